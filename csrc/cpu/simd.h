// Vectors: memory and what goes across lanes, on top of their types (simd_types.h) and narrow numbers (simd_narrow.h).
#pragma once
#include "simd_narrow.h"

namespace handtuned::HANDTUNED_ISA {

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

// The larger; b where one is NaN.
HT_INLINE f32 larger(f32 a, f32 b) {
#if defined(HT_AVX512)
  return (f32)_mm512_mask_max_ps((__m512)a, 0xffff, (__m512)a, (__m512)b);
#elif defined(HT_AVX2)
  return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
HT_INLINE f64 larger(f64 a, f64 b) { return a > b ? a : b; }
HT_INLINE float larger(float a, float b) { return a > b ? a : b; }
HT_INLINE double larger(double a, double b) { return a > b ? a : b; }
// The smaller; b where one is NaN.
HT_INLINE f32 smaller(f32 a, f32 b) {
#if defined(HT_AVX512)
  return (f32)_mm512_mask_min_ps((__m512)a, 0xffff, (__m512)a, (__m512)b);
#elif defined(HT_AVX2)
  return (f32)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
HT_INLINE f64 smaller(f64 a, f64 b) { return a < b ? a : b; }

// Asks for the line of p as one to be written. Elsewhere it is taken from the other cores with the first store.
HT_INLINE void prefetch_to_write(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));  // nothing on processors that do not have it
#else
  __builtin_prefetch(p, 1);
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

// table[index[i] % 16] for each lane.
HT_INLINE f32 look_up(const float (&table)[16], u32 index) {
#if defined(HT_AVX512)
  return (f32)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, _mm512_loadu_ps(table));
#elif defined(HT_AVX2)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
  return (f32)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // by bit 3, as the sign
#else
  f32 found;
  for (int i = 0; i < kLanes<float>; ++i) found[i] = table[index[i] % 16];
  return found;
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

// Lane i is the sum of rows[i]'s lanes, of one vector a row. Of each exchange of a transposition only the sum is kept.
template <class A, int Step = 1>
HT_INLINE vec<A> sum_each(vec<A>* rows) {
  constexpr int L = kLanes<A>;
  if constexpr (Step == L) {
    return rows[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < L; i += 2 * Step) {
      exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, L>{});
      rows[i] += rows[i + Step];
    }
    return sum_each<A, 2 * Step>(rows);
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
