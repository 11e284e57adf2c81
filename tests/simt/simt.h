// The emulator's interface. CUDA sources, unchanged, are compiled by g++ against include/, whose headers turn CUDA's
// names into calls of these functions; simt.cpp runs a launch with every CUDA thread as a fiber of one host thread.
//
//   include/      cuda_runtime.h, cuda_bf16.h, cuda_fp16.h; in place of the kernels' own, the headers of device/ that
//                 hold PTX or touch memory
//   fiber.*       a stack and a switch
//   simt.cpp      launches: blocks, schedules
//   meet.cpp      barriers, signals between blocks, warp collectives, asynchronous copies
//   state.h       what those two know of a launch
//   banks.cpp     bank conflicts
//   memory.*      shared memory that remembers who touched it; accesses to global memory, counted and checked
//
// A kernel that does what CUDA forbids stops the launch, which returns an error whose text says what and where.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kMostThreads = 1024;      // of a block
constexpr size_t kMostShared = 227 << 10;  // bytes of a block, once asked for
constexpr size_t kSharedWithoutAsking = 48 << 10;

struct Index {
  unsigned x, y, z;
};

class SharedMemory;

// What a kernel can ask about the thread it is, and what each of its accesses to memory needs.
struct Thread {
  Index thread, block, block_size, grid_size;
  int lane;    // in its warp
  int number;  // in its block
  SharedMemory* shared;
  unsigned block_number;                // in the launch
  const unsigned *barriers, *meetings;  // how often its block, and its warp, have synchronised
};

// Of the running fiber. __thread, not thread_local: no wrapper function, which sanitizers would instrument.
extern __thread Thread* current;

// ---- launching ---------------------------------------------------------------------------------------------------

// The order in which threads that can go on do: any (by seed), the lowest first, the highest first, or a warp for as
// long as it can.
enum class Schedule { random, forward, backward, warp_greedy };

struct Config {
  Schedule schedule = Schedule::forward;
  uint64_t seed = 0;
};
extern Config config;

// What launches did since the last reset.
struct Counts {
  uint64_t launches, blocks, threads, switches;
  uint64_t bytes_loaded, bytes_stored;       // global memory
  uint64_t shared_accesses, bank_conflicts;  // of warps; cycles beyond the first that they took
  uint64_t most_shared_bytes;                // of a block
};
extern Counts counts;

struct Launch {
  Index grid, block;
  size_t shared_bytes;
  bool cooperative;  // all blocks are there at once, and may wait for each other's signals
};

// The device that launchers see; tests make it smaller, so that small shapes take the ways of large ones.
struct DeviceSize {
  int multiprocessors = 16;
  int shared_bytes = kMostShared;  // of a block
};
extern DeviceSize device;

// Runs body once for every thread. Returns a cudaError_t; last_error() has the words.
int launch(const Launch& what, const std::function<void()>& body);
int refuse(const std::string& why);  // the error of a launch that cannot be
const std::string& last_error();

// Executes launches in the emulator's stead, where set: the PTX of the same kernels (tests/ptx). Returns what went
// wrong, or nullptr.
using Elsewhere = const char* (*)(const void* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                                  int cooperative, const void* const* arguments);
extern Elsewhere elsewhere;

// ---- called by fibers --------------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what);  // ends the launch
void block_barrier();
bool block_any(bool vote);  // a barrier that tells whether anybody voted for it

// Between blocks of a cooperative launch: adds one to a word of global memory, after all that this thread knows of; and
// goes on once the word is at least `least`, knowing what those knew who added to it.
void signal(unsigned* word);
void wait_for(const unsigned* word, unsigned least);

// The lanes of `mask` meet; each brings a value. The last to come runs `combine(values, mask)` for all, where
// values[lane] is what that lane brought; it may write through them.
using Combine = void (*)(void** values, unsigned mask);
void warp_meet(const char* name, unsigned mask, void* value, Combine combine);
inline const char* const kSyncWarp = "__syncwarp";  // the one meeting that orders memory

// Copies to shared memory that the thread does not wait for: `read` bytes from `from`, then zeros, `bytes` in all. The
// target is NaN until the thread waits for the copy's group.
void async_copy(size_t offset, const void* from, size_t read, size_t bytes);
void async_commit();              // ends a group
void async_wait(size_t pending);  // for all groups but the last `pending`

// ---- mutations ---------------------------------------------------------------------------------------------------

// In a library built from sources with mutation points (mutate.py): whether point `number` is the planted bug; and
// which points were passed since the last reset.
constexpr int kMostMutants = 4096;
extern int planted;
extern unsigned char passed[kMostMutants];
inline bool mutant(int number) {
  passed[number] = 1;
  return number == planted;
}

}  // namespace simt
