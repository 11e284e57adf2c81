// Vectors of one native width per instruction set: the only file with intrinsics.
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

// ---- 16-bit floats <-> float ------------------------------------------------------------------------------------

// float(x) = bits << 16
HT_INLINE f32 widen(const bf16* p) {
#if defined(HT_AVX512)
  return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(HT_AVX2)
  return (f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (f32)(__builtin_convertvector(load_bits<u16_half>(p), u32) << 16);
#endif
}

// The upper half of the result is v rounded to nearest even; the lower half is to be dropped.
// A NaN must come in with zeros in its lower half, or the carry could run through it. Those that arithmetic makes and
// those that began as 16-bit floats do; only float32 arguments need clean_nan() first.
HT_INLINE u32 round_bf16(f32 v) {
  // bits + 0x7fff + lowest kept bit
  u32 x = (u32)v;
  return x + 0x7fff + ((x >> 16) & 1);
}

HT_INLINE f32 clean_nan(f32 v) { return v == v ? v : broadcast(__builtin_nanf("")); }

HT_INLINE u16_half narrow_bf16(f32 v) {
#if defined(HT_AVX512) && defined(__AVX512BF16__)
  return (u16_half)_mm512_cvtneps_pbh((__m512)v);
#elif defined(HT_AVX2)
  // Packing works within 128-bit halves; the permutation brings the two results together.
  __m256i upper = _mm256_srli_epi32((__m256i)round_bf16(v), 16);
  return (u16_half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08));
#else
  return __builtin_convertvector(round_bf16(v) >> 16, u16_half);
#endif
}

