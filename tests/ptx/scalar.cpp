// Instructions that each lane executes for itself: arithmetic, logic, comparisons, moves.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

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
template <class T>
T begin(const Instruction& in, T v) {
  if constexpr (std::is_same_v<T, float>) {
    if (in.ftz) return flushed(v);
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

// ---- which type ----------------------------------------------------------------------------------------------------

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

template <template <class, class> class Form, class Op>
Action of_any(Type t) {
  const Action found = of_integer<Form, Op>(t);
  return found ? found : of_float<Form, Op>(t);
}

// ---- comparisons and choices ---------------------------------------------------------------------------------------

enum Comparison : uint32_t { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan, kUnordered = 8 };
const std::map<std::string, uint32_t> kComparisons = {{"eq", kEq},
                                                      {"ne", kNe},
                                                      {"lt", kLt},
                                                      {"le", kLe},
                                                      {"gt", kGt},
                                                      {"ge", kGe},
                                                      {"lo", kLt},
                                                      {"ls", kLe},
                                                      {"hi", kGt},
                                                      {"hs", kGe},
                                                      {"equ", kEq | kUnordered},
                                                      {"neu", kNe | kUnordered},
                                                      {"ltu", kLt | kUnordered},
                                                      {"leu", kLe | kUnordered},
                                                      {"gtu", kGt | kUnordered},
                                                      {"geu", kGe | kUnordered},
                                                      {"num", kNum},
                                                      {"nan", kNan}};

template <class T>
bool holds(uint32_t how, T a, T b) {
  const bool unordered = a != a || b != b;
  if (unordered) return (how & kUnordered) || how == kNan;
  switch (how & 7) {
    case kEq: return a == b;
    case kNe: return a != b;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    case kGe: return a >= b;
    default: return how == kNum;
  }
}
inline bool holds(uint32_t how, Half a, Half b) { return holds(how, wide(a), wide(b)); }
inline bool holds(uint32_t how, Bfloat a, Bfloat b) { return holds(how, wide(a), wide(b)); }

// setp.lt.and.f32 p|q, a, b, c
template <class T>
void compare(Step& step) {
  const Instruction& in = step.instruction;
  T a[kWarp], b[kWarp];
  step.get(1, a);
  step.get(2, b);
  uint32_t found = 0;
  for (int l = 0; l < kWarp; ++l) found |= uint32_t(holds(in.detail, begin(in, a[l]), begin(in, b[l]))) << l;
  uint32_t other = ~found;
  if (in.operands.size() > 3) {
    const uint32_t with = step.predicate(step.operand(3));
    const auto joined = [&](uint32_t v) { return in.has("and") ? v & with : in.has("or") ? v | with : v ^ with; };
    found = joined(found);
    other = joined(other);
  }
  const Operand& to = step.operand(0);
  if (to.is != Operand::Is::list) return step.set_predicate(to, found);
  step.set_predicate(to.list[0], found);
  step.set_predicate(to.list[1], other);
}
template <class, class T>
struct Compare {
  static constexpr Action action = compare<T>;
};
template <class Op, class T>
struct Compare<Op, Pair<T>> {
  static constexpr Action action = nullptr;
};  // set, not setp

template <class T>
void select(Step& step) {
  T a[kWarp], b[kWarp], r[kWarp];
  step.get(1, a);
  step.get(2, b);
  const uint32_t first = step.predicate(step.operand(3));
  for (int l = 0; l < kWarp; ++l) r[l] = first >> l & 1 ? a[l] : b[l];
  step.put(size_t(0), r);
}

void logic(Step& step) {  // and, or, xor, not of predicates
  const std::string& name = step.instruction.parts[0];
  const uint32_t a = step.predicate(step.operand(1));
  if (name == "not") return step.set_predicate(step.operand(0), ~a);
  const uint32_t b = step.predicate(step.operand(2));
  step.set_predicate(step.operand(0), name == "and" ? a & b : name == "or" ? a | b : a ^ b);
}

// ---- moves ---------------------------------------------------------------------------------------------------------

// mov, cvta. {a, b} on either side packs or unpacks, the first in the lowest bits.
template <class T>
void move(Step& step) {
  const Operand &to = step.operand(0), &from = step.operand(1);
  uint64_t all[kWarp] = {};
  if (from.is == Operand::Is::list) {
    const size_t bits = 8 * sizeof(T) / from.list.size();
    for (size_t i = 0; i < from.list.size(); ++i) {
      uint64_t part[kWarp];
      step.get(from.list[i], part);
      for (int l = 0; l < kWarp; ++l) all[l] |= (part[l] & (bits == 64 ? ~0ull : (1ull << bits) - 1)) << i * bits;
    }
  } else {
    T v[kWarp];
    step.get(from, v);
    for (int l = 0; l < kWarp; ++l) all[l] = v[l];
  }
  const std::vector<Operand> one = {to};
  const std::vector<Operand>& parts = to.is == Operand::Is::list ? to.list : one;
  const size_t bits = 8 * sizeof(T) / parts.size();
  for (size_t i = 0; i < parts.size(); ++i) {
    uint64_t part[kWarp];
    for (int l = 0; l < kWarp; ++l) part[l] = all[l] >> i * bits;
    step.put(parts[i], part);
  }
}

void move_predicate(Step& step) { step.set_predicate(step.operand(0), step.predicate(step.operand(1))); }

// cvta.shared: to a generic address; cvta.to.shared: back.
void convert_address(Step& step) {
  uint64_t a[kWarp];
  step.get(1, a);
  const char space = step.instruction.space;
  const uint64_t window = space == 's' ? kSharedWindow : space == 'l' ? kLocalWindow : 0;
  for (uint64_t& v : a) v = step.instruction.has("to") ? v - window : v + window;
  step.put(size_t(0), a);
}

Action move_of(Type t) {
  switch (t.bits * t.packed) {
    case 1: return move_predicate;
    case 16: return move<uint16_t>;
    case 32: return move<uint32_t>;
    case 64: return move<uint64_t>;
    default: return nullptr;
  }
}

Action select_of(Type t) {
  switch (t.bits * t.packed) {
    case 16: return select<uint16_t>;
    case 32: return select<uint32_t>;
    case 64: return select<uint64_t>;
    default: return nullptr;
  }
}

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
    {"and", [](const Instruction& in) { return in.type.kind == 'p' ? logic : of_integer<Binary, And>(in.type); }},
    {"or", [](const Instruction& in) { return in.type.kind == 'p' ? logic : of_integer<Binary, Or>(in.type); }},
    {"xor", [](const Instruction& in) { return in.type.kind == 'p' ? logic : of_integer<Binary, Xor>(in.type); }},
    {"not", [](const Instruction& in) { return in.type.kind == 'p' ? logic : of_integer<Unary, Not>(in.type); }},
    {"cnot", [](const Instruction& in) { return of_integer<Unary, Zero>(in.type); }},
    {"selp", [](const Instruction& in) { return select_of(in.type); }},
    {"mov", [](const Instruction& in) { return move_of(in.type); }},
    {"cvta", [](const Instruction&) -> Action { return convert_address; }},
};

}  // namespace

bool decode_scalar(Instruction& in) {
  // Carries, roundings other than to nearest but of fma and integers that saturate are not there.
  const char* const unknown[] = {"cc", "rz", "rm", "rp", "xorsign"};
  const bool strange = std::any_of(std::begin(unknown), std::end(unknown), [&](const char* p) { return in.has(p); });
  if (in.parts[0] == "fma" && in.type.kind == 'f' && in.type.bits == 32 &&
      (in.has("rz") || in.has("rm") || in.has("rp")))
    return (in.action = fma_directed);
  if (in.parts[0] != "cvt" && (strange || (in.sat && in.type.kind != 'f' && in.type.kind != 'h'))) return false;
  if (in.parts[0] == "setp") {
    const auto how = kComparisons.find(in.parts[1]);
    if (how == kComparisons.end()) return false;
    in.detail = how->second;
    return (in.action = of_any<Compare, Add>(in.type));
  }
  const auto found = kDecoders.find(in.parts[0]);
  return found != kDecoders.end() && (in.action = found->second(in));
}

}  // namespace ptx
