// cvt: between integers and floating point of any width, with its roundings.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

Rounding rounding_of(const Instruction& in) {
  if (in.has("rz") || in.has("rzi")) return kToZero;
  if (in.has("rm") || in.has("rmi")) return kDown;
  return in.has("rp") || in.has("rpi") ? kUp : kNearest;
}

double whole(double v, uint32_t how) {
  switch (how) {
    case kToZero: return std::trunc(v);
    case kDown: return std::floor(v);
    case kUp: return std::ceil(v);
    default: return std::nearbyint(v);
  }
}

// The lower bits of the mantissa that a float16 or bfloat16 lacks, cut off: rounds to zero.
uint16_t cut(float v, bool bfloat) {
  if (v != v) return 0x7fff;
  if (bfloat) return uint16_t(bits_as<uint32_t>(v) >> 16);
  uint16_t near = double_to_half(double(v));
  if (std::fabs(half_to_float(near)) > std::fabs(v)) --near;  // one step down in magnitude
  return near;
}

// Value of a source operand: of a float in `real`, of an integer in `integer`, its bits read as S.
struct Source {
  bool is_float;
  double real;
  __int128 integer;
};

template <class S>
void read(Step& step, const Operand& o, Source (&v)[kWarp]) {
  S a[kWarp];
  step.get(o, a);
  for (int l = 0; l < kWarp; ++l) {
    if constexpr (std::is_floating_point_v<S>) {
      const S value = std::is_same_v<S, float> && step.instruction.ftz ? S(flushed(float(a[l]))) : a[l];
      v[l] = {true, double(value), 0};
    } else {
      v[l] = {false, 0, __int128(a[l])};
    }
  }
}

void read(Step& step, const Operand& o, Type t, Source (&v)[kWarp]) {
  if (t.kind == 'f' && t.bits == 32) return read<float>(step, o, v);
  if (t.kind == 'f' && t.bits == 64) return read<double>(step, o, v);
  if (t.kind == 'f' || t.kind == 'h') {
    uint16_t a[kWarp];
    step.get(o, a);
    for (int l = 0; l < kWarp; ++l)
      v[l] = {true, double(t.kind == 'h' ? bfloat_to_float(a[l]) : half_to_float(a[l])), 0};
    return;
  }
  const bool is_signed = t.kind == 's';
  switch (t.bits) {
    case 8: return is_signed ? read<int8_t>(step, o, v) : read<uint8_t>(step, o, v);
    case 16: return is_signed ? read<int16_t>(step, o, v) : read<uint16_t>(step, o, v);
    case 32: return is_signed ? read<int32_t>(step, o, v) : read<uint32_t>(step, o, v);
    default: return is_signed ? read<int64_t>(step, o, v) : read<uint64_t>(step, o, v);
  }
}

// A float is rounded and kept in range, NaN becomes 0; an integer wraps, or with .sat is kept in range.
template <class D>
D integer_of(const Instruction& in, const Source& v) {
  const __int128 least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
  if (!v.is_float) return D(in.sat ? std::min(std::max(v.integer, least), most) : v.integer);
  if (v.real != v.real) return 0;
  const double rounded = whole(v.real, in.detail);
  if (rounded >= std::ldexp(1.0, std::numeric_limits<D>::digits)) return D(most);
  return rounded <= double(least) ? D(least) : D(rounded);
}

template <class D>
void to_integer(Step& step) {
  Source v[kWarp];
  read(step, step.operand(1), step.instruction.second.kind ? step.instruction.type : Type{}, v);
  D r[kWarp];
  for (int l = 0; l < kWarp; ++l) r[l] = integer_of<D>(step.instruction, v[l]);
  step.put(size_t(0), r);
}

float float_of(const Instruction& in, const Source& v) {
  if (!v.is_float) {
    const float near = float(v.integer);  // rounds to nearest
    return in.detail == kNearest ? near : directed({double(v.integer), 0}, in.detail);
  }
  const bool to_whole = in.has("rni") || in.has("rzi") || in.has("rmi") || in.has("rpi");
  float r = to_whole ? float(whole(v.real, in.detail)) : directed({v.real, 0}, in.detail);
  if (in.sat) r = r > 0 ? std::min(r, 1.0f) : 0.0f;
  if (in.has("relu") && !(r > 0)) r = r != r ? r : 0.0f;
  return in.ftz ? flushed(r) : r;
}

