// float16 conversions for the emulator.
#pragma once
#include <cuda_runtime.h>

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 0x1p-24f;  // subnormal
  return sign ? -magnitude : magnitude;
}

// To nearest even; every NaN becomes 0x7fff.
inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (value != value) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00u)};  // rounds beyond the largest, 65504
  if (magnitude < 0x1p-14f) {                                                       // subnormal: counts of 2^-24
    return {static_cast<unsigned short>(sign | unsigned(std::nearbyint(magnitude * 0x1p24f)))};
  }
  const unsigned m = (bits & 0x7fffffffu) - (112u << 23);
  return {static_cast<unsigned short>(sign | (m + 0xfff + (m >> 13 & 1)) >> 13)};
}
