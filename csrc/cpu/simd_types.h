// Vectors of one native width per instruction set: their types. With simd_narrow.h and simd.h, which is what to
// include, the only files with intrinsics.
//
// Arithmetic, comparison and selection use the compiler's vector extensions, which reach the same speed as intrinsics
// and also serve machines that have none of these ISAs. What the extensions cannot say (16-bit floats, streaming
// stores, 32x32->64 products) has one function each below: an intrinsic where the ISA has it, plain C++ elsewhere.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../params.h"

// HANDTUNED_VECTOR_BYTES: a test build of some other width out of the extensions alone, so that the 512-bit source
// also runs where there is no AVX-512.
#if defined(HANDTUNED_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define HT_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define HT_AVX2 1
#include <immintrin.h>
#elif defined(__SSE2__)
#define HT_SSE2 1
#endif

#define HT_INLINE __attribute__((always_inline)) inline
#define HT_LAMBDA __attribute__((always_inline))

namespace handtuned::HANDTUNED_ISA {

#if defined(HANDTUNED_VECTOR_BYTES)
inline constexpr int kVectorBytes = HANDTUNED_VECTOR_BYTES;
#elif defined(HT_AVX512)
inline constexpr int kVectorBytes = 64;
#elif defined(HT_AVX2)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

using f32 = float __attribute__((vector_size(kVectorBytes)));
using f64 = double __attribute__((vector_size(kVectorBytes)));
using i32 = int32_t __attribute__((vector_size(kVectorBytes)));
using u32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using i64 = int64_t __attribute__((vector_size(kVectorBytes)));
using u64 = uint64_t __attribute__((vector_size(kVectorBytes)));
using u16_half = uint16_t __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as f32

// A is the type of statistics and accumulation: float, or double for double tensors.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = f32;
  using integers = i32;
};
template <>
struct VectorOf<double> {
  using type = f64;
  using integers = i64;
};
template <class A>
using vec = typename VectorOf<A>::type;
// Two neighbours along the summed dimension of a product, which the bf16 dot instruction multiplies and adds at once.
struct pair {
  bf16 first, second;
};
template <>
struct VectorOf<pair> {
  using type = u32;
};
// Four neighbours along the summed dimension, in one lane: of weights signed, of what they are multiplied with
// unsigned.
struct quad {
  uint8_t bytes[4];
};
template <>
struct VectorOf<quad> {
  using type = u32;
};
template <>
struct VectorOf<int32_t> {
  using type = i32;
};
template <>
struct AccumulateOf<quad> {
  using type = int32_t;
};
template <class A>
inline constexpr DType kDType = sizeof(A) == 8 ? DType::f64 : DType::f32;
template <class A>
using ints = typename VectorOf<A>::integers;  // as wide, lane by lane: positions, and what comparisons give
template <class A>
inline constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class V, class T>
HT_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class A>
HT_INLINE vec<A> broadcast(A a) {
  return a - vec<A>{};  // with -fno-signed-zeros this is one broadcast and nothing else
}

HT_INLINE u32 broadcast(pair a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return u32{} + bits;
}

HT_INLINE u32 broadcast(quad a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return u32{} + bits;
}

HT_INLINE float square_root(float a) { return __builtin_sqrtf(a); }
HT_INLINE double square_root(double a) { return __builtin_sqrt(a); }

}  // namespace handtuned::HANDTUNED_ISA
