// Sweeping a row: vectors of its elements, the shorter one at its end, and sums along it.
//
// Row<T> is a piece of a row of T in registers: one vector of float or double. A row of bf16 is taken on AVX2 as a
// pair of vectors, its even and its odd columns:
//   32 bytes of bf16 = eight 32-bit words  c1:c0, c3:c2, ... c15:c14
//   even = word << 16,   odd = word & 0xffff0000,   word = even >> 16 | odd & 0xffff0000
// which saves the unpacking and packing across lanes that columns in their order need. Float scratch beside such rows
// (weights, sums, dropout factors) is in "row order": of each 16 columns the even ones, then the odd ones, with room
// for a whole last 16. AVX-512 converts in one instruction and keeps the order.
#pragma once
#include <type_traits>

#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

// Row i of a strided tensor.
template <class T>
HT_INLINE T* row_of(const StridedRows& rows, int64_t i) {
  T* p = static_cast<T*>(rows.data);
  if (rows.ndim == 1) return p + i * rows.stride[0];
  for (int d = rows.ndim - 1; d >= 0; --d) {
    p += i % rows.size[d] * rows.stride[d];
    i /= rows.size[d];
  }
  return p;
}

struct Pair {
  f32 even, odd;
};

template <class T>
struct RowOf {
  using type = vec<Accumulate<T>>;
};
#if defined(HT_AVX2)
template <>
struct RowOf<bf16> {
  using type = Pair;
};
#endif
template <class T>
using Row = typename RowOf<T>::type;
template <class T>
inline constexpr int kRowLanes = int(sizeof(Row<T>) / sizeof(Accumulate<T>));  // columns in a Row<T>
template <class T>
inline constexpr bool kPaired = sizeof(Row<T>) > kVectorBytes;

// ---- for a pair, what simd.h has for a vector -------------------------------------------------------------------

#define HT_PAIR_OPERATOR(op)                                                                \
  HT_INLINE Pair operator op(Pair a, Pair b) { return {a.even op b.even, a.odd op b.odd}; } \
  HT_INLINE Pair operator op(Pair a, float b) { return {a.even op b, a.odd op b}; }         \
  HT_INLINE Pair operator op(float a, Pair b) { return {a op b.even, a op b.odd}; }         \
  HT_INLINE Pair& operator op## = (Pair & a, Pair b) { return a = a op b; }                 \
  HT_INLINE Pair& operator op## = (Pair & a, float b) { return a = a op b; }
HT_PAIR_OPERATOR(+)
HT_PAIR_OPERATOR(-)
HT_PAIR_OPERATOR(*)
#undef HT_PAIR_OPERATOR

HT_INLINE Pair clean_nan(Pair v) { return {clean_nan(v.even), clean_nan(v.odd)}; }
HT_INLINE Pair rounded_to(Pair v, const bf16* p) { return {rounded_to(v.even, p), rounded_to(v.odd, p)}; }
#if defined(HT_AVX2)
HT_INLINE u32 narrow(Pair v, const bf16*) {
  __m256i even = _mm256_srli_epi32((__m256i)round_bf16(v.even), 16);
  return (u32)_mm256_blend_epi16(even, (__m256i)round_bf16(v.odd), 0xaa);
}
#endif

// sum += v
HT_INLINE void add_into(f32& sum, f32 v) { sum += v; }
HT_INLINE void add_into(f64& sum, f64 v) { sum += v; }
HT_INLINE void add_into(f32& sum, Pair v) {
  sum += v.even;
  sum += v.odd;
}

// ---- sweeping ---------------------------------------------------------------------------------------------------

// A Row<T> of a row: Whole, or the n < lanes elements at its end. Code written against either compiles to plain
// vector instructions for Whole.
template <class T>
struct Whole {
  using A = Accumulate<T>;
  template <class U>
  HT_INLINE Row<T> load(const U* p) const {
    if constexpr (!kPaired<T>) {
      return HANDTUNED_ISA::load(p);
    } else if constexpr (std::is_same_v<U, float>) {
      return {HANDTUNED_ISA::load(p), HANDTUNED_ISA::load(p + kLanes<float>)};
    } else {
      u32 words = load_bits<u32>(p);
      return {(f32)(words << 16), (f32)(words & 0xffff0000u)};
    }
  }
  template <bool Stream = false, class U>
  HT_INLINE void store(U* p, Row<T> v) const {
    if constexpr (kPaired<T> && std::is_same_v<U, float>) {
      HANDTUNED_ISA::store(p, v.even);
      HANDTUNED_ISA::store(p + kLanes<float>, v.odd);
    } else {
      Stream ? HANDTUNED_ISA::stream(p, v) : HANDTUNED_ISA::store(p, v);
    }
  }
  // The same between float in the order of columns and a Row<T>; seldom, so in plain C++.
  template <class U>
  HT_INLINE Row<T> load_in_order(const U* p) const {
    if constexpr (!(kPaired<T> && std::is_same_v<U, float>)) {
      return load(p);
    } else {
      Row<T> v;
      for (int i = 0; i < kLanes<float>; ++i) v.even[i] = p[2 * i], v.odd[i] = p[2 * i + 1];
      return v;
    }
  }
  template <class U>
  HT_INLINE void store_in_order(U* p, Row<T> v) const {
    if constexpr (!(kPaired<T> && std::is_same_v<U, float>)) {
      store(p, v);
    } else {
      for (int i = 0; i < kLanes<float>; ++i) p[2 * i] = v.even[i], p[2 * i + 1] = v.odd[i];
    }
  }
  HT_INLINE Row<T> only(Row<T> v) const { return v; }
};

