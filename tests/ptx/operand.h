// An operand's text to places and numbers.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

// What names stand for in a kernel.
struct Names {
  struct Register {
    uint32_t at;
    int bits;
  };
  std::vector<std::map<std::string, Register>> scopes;  // the innermost last
  std::map<std::string, uint64_t> symbols;              // of variables and parameters: addresses

  Operand operand(const std::string& text) const;

 private:
  Operand address(const std::string& text) const;
  bool find_register(const std::string& name, Operand& made) const;
};

}  // namespace ptx