void to_float(Step& step) {
  Source v[kWarp];
  read(step, step.operand(1), step.instruction.type, v);
  float r[kWarp];
  for (int l = 0; l < kWarp; ++l) r[l] = float_of(step.instruction, v[l]);
  step.put(size_t(0), r);
}

void to_double(Step& step) {
  Source v[kWarp];
  read(step, step.operand(1), step.instruction.type, v);
  const Instruction& in = step.instruction;
  const bool to_whole = in.has("rni") || in.has("rzi") || in.has("rmi") || in.has("rpi");
  double r[kWarp];
  for (int l = 0; l < kWarp; ++l)
    r[l] = !v[l].is_float ? double(v[l].integer) : to_whole ? whole(v[l].real, in.detail) : v[l].real;
  step.put(size_t(0), r);
}

uint16_t half_of(const Instruction& in, const Source& v, bool bfloat) {
  double value = v.is_float ? v.real : double(v.integer);
  if (in.has("relu") && value <= 0) value = 0;
  if (in.detail == kToZero) return cut(float(value), bfloat);
  return bfloat ? double_to_bfloat(value) : double_to_half(value);
}

void to_half(Step& step) {  // f16, bf16
  const Instruction& in = step.instruction;
  Source v[kWarp];
  read(step, step.operand(1), in.type, v);
  uint16_t r[kWarp];
  for (int l = 0; l < kWarp; ++l) r[l] = half_of(in, v[l], in.second.kind == 'h');
  step.put(size_t(0), r);
}

void to_pair(Step& step) {  // cvt.rn.bf16x2.f32 d, high, low
  const Instruction& in = step.instruction;
  Source high[kWarp], low[kWarp];
  read(step, step.operand(1), in.type, high);
  read(step, step.operand(2), in.type, low);
  uint32_t r[kWarp];
  for (int l = 0; l < kWarp; ++l)
    r[l] = uint32_t(half_of(in, high[l], in.second.kind == 'h')) << 16 | half_of(in, low[l], in.second.kind == 'h');
  step.put(size_t(0), r);
}

void to_tf32(Step& step) {  // 10 bits of mantissa: to nearest, ties away (.rna)
  uint32_t a[kWarp];
  step.get(1, a);
  for (uint32_t& v : a)
    if ((v & 0x7f800000u) != 0x7f800000u) v = (v + 0x1000u) & ~0x1fffu;
  step.put(size_t(0), a);
}

}  // namespace

bool decode_convert(Instruction& in) {
  if (in.parts[0] != "cvt" || in.has("pack")) return false;
  in.detail = rounding_of(in);
  const Type to = in.second, from = in.type;
  if (from.kind == 't' || from.packed != 1) return false;
  if (to.kind == 't') return in.has("rna") && (in.action = to_tf32);
  const bool directed_half = in.detail == kDown || in.detail == kUp;
  if (to.packed == 2) return !directed_half && from.bits == 32 && (in.action = to_pair);
  if (to.kind == 'h' || (to.kind == 'f' && to.bits == 16)) return !directed_half && (in.action = to_half);
  if (to.kind == 'f') return (in.action = to.bits == 32 ? to_float : to_double);
  const bool is_signed = to.kind == 's';
  switch (to.bits) {
    case 8: return (in.action = is_signed ? to_integer<int8_t> : to_integer<uint8_t>);
    case 16: return (in.action = is_signed ? to_integer<int16_t> : to_integer<uint16_t>);
    case 32: return (in.action = is_signed ? to_integer<int32_t> : to_integer<uint32_t>);
    case 64: return (in.action = is_signed ? to_integer<int64_t> : to_integer<uint64_t>);
    default: return false;
  }
}

}  // namespace ptx