template <class T>
struct Tail {
  using A = Accumulate<T>;
  int n;
  template <class U>
  static constexpr bool is_scratch = kPaired<T> && std::is_same_v<U, float>;  // has room for a whole Row<T>
  template <class U>
  HT_INLINE Row<T> load(const U* p) const {  // zeros past the end
    if constexpr (is_scratch<U>)
      return Whole<T>{}.load(p);
    else
      return load_in_order(p);
  }
  template <bool Stream = false, class U>
  HT_INLINE void store(U* p, Row<T> v) const {
    if constexpr (is_scratch<U>)
      Whole<T>{}.store(p, v);
    else
      store_in_order(p, v);
  }
  template <class U>
  HT_INLINE Row<T> load_in_order(const U* p) const {
    U a[kRowLanes<T>] = {};
    __builtin_memcpy(a, p, n * sizeof(U));
    return Whole<T>{}.load_in_order(a);
  }
  template <class U>
  HT_INLINE void store_in_order(U* p, Row<T> v) const {
    U a[kRowLanes<T>];
    Whole<T>{}.store_in_order(a, v);
    __builtin_memcpy(p, a, n * sizeof(U));
  }
  HT_INLINE Row<T> only(Row<T> v) const {  // zeros past the end
    for (int i = 0; i < kLanes<A>; ++i) {
      if constexpr (kPaired<T>) {
        v.even[i] = 2 * i < n ? v.even[i] : A(0);
        v.odd[i] = 2 * i + 1 < n ? v.odd[i] : A(0);
      } else {
        v[i] = i < n ? v[i] : A(0);
      }
    }
    return v;
  }
};

struct Nothing {
  HT_INLINE void operator()(int64_t) const {}
};

// Calls body(column, part, j) along a row of cols elements, four vectors at a time; j names an accumulator of Sum, so
// that four sums run side by side. ahead(column) comes before each four.
template <class T, class Body, class Ahead = Nothing>
HT_INLINE void sweep(int64_t cols, Body body, Ahead ahead = {}) {
  constexpr int64_t L = kRowLanes<T>, kFour = 4 * kLanes<Accumulate<T>>;
  int64_t c = 0;
  for (; c + kFour <= cols; c += kFour) {
    ahead(c);
    body(c, Whole<T>{}, 0);
    body(c + L, Whole<T>{}, 1);
    if constexpr (!kPaired<T>) {
      body(c + 2 * L, Whole<T>{}, 2);
      body(c + 3 * L, Whole<T>{}, 3);
    }
  }
  for (; c + L <= cols; c += L) body(c, Whole<T>{}, 0);
  if (c < cols) body(c, Tail<T>{int(cols - c)}, 1);
}

// Asks for the cache lines of the four vectors of a sweep that begin at p.
template <class T>
HT_INLINE void prefetch(const T* p) {
  constexpr int bytes = 4 * kLanes<Accumulate<T>> * int(sizeof(T));
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + line);
}

// A sum along a row: four accumulators side by side, folded into a total after each segment of a long row, so that
// rounding grows with the length of a segment and the number of segments, not with their product.
template <class T>
struct Sum {
  using A = Accumulate<T>;
  vec<A> running[4] = {}, folded = {};
  HT_INLINE void add(int j, Row<T> v) {
    if constexpr (kPaired<T>) {
      running[2 * j] += v.even;
      running[2 * j + 1] += v.odd;
    } else {
      running[j] += v;
    }
  }
  HT_INLINE void fold() {
    folded += (running[0] + running[1]) + (running[2] + running[3]);
    for (auto& r : running) r = vec<A>{};
  }
  HT_INLINE A total() const { return sum_lanes(folded); }
};

// sweep() in segments, with fold() after each.
template <class T, class Body, class Fold>
HT_INLINE void sweep_segments(int64_t cols, Body body, Fold fold) {
  constexpr int64_t kSegment = 64 * kLanes<Accumulate<T>>;
  for (int64_t first = 0; first < cols; first += kSegment) {
    const int64_t n = cols - first < kSegment ? cols - first : kSegment;
    sweep<T>(n, [&](int64_t c, auto part, int j) HT_LAMBDA { body(first + c, part, j); });
    fold();
  }
}

}  // namespace handtuned::HANDTUNED_ISA
