// Arithmetic and bitwise logic.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

// ---- one, two and three values -------------------------------------------------------------------------------------

// f of values of T, whatever T is.
template <class F, class T, class... More>
T apply(F f, T a, More... more) {
  return f(a, more...);
}
template <class F, class... More>
Half apply(F f, Half a, More... more) {
  Half r;
  narrow(r, f(wide(a), wide(more)...));
  return r;
}
template <class F, class... More>
Bfloat apply(F f, Bfloat a, More... more) {
  Bfloat r;
  narrow(r, f(wide(a), wide(more)...));
  return r;
}
template <class F, class T, class... More>
Pair<T> apply(F f, Pair<T> a, More... more) {
  return {apply(f, a.low, more.low...), apply(f, a.high, more.high...)};
}

template <class T>
T finish(const Instruction& in, T v) {
  if constexpr (std::is_same_v<T, float>) {
    if (in.ftz) v = flushed(v);
  }
  if constexpr (is_float<T>) {
    if (in.sat) v = v > T(0) ? std::min(v, T(1)) : T(0);  // NaN becomes 0
  }
  return v;
}
template <class Op, class T>
void unary(Step& step) {
  T a[kWarp], r[kWarp];
  step.get(1, a);
  for (int l = 0; l < kWarp; ++l) r[l] = finish(step.instruction, apply(Op{}, begin(step.instruction, a[l])));
  step.put(size_t(0), r);
}
template <class Op, class T>
void binary(Step& step) {
  const Instruction& in = step.instruction;
  T a[kWarp], b[kWarp], r[kWarp];
  step.get(1, a);
  step.get(2, b);
  for (int l = 0; l < kWarp; ++l) r[l] = finish(in, apply(Op{}, begin(in, a[l]), begin(in, b[l])));
  step.put(size_t(0), r);
}
template <class Op, class T>
void ternary(Step& step) {
  const Instruction& in = step.instruction;
  T a[kWarp], b[kWarp], c[kWarp], r[kWarp];
  step.get(1, a);
  step.get(2, b);
  step.get(3, c);
  for (int l = 0; l < kWarp; ++l) r[l] = finish(in, apply(Op{}, begin(in, a[l]), begin(in, b[l]), begin(in, c[l])));
  step.put(size_t(0), r);
}

// fma.rz, .rm, .rp of float: the product is exact in double, and so is the sum as two of them.
void fma_directed(Step& step) {
  const Instruction& in = step.instruction;
  float a[kWarp], b[kWarp], c[kWarp], r[kWarp];
  step.get(1, a);
  step.get(2, b);
  step.get(3, c);
  for (int l = 0; l < kWarp; ++l)
    r[l] = finish(in, directed(two_sum(double(begin(in, a[l])) * double(begin(in, b[l])), double(begin(in, c[l]))),
                               in.has("rz")   ? kToZero
                               : in.has("rm") ? kDown
                                              : kUp));
  step.put(size_t(0), r);
}

// ---- operations ----------------------------------------------------------------------------------------------------

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return T(a + b);
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return T(a - b);
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return T(a * b);
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return T(-a);
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    if constexpr (is_float<T>)
      return std::fabs(a);
    else
      return a < T(0) ? T(0 - a) : a;
  }
};
// Lanes that are not active divide whatever they hold; a division by zero gives all ones, as hardware does.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>)
      return a / b;
    else if (b == 0)
      return T(~T(0));
    else if (std::is_signed_v<T> && b == T(-1))
      return T(0 - a);
    else
      return T(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
  }
};
struct Least {  // of a NaN and a number, the number
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>)
      return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
    else
      return std::min(a, b);
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>)
      return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
    else
      return std::max(a, b);
  }
};
template <class Op>
struct WithNan {  // .NaN
  template <class T>
  T operator()(T a, T b) const {
    return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : Op{}(a, b);
  }
};
struct MulAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return T(a * b + c);
  }
};
struct Fma {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct Relu {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fmax(std::fma(a, b, c), T(0));
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};
struct Root {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct InverseRoot {
  template <class T>
  T operator()(T a) const {
    return T(1) / std::sqrt(a);
  }
};
// Of hardware's approximations only the value they approximate is known here.
struct Exp2 {
  template <class T>
  T operator()(T a) const {
    return std::exp2(a);
  }
};
struct Log2 {
  template <class T>
  T operator()(T a) const {
    return std::log2(a);
  }
};
struct Sine {
  template <class T>
  T operator()(T a) const {
    return std::sin(a);
  }
};
struct Cosine {
  template <class T>
  T operator()(T a) const {
    return std::cos(a);
  }
};
struct Tanh {
  template <class T>
  T operator()(T a) const {
    return std::tanh(a);
  }
};
struct CopySign {
  template <class T>
  T operator()(T sign, T a) const {
    return std::copysign(a, sign);
  }
};

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return T(~a);
  }
};
struct Zero {
  template <class T>
  T operator()(T a) const {
    return T(a == 0);
  }
};  // cnot

