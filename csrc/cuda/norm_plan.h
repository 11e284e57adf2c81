// Norm family on CUDA: how rows are dealt to threads and rows to chunks, from the shape alone, so that neither the
// results nor the scratch depend on the device. Host code, read by the skin (scratch) and the launchers (grids).
#pragma once
#include "../norm.h"

namespace handtuned::cuda {

constexpr int kPacksHeld = 4;              // packs of 16 bytes that a thread holds in registers
constexpr int kMostThreadsForward = 768;   // of a row, and of a block: 80 registers a thread
constexpr int kMostThreadsBackward = 512;  // 144 registers
constexpr int kThreadsOfShort = 128;       // of a block, where a row needs fewer
constexpr int kMostShared = 99 << 10;      // bytes that every GPU from sm_80 on grants a block
constexpr int kMostChunks = 512;           // rows of partial sums
constexpr int kLeastChunk = 16;            // rows of a chunk: a row of partial sums takes as much as 4 of bfloat16

// Where a row stays between the passes over it.
enum class Home : int8_t { registers, shared, memory };

struct RowPlan {
  int threads;  // of a row: a power of two up to 32, then a multiple of 32
  int rows;     // of a block; 1 where a row takes more than a warp
  int packs;    // of a thread
  Home home;
  bool sums_columns;  // backward: there is room in shared memory for the sums of dweight and dbias
  int pitch;          // of those sums
  int shared_bytes;
};

// Scratch of the sums over a row: two of 2 * 32 values.
constexpr int scratch_bytes(DType dtype) { return 2 * 2 * 32 * (dtype == DType::f64 ? 8 : 4); }

// rows_held: tensors whose row is needed in a later pass (forward h, backward dy and h).
inline RowPlan plan_rows(int64_t cols, DType dtype, bool dropout, int most_threads, int rows_held) {
  const int64_t lanes = 16 / bytes_of(dtype), packs = (cols + lanes - 1) / lanes;
  const int64_t wanted = (packs + kPacksHeld - 1) / kPacksHeld;
  RowPlan plan = {};
  if (wanted > 32) {
    plan.threads = wanted > most_threads ? most_threads : int((wanted + 31) / 32 * 32);
  } else {
    plan.threads = dropout ? 32 : 1;  // a warp shares the calls of the generator
    while (plan.threads < wanted) plan.threads *= 2;
  }
  plan.rows = plan.threads > 32 ? 1 : kThreadsOfShort / plan.threads;
  plan.packs = int((packs + plan.threads - 1) / plan.threads);
  plan.shared_bytes = scratch_bytes(dtype);
  plan.home = Home::registers;
  if (wanted > most_threads) {
    const int64_t held = int64_t(rows_held) * plan.packs * plan.threads * 16;
    plan.home = held + plan.shared_bytes <= kMostShared ? Home::shared : Home::memory;
    if (plan.home == Home::shared) plan.shared_bytes += int(held);
  }
  return plan;
}

inline RowPlan plan_forward(int64_t cols, DType dtype, bool dropout) {
  return plan_rows(cols, dtype, dropout, kMostThreadsForward, 1);
}

// dweight and dbias: each element's thread has two sums, [2, packs * lanes, pitch], thread by thread. The pitch keeps
// neighbouring columns in different banks. Where there is no room, a second kernel makes them.
inline RowPlan plan_backward(int64_t cols, DType dtype, bool dropout) {
  RowPlan plan = plan_rows(cols, dtype, dropout, kMostThreadsBackward, 2);
  const int64_t lanes = 16 / bytes_of(dtype);
  plan.pitch = plan.threads * plan.rows + (is_narrow(dtype) ? 4 : 8);
  const int64_t sums = 2 * plan.packs * lanes * plan.pitch * (dtype == DType::f64 ? 8 : 4);
  plan.sums_columns = plan.home == Home::registers && sums + plan.shared_bytes <= kMostShared;
  if (plan.sums_columns) plan.shared_bytes += int(sums);
  return plan;
}

inline int64_t chunk_rows(int64_t rows, const RowPlan& plan) {
  int64_t n = (rows + kMostChunks - 1) / kMostChunks;
  if (n < kLeastChunk) n = kLeastChunk;
  return (n + plan.rows - 1) / plan.rows * plan.rows;
}
inline int64_t chunks(int64_t rows, const RowPlan& plan) {
  const int64_t n = chunk_rows(rows, plan);
  return (rows + n - 1) / n;
}

}  // namespace handtuned::cuda
