// Elementary functions on vectors, with the accuracy that a softmax needs: relative errors near one rounding.
#pragma once
#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x for x up to about 100; exactly 0 below 2^-126 (double 2^-1022) and for -infinity; NaN for NaN.
//   2^x = 2^n * 2^f,  n = round(x),  f = x - n in [-1/2, 1/2]
// Adding 1.5 * 2^23 rounds x to an integer and leaves n in the low bits. 2^f: polynomials through the Chebyshev nodes,
// relative error 1.0e-7 in float (degree 5), 4e-18 in double (degree 11).
HT_INLINE f32 exp2(f32 x) {
  f32 shifted = x + 12582912.0f;
  f32 f = x - (shifted - 12582912.0f);
  f32 p = 1.3390863e-3f * f + 9.6760319e-3f;
  p = p * f + 5.5503571e-2f;
  p = p * f + 2.4022107e-1f;
  p = p * f + 6.9314719e-1f;
  p = p * f + 1.0f;
  f32 power = (f32)(((u32)shifted << 23) + 0x3f800000u);
  return (f32)((i32)(p * power) & ~(x < -126.0f));
}

HT_INLINE f64 exp2(f64 x) {
  f64 shifted = x + 6755399441055744.0;
  f64 f = x - (shifted - 6755399441055744.0);
  constexpr double c[] = {4.4558179083360645e-10, 7.074194297288521e-9,  1.0178057087733941e-7, 1.3215432535912376e-6,
                          1.5252733841556773e-5,  1.5403530463523724e-4, 1.3333558146406471e-3, 9.6181291075872567e-3,
                          5.5504108664821627e-2,  2.402265069591016e-1,  6.9314718055994531e-1, 1.0};
  f64 p = f64{} + c[0];
  for (int i = 1; i < 12; ++i) p = p * f + c[i];
  f64 power = (f64)(((u64)shifted << 52) + 0x3ff0000000000000u);
  return (f64)((i64)(p * power) & ~(x < -1022.0));
}

HT_INLINE f32 absolute(f32 x) { return (f32)((u32)x & 0x7fffffffu); }
HT_INLINE f64 absolute(f64 x) { return (f64)((u64)x & 0x7fffffffffffffffu); }

// tanh(x) = sign(x) * (1 - e) / (1 + e),  e = 2^(-2 |x| log2(e));  near 0, where 1 - e cancels, x + x^3 P(x^2).
HT_INLINE f32 tanh(f32 x) {
  f32 a = absolute(x), e = exp2(a * float(-2 * kLog2e)), far = (1.0f - e) / (1.0f + e);
  far = (f32)((u32)far | ((u32)x & 0x80000000u));
  f32 z = x * x;
  f32 p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return a < 0.625f ? x + x * z * p : far;
}

HT_INLINE f64 tanh(f64 x) {
  f64 y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

HT_INLINE float logarithm(float x) { return __builtin_logf(x); }
HT_INLINE double logarithm(double x) { return __builtin_log(x); }
HT_INLINE float power_of_2(float x) { return __builtin_exp2f(x); }
HT_INLINE double power_of_2(double x) { return __builtin_exp2(x); }

// The larger; b where a is NaN.
template <class V>
HT_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

}  // namespace handtuned::HANDTUNED_ISA
