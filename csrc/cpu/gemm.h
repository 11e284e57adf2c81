// Products of small matrices: one register-blocked micro-kernel for every product of the library.
//
//   C[i][v] (+)= sum_k B[i][k] * A[k][v]        i < rows, k < depth, v < a panel of vectors
//
// The lanes of a vector run along v, so A and C are read and written by vectors and B element by element, at any
// strides: B transposed is the same product with its strides exchanged, and nothing but A's layout ever needs packing.
// Plan: a block of C, kBlockRows x MV vectors, stays in registers over all of depth. Each step loads MV vectors of A
// and one element of B per row: with 6 x 2 (AVX2) that is 8 loads for 12 multiply-adds.
//
// Element types: E of B and T of A, accumulated in A = Accumulate<E>. Beside float and double there is `pair` for both,
// two bf16 along k that one instruction multiplies and adds: depth then counts pairs. With `quad` depth counts four
// bytes, those of B unsigned and those of A signed, and sums are integers. A alone may also be bf16 or f16,
// converted as it is loaded.
#pragma once
#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int kPanelVectors = 2;
template <class A>
inline constexpr int kPanel = kPanelVectors * kLanes<A>;  // columns of a panel

// Numbers along k in an element.
template <class E>
inline constexpr int64_t kPack = std::is_same_v<E, quad>   ? 4
                                 : std::is_same_v<E, pair> ? 2
                                                           : 1;

// Rows of C in registers beside MV vectors of columns: 32 registers with AVX-512, else 16.
template <int MV>
inline constexpr int kBlockRows = MV == 1 ? (kVectorBytes == 64 ? 16 : 8) : (kVectorBytes == 64 ? 24 : 12) / MV;

// B: element [i][k] at data[i * row + k * step].
template <class E>
struct Broadcast {
  const E* data;
  int64_t row, step;
};

