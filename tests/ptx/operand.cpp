#include "operand.h"

#include "text.h"

namespace ptx {
namespace {

const std::map<std::string, Special> kSpecials = {{"%laneid", kLaneid},
                                                  {"%warpid", kWarpid},
                                                  {"%nwarpid", kNwarpid},
                                                  {"%smid", kSmid},
                                                  {"%clock", kClock},
                                                  {"%clock64", kClock},
                                                  {"%gridid", kGridid},
                                                  {"%lanemask_eq", kMaskEq},
                                                  {"%lanemask_le", kMaskLe},
                                                  {"%lanemask_lt", kMaskLt},
                                                  {"%lanemask_ge", kMaskGe},
                                                  {"%lanemask_gt", kMaskGt},
                                                  {"%dynamic_smem_size", kDynamicShared},
                                                  {"%total_smem_size", kTotalShared}};

bool find_special(const std::string& name, Operand& made) {
  if (name[0] != '%') return false;
  made.is = Operand::Is::special;
  const size_t dot = name.find('.');
  static const std::map<std::string, uint32_t> triples = {
      {"%tid", kTid}, {"%ntid", kNtid}, {"%ctaid", kCtaid}, {"%nctaid", kNctaid}};
  if (dot != std::string::npos && triples.count(name.substr(0, dot))) {
    made.at = triples.at(name.substr(0, dot)) + uint32_t(name[dot + 1] - 'x');
  } else if (kSpecials.count(name)) {
    made.at = kSpecials.at(name);
  } else if (starts_with(name, "%envreg")) {
    made.at = kZero;
  } else {
    throw Error("unknown register " + name);
  }
  return true;
}

}  // namespace

Operand Names::operand(const std::string& text) const {
  Operand made;
  if (text[0] == '{') {
    made.is = Operand::Is::list;
    for (const std::string& one : split(text.substr(1, text.size() - 2))) made.list.push_back(operand(one));
  } else if (text.find('|') != std::string::npos) {  // a register and a predicate
    made.is = Operand::Is::list;
    for (const std::string& one : split(text, '|')) made.list.push_back(operand(one));
  } else if (text[0] == '[') {
    made = address(trimmed(text.substr(1, text.size() - 2)));
  } else if (text[0] == '!') {
    made = operand(text.substr(1));
    made.negated = true;
  } else if (text != "_" && !find_register(text, made) && !find_special(text, made)) {
    made.is = Operand::Is::number;
    const auto symbol = symbols.find(text);
    made.number = symbol != symbols.end() ? symbol->second : literal(text);
  }
  return made;
}

Operand Names::address(const std::string& text) const {  // %r1   %r1 + 4   %r1+-4   symbol+4   symbol
  Operand made;
  const size_t plus = text.find('+');
  const std::string base = trimmed(text.substr(0, plus));
  made.based = find_register(base, made);
  if (!made.based) made.number = operand(base).number;
  if (plus != std::string::npos) made.number += literal(trimmed(text.substr(plus + 1)));
  made.is = Operand::Is::memory;
  return made;
}

bool Names::find_register(const std::string& name, Operand& made) const {
  for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
    const auto found = scope->find(name);
    if (found == scope->end()) continue;
    made.is = Operand::Is::reg;
    made.at = found->second.at;
    made.bits = found->second.bits;
    return true;
  }
  return false;
}

}  // namespace ptx
