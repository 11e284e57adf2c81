// Products of tiles by a block of 256 threads without tensor cores, for every type and any width: float32 and float64
// as exact as their multiply-add, and 16 bits where a width is beyond those of the tensor cores.
//
// Thread (y, x) of 16 x 16 owns rows y + 16 r and columns x + 16 c of a product: what a warp reads from shared memory
// are then neighbouring words, and the keys of a thread share one call of the dropout's generator.
//
//   shared memory   tables of the addresses of up to four kinds of 64 rows
//                   a stage of operands: 2 x [kDepth, kPitch] of product_tile, or [kStep, kColumns] of accumulate_tile
//                   weights [64, kWeightPitch]: P or dS, an operand of accumulate_tile
#pragma once
#include "attention_scores.cuh"

namespace handtuned::cuda {

constexpr int kSide = 16;  // threads along a product's rows, and along its columns
constexpr int kProductThreads = kSide * kSide;
constexpr int kOwn = kTileRows / kSide;  // rows, and keys, of a thread
static_assert(kTileRows == kTileKeys, "a tile of rows and one of keys are exchangeable");
constexpr int kDepth = 32;  // of the sums in product_tile at a time
constexpr int kPitch = 65;  // so that a column of a tile is written without bank conflicts
template <class A>
inline constexpr int kColumns = sizeof(A) == 8 ? 64 : 128;  // of an accumulated product: 32 registers a row of threads
template <class A>
inline constexpr int kOwnColumns = kColumns<A> / kSide;
constexpr int kStep = 16;         // rows of an operand in accumulate_tile at a time
constexpr int kWeightPitch = 80;  // two rows of 16 neighbours lie in different banks
static_assert(kStep * 128 <= 2 * kDepth * kPitch, "the stage holds either");

template <class T>
struct ProductMemory {
  using A = Accumulate<T>;
  static constexpr int kTableBytes = 8 * kTileRows;
  static constexpr int kTables = 4 * kTableBytes;
  static constexpr int kStage = kTables, kWeights = kStage + 2 * kDepth * kPitch * int(sizeof(A));
  static constexpr int kBytes = kWeights + kTileRows * kWeightPitch * int(sizeof(A));

  __device__ static Shared<const T*> table(int which) { return shared<const T*>(which * kTableBytes); }
  __device__ static Shared<A> stage() { return shared<A>(kStage); }
  __device__ static Shared<A> weights() { return shared<A>(kWeights); }
};

// A table of kTileRows addresses; row_of(r) may be nullptr, and the row is then 0. A barrier must follow. None need
// come before: whoever reads a table does so before the last barrier of product_tile or accumulate_tile.
template <class T, class RowOf>
__device__ inline void fill_table(int which, RowOf row_of) {
  const int r = int(threadIdx.x);
  if (r < kTileRows) ProductMemory<T>::table(which)[r] = row_of(r);
}

// s[r][c] = sum_d a[y + 16 r][d] b[x + 16 c][d] over d < width, of the rows in two tables. Begins with a barrier.
template <class T, class A>
__device__ inline void product_tile(A (&s)[kOwn][kOwn], int a_table, int b_table, int width) {
  using Memory = ProductMemory<T>;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const Shared<A> a = Memory::stage(), b = a + kDepth * kPitch;
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int c = 0; c < kOwn; ++c) s[r][c] = 0;
  for (int from = 0; from < width; from += kDepth) {
    const int depth = width - from < kDepth ? width - from : kDepth;
    __syncthreads();
    const int d = threadIdx.x % kDepth;
    for (int row = threadIdx.x / kDepth; row < kTileRows; row += kProductThreads / kDepth) {
      const T *of_a = Memory::table(a_table)[row], *of_b = Memory::table(b_table)[row];
      a[d * kPitch + row] = d < depth && of_a != nullptr ? A(widen(load_global(of_a + from + d))) : A(0);
      b[d * kPitch + row] = d < depth && of_b != nullptr ? A(widen(load_global(of_b + from + d))) : A(0);
    }
    __syncthreads();
    for (int k = 0; k < depth; ++k) {
      A left[kOwn], right[kOwn];
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        left[n] = a[k * kPitch + y + kSide * n];
        right[n] = b[k * kPitch + x + kSide * n];
      }
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int c = 0; c < kOwn; ++c) s[r][c] += left[r] * right[c];
    }
  }
}

// A thread's share of an accumulated product, row y + 16 r and column x + 16 c of it.
template <class A>
struct Accumulated {
  A all[kOwn * kOwnColumns<A>];
  __device__ A& at(int r, int c) { return all[r * kOwnColumns<A> + c]; }
  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kOwn * kOwnColumns<A>; ++n) all[n] = 0;
  }
  __device__ bool finite() const {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < kOwn * kOwnColumns<A>; ++n) finite = finite && isfinite(all[n]);
    return finite;
  }
};

// o[r][c] += sum_k w[y + 16 r][k] rows[k][first_column + x + 16 c] over k < count, of the rows in a table.
// w[i][k] is weights[i * row_pitch + k * pitch]. A barrier inside makes the weights visible; when it returns, others
// may still read them. careful: what has a weight of 0 adds nothing, whatever it is.
template <class T, class A>
__device__ inline void accumulate_tile(Accumulated<A>& o, int row_pitch, int pitch, int table, int count,
                                       int first_column, int width, bool careful) {
  using Memory = ProductMemory<T>;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const Shared<A> stage = Memory::stage(), weights = Memory::weights();
  Accumulated<A> sum = {};
  for (int from = 0; from < count; from += kStep) {
    const int step = count - from < kStep ? count - from : kStep;
    __syncthreads();
    const int column = threadIdx.x % kColumns<A>;
    for (int k = threadIdx.x / kColumns<A>; k < step; k += kProductThreads / kColumns<A>) {
      const T* row = Memory::table(table)[from + k];
      const bool there = row != nullptr && first_column + column < width;
      stage[k * kColumns<A> + column] = there ? A(widen(load_global(row + first_column + column))) : A(0);
    }
    __syncthreads();
    for (int k = 0; k < step; ++k) {
      A left[kOwn], right[kOwnColumns<A>];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) left[r] = weights[(y + kSide * r) * row_pitch + (from + k) * pitch];
#pragma unroll
      for (int c = 0; c < kOwnColumns<A>; ++c) right[c] = stage[k * kColumns<A> + x + kSide * c];
      if (careful) {
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int c = 0; c < kOwnColumns<A>; ++c) sum.at(r, c) += left[r] == 0 ? A(0) : left[r] * right[c];
      } else {
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int c = 0; c < kOwnColumns<A>; ++c) sum.at(r, c) += left[r] * right[c];
      }
    }
  }
  // Tile by tile, so that a long sum is one of short ones.
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int c = 0; c < kOwnColumns<A>; ++c) o.at(r, c) += sum.at(r, c);
}

}  // namespace handtuned::cuda
