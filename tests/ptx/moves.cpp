// Comparisons, choices, logic of predicates, moves.
#include <map>

#include "lanes.h"

namespace ptx {
namespace {

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

}  // namespace

bool decode_move(Instruction& in) {
  const std::string& name = in.parts[0];
  if (name == "setp") {
    const auto how = kComparisons.find(in.parts[1]);
    if (how == kComparisons.end()) return false;
    in.detail = how->second;
    return (in.action = of_any<Compare, void>(in.type));
  }
  if (name == "and" || name == "or" || name == "xor" || name == "not")
    return in.type.kind == 'p' && (in.action = logic);
  if (name == "selp") return (in.action = select_of(in.type));
  if (name == "mov") return (in.action = move_of(in.type));
  return name == "cvta" && (in.action = convert_address);
}

}  // namespace ptx
