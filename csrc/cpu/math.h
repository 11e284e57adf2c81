// Elementary functions on vectors, with the accuracy that a softmax needs: relative errors near one rounding.
#pragma once
#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr double kLog2e = 1.4426950408889634;

// 2^n of the integer that 1.5 * 2^23 + n holds.
HT_INLINE f32 power_of_two(f32 shifted) { return (f32)(((u32)shifted << 23) + 0x3f800000u); }

// e^x for x up to about 80; exactly 0 below -87.3 (double -708.3) and for -infinity; NaN for NaN.
//   e^x = 2^n * e^f,  n = round(x / ln 2),  f = x - n ln 2 in [-0.35, 0.35]
// Adding 1.5 * 2^23 rounds to an integer and leaves n in the low bits. ln 2 is taken off in two parts, the first with
// so few bits that its product is exact. e^f: polynomials through the Chebyshev nodes, relative error 2.5e-9 in float
// (degree 6), 4e-18 in double (degree 11). Of N vectors at once, step by step side by side: one alone would wait for
// its own chain of results.
template <int N>
HT_INLINE void exponential(f32 (&x)[N]) {
  constexpr float kPolynomial[] = {1.3941108e-3f, 8.3751264e-3f, 4.1666353e-2f, 1.6666416e-1f, 0.5f, 1.0f, 1.0f};
  auto each = [](auto step) HT_LAMBDA {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) step(i);
  };
  f32 shifted[N], n[N], p[N];
  i32 tiny[N];
  each([&](int i) HT_LAMBDA { tiny[i] = x[i] < -87.3f; });
  each([&](int i) HT_LAMBDA { shifted[i] = x[i] * float(kLog2e) + 12582912.0f; });
  each([&](int i) HT_LAMBDA { n[i] = shifted[i] - 12582912.0f; });
  each([&](int i) HT_LAMBDA { x[i] = x[i] - n[i] * 0.693359375f; });
  each([&](int i) HT_LAMBDA { x[i] = x[i] + n[i] * 2.12194440e-4f; });
  each([&](int i) HT_LAMBDA { p[i] = kPolynomial[0] * x[i] + kPolynomial[1]; });
#pragma GCC unroll 8
  for (int k = 2; k < 7; ++k) each([&](int i) HT_LAMBDA { p[i] = p[i] * x[i] + kPolynomial[k]; });
  each([&](int i) HT_LAMBDA { p[i] *= power_of_two(shifted[i]); });
  each([&](int i) HT_LAMBDA { x[i] = (f32)((i32)p[i] & ~tiny[i]); });
}

HT_INLINE f32 exponential(f32 x) {
  f32 one[1] = {x};
  exponential(one);
  return one[0];
}

HT_INLINE f64 exponential(f64 x) {
  f64 shifted = x * kLog2e + 6755399441055744.0, n = shifted - 6755399441055744.0;
  f64 f = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
  constexpr double c[] = {2.51100376059637777e-8,
                          2.76326396390410297e-7,
                          2.75572409185789698e-6,
                          2.48014854823284924e-5,
                          1.98412698900471137e-4,
                          1.38888889523147747e-3,
                          8.33333333331960061e-3,
                          4.16666666664880955e-2,
                          1.66666666666666808e-1,
                          5.00000000000001839e-1,
                          1.0,
                          1.0};
  f64 p = f64{} + c[0];
  for (int i = 1; i < 12; ++i) p = p * f + c[i];
  f64 power = (f64)(((u64)shifted << 52) + 0x3ff0000000000000u);
  return (f64)((i64)(p * power) & ~(x < -708.3));
}

template <int N>
HT_INLINE void exponential(f64 (&x)[N]) {
  for (f64& one : x) one = exponential(one);
}

