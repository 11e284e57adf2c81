// Linear backward.
//
//   dz[r][n] = dy[r][n] keep / (1 - p) activation'(z[r][n])       db[n]    = sum_r dz[r][n]
//   dx[r][k] = sum_n dz[r][n] W[n][k]                             dW[n][k] = sum_r dz[r][n] x[r][k]
//
// Pass 1 makes dz (where it is not dy itself) and db's partial sums; then two products of linear_product.h, with W and
// x packed for this call: lanes run along k in both, so both are copied, not transposed.
#pragma once
#include "linear.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kBiasColumns = kMostColumns;  // of a piece of pass 1
inline constexpr int64_t kFewSummed = 4;               // rows whose sum is made before it goes into a larger one

// Columns c to c + n of row r of dz, to dz.
template <class T>
void grad_preactivation_row(const LinearBackward& p, int64_t r, int64_t c, int64_t n, Accumulate<T>* dz) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const T* dy = row_of<T>(p.grad_output, r) + c;
  for (int64_t i = 0; i < n; i += L) store(dz + i, load_first(dy + i, n - i));
  if (p.dropout.p > 0) {
    DropoutFactors<A> factors;
    const A* factor = factors.of(r, c, n, p.dropout);
    for (int64_t i = 0; i < n; i += L) store(dz + i, load(dz + i) * load(factor + i));
  }
  if (p.activation != Activation::none) {
    const T* z = row_of<T>(p.preactivation, r) + c;
    with_activation(p.activation, [&](auto f) HT_LAMBDA {
      for (int64_t i = 0; i < n; i += L) store(dz + i, load(dz + i) * f.slope(load_first(z + i, n - i)));
    });
  }
}

template <class T>
void grad_preactivation(const LinearBackward& p) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t chunk_rows = linear_bias_chunk_rows(p.rows), chunks = linear_bias_chunks(p.rows);
  const int64_t pitch = linear_panels(p.out) * kLinearPanel, blocks = (p.out + kBiasColumns - 1) / kBiasColumns;
  const bool serial = p.rows * p.out < 1 << 15;
  A* partials = static_cast<A*>(p.bias_sums);
  parallel_pieces(chunks * blocks, serial, [&](int64_t piece) {
    const int64_t chunk = piece / blocks, c = piece % blocks * kBiasColumns, n = least(kBiasColumns, p.out - c);
    const int64_t end = least((chunk + 1) * chunk_rows, p.rows);
    alignas(64) A dz[kBiasColumns], sums[kBiasColumns] = {}, few[kBiasColumns] = {};
    for (int64_t r = chunk * chunk_rows; r < end; ++r) {
      grad_preactivation_row<T>(p, r, c, n, dz);
      if (p.grad_preactivation) store_row<T>(p.grad_preactivation, p.out, r, c, n, dz);
      const bool fold = r % kFewSummed == kFewSummed - 1 || r + 1 == end;
      for (int64_t i = 0; i < n; i += L) {
        const vec<A> sum = load(few + i) + load(dz + i);
        store(few + i, fold ? vec<A>{} : sum);
        if (fold) store(sums + i, load(sums + i) + sum);
      }
    }
    if (partials) __builtin_memcpy(partials + chunk * pitch + c, sums, n * sizeof(A));
  });
  if (!p.grad_bias) return;
  for (int64_t c = 0; c < p.out; c += L) {
    vec<A> sum = {}, few = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      few += load(partials + chunk * pitch + c);
      if (chunk % 16 == 15 || chunk + 1 == chunks) sum += few, few = vec<A>{};
    }
    store_first(static_cast<T*>(p.grad_bias) + c, sum, p.out - c);
  }
}

// `packed` from rows that are the steps of the product.
template <class T>
void pack_all_steps(const StridedRows& rows, int64_t columns, int64_t depth, void* packed) {
  const int64_t steps = steps_of<T>(depth), blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  parallel_pieces(linear_panels(columns) * blocks, columns * depth < 1 << 16, [&](int64_t piece) {
    const int64_t panel = piece / blocks, s = piece % blocks * kBlockSteps, d = s * kStep<T>;
    pack_steps<Stored<T>, T>([&](int64_t i) HT_LAMBDA { return row_of<T>(rows, d + i) + panel * kLinearPanel; },
                             columns - panel * kLinearPanel, least(kBlockSteps * kStep<T>, depth - d),
                             static_cast<Stored<T>*>(packed) + (panel * steps + s) * kLinearPanel, kLinearPanel);
  });
}

inline StridedRows rows_of(const void* data, int64_t row) {
  StridedRows rows;
  rows.data = const_cast<void*>(data);
  rows.ndim = 1;
  rows.stride[0] = row;
  return rows;
}

template <class T>
void linear_backward_in(const LinearBackward& p) {
  using A = Accumulate<T>;
  if (p.grad_preactivation || p.grad_bias) grad_preactivation<T>(p);
  const StridedRows dz = p.grad_preactivation ? rows_of(p.grad_preactivation, p.out) : p.grad_output;
  if (p.grad_input) {
    pack_all_steps<T>(rows_of(p.weight, p.weight_row), p.in, p.out, p.packed_weight);
    product_of<T>(p.rows, p.in, p.out, p.packed_weight, LeftRows<T>{dz, p.out}, rows_to<T>(p.grad_input, p.in),
                  [&](int64_t r, int64_t c, int64_t n, A* sums) { store_row<T>(p.grad_input, p.in, r, c, n, sums); });
  }
  if (p.grad_weight) {
    pack_all_steps<T>(p.input, p.in, p.rows, p.packed_input);
    product_of<T>(p.out, p.in, p.rows, p.packed_input, LeftColumns<T>{dz, p.rows}, rows_to<T>(p.grad_weight, p.in),
                  [&](int64_t r, int64_t c, int64_t n, A* sums) { store_row<T>(p.grad_weight, p.in, r, c, n, sums); });
  }
}

}  // namespace handtuned::HANDTUNED_ISA
