// How the threads of a block share a row, and where a thread keeps its part of it between the passes.
#pragma once
#include <device/vector.h>

#include <type_traits>

#include "norm_plan.h"

namespace handtuned::cuda {

// What a thread has to do with a row: where its packs are.
template <class T>
struct RowShare {
  int64_t row, cols;
  int thread, threads;
  bool there;  // false for threads beyond the last row, which take part in everything but accesses to memory

  __device__ RowShare(const RowPlan& plan, int64_t first_row, int64_t last_row, int64_t cols)
      : row(first_row + threadIdx.x / plan.threads), cols(cols), threads(plan.threads) {
    thread = threadIdx.x % plan.threads;
    there = row < last_row;
  }

  // Its place in a strided tensor; nullptr if the tensor was not given.
  __device__ const T* of(const StridedRows& rows) const { return row_of<T>(rows, row); }

  // Elements from a column on: of its pack, and perhaps of later ones; not positive where there are none.
  __device__ int count(int64_t column) const {
    const int64_t left = cols - column;
    if (!there) return 0;
    return left < kLanes<T> ? int(left) : kLanes<T>;
  }

  // Calls f(pack, column, count) for every pack of the row's threads, also where it has no elements: warps stay
  // together.
  template <bool InRegisters, class F>
  __device__ void each_pack(int packs, F f) const {
    using Column = std::conditional_t<InRegisters, int, int64_t>;  // rows in registers are short
    auto visit = [&](int pack) {
      const Column column = (Column(pack) * threads + thread) * kLanes<T>;
      f(pack, column, count(column));
    };
    if (InRegisters) {
#pragma unroll
      for (int pack = 0; pack < kPacksHeld && pack < packs; ++pack) visit(pack);
    } else {
      for (int pack = 0; pack < packs; ++pack) visit(pack);
    }
  }
};

// The packs of a row that one thread has read. In registers; else in shared memory, [packs, threads of the block], each
// thread its own, so that no barrier is needed; and where that is too small they are read again.
template <class T, bool InRegisters>
class RowPacks;

template <class T>
class RowPacks<T, true> {
 public:
  __device__ RowPacks(const RowPlan&, const T*, int) {}
  __device__ void put(int pack, const Pack<T>& value) { held_[pack] = value; }
  __device__ Pack<T> get(int pack, int64_t, int, bool) const { return held_[pack]; }

 private:
  Pack<T> held_[kPacksHeld];
};

template <class T>
class RowPacks<T, false> {
 public:
  // row: where to read again; offset: of its place in shared memory.
  __device__ RowPacks(const RowPlan& plan, const T* row, int offset)
      : held_(shared<Pack<T>>(offset)), row_(row), in_shared_(plan.home == Home::shared) {}
  __device__ void put(int pack, const Pack<T>& value) {
    if (in_shared_) held_[at(pack)] = value;
  }
  __device__ Pack<T> get(int pack, int64_t column, int count, bool wide) const {
    if (in_shared_) return held_[at(pack)];
    return load_pack(row_ + column, count, wide);
  }

 private:
  __device__ int at(int pack) const { return pack * int(blockDim.x) + int(threadIdx.x); }
  Shared<Pack<T>> held_;
  const T* row_;
  bool in_shared_;
};

}  // namespace handtuned::cuda