#if defined(HT_AVX512)
HT_INLINE f32 widen(const f16* p) { return (f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
HT_INLINE u16_half narrow_f16(f32 v) { return (u16_half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(HT_AVX2)
HT_INLINE f32 widen(const f16* p) { return (f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
HT_INLINE u16_half narrow_f16(f32 v) { return (u16_half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
HT_INLINE float as_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
HT_INLINE uint32_t as_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

HT_INLINE float f16_to_float(uint16_t h) {
  // Shift exponent and mantissa into place and scale by 2^112, which also normalises subnormals.
  uint32_t magnitude = (h & 0x7fffu) << 13;
  uint32_t bits = (h & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : as_bits(as_float(magnitude) * 0x1p112f);
  return as_float(bits | (h & 0x8000u) << 16);
}

HT_INLINE uint16_t float_to_f16(float f) {
  uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu, h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    h = 0x7c00u;  // rounds to 65536 or more: infinity
  } else if (magnitude < 0x38800000u) {
    h = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // subnormal: the addition rounds at the right bit
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  return uint16_t(sign | h);
}

HT_INLINE f32 widen(const f16* p) {
  f32 v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = f16_to_float(p[i].bits);
  return v;
}
HT_INLINE u16_half narrow_f16(f32 v) {
  u16_half r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = float_to_f16(v[i]);
  return r;
}
#endif

// ---- pairs of bf16 ------------------------------------------------------------------------------------------------

HT_INLINE f32 first_of(u32 pairs) { return (f32)(pairs << 16); }
HT_INLINE f32 second_of(u32 pairs) { return (f32)(pairs & 0xffff0000u); }

// Both rounded to nearest even.
HT_INLINE u32 narrow_pair(f32 first, f32 second) {
#if defined(HT_AVX512) && defined(__AVX512BF16__)
  // The conversion leaves all of `first` below all of `second`; the permutation brings neighbours together.
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
  return (u32)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
  return round_bf16(first) >> 16 | (round_bf16(second) & 0xffff0000u);
#endif
}

// ---- bytes --------------------------------------------------------------------------------------------------------

// float(signed byte number i of each lane)
template <int i>
HT_INLINE f32 signed_byte(u32 quads) {
  return __builtin_convertvector((i32)(quads << (24 - 8 * i)) >> 24, f32);
}

// To the nearest integer, to even in the middle. Unlike v + 0.5 it leaves nothing to contract, so all ISAs agree.
HT_INLINE i32 round_to_integer(f32 v) {
#if defined(HT_AVX512)
  return (i32)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v);  // GCC 12 warns inside the plain form
#elif defined(HT_AVX2)
  return (i32)_mm256_cvtps_epi32((__m256)v);
#elif defined(HT_SSE2)
  return (i32)__builtin_ia32_cvtps2dq(v);
#else
  i32 r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = int32_t(__builtin_rintf(v[i]));
  return r;
#endif
}

// The lowest byte of each lane, one after the other.
HT_INLINE void store_bytes(quad* p, i32 v) {
  using bytes = uint8_t __attribute__((vector_size(kVectorBytes / 4)));
  const bytes b = __builtin_convertvector(v, bytes);
  __builtin_memcpy(p, &b, sizeof b);
}

// ---- products ---------------------------------------------------------------------------------------------------

// Whether this ISA multiplies pairs in one instruction. The emulated one tests the code that uses it.
#if defined(__AVX512BF16__) || defined(HANDTUNED_VECTOR_BYTES)
inline constexpr bool kMultipliesPairs = true;
#else
inline constexpr bool kMultipliesPairs = false;
#endif

// sum + a * b
HT_INLINE f32 multiply_add(f32 a, f32 b, f32 sum) { return sum + a * b; }
HT_INLINE f64 multiply_add(f64 a, f64 b, f64 sum) { return sum + a * b; }
// sum + a.first * b.first + a.second * b.second
HT_INLINE f32 multiply_add(u32 a, u32 b, f32 sum) {
#if defined(HT_AVX512) && defined(__AVX512BF16__)
  return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + first_of(a) * first_of(b) + second_of(a) * second_of(b);
#endif
}

// sum + the four products of a's unsigned with b's signed bytes: the same integers on every ISA
HT_INLINE i32 multiply_add(u32 a, u32 b, i32 sum) {
#if defined(HT_AVX512) && defined(__AVX512VNNI__)
  return (i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(HT_AVX512)
  // In 16 bits, bytes 0 and 2, then 1 and 3. (The instruction for bytes, vpmaddubsw, would saturate.)
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512((__m512i)a, _mm512_set1_epi16(0xff)),
                                         _mm512_srai_epi16(_mm512_slli_epi16((__m512i)b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)a, 8), _mm512_srai_epi16((__m512i)b, 8));
  return sum + (i32)even + (i32)odd;
#elif defined(HT_AVX2)
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)a, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)a, 8), _mm256_srai_epi16((__m256i)b, 8));
  return sum + (i32)even + (i32)odd;
#else
  for (int shift = 0; shift < 32; shift += 8) sum += (i32)(a >> shift & 0xff) * ((i32)(b << (24 - shift)) >> 24);
  return sum;
#endif
}

// ---- memory -----------------------------------------------------------------------------------------------------

HT_INLINE f32 load(const float* p) { return load_bits<f32>(p); }
HT_INLINE f64 load(const double* p) { return load_bits<f64>(p); }
HT_INLINE i32 load(const int32_t* p) { return load_bits<i32>(p); }
HT_INLINE u32 load(const pair* p) { return load_bits<u32>(p); }
HT_INLINE u32 load(const quad* p) { return load_bits<u32>(p); }
HT_INLINE f32 load(const bf16* p) { return widen(p); }
HT_INLINE f32 load(const f16* p) { return widen(p); }

HT_INLINE f32 narrow(f32 v, const float*) { return v; }
HT_INLINE f64 narrow(f64 v, const double*) { return v; }
HT_INLINE i32 narrow(i32 v, const int32_t*) { return v; }
HT_INLINE u16_half narrow(f32 v, const bf16*) { return narrow_bf16(v); }
HT_INLINE u16_half narrow(f32 v, const f16*) { return narrow_f16(v); }

template <class T, class V>
HT_INLINE void store(T* p, V v) {
  auto bits = narrow(v, p);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// Booleans as what a softmax adds to a score: 0 where true, -infinity where false.
struct boolean {
  uint8_t byte;
};
HT_INLINE f32 load_bias(const boolean* p, float) {
  using bytes = uint8_t __attribute__((vector_size(kVectorBytes / 4)));
  i32 off = __builtin_convertvector(load_bits<bytes>(p), i32) == 0;
  return (f32)(off & (i32)broadcast(-__builtin_inff()));
}
HT_INLINE f64 load_bias(const boolean* p, double) {
  using bytes = uint8_t __attribute__((vector_size(kVectorBytes / 8)));
  i64 off = __builtin_convertvector(load_bits<bytes>(p), i64) == 0;
  return (f64)(off & (i64)broadcast(-__builtin_inf()));
}
template <class T, class A>
HT_INLINE vec<A> load_bias(const T* p, A) {
  return load(p);
}

// First `n` elements as a vector, zeros after.
template <class T>
HT_INLINE vec<Accumulate<T>> load_first(const T* p, int64_t n) {
  using A = Accumulate<T>;
  if (n >= kLanes<A>) return load(p);
#if defined(HT_AVX512)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    return (vec<A>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  } else if constexpr (sizeof(T) == 4) {
    return (vec<A>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
    return widen(reinterpret_cast<const T*>(&bits));
  }
#endif
  T a[kLanes<A>] = {};
  __builtin_memcpy(a, p, n * sizeof(T));
  return load(a);
}

template <class T, class V>
HT_INLINE void store_first(T* p, V v, int64_t n) {
  if (n >= kLanes<Accumulate<T>>) return store(p, v);
#if defined(HT_AVX512)
  const auto bits = narrow(v, p);
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8)
    return _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)bits);
  else if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)bits);
  else
    return _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)bits);
