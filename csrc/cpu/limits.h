// What the machine can do at best, to put beside what a kernel reaches: copy bandwidth and multiply-add rates.
#pragma once
#include "simd.h"

// The compiler may not fold the chain away.
#if defined(HANDTUNED_VECTOR_BYTES)
#define HT_KEEP_IN_REGISTER(v) asm volatile("" : "+m"(v))
#elif defined(__x86_64__)
#define HT_KEEP_IN_REGISTER(v) asm volatile("" : "+v"(v))
#else
#define HT_KEEP_IN_REGISTER(v) asm volatile("" : "+w"(v))
#endif

namespace handtuned::HANDTUNED_ISA {

// Copies with streaming stores. dst must be 64-byte aligned and bytes a multiple of 256.
inline void copy(void* dst, const void* src, size_t bytes) {
  float* d = static_cast<float*>(dst);
  const float* s = static_cast<const float*>(src);
  for (size_t i = 0; i < bytes / sizeof(float); i += kLanes<float>) stream(d + i, load(s + i));
  stream_fence();
}

// Independent chains of multiply-adds of E, enough to hide their latency. Returns the flops done.
template <class E>
double multiply_add(int64_t iterations) {
  constexpr int kChains = 12;
  vec<E> a{}, b{};
  f32 sum[kChains] = {};
  HT_KEEP_IN_REGISTER(a);  // neither may be known as 0
  HT_KEEP_IN_REGISTER(b);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      sum[j] = multiply_add(a, b, sum[j]);
      HT_KEEP_IN_REGISTER(sum[j]);
    }
  }
  return 2.0 * kChains * kLanes<float> * (std::is_same_v<E, pair> ? 2 : 1) * double(iterations);
}

}  // namespace handtuned::HANDTUNED_ISA
