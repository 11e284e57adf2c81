// Linear forward.
//
//   z[r][n] = sum_k x[r][k] W[n][k] + b[n],   y = dropout(activation(z)) + residual
//
// Many rows: the product of linear_product.h with the packed weight, each row finished while its sums are in the cache.
// Few rows: memory is the limit, so the weight's rows are read in place, once, against all rows of x (multiply_dots).
#pragma once
#include "linear_activation.h"
#include "linear_product.h"
#include "philox.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kMostColumns = kMostPanels * kLinearPanel;  // of a row that is finished at once

// factor[i] of columns c + i, i < n, of row r.
template <class A>
struct DropoutFactors {
  alignas(64) A room[kMostColumns + 2 * kDropoutBlock];
  const A* of(int64_t r, int64_t c, int64_t n, Dropout dropout) {
    const int64_t before = c % kDropoutBlock;
    dropout_row<false>(room, n + before, r, dropout, c - before);
    return room + before;
  }
};

// sums [n] of row r, columns from c on, to y. Sums and everything before the last rounding are A.
template <class T>
void finish_row(const LinearForward& p, int64_t r, int64_t c, int64_t n, const Accumulate<T>* sums) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + c : nullptr;
  const T* residual = p.residual.data ? row_of<T>(p.residual, r) + c : nullptr;
  T* z = p.preactivation ? static_cast<T*>(p.preactivation) + r * p.out + c : nullptr;
  T* y = static_cast<T*>(p.output) + r * p.out + c;
  auto finish = [&](auto f, const A* factor) HT_LAMBDA {
    for (int64_t i = 0; i < n; i += L) {
      vec<A> v = load(sums + i);
      if (bias) v += load_first(bias + i, n - i);
      if (z) store_first(z + i, v, n - i);
      v = f.value(v);
      if (factor) v *= load(factor + i);
      if (residual) v += load_first(residual + i, n - i);
      store_first(y + i, v, n - i);
    }
  };
  with_activation(p.activation, [&](auto f) HT_LAMBDA {
    if (p.dropout.p > 0) {
      DropoutFactors<A> factors;
      finish(f, factors.of(r, c, n, p.dropout));
    } else {
      finish(f, nullptr);
    }
  });
}

// y of rows first to first + R; those that do not exist are computed as zeros and not stored.
template <class T, int R>
void linear_few_rows(const LinearForward& p, int64_t first) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>, kColumns = kLinearPanel;
  constexpr int64_t kBlock = 4096 / R;  // numbers of x's rows that are used at a time, so that they stay in L1
  constexpr int kAhead = 16384;         // bytes
  const int64_t pitch = (p.in + L - 1) / L * L, rows = least(R, p.rows - first);
  Scratch<A> x(R * pitch);
  __builtin_memset(x.data, 0, R * pitch * sizeof(A));
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = row_of<T>(p.input, first + r);
    for (int64_t k = 0; k < p.in; k += L) store(x.data + r * pitch + k, load_first(row + k, p.in - k));
  }
  parallel_pieces(linear_panels(p.out), is_small(rows, p.out, p.in), [&](int64_t piece) {
    alignas(64) A dots[kColumns][R], sums[R][kColumns] = {};
    const int64_t column = piece * kColumns, n = least(kColumns, p.out - column);
    const T* weight = static_cast<const T*>(p.weight) + column * p.weight_row;
    for (int64_t k = 0; k < p.in; k += kBlock) {
      multiply_dots<A, R, kAhead>(n, Broadcast<T>{weight + k, p.weight_row, 1}, x.data + k, pitch,
                                  least(kBlock, p.in - k), dots[0]);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t r = 0; r < R; ++r) sums[r][i] += dots[i][r];
    }
    for (int64_t r = 0; r < rows; ++r) finish_row<T>(p, first + r, column, n, sums[r]);
  });
}

template <class T>
void linear_forward_in(const LinearForward& p) {
  using A = Accumulate<T>;
  if (p.rows <= kLinearFewRows) {
    constexpr int64_t most_rows = least(kLanes<A>, kLinearFewRows);
    for (int64_t r = 0; r < p.rows; r += most_rows) {
      const int64_t rows = p.rows - r;
      rows == 1   ? linear_few_rows<T, 1>(p, r)
      : rows == 2 ? linear_few_rows<T, 2>(p, r)
                  : linear_few_rows<T, most_rows>(p, r);
    }
    return;
  }
  product_of<T>(p.rows, p.out, p.in, p.packed, LeftRows<T>{p.input, p.in}, rows_to<T>(p.output, p.out),
                [&](int64_t r, int64_t c, int64_t n, A* sums) { finish_row<T>(p, r, c, n, sums); });
}

// A panel and kBlockSteps of its steps at a time.
template <class T>
void linear_pack_in(const LinearPack& p) {
  const int64_t steps = linear_steps(p.dtype, p.in), blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  parallel_pieces(linear_panels(p.out) * blocks, p.out * p.in < 1 << 16, [&](int64_t piece) {
    const int64_t panel = piece / blocks, s = piece % blocks * kBlockSteps, column = panel * kLinearPanel;
    const T* weight = static_cast<const T*>(p.weight) + column * p.weight_row + s * kStep<T>;
    pack_rows(weight, p.weight_row, p.out - column, least(kBlockSteps * kStep<T>, p.in - s * kStep<T>),
              static_cast<Stored<T>*>(p.packed) + (panel * steps + s) * kLinearPanel);
  });
}

}  // namespace handtuned::HANDTUNED_ISA
