// Integers beyond plain arithmetic: products of twice the width, shifts, fields and bits.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

// mul.wide, mul.hi, and the same with an addition. W holds a whole product.
template <class T, class W, bool high>
void product(Step& step) {
  using R = std::conditional_t<high, T, W>;
  T a[kWarp], b[kWarp];
  R c[kWarp] = {}, r[kWarp];
  step.get(1, a);
  step.get(2, b);
  if (step.instruction.parts[0] == "mad") step.get(3, c);
  for (int l = 0; l < kWarp; ++l) r[l] = R(R(high ? W(a[l]) * W(b[l]) >> 8 * sizeof(T) : W(a[l]) * W(b[l])) + c[l]);
  step.put(size_t(0), r);
}

template <bool high>
Action product_of(Type t) {
  const bool is_signed = t.kind == 's';
  if (t.bits == 16) return is_signed ? product<int16_t, int32_t, high> : product<uint16_t, uint32_t, high>;
  if (t.bits == 32) return is_signed ? product<int32_t, int64_t, high> : product<uint32_t, uint64_t, high>;
  if constexpr (high) {
    if (t.bits == 64) return is_signed ? product<int64_t, __int128, high> : product<uint64_t, unsigned __int128, high>;
  }
  return nullptr;
}

template <class T, bool left>
void shift(Step& step) {
  T a[kWarp], r[kWarp];
  uint32_t by[kWarp];
  step.get(1, a);
  step.get(2, by);
  constexpr uint32_t bits = 8 * sizeof(T);
  for (int l = 0; l < kWarp; ++l) {
    if (by[l] < bits) {
      r[l] = T(left ? a[l] << by[l] : a[l] >> by[l]);
    } else {
      r[l] = std::is_signed_v<T> && !left && a[l] < 0 ? T(-1) : T(0);
    }
  }
  step.put(size_t(0), r);
}
template <bool left>
Action shift_of(Type t) {
  const bool is_signed = t.kind == 's';
  if (t.bits == 16) return is_signed ? shift<int16_t, left> : shift<uint16_t, left>;
  if (t.bits == 32) return is_signed ? shift<int32_t, left> : shift<uint32_t, left>;
  return t.bits == 64 ? (is_signed ? shift<int64_t, left> : shift<uint64_t, left>) : nullptr;
}

// shf.l: the upper half of b:a shifted left; shf.r: the lower half, shifted right.
void funnel(Step& step) {
  uint32_t a[kWarp], b[kWarp], by[kWarp], r[kWarp];
  step.get(1, a);
  step.get(2, b);
  step.get(3, by);
  const bool wrap = step.instruction.has("wrap"), left = step.instruction.has("l");
  for (int l = 0; l < kWarp; ++l) {
    const uint32_t n = wrap ? by[l] & 31 : std::min(by[l], 32u);
    const uint64_t both = uint64_t(b[l]) << 32 | a[l];
    r[l] = left ? uint32_t(both << n >> 32) : uint32_t(both >> n);
  }
  step.put(size_t(0), r);
}

template <class T>
void extract(Step& step) {  // bfe: `length` bits of a from `from` on
  T a[kWarp], r[kWarp];
  uint32_t from[kWarp], length[kWarp];
  step.get(1, a);
  step.get(2, from);
  step.get(3, length);
  constexpr uint32_t bits = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  for (int l = 0; l < kWarp; ++l) {
    const uint32_t f = from[l] & 0xff, n = length[l] & 0xff;
    const bool sign = std::is_signed_v<T> && n && (U(a[l]) >> std::min({bits - 1, f + n - 1}) & 1);
    U found = f < bits ? U(a[l]) >> f : 0;
    const U mask = n >= bits ? U(~U(0)) : U((U(1) << n) - 1);
    found &= mask;
    if (sign) {
      const uint32_t known = f >= bits ? 0 : std::min(n, bits - f);
      found |= known >= bits ? 0 : U(~U(0)) << known;
    }
    r[l] = T(found);
  }
  step.put(size_t(0), r);
}

template <class T>
void insert(Step& step) {  // bfi: the lower bits of a into b
  T a[kWarp], b[kWarp], r[kWarp];
  uint32_t to[kWarp], length[kWarp];
  step.get(1, a);
  step.get(2, b);
  step.get(3, to);
  step.get(4, length);
  constexpr uint32_t bits = 8 * sizeof(T);
  for (int l = 0; l < kWarp; ++l) {
    const uint32_t f = to[l] & 0xff, n = length[l] & 0xff;
    const T ones = n >= bits ? T(~T(0)) : T((T(1) << n) - 1);
    const T mask = f >= bits ? T(0) : T(ones << f);
    r[l] = f >= bits ? b[l] : T((b[l] & ~mask) | (T(a[l] << f) & mask));
  }
  step.put(size_t(0), r);
}