HT_INLINE float exponential(float x) { return __builtin_expf(x); }
HT_INLINE double exponential(double x) { return __builtin_exp(x); }
// ln x of x >= 0:  x = 2^e m,  m in [0.7, 1.4],  ln m = 2 artanh(s),  s = (m - 1) / (m + 1);  relative error 2e-7.
HT_INLINE f32 logarithm(f32 x) {
  i32 bits = (i32)x, e = (bits - 0x3f3504f3) >> 23;
  f32 m = (f32)(bits - (e << 23)), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  f32 p = 1.1111111e-1f * z + 1.4285715e-1f;
  p = p * z + 2.0e-1f;
  p = p * z + 3.3333334e-1f;
  f32 power = __builtin_convertvector(e, f32);
  f32 y = power * 0.693359375f + (power * -2.12194440e-4f + (2.0f * s + 2.0f * s * z * p));
  y = x < __builtin_inff() ? y : x;  // infinity and NaN
  return x == 0.0f ? broadcast(-__builtin_inff()) : y;
}
HT_INLINE f64 logarithm(f64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

HT_INLINE float logarithm(float x) { return __builtin_logf(x); }
HT_INLINE double logarithm(double x) { return __builtin_log(x); }

HT_INLINE f32 absolute(f32 x) { return (f32)((u32)x & 0x7fffffffu); }
HT_INLINE f64 absolute(f64 x) { return (f64)((u64)x & 0x7fffffffffffffffu); }

// min(max(x, low), high);  NaN stays
template <class V>
HT_INLINE V clamp(V x, double low, double high) {
  using A = decltype(x[0] + x[0]);
  return smaller(V{} + A(high), larger(V{} + A(low), x));
}

// tanh(x) = sign(x) m / (m + 2),  m = e^2a - 1 = 2^n M + (2^n - 1),  a = |x|,  n = round(2a / ln 2),
// M = e^2f - 1 = 2f + f^2 Q(f),  f = a - n ln 2 / 2: near 0, where n is 0, nothing cancels. Q through the Chebyshev
// nodes, error of M 2.6e-8. From 9.02 on it is 1 to the last bit. Polynomials in pairs: a chain would be waited for.
HT_INLINE f32 tanh(f32 x) {
  const f32 a = smaller(f32{} + 9.02f, absolute(x));
  const f32 shifted = a * float(2 * kLog2e) + 12582912.0f, n = shifted - 12582912.0f;
  const f32 f = a - n * 0.3466796875f + n * 1.06097220e-4f, z = f * f;
  const f32 high = 8.936856e-2f * z + (2.676225e-1f * f + 6.6665582e-1f), low = 1.33332615f * f + 2.0f;
  const f32 power = power_of_two(shifted), m = power * (z * (high * z + low) + (f + f)) + (power - 1.0f);
  return (f32)((u32)(m / (m + 2.0f)) | ((u32)x & 0x80000000u));
}

HT_INLINE f64 tanh(f64 x) {
  f64 y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

// erf(x) = x + x P(x^2) near 0, else sign(x) (1 - e^-Q(|x|));  both polynomials by least squares at Chebyshev nodes,
// error 7e-8. From 4.1 on it is 1 to the last bit.
HT_INLINE f32 erf(f32 x) {
  f32 a = absolute(x), z = x * x;
  f32 p = 8.20979694e-5f * z - 8.10444180e-4f;
  p = p * z + 5.19764237e-3f;
  p = p * z - 2.68580317e-2f;
  p = p * z + 1.12836711e-1f;
  p = p * z - 3.76126319e-1f;
  p = p * z + 1.28379166e-1f;
  f32 t = a < 4.1f ? a : broadcast(4.1f);
  f32 q = 1.84255623e-5f * t - 3.99064389e-4f;
  q = q * t + 3.97621747e-3f;
  q = q * t - 2.45420467e-2f;
  q = q * t + 1.07284710e-1f;
  q = q * t + 6.34346068e-1f;
  q = q * t + 1.12897372f;
  q = q * t - 5.24647221e-5f;
  f32 far = (f32)((u32)(1.0f - exponential(-q)) | ((u32)x & 0x80000000u));
  return a > 0.95f ? far : x + x * p;
}

HT_INLINE f64 erf(f64 x) {
  f64 y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_erf(x[i]);
  return y;
}

// 1 / (1 + e^-x), relative error near one rounding on both sides; e^-x as in exponential(), its f with the other sign.
// Exactly 0 below -87.
HT_INLINE f32 sigmoid(f32 x) {
  const f32 a = clamp(x, -87, 87), shifted = a * float(-kLog2e) + 12582912.0f, n = shifted - 12582912.0f;
  const f32 f = a + n * 0.693359375f - n * 2.12194440e-4f;
  const f32 z = f * f, high = 1.3941108e-3f * z + (4.1666353e-2f - 8.3751264e-3f * f);
  const f32 p = z * (z * high + (0.5f - 1.6666416e-1f * f)) + (1.0f - f);
  const f32 y = 1.0f / (1.0f + p * power_of_two(shifted));
  return x < -87.0f ? f32{} : y;
}

// With e = e^-|x|:  1 / (1 + e) above 0, e / (1 + e) below.
HT_INLINE f64 sigmoid(f64 x) {
  f64 e = exponential(-absolute(x));
  return (x < 0 ? e : 1 - f64{}) / (1 + e);
}

}  // namespace handtuned::HANDTUNED_ISA
