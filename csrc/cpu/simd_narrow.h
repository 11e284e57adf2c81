// Vectors of numbers narrower than float: 16-bit floats, pairs of bf16, bytes, and the products of these.
#pragma once
#include "simd_types.h"

namespace handtuned::HANDTUNED_ISA {

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

}  // namespace handtuned::HANDTUNED_ISA