void permute(Step& step) {  // prmt: four bytes chosen out of b:a
  uint32_t a[kWarp], b[kWarp], c[kWarp], r[kWarp];
  step.get(1, a);
  step.get(2, b);
  step.get(3, c);
  for (int l = 0; l < kWarp; ++l) {
    const uint64_t both = uint64_t(b[l]) << 32 | a[l];
    r[l] = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t choice = c[l] >> 4 * i & 15;
      uint8_t byte = uint8_t(both >> 8 * (choice & 7));
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, eight times
      r[l] |= uint32_t(byte) << 8 * i;
    }
  }
  step.put(size_t(0), r);
}

void lookup(Step& step) {  // lop3: any function of three bits, by its table
  uint32_t a[kWarp], b[kWarp], c[kWarp], r[kWarp] = {};
  step.get(1, a);
  step.get(2, b);
  step.get(3, c);
  const uint32_t table = uint32_t(step.operand(4).number);
  for (int l = 0; l < kWarp; ++l)
    for (uint32_t i = 0; i < 8; ++i)
      if (table >> i & 1) r[l] |= (i & 4 ? a[l] : ~a[l]) & (i & 2 ? b[l] : ~b[l]) & (i & 1 ? c[l] : ~c[l]);
  step.put(size_t(0), r);
}

// popc, clz, brev, bfind: the first two and the last give 32 bits.
template <class T>
void bits_of(Step& step) {
  T a[kWarp];
  uint32_t r[kWarp];
  step.get(1, a);
  const std::string& name = step.instruction.parts[0];
  for (int l = 0; l < kWarp; ++l) {
    uint64_t v = uint64_t(a[l]);
    if (name == "bfind" && step.instruction.type.kind == 's' && T(a[l]) >> (8 * sizeof(T) - 1)) v = T(~a[l]);
    const uint32_t leading = v ? uint32_t(__builtin_clzll(v)) - uint32_t(64 - 8 * sizeof(T)) : 8 * sizeof(T);
    if (name == "popc") r[l] = uint32_t(__builtin_popcountll(v));
    if (name == "clz") r[l] = leading;
    if (name == "bfind") r[l] = !v ? ~0u : step.instruction.has("shiftamt") ? leading : 8 * sizeof(T) - 1 - leading;
  }
  step.put(size_t(0), r);
}

template <class T>
void reverse(Step& step) {
  T a[kWarp], r[kWarp] = {};
  step.get(1, a);
  for (int l = 0; l < kWarp; ++l)
    for (size_t i = 0; i < 8 * sizeof(T); ++i) r[l] |= T((a[l] >> i & 1) << (8 * sizeof(T) - 1 - i));
  step.put(size_t(0), r);
}

// The form for 32 or 64 bits.
template <template <class> class Form>
Action by_width(Type t) {
  return t.bits == 32 ? Form<uint32_t>::action : t.bits == 64 ? Form<uint64_t>::action : nullptr;
}
template <class T>
struct Insert {
  static constexpr Action action = insert<T>;
};
template <class T>
struct Bits {
  static constexpr Action action = bits_of<T>;
};
template <class T>
struct Reverse {
  static constexpr Action action = reverse<T>;
};

Action action_of(const Instruction& in) {
  const std::string& name = in.parts[0];
  const bool is_signed = in.type.kind == 's';
  if (name == "mul" || name == "mad")
    return in.has("wide") ? product_of<false>(in.type) : in.has("hi") ? product_of<true>(in.type) : nullptr;
  if (name == "shl") return shift_of<true>(in.type);
  if (name == "shr") return shift_of<false>(in.type);
  if (name == "shf") return funnel;
  if (name == "bfe" && in.type.bits == 32) return is_signed ? extract<int32_t> : extract<uint32_t>;
  if (name == "bfe" && in.type.bits == 64) return is_signed ? extract<int64_t> : extract<uint64_t>;
  if (name == "bfi") return by_width<Insert>(in.type);
  if (name == "prmt" && in.parts.size() == 2) return permute;
  if (name == "lop3") return lookup;
  if (name == "popc" || name == "clz" || name == "bfind") return by_width<Bits>(in.type);
  return name == "brev" ? by_width<Reverse>(in.type) : nullptr;
}

}  // namespace

bool decode_integer(Instruction& in) { return !in.has("cc") && !in.sat && (in.action = action_of(in)); }

}  // namespace ptx
