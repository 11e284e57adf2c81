// Products of small matrices: one register-blocked micro-kernel for every product of the library.
//
//   C[i][v] (+)= sum_k B[i][k] * A[k][v]        i < rows, k < depth, v < a panel of vectors
//
// The lanes of a vector run along v, so A and C are read and written by vectors and B element by element, at any
// strides: B transposed is the same product with its strides exchanged, and nothing but A's layout ever needs packing.
// Plan: a block of C, kBlockRows x MV vectors, stays in registers over all of depth. Each step loads MV vectors of A
// and one element of B per row: with 6 x 2 (AVX2) that is 8 loads for 12 multiply-adds.
#pragma once
#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int kPanelVectors = 2;
template <class A>
inline constexpr int kPanel = kPanelVectors * kLanes<A>;  // columns of a panel

// Rows of C in registers beside MV vectors of columns: 32 registers with AVX-512, else 16.
template <int MV>
inline constexpr int kBlockRows = (kVectorBytes == 64 ? 24 : 12) / MV;

// B: element [i][k] at data[i * row + k * step].
template <class A>
struct Broadcast {
  const A* data;
  int64_t row, step;
};

template <class A, int NR, int MV, bool Add>
HT_INLINE void multiply_block(Broadcast<A> b, const A* a, int64_t a_step, int64_t depth, A* c, int64_t c_row) {
  constexpr int L = kLanes<A>;
  vec<A> sum[NR][MV];
#pragma GCC unroll 24
  for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) sum[i][v] = vec<A>{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vec<A> column[MV];
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) column[v] = load(a + k * a_step + v * L);
#pragma GCC unroll 24
    for (int i = 0; i < NR; ++i) {
      // C[i][v] += B[i][k] * A[k][v]
      vec<A> element = broadcast(b.data[i * b.row + k * b.step]);
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) sum[i][v] += element * column[v];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < MV; ++v) {
      A* to = c + i * c_row + v * L;
      store(to, Add ? load(to) + sum[i][v] : sum[i][v]);  // depth is summed on its own, then added: less rounding
    }
  }
}

// All rows, MV vectors wide: whole blocks, then halves of a block down to one row.
template <class A, int MV, bool Add, int NR = kBlockRows<MV>>
__attribute__((noinline)) void multiply_rows(int64_t rows, Broadcast<A> b, const A* a, int64_t a_step, int64_t depth,
                                             A* c, int64_t c_row) {
  for (; rows >= NR; rows -= NR) {
    multiply_block<A, NR, MV, Add>(b, a, a_step, depth, c, c_row);
    b.data += NR * b.row;
    c += NR * c_row;
  }
  if constexpr (NR > 1) {
    if (rows) multiply_rows<A, MV, Add, NR / 2>(rows, b, a, a_step, depth, c, c_row);
  }
}

// C is `vectors` vectors wide: in panels of two, or wider where rows are too few to keep the multipliers busy.
template <class A, bool Add>
inline void multiply(int64_t rows, int64_t vectors, Broadcast<A> b, const A* a, int64_t a_step, int64_t depth, A* c,
                     int64_t c_row) {
  constexpr int L = kLanes<A>;
  for (; vectors >= 8 && rows == 1; vectors -= 8, a += 8 * L, c += 8 * L)
    multiply_rows<A, 8, Add>(rows, b, a, a_step, depth, c, c_row);
  for (; vectors >= 4 && rows <= 3; vectors -= 4, a += 4 * L, c += 4 * L)
    multiply_rows<A, 4, Add>(rows, b, a, a_step, depth, c, c_row);
  for (; vectors >= 2; vectors -= 2, a += 2 * L, c += 2 * L)
    multiply_rows<A, 2, Add>(rows, b, a, a_step, depth, c, c_row);
  if (vectors) multiply_rows<A, 1, Add>(rows, b, a, a_step, depth, c, c_row);
}

// Dot products for few rows of A, where lanes along rows would stand empty: lanes run along the width, and L sums at a
// time, of R rows with L / R rows of B, are added up by one transposition.
//   C[j][r] = sum_k B[j][k] * A[r][k]     j < n, r < R; A [R][pitch] with zeros past width, C's rows c_row apart
template <class A, int R>
__attribute__((noinline)) void multiply_dots(int64_t n, Broadcast<A> b, const A* a, int64_t pitch, int64_t width, A* c,
                                             int64_t c_row) {
  constexpr int L = kLanes<A>, K = L / R;
  for (int64_t j = 0; j < n; j += K) {
    const A* row[K];
    for (int i = 0; i < K; ++i) row[i] = b.data + (j + i < n ? j + i : n - 1) * b.row;
    vec<A> sum[L] = {};
    auto add = [&](int64_t k, auto load_at) HT_LAMBDA {
#pragma GCC unroll 16
      for (int i = 0; i < K; ++i) {
        const vec<A> element = load_at(row[i] + k);
        // Rows come from memory, once: each line of the rows after the next is asked for.
        if (k * sizeof(A) % 64 == 0) __builtin_prefetch(row[i] + k + 2 * K * b.row);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[i * R + r] += element * load(a + r * pitch + k);
      }
    };
    int64_t k = 0;
    for (; k + L <= width; k += L) add(k, [](const A* p) HT_LAMBDA { return load(p); });
    if (k < width) add(k, [&](const A* p) HT_LAMBDA { return load_first(p, width - k); });
    transpose<A>(sum);
    vec<A> total = {};
    for (int i = 0; i < L; ++i) total += sum[i];
    for (int i = 0; i < K && j + i < n; ++i)
      for (int r = 0; r < R; ++r) c[(j + i) * c_row + r] = total[i * R + r];
  }
}

// C += B * A where zeros are weights of what must not be read: a zero in B (ZeroInB) or in A takes no part, whatever
// stands beside it, NaN and infinity included. For the few blocks that hold both.
template <class A, bool ZeroInB>
__attribute__((noinline)) void multiply_visible(int64_t rows, int64_t vectors, Broadcast<A> b, const A* a,
                                                int64_t a_step, int64_t depth, A* c, int64_t c_row) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t v = 0; v < vectors; ++v) {
      vec<A> sum = load(c + i * c_row + v * L);
      for (int64_t k = 0; k < depth; ++k) {
        const A element = b.data[i * b.row + k * b.step];
        vec<A> column = load(a + k * a_step + v * L), weight = ZeroInB ? broadcast(element) : column;
        sum = weight == vec<A>{} ? sum : sum + element * column;
      }
      store(c + i * c_row + v * L, sum);
    }
  }
}

}  // namespace handtuned::HANDTUNED_ISA
