// The launch in progress: blocks, warps, threads, and what they wait for. Of the emulator's own files alone.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace simt {

struct Block;
struct Lane;

// The lanes of one mask that wait for the rest of it.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  void* values[kWarp];
  struct Lane* waiting[kWarp];
};

// One access of a warp to shared memory: the n-th of each of its lanes since they last met.
struct BankAccess {
  unsigned lanes = 0;
  uint32_t bytes = 0;
  uint32_t offset[kWarp];
};

struct Warp {
  std::vector<Meeting> meetings;  // one a mask in use
  std::vector<BankAccess> accesses;
  std::vector<struct Lane*> lanes;
  uint32_t syncs = 0;
  char places[2];  // as a Barrier's
};

// A copy to shared memory under way.
struct Copy {
  size_t offset, read, bytes;
  const void* from;
  size_t group;
};

// A CUDA thread.
struct Lane : Thread {
  Block* of;
  Warp* warp;
  const char* waits_at = nullptr;
  size_t accesses = 0;  // to shared memory since its warp last met
  bool done = false;
  std::vector<Copy> copies;  // under way
  size_t group = 0;          // of copies, the open one
  Fiber fiber;
  explicit Lane(void (*entry)()) : fiber(entry) {}
};

// Threads that wait at a barrier for all that have not returned.
struct Barrier {
  std::vector<Lane*> waiting;
  uint32_t passed = 0;
  char places[2];  // to publish(): in turns, or who is early would already be seen
};

// How many barriers each block of a launch had passed, as far as somebody knows: what threads did before is ordered.
using Clocks = std::vector<uint32_t>;

void learn(Clocks& clocks, const Clocks& others);

// A word that blocks signal through.
struct Signal {
  struct Waiting {
    Lane* lane;
    unsigned least;
  };
  Clocks known;
  std::vector<Waiting> waiting;
};

struct Block {
  SharedMemory shared;
  size_t number;          // in the launch
  Clocks known, learned;  // by all of its threads; by one of them since the last barrier
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Lane>> lanes;
  Barrier barrier;
  bool vote = false, voted = false;  // so far; at the last barrier
  size_t running = 0;                // lanes that have not returned
  Block(size_t shared_bytes, size_t number, size_t blocks)
      : shared(shared_bytes), number(number), known(blocks), learned(blocks) {}
};

// The launch in progress.
struct State {
  const std::function<void()>* body = nullptr;
  bool cooperative = false;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Lane*> ready;
  std::map<const unsigned*, Signal> signals;
  size_t running = 0;
  uint64_t random = 1;
  bool failed = false;
  char begun;  // to publish(): what was done before the launch
};
extern State state;
extern std::string error_text;

inline Lane* self() { return static_cast<Lane*>(current); }
std::string where(const Thread& t);

void wait_at(const char* place);  // suspends the running fiber
void pass_barrier(Block& block);  // all who can come are there
void settle_banks(Warp& warp);    // counts its accesses since it last met

}  // namespace simt
