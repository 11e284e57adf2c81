// Sixteen-bit floating point and roundings. Written apart from the emulator's, so that each checks the other.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The compiler's own float16: conversions round to nearest even.
inline float half_to_float(uint16_t bits) { return float(bits_as<_Float16>(bits)); }
inline uint16_t double_to_half(double v) { return v != v ? uint16_t(0x7fff) : bits_as<uint16_t>(_Float16(v)); }

inline float bfloat_to_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

// The neighbours of v in bfloat16 are its upper 16 bits and one more; the nearer one, or the even one, is wanted. From
// a double, so that sums and products of bfloat16 are rounded once.
inline uint16_t double_to_bfloat(double v) {
  if (v != v) return 0x7fff;
  float near = float(v);  // to odd, so that the second rounding sees what the first cut off
  if (double(near) != v && !std::isinf(near)) {
    if (std::fabs(double(near)) > std::fabs(v)) near = std::nextafterf(near, 0.0f);
    near = bits_as<float>(bits_as<uint32_t>(near) | 1);
  }
  const uint32_t bits = bits_as<uint32_t>(near), below = bits & 0xffff, up = bits >> 16;
  if (std::isinf(near)) return uint16_t(up);
  return uint16_t(up + (below > 0x8000 || (below == 0x8000 && (up & 1))));
}

// A sum of doubles, exactly: sum + rest.
struct Exact {
  double sum, rest;
};
inline Exact two_sum(double a, double b) {
  const double sum = a + b, of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}

enum Rounding : uint32_t { kNearest, kToZero, kDown, kUp };

// The float on the side that the rounding asks for.
inline float directed(Exact v, uint32_t how) {
  const float near = float(v.sum);
  if (!std::isfinite(v.sum) || how == kNearest) return near;
  const double wide = double(near);
  const bool beyond = wide > v.sum || (wide == v.sum && v.rest < 0),
             below = wide < v.sum || (wide == v.sum && v.rest > 0);
  const bool positive = v.sum > 0;
  if (how == kDown || (how == kToZero && positive)) return beyond ? std::nextafterf(near, -INFINITY) : near;
  return below ? std::nextafterf(near, INFINITY) : near;
}

inline float flushed(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }

}  // namespace ptx