#endif
  T a[kLanes<Accumulate<T>>];
  store(a, v);
  __builtin_memcpy(p, a, n * sizeof(T));
}

// What store() leaves in memory, as the accumulate type again.
HT_INLINE f32 rounded_to(f32 v, const float*) { return v; }
HT_INLINE f64 rounded_to(f64 v, const double*) { return v; }
HT_INLINE f32 rounded_to(f32 v, const bf16*) { return (f32)(round_bf16(v) & 0xffff0000u); }
HT_INLINE f32 rounded_to(f32 v, const f16*) {
  u16_half bits = narrow_f16(v);
  return widen(reinterpret_cast<const f16*>(&bits));
}

// Past the caches: for outputs too large to be still cached when somebody reads them. p must be aligned to the
// vector's size in memory. End a stretch of them with stream_fence().
template <class T, class V>
HT_INLINE void stream(T* p, V v) {
  auto bits = narrow(v, p);
#if defined(HT_AVX512)
  if constexpr (sizeof bits == 64) {
    _mm512_stream_si512((__m512i*)p, (__m512i)bits);
  } else {
    _mm256_stream_si256((__m256i*)p, (__m256i)bits);
  }
#elif defined(HT_AVX2)
  if constexpr (sizeof bits == 32) {
    _mm256_stream_si256((__m256i*)p, (__m256i)bits);
  } else {
    _mm_stream_si128((__m128i*)p, (__m128i)bits);
  }
#else
  __builtin_memcpy(p, &bits, sizeof bits);
#endif
}

HT_INLINE void stream_fence() {
#if defined(HT_AVX512) || defined(HT_AVX2)
  _mm_sfence();
#endif
}

// Tells the core that this thread only waits for another's store.
HT_INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// ---- across lanes -----------------------------------------------------------------------------------------------

// Whether some lane is not zero.
template <class V>
HT_INLINE bool any(V v) {
#if defined(HT_AVX512)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(HT_AVX2)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  const u64 words = (u64)v;
  uint64_t bits = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) bits |= words[i];
  return bits;
#endif
}

// Sum of all lanes: halves are added until one lane is left, so the order is fixed.
HT_INLINE float sum_lanes(float __attribute__((vector_size(16))) v) { return (v[0] + v[2]) + (v[1] + v[3]); }
HT_INLINE double sum_lanes(double __attribute__((vector_size(16))) v) { return v[0] + v[1]; }
HT_INLINE float sum_lanes(float __attribute__((vector_size(32))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
HT_INLINE double sum_lanes(double __attribute__((vector_size(32))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
}
HT_INLINE float sum_lanes(float __attribute__((vector_size(64))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
HT_INLINE double sum_lanes(double __attribute__((vector_size(64))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}

template <int Step, class V, int... lane>
HT_INLINE void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  V low = __builtin_shufflevector(a, b, (lane & Step ? lane - Step + L : lane)...);
  b = __builtin_shufflevector(a, b, (lane & Step ? lane + L : lane + Step)...);
  a = low;
}

// The square of one vector a row, transposed in registers: blocks of Step x Step change places across the diagonal of
// blocks of twice their size (Eklundh 1972).
template <class A, int Step = 1>
HT_INLINE void transpose(vec<A>* rows) {
  constexpr int L = kLanes<A>;
  if constexpr (Step < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, L>{});
    transpose<A, 2 * Step>(rows);
  }
}

// Lane i of the product is the 64-bit product of the low 32 bits of lane i of a and b.
HT_INLINE u64 multiply_low32(u64 a, u64 b) {
#if defined(HT_AVX512)
  return (u64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(HT_AVX2)
  return (u64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(HT_SSE2)
  return (u64)__builtin_ia32_pmuludq128((int __attribute__((vector_size(16))))a,
                                        (int __attribute__((vector_size(16))))b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

HT_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HT_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace handtuned::HANDTUNED_ISA