// ---- decoding ------------------------------------------------------------------------------------------------------

template <class Op, class T>
struct Unary {
  static constexpr Action action = unary<Op, T>;
};
template <class Op, class T>
struct Binary {
  static constexpr Action action = binary<Op, T>;
};
template <class Op, class T>
struct Ternary {
  static constexpr Action action = ternary<Op, T>;
};

// Opcode -> what finds its action; nullptr there: none for this type.
const std::map<std::string, Action (*)(const Instruction&)> kDecoders = {
    {"add", [](const Instruction& in) { return of_any<Binary, Add>(in.type); }},
    {"sub", [](const Instruction& in) { return of_any<Binary, Sub>(in.type); }},
    {"mul",
     [](const Instruction& in) -> Action {
       return in.has("wide") || in.has("hi") ? nullptr : of_any<Binary, Mul>(in.type);  // integer.cpp
     }},
    {"mad",
     [](const Instruction& in) -> Action {
       if (in.has("wide") || in.has("hi")) return nullptr;
       return in.type.kind == 'f' ? of_float<Ternary, Fma>(in.type) : of_integer<Ternary, MulAdd>(in.type);
     }},
    {"fma",
     [](const Instruction& in) {
       return in.has("relu") ? of_float<Ternary, Relu>(in.type) : of_float<Ternary, Fma>(in.type);
     }},
    {"div",
     [](const Instruction& in) {
       return in.type.kind == 'f' ? of_float<Binary, Divide>(in.type) : of_integer<Binary, Divide>(in.type);
     }},
    {"rem", [](const Instruction& in) { return of_integer<Binary, Remainder>(in.type); }},
    {"neg", [](const Instruction& in) { return of_any<Unary, Negate>(in.type); }},
    {"abs", [](const Instruction& in) { return of_any<Unary, Absolute>(in.type); }},
    {"min",
     [](const Instruction& in) {
       return in.has("NaN") ? of_float<Binary, WithNan<Least>>(in.type) : of_any<Binary, Least>(in.type);
     }},
    {"max",
     [](const Instruction& in) {
       return in.has("NaN") ? of_float<Binary, WithNan<Greatest>>(in.type) : of_any<Binary, Greatest>(in.type);
     }},
    {"rcp", [](const Instruction& in) { return of_float<Unary, Reciprocal>(in.type); }},
    {"sqrt", [](const Instruction& in) { return of_float<Unary, Root>(in.type); }},
    {"rsqrt", [](const Instruction& in) { return of_float<Unary, InverseRoot>(in.type); }},
    {"ex2", [](const Instruction& in) { return of_float<Unary, Exp2>(in.type); }},
    {"lg2", [](const Instruction& in) { return of_float<Unary, Log2>(in.type); }},
    {"sin", [](const Instruction& in) { return of_float<Unary, Sine>(in.type); }},
    {"cos", [](const Instruction& in) { return of_float<Unary, Cosine>(in.type); }},
    {"tanh", [](const Instruction& in) { return of_float<Unary, Tanh>(in.type); }},
    {"copysign", [](const Instruction& in) { return of_float<Binary, CopySign>(in.type); }},
    {"and", [](const Instruction& in) { return of_integer<Binary, And>(in.type); }},
    {"or", [](const Instruction& in) { return of_integer<Binary, Or>(in.type); }},
    {"xor", [](const Instruction& in) { return of_integer<Binary, Xor>(in.type); }},
    {"not", [](const Instruction& in) { return of_integer<Unary, Not>(in.type); }},
    {"cnot", [](const Instruction& in) { return of_integer<Unary, Zero>(in.type); }},
};

}  // namespace

bool decode_arithmetic(Instruction& in) {
  // Carries, roundings other than to nearest but of fma and integers that saturate are not there.
  const char* const unknown[] = {"cc", "rz", "rm", "rp", "xorsign"};
  const bool strange = std::any_of(std::begin(unknown), std::end(unknown), [&](const char* p) { return in.has(p); });
  if (in.parts[0] == "fma" && in.type.kind == 'f' && in.type.bits == 32 &&
      (in.has("rz") || in.has("rm") || in.has("rp")))
    return (in.action = fma_directed);
  if (strange || (in.sat && in.type.kind != 'f' && in.type.kind != 'h')) return false;
  const auto found = kDecoders.find(in.parts[0]);
  return found != kDecoders.end() && (in.action = found->second(in));
}

}  // namespace ptx
