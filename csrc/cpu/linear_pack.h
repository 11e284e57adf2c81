// Packing a matrix into panels (linear.h), from rows that lie along its summed dimension or across it.
//
//   columns of the panel are rows in memory:     packed[s][c] = row(c)[s]      pack_rows: transposed in registers
//   steps are rows in memory:                    packed[s][c] = row(s)[c]      pack_steps: copied, or for bf16 zipped
// so that products find what they load next to what they loaded before, and no panel has an end to look out for.
#pragma once
#include "../linear.h"

#include "row.h"

namespace handtuned::HANDTUNED_ISA {

// Of tensors of T: the element of products along the summed dimension, and what a panel holds of it in memory.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, bf16>, pair, Accumulate<T>>;
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, bf16>, pair, T>;
template <class T>
inline constexpr int64_t kStep = std::is_same_v<T, bf16> ? 2 : 1;  // numbers in an element
template <class T>
inline int64_t steps_of(int64_t depth) {
  return (depth + kStep<T> - 1) / kStep<T>;
}

// The first elements of a row of `numbers` as a vector, a pair's bits in a lane; zeros past the end.
template <class T>
HT_INLINE vec<Accumulate<T>> load_elements(const T* p, int64_t numbers) {
  if constexpr (kStep<T> == 1) {
    return load_first(p, numbers);
  } else {
    constexpr int n = kVectorBytes / sizeof(T);
    if (numbers >= n) return load_bits<f32>(p);
    T own[n] = {};
    __builtin_memcpy(own, p, numbers * sizeof(T));
    return load_bits<f32>(own);
  }
}

template <class T>
HT_INLINE void store_elements(Stored<T>* p, vec<Accumulate<T>> v) {
  if constexpr (kStep<T> == 1) {
    store(p, v);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// packed [steps][kLinearPanel] from `columns` rows of `depth` numbers, `row` apart.
template <class T>
void pack_rows(const T* rows, int64_t row, int64_t columns, int64_t depth, Stored<T>* packed) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t steps = steps_of<T>(depth);
  for (int64_t s = 0; s < steps; s += L) {
    for (int64_t c = 0; c < kLinearPanel; c += L) {
      vec<A> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        square[i] =
            c + i < columns ? load_elements(rows + (c + i) * row + s * kStep<T>, depth - s * kStep<T>) : vec<A>{};
      transpose<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (s + i < steps) store_elements<T>(packed + (s + i) * kLinearPanel + c, square[i]);
    }
  }
}

// packed [steps][pitch] of P from `depth` rows, row(d) [columns]; pitch is a whole number of vectors.
template <class P, class T, class Row>
void pack_steps(const Row& row, int64_t columns, int64_t depth, P* packed, int64_t pitch) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  auto numbers = [&](const T* p, int64_t c)
                     HT_LAMBDA { return c < columns ? load_first(p + c, columns - c) : vec<A>{}; };
  for (int64_t d = 0; d < depth; d += kStep<T>, packed += pitch) {
    const T* first = row(d);
    const T* second = kStep<T> == 2 && d + 1 < depth ? row(d + 1) : nullptr;
    for (int64_t c = 0; c < pitch; c += L) {
      vec<A> v = numbers(first, c);
      if constexpr (kStep<T> == 2) {
        const u32 above = second ? (u32)numbers(second, c) : u32{};
        v = (f32)((u32)v >> 16 | above);
        __builtin_memcpy(packed + c, &v, sizeof v);
      } else {
        store(packed + c, v);
      }
    }
  }
}

}  // namespace handtuned::HANDTUNED_ISA
