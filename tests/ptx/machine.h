// What executes a Program. A warp goes on in lockstep for those of its lanes that are at the same instruction, the
// lowest one first, so that lanes that parted meet again; lanes wait at barriers and in warp instructions for others.
// Warps take turns of some instructions. Blocks come one after the other, those of a cooperative launch all at once.
#pragma once
#include <cstring>
#include <deque>
#include <memory>

#include "memory.h"
#include "numbers.h"
#include "program.h"

namespace ptx {

struct Launch {
  unsigned grid[3], block[3];
  size_t shared_bytes;
  bool cooperative;
};

// What launches executed; instructions are those of warps.
struct Counts {
  uint64_t launches, blocks, instructions, products, bytes_loaded, bytes_stored;  // products: mma; bytes: global memory
  uint64_t arithmetic, memory, exchanges;                                         // by Instruction::counted
};

struct Config {
  uint64_t seed = 0;  // 0: warps in order; else in any, by seed
  bool junk = false;  // torch fills fresh memory with its pattern: report loads of it
};

struct Block;

// A copy of cp.async that is under way, for one lane.
struct Copy {
  int lane;
  uint64_t to;
  size_t bytes;
  unsigned char data[16];
};

struct Warp {
  Block* block = nullptr;
  int number = 0;
  uint32_t alive = 0;    // lanes that have not returned
  uint32_t blocked = 0;  // lanes that wait at `pc`
  uint32_t pc[kWarp] = {};
  std::vector<unsigned char> registers;
  std::vector<unsigned char> local;  // [lane][bytes]
  std::vector<Copy> open[kWarp];     // of each lane: since the last commit_group
  std::deque<std::vector<Copy>> groups[kWarp];
  uint32_t runnable() const { return alive & ~blocked; }
};

struct Barrier {
  unsigned needed = 0, arrived = 0;
  std::vector<std::pair<Warp*, uint32_t>> waiting;
  unsigned yes = 0;  // of bar.red: threads whose predicate holds
};

struct Block {
  unsigned index[3];
  SharedMemory shared;
  std::vector<Warp> warps;
  Barrier barriers[16];
  unsigned running = 0;
  explicit Block(size_t shared_bytes) : shared(shared_bytes) {}
};

class Machine {
 public:
  Machine(const Kernel& kernel, const Launch& launch, const void* const* arguments);
  void run();

  const Kernel& kernel;
  const Launch& launch;
  std::vector<unsigned char> parameters;
  uint64_t clock = 0;

  void arrive(Step& step, unsigned barrier, unsigned needed, bool waits);

 private:
  void add_block(unsigned x, unsigned y, unsigned z);
  void run_blocks();
  void run_warp(Warp& warp, uint64_t instructions);
  void release(Barrier& barrier);
  void check_barriers(Block& block);
  [[noreturn]] void deadlock() const;
  uint64_t draw();

  std::vector<std::unique_ptr<Block>> blocks_;
  uint64_t random_;
};

extern Config config;
extern Counts counts;  // of the launch in progress

// One instruction for the lanes in `mask`.
struct Step {
  Machine& machine;
  Warp& warp;
  const Instruction& instruction;
  uint32_t mask;
  uint32_t next;  // lanes that go on behind the instruction; branches take theirs out

  [[noreturn]] void fail(const std::string& what, int lane = -1) const;
  bool active(int lane) const { return mask >> lane & 1; }

  // ---- operands ----------------------------------------------------------------------------------------------------

  const Operand& operand(size_t i) const { return instruction.operands[i]; }
  uint32_t predicate(const Operand& o) const;  // a mask
  void set_predicate(const Operand& o, uint32_t value);

  // The value of each lane; a wider register gives its lower bits, a narrower one zeros above.
  template <class T>
  void get(const Operand& o, T (&v)[kWarp]) const;
  template <class T>
  void get(size_t i, T (&v)[kWarp]) const {
    get(operand(i), v);
  }
  // To the lanes in the mask; a wider register takes the sign of a signed T along.
  template <class T>
  void put(const Operand& o, const T (&v)[kWarp]);
  template <class T>
  void put(size_t i, const T (&v)[kWarp]) {
    put(operand(i), v);
  }
  // Addresses of a memory operand.
  void addresses(const Operand& o, uint64_t (&v)[kWarp]) const;

 private:
  void special(uint32_t which, uint64_t (&v)[kWarp]) const;
  template <class R, class T>
  void copy(const Operand& o, T (&v)[kWarp]) const {
    R r[kWarp];
    std::memcpy(r, warp.registers.data() + o.at, sizeof r);
    for (int l = 0; l < kWarp; ++l) {
      const uint64_t wide = r[l];
      std::memcpy(&v[l], &wide, sizeof(T));
    }
  }
  template <class R, class T>
  void assign(const Operand& o, const T (&v)[kWarp]) {
    unsigned char* place = warp.registers.data() + o.at;
    R r[kWarp];
    std::memcpy(r, place, sizeof r);
    for (int l = 0; l < kWarp; ++l) {
      R value{};
      if constexpr (std::is_integral_v<T>) {
        value = R(v[l]);
      } else {
        std::memcpy(&value, &v[l], sizeof(T) < sizeof(R) ? sizeof(T) : sizeof(R));
      }
      r[l] = mask >> l & 1 ? value : r[l];
    }
    std::memcpy(place, r, sizeof r);
  }
};

template <class T>
void Step::get(const Operand& o, T (&v)[kWarp]) const {
  switch (o.is) {
    case Operand::Is::reg:
      if (size_t(o.bits) == 8 * sizeof(T)) {
        std::memcpy(v, warp.registers.data() + o.at, sizeof v);
        return;
      }
      if (o.bits == 64) return copy<uint64_t>(o, v);
      if (o.bits == 32) return copy<uint32_t>(o, v);
      if (o.bits == 16) return copy<uint16_t>(o, v);
      if (o.bits == 8) return copy<uint8_t>(o, v);
      fail("a predicate as a number");
    case Operand::Is::number:
      for (int l = 0; l < kWarp; ++l) std::memcpy(&v[l], &o.number, sizeof(T));
      return;
    case Operand::Is::special: {
      uint64_t wide[kWarp];
      special(o.at, wide);
      for (int l = 0; l < kWarp; ++l) std::memcpy(&v[l], &wide[l], sizeof(T));
      return;
    }
    default: fail("an operand that holds no number");
  }
}

template <class T>
void Step::put(const Operand& o, const T (&v)[kWarp]) {
  if (o.is == Operand::Is::none) return;  // _
  if (o.is != Operand::Is::reg) fail("a result needs a register");
  switch (o.bits) {
    case 64: return assign<uint64_t>(o, v);
    case 32: return assign<uint32_t>(o, v);
    case 16: return assign<uint16_t>(o, v);
    case 8: return assign<uint8_t>(o, v);
    default: fail("a predicate as a result");
  }
}

// The lanes that meet in a warp instruction: true once all of `members` are there, and then mask holds them; otherwise
// those of this step wait. Each lane says whom it waits for.
bool meet(Step& step, const uint32_t (&members)[kWarp]);
bool meet_all(Step& step);  // the whole warp: instructions that are .aligned

}  // namespace ptx
