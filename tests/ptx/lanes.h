// What instructions that each lane executes for itself have in common: values, and the choice of an action by type.
#pragma once
#include "machine.h"

namespace ptx {

// ---- values --------------------------------------------------------------------------------------------------------

// Sixteen-bit floats compute in double and are rounded once.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};
template <class T>
struct Pair {  // .f16x2, .bf16x2
  T low, high;
};

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;

inline double wide(Half v) { return double(half_to_float(v.bits)); }
inline double wide(Bfloat v) { return double(bfloat_to_float(v.bits)); }
inline void narrow(Half& to, double v) { to.bits = double_to_half(v); }
inline void narrow(Bfloat& to, double v) { to.bits = double_to_bfloat(v); }

template <class T>
T begin(const Instruction& in, T v) {
  if constexpr (std::is_same_v<T, float>) {
    if (in.ftz) return flushed(v);
  }
  return v;
}

// ---- which type ----------------------------------------------------------------------------------------------------

// Form<Op, T>::action for the T that the type says; nullptr: there is none.
template <template <class, class> class Form, class Op>
Action of_integer(Type t) {
  const bool is_signed = t.kind == 's';
  switch (t.packed == 1 && t.kind != 'f' && t.kind != 'h' ? t.bits : 0) {
    case 16: return is_signed ? Form<Op, int16_t>::action : Form<Op, uint16_t>::action;
    case 32: return is_signed ? Form<Op, int32_t>::action : Form<Op, uint32_t>::action;
    case 64: return is_signed ? Form<Op, int64_t>::action : Form<Op, uint64_t>::action;
    default: return nullptr;
  }
}
template <template <class, class> class Form, class Op>
Action of_float(Type t) {
  if (t.kind == 'f' && t.bits == 32) return Form<Op, float>::action;
  if (t.kind == 'f' && t.bits == 64) return Form<Op, double>::action;
  if (t.kind == 'f' && t.bits == 16) return t.packed == 1 ? Form<Op, Half>::action : Form<Op, Pair<Half>>::action;
  if (t.kind == 'h') return t.packed == 1 ? Form<Op, Bfloat>::action : Form<Op, Pair<Bfloat>>::action;
  return nullptr;
}
template <template <class, class> class Form, class Op>
Action of_any(Type t) {
  const Action found = of_integer<Form, Op>(t);
  return found ? found : of_float<Form, Op>(t);
}

}  // namespace ptx