// C[i] = base[i] + the product, where Add; base may be C. Not inline, and B in scalars: where a caller puts strides
// together in vector registers or spills them there, they wait behind the multiply-adds of the block before, and the
// block's loads wait for them. A that comes from memory is asked for Ahead bytes before it is read; with 0 it is in the
// cache.
template <class E, int NR, int MV, bool Add, int Ahead, class T>
__attribute__((noinline)) void multiply_block(const E* b, int64_t b_row, int64_t b_step, const T* a, int64_t a_step,
                                              int64_t depth, Accumulate<E>* c, int64_t c_row, const Accumulate<E>* base,
                                              int64_t base_row) {
  using A = Accumulate<E>;
  constexpr int L = kLanes<A>;
  vec<A> sum[NR][MV];
#pragma GCC unroll 24
  for (int i = 0; i < NR; ++i) {
    if (Add) __builtin_prefetch(c + i * c_row, 1);  // wanted at the end
#pragma GCC unroll 8
    for (int v = 0; v < MV; ++v) sum[i][v] = vec<A>{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    vec<E> column[MV];
#pragma GCC unroll 8
    for (int v = 0; v < MV; ++v) {
      const T* from = a + v * L;
      column[v] = load(from);
      if (Ahead > 0 && v * L * sizeof(T) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(from) + Ahead);
    }
#pragma GCC unroll 24
    for (int i = 0; i < NR; ++i) {
      // C[i][v] += B[i][k] * A[k][v]
      vec<E> element = broadcast(b[i * b_row]);
#pragma GCC unroll 8
      for (int v = 0; v < MV; ++v) sum[i][v] = multiply_add(element, column[v], sum[i][v]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < NR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < MV; ++v)  // depth is summed on its own, then added: less rounding
      store(c + i * c_row + v * L, Add ? load(base + i * base_row + v * L) + sum[i][v] : sum[i][v]);
  }
}

// Rows of memory that the products' results will be stored to, soon. Other cores may hold these lines, written or read
// as what was there before, so each block of rows asks for its own while it multiplies.
struct Destination {
  uintptr_t data = 0;                      // 0: unknown
  int64_t row = 0, bytes = 0, number = 0;  // bytes from row to row, of a row, of a number

  HT_INLINE Destination rows(int64_t first) const { return {data ? data + first * row : 0, row, bytes, number}; }
  HT_INLINE Destination columns(int64_t first, int64_t n) const {
    return {data ? data + first * number : 0, row, n * number, number};
  }
  HT_INLINE void expect(int rows) {
    if (!data) return;
    for (int i = 0; i < rows; ++i, data += row)
      for (int64_t line = 0; line < bytes; line += 64) prefetch_to_write(reinterpret_cast<const void*>(data + line));
  }
};

// What products after this one will read of memory: so many lines of it are asked for with each block of rows.
struct Upcoming {
  const char* data = nullptr;
  int64_t lines = 0;

  HT_INLINE void expect() {
    for (const char* end = data + 64 * lines; data < end; data += 64) __builtin_prefetch(data);
  }
};

template <class E, int MV, bool Add, int Ahead, class T, int NR>
__attribute__((noinline)) void multiply_row_blocks(int64_t rows, const E* b, int64_t b_row, int64_t b_step, const T* a,
                                                   int64_t a_step, int64_t depth, Accumulate<E>* c, int64_t c_row,
                                                   const Accumulate<E>* base, int64_t base_row, Destination to,
                                                   Upcoming next) {
  for (; rows >= NR; rows -= NR, b += NR * b_row, c += NR * c_row, base += NR * base_row) {
    to.expect(NR);
    next.expect();
    multiply_block<E, NR, MV, Add, Ahead>(b, b_row, b_step, a, a_step, depth, c, c_row, base, base_row);
  }
  if constexpr (NR > 1) {
    if (rows)
      multiply_row_blocks<E, MV, Add, Ahead, T, NR - 1>(rows, b, b_row, b_step, a, a_step, depth, c, c_row, base,
                                                        base_row, to, next);
  }
}
// All rows, MV vectors wide: whole blocks, then one of as many rows as are left. base: see multiply_block.
template <class E, int MV, class T>
HT_INLINE void multiply_rows_onto(int64_t rows, Broadcast<E> b, const T* a, int64_t a_step, int64_t depth,
                                  Accumulate<E>* c, int64_t c_row, const Accumulate<E>* base, int64_t base_row) {
  multiply_row_blocks<E, MV, true, 0, T, kBlockRows<MV>>(rows, b.data, b.row, b.step, a, a_step, depth, c, c_row, base,
                                                         base_row, {}, {});
}
template <class E, int MV, bool Add, int Ahead = 0, class T>
HT_INLINE void multiply_rows(int64_t rows, Broadcast<E> b, const T* a, int64_t a_step, int64_t depth, Accumulate<E>* c,
                             int64_t c_row, Destination to = {}, Upcoming next = {}) {
  multiply_row_blocks<E, MV, Add, Ahead, T, kBlockRows<MV>>(rows, b.data, b.row, b.step, a, a_step, depth, c, c_row, c,
                                                            c_row, to, next);
}

// C is `vectors` vectors wide: in panels of two, or wider where rows are too few to keep the multipliers busy.
template <class E, bool Add, class T = E>
inline void multiply(int64_t rows, int64_t vectors, Broadcast<E> b, const T* a, int64_t a_step, int64_t depth,
                     Accumulate<E>* c, int64_t c_row) {
  constexpr int L = kLanes<Accumulate<E>>;
  for (; vectors >= 8 && rows == 1; vectors -= 8, a += 8 * L, c += 8 * L)
    multiply_rows<E, 8, Add>(rows, b, a, a_step, depth, c, c_row);
  for (; vectors >= 4 && rows <= kBlockRows<4>; vectors -= 4, a += 4 * L, c += 4 * L)
    multiply_rows<E, 4, Add>(rows, b, a, a_step, depth, c, c_row);
  for (; vectors >= 2; vectors -= 2, a += 2 * L, c += 2 * L)
    multiply_rows<E, 2, Add>(rows, b, a, a_step, depth, c, c_row);
  if (vectors) multiply_rows<E, 1, Add>(rows, b, a, a_step, depth, c, c_row);
}

// Dot products for few rows of A, where lanes along rows would stand empty: lanes run along the width, and L sums at a
// time, of R rows with L / R rows of B, are added up side by side.
//   C[j][r] = sum_k B[j][k] * A[r][k]     j < n, r < R; A [R][pitch] with zeros past width, C [n][R]
// B's rows come from memory, once, so they are read whole, one after the other; where the hardware does not foresee
// that, they are asked for Ahead bytes before.
template <class A, int R, int Ahead, class T>
__attribute__((noinline)) void multiply_dots(int64_t n, Broadcast<T> b, const A* a, int64_t pitch, int64_t width,
                                             A* c) {
  constexpr int L = kLanes<A>, K = L / R, N = K > 1 ? 2 : 1;  // N rows of B at a time
  const int64_t whole = width / L * L;
  for (int64_t j = 0; j < n; j += K) {
    vec<A> sum[L];
#pragma GCC unroll 16
    for (int i = 0; i < K; i += N) {
      const T* row[N];
      vec<A> own[N][R] = {};
      for (int u = 0; u < N; ++u) row[u] = b.data + least(j + i + u, n - 1) * b.row;
      auto add = [&](int64_t k, auto part_of) HT_LAMBDA {
        vec<A> element[N];
        for (int u = 0; u < N; ++u) element[u] = part_of(row[u] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const vec<A> column = load(a + r * pitch + k);
          for (int u = 0; u < N; ++u) own[u][r] += element[u] * column;
        }
      };
      for (int64_t k = 0; k < whole; k += L) {
        for (int u = 0; Ahead && k * sizeof(T) % 64 == 0 && u < N; ++u)
          __builtin_prefetch(reinterpret_cast<const char*>(row[u] + k) + Ahead);
        add(k, [](const T* p) HT_LAMBDA { return load(p); });
      }
      if (whole < width) add(whole, [&](const T* p) HT_LAMBDA { return load_first(p, width - whole); });
#pragma GCC unroll 16
      for (int at = 0; at < N * R; ++at) sum[i * R + at] = own[at / R][at % R];
    }
    store_first(c + j * R, sum_each<A>(sum), (n - j) * R);
  }
}

// C += B * A where zeros are weights of what must not be read: a zero in B (ZeroInB) or in A takes no part, whatever
// stands beside it, NaN and infinity included. For the few blocks that hold both.
template <class E, bool ZeroInB, class T = E>
__attribute__((noinline)) void multiply_visible(int64_t rows, int64_t vectors, Broadcast<E> b, const T* a,
                                                int64_t a_step, int64_t depth, Accumulate<E>* c, int64_t c_row) {
  using A = Accumulate<E>;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t v = 0; v < vectors; ++v) {
      vec<A> sum = load(c + i * c_row + v * L);
      auto add = [&](vec<A> element, vec<A> column)
                     HT_LAMBDA { sum = (ZeroInB ? element : column) == vec<A>{} ? sum : sum + element * column; };
      for (int64_t k = 0; k < depth; ++k) {
        const vec<E> element = broadcast(b.data[i * b.row + k * b.step]), column = load(a + k * a_step + v * L);
        if constexpr (std::is_same_v<E, pair>) {
          add(first_of(element), first_of(column));
          add(second_of(element), second_of(column));
        } else {
          add(element, column);
        }
      }
      store(c + i * c_row + v * L, sum);
    }
  }
}

}  // namespace handtuned::HANDTUNED_ISA
