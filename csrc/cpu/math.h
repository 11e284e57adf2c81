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

// A function of a >= 0 that is 0 from 6.3 on, by polynomials on 15 intervals of 7/16, highest power first, and 0 after
// them: each is found in one register by the number of its interval, so a value takes few instructions more than the
// polynomial. NaN stays NaN. Coefficients by least squares at Chebyshev nodes.
template <int Terms>
HT_INLINE f32 by_intervals(const float (&table)[Terms][16], f32 a) {
  constexpr float kWidth = 0.4375f, kEnd = 15 * kWidth;
  a = a > kEnd ? broadcast(kEnd) : a;
  const f32 shifted = a * (1 / kWidth) + 12582912.0f, n = shifted - 12582912.0f, t = a - n * kWidth;
  f32 sum = look_up(table[0], (u32)shifted);
#pragma GCC unroll 8
  for (int k = 1; k < Terms; ++k) sum = sum * t + look_up(table[k], (u32)shifted);
  return sum;
}

// 1 - Phi(a) for a >= 0, Phi the normal distribution; error 1.3e-8.
HT_INLINE f32 normal_tail(f32 a) {
  alignas(64) static constexpr float kTable[6][16] = {
      {-9.87472199e-3f, -5.66286873e-3f, 2.23447336e-3f, 6.0728942e-3f, 4.29541385e-3f, 8.74916383e-4f, -9.49867477e-4f,
       -1.05470873e-3f, -5.80367981e-4f, -2.17163906e-4f, -6.01315769e-5f, -1.27850499e-5f, -2.12968916e-6f,
       -2.81401043e-7f, -2.97393683e-8f, 0},
      {0, -1.83549002e-2f, -2.19747052e-2f, -1.17602795e-2f, 2.99898209e-4f, 5.85358962e-3f, 5.39304642e-3f,
       2.99492851e-3f, 1.19013235e-3f, 3.58599355e-4f, 8.42169393e-5f, 1.56584865e-5f, 2.32776642e-6f, 2.78527835e-7f,
       2.69530602e-8f, 0},
      {6.64880201e-2f, 4.88559008e-2f, 1.0628337e-2f, -2.03042794e-2f, -2.96574533e-2f, -2.30021384e-2f,
       -1.24926837e-2f, -5.12098428e-3f, -1.63623819e-3f, -4.14530165e-4f, -8.41282308e-5f, -1.37693241e-5f,
       -1.82591509e-6f, -1.96833156e-7f, -1.72921926e-8f, 0},
      {0, 7.93002546e-2f, 1.19020708e-1f, 1.10638976e-1f, 7.54943267e-2f, 3.98804508e-2f, 1.67008769e-2f,
       5.61485579e-3f, 1.52696308e-3f, 3.37531121e-4f, 6.08452174e-5f, 8.96566235e-6f, 1.08174822e-6f, 1.07008283e-7f,
       8.68729355e-9f, 0},
      {-3.98942262e-1f, -3.62532318e-1f, -2.72055e-1f, -1.68593198e-1f, -8.6277321e-2f, -3.64608318e-2f,
       -1.27241788e-2f, -3.66696157e-3f, -8.72682955e-4f, -1.71506443e-4f, -2.78341904e-5f, -3.73036801e-6f,
       -4.12857844e-7f, -3.77334466e-8f, -2.84794166e-9f, 0},
      {5e-1f, 3.30874383e-1f, 1.90786958e-1f, 9.46757421e-2f, 4.0059153e-2f, 1.43530183e-2f, 4.33244742e-3f,
       1.09748286e-3f, 2.32629696e-4f, 4.11677902e-5f, 6.07173479e-6f, 7.45297086e-7f, 7.60548673e-8f, 6.44640652e-9f,
       4.53508314e-10f, 0},
  };
  return by_intervals(kTable, a);
}

HT_INLINE f64 normal_tail(f64 a) {
  for (int i = 0; i < kLanes<double>; ++i) a[i] = 0.5 * __builtin_erfc(a[i] * 0.7071067811865476);
  return a;
}

// 1 - Phi(a) - a phi(a) for a >= 0, phi its density; error 5e-9.
HT_INLINE f32 normal_tail_slope(f32 a) {
  alignas(64) static constexpr float kTable[7][16] = {
      {0, 2.14616358e-2f, 1.45544e-2f, -5.35602588e-3f, -1.13148e-2f, -4.02336195e-3f, 2.02851952e-3f, 2.34997761e-3f,
       7.48934399e-4f, -8.826673e-5f, -1.73599648e-4f, -7.94172156e-5f, -2.22563613e-5f, -4.41133125e-6f,
       -6.53163511e-7f, 0},
      {-5.90518415e-2f, -2.64042262e-2f, 2.69468799e-2f, 3.8191393e-2f, 1.21989343e-2f, -9.10650007e-3f, -1.04302e-2f,
       -3.76913836e-3f, 2.82444496e-4f, 9.24423977e-4f, 4.9117062e-4f, 1.5786814e-4f, 3.58775287e-5f, 6.10303141e-6f,
       7.99568625e-7f, 0},
      {0, -1.05274752e-1f, -1.00812674e-1f, -1.86134595e-2f, 3.96838374e-2f, 3.90123464e-2f, 1.43588167e-2f,
       -1.30781368e-3f, -4.23983205e-3f, -2.4714903e-3f, -8.8196696e-4f, -2.24111674e-4f, -4.28419844e-5f,
       -6.33221907e-6f, -7.35348635e-7f, 0},
      {2.65942693e-1f, 1.62940145e-1f, -3.50460336e-2f, -1.4304252e-1f, -1.15881011e-1f, -4.01026905e-2f,
       6.88263914e-3f, 1.60814803e-2f, 9.93675645e-3f, 3.88323399e-3f, 1.09651592e-3f, 2.35123633e-4f, 3.92511865e-5f,
       5.17634317e-6f, 5.44382146e-7f, 0},
      {0, 3.02036434e-1f, 3.849684e-1f, 2.51963705e-1f, 7.07743987e-2f, -3.1311281e-2f, -4.82748672e-2f,
       -3.02027576e-2f, -1.25993537e-2f, -3.88432248e-3f, -9.218661e-4f, -1.71983265e-4f, -2.55353389e-5f,
       -3.04171749e-6f, -2.92299887e-7f, 0},
      {-7.97884464e-1f, -6.55673623e-1f, -3.35817963e-1f, -4.67583276e-2f, 9.16696638e-2f, 1.01549149e-1f,
       6.22292124e-2f, 2.70581655e-2f, 8.94499198e-3f, 2.3160011e-3f, 4.77093039e-4f, 7.89344776e-5f, 1.0553531e-5f,
       1.14509749e-6f, 1.0114335e-7f, 0},
      {5e-1f, 1.72266498e-1f, -4.7261171e-2f, -1.26602814e-1f, -1.10926151e-1f, -6.54050484e-2f, -2.90685277e-2f,
       -1.01325894e-2f, -2.82176025e-3f, -6.34137832e-4f, -1.15702278e-4f, -1.7206894e-5f, -2.09139762e-6f,
       -2.08153068e-7f, -1.6988789e-8f, 0},
  };
  return by_intervals(kTable, a);
}

HT_INLINE f64 normal_tail_slope(f64 a) { return normal_tail(a) - a * (0.3989422804014327 * exponential(-0.5 * a * a)); }

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
