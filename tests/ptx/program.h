// PTX as it was read: kernels, their parameters and registers, and instructions whose operands are places and numbers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kWarp = 32;

// Generic addresses of what is not global memory; a global address is a host address.
constexpr uint64_t kSharedWindow = 1ull << 60, kLocalWindow = 1ull << 61;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An instruction's type: .u32, .bf16x2, .pred ...
struct Type {
  char kind = 0;  // 'b', 'u', 's', 'f', 'h' (bf16), 't' (tf32), 'p' (pred)
  int bits = 0;   // of one value
  int packed = 1;
  int bytes() const { return bits * packed / 8; }
};

struct Operand {
  enum class Is : uint8_t { none, reg, number, special, memory, list };
  Is is = Is::none;
  bool negated = false;  // !%p
  bool based = false;    // memory: a register holds the base
  int bits = 0;          // of the register
  uint32_t at = 0;       // the register's place in a warp's registers; number of the special register
  uint64_t number = 0;   // bits of a literal, address of a symbol; memory: what is added to the base
  std::vector<Operand> list;
};

struct Step;
using Action = void (*)(Step&);

struct Instruction {
  std::string text;
  int line = 0;
  std::vector<std::string> parts;  // the opcode, split at the dots
  std::vector<Operand> operands;
  bool guarded = false;
  Operand guard;
  std::vector<std::string> labels;  // branches: where to
  std::vector<uint32_t> targets;

  // Found by decode(), before the first launch.
  Action action = nullptr;
  Type type, second;  // the last type in the opcode, and the one before it
  int width = 1;      // .v2, .v4; registers of ldmatrix
  char space = 0;     // 'g', 's', 'l', 'p', 0: generic
  bool ftz = false, sat = false;
  uint32_t detail = 0;  // what the action needs to know beyond that
  // How it is counted: 'a' floating-point arithmetic, 'm' memory but parameters, 'w' of a warp, 0 the rest, of which
  // ptxas makes more or fewer.
  char counted = 0;

  bool has(const char* part) const;
};

struct Parameter {
  std::string name;
  size_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0;
  size_t register_bytes = 0;  // of a warp: a 32-bit mask for each predicate, 32 values for each other register
  size_t static_shared = 0, local_bytes = 0;
  std::vector<Instruction> code;
  bool decoded = false;
};

// A module: its kernels, and memory for its .global and .const variables.
class Program {
 public:
  explicit Program(const std::string& text);
  Kernel& kernel(const std::string& name);
  std::vector<std::pair<uint64_t, uint64_t>> variables() const;  // address, bytes

 private:
  friend class Parser;
  std::map<std::string, Kernel> kernels_;
  std::map<std::string, std::vector<uint64_t>> variables_;
};

// Finds the action of each instruction; an Error names the first that is not known.
void decode(Kernel& kernel);

// The families of instructions: fill in action and detail, or say that the opcode is none of theirs.
bool decode_arithmetic(Instruction& instruction);  // arithmetic.cpp
bool decode_integer(Instruction& instruction);     // integer.cpp
bool decode_move(Instruction& instruction);        // moves.cpp
bool decode_convert(Instruction& instruction);     // convert.cpp
bool decode_memory(Instruction& instruction);      // memory.cpp
bool decode_warp(Instruction& instruction);        // warp.cpp
bool decode_control(Instruction& instruction);     // machine.cpp

// Special registers.
enum Special : uint32_t {
  kTid,
  kNtid = 3,
  kCtaid = 6,
  kNctaid = 9,
  kLaneid = 12,
  kWarpid,
  kNwarpid,
  kSmid,
  kClock,
  kGridid,
  kMaskEq,
  kMaskLe,
  kMaskLt,
  kMaskGe,
  kMaskGt,
  kDynamicShared,
  kTotalShared,
  kZero
};  // x, y and z follow each other

}  // namespace ptx
