// Matrix products whose operands are wherever a function finds them:  C[m][n] = sum_k left(m, k) * right(n, k)
//
// Plan: a block of 256 threads owns a tile of 64 x 64 of C; a thread every 16th row and column of it, 4 x 4. Of both
// operands 32 steps of the depth are brought to shared memory, k by k, and their products are added up before they are
// added to the rest: the rounding errors of one long chain would show.
#pragma once
#include <device/intrinsics.h>

namespace handtuned::cuda {

constexpr int kTile = 64, kTileDepth = 32, kTilePitch = kTile + 1, kProductThreads = 256;
template <class A>
constexpr int kProductBytes = 2 * kTileDepth * kTilePitch * int(sizeof(A));

// kTileDepth steps of kTile rows of an operand from (row, k) on, zeros outside. AlongDepth: neighbours in memory are
// those of k, else those of the row.
template <bool AlongDepth, class A, class Operand>
__device__ inline void bring_tile(Shared<A> to, int64_t row, int64_t rows, int64_t k, int64_t depth, Operand operand) {
  for (int i = threadIdx.x; i < kTile * kTileDepth; i += kProductThreads) {
    const int r = AlongDepth ? i / kTileDepth : i % kTile, j = AlongDepth ? i % kTileDepth : i / kTile;
    A value = 0;
    if (row + r < rows && k + j < depth) value = operand(row + r, k + j);
    to[j * kTilePitch + r] = value;
  }
}

// The tile (blockIdx.x, blockIdx.y) of C [rows][columns]; store(m, n, c) for each of its elements.
template <class A, bool LeftAlongDepth, bool RightAlongDepth, class Left, class Right, class Store>
__device__ inline void product_tile(int64_t rows, int64_t columns, int64_t depth, Left left, Right right, Store store) {
  const Shared<A> lefts = shared<A>(0), rights = lefts + kTileDepth * kTilePitch;
  const int64_t row = int64_t(blockIdx.x) * kTile, column = int64_t(blockIdx.y) * kTile;
  const int m = threadIdx.x / 16, n = threadIdx.x % 16;
  A total[4][4] = {};
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    __syncthreads();  // the step before was read
    bring_tile<LeftAlongDepth>(lefts, row, rows, k, depth, left);
    bring_tile<RightAlongDepth>(rights, column, columns, k, depth, right);
    __syncthreads();
    A sum[4][4] = {};
#pragma unroll 4
    for (int j = 0; j < kTileDepth; ++j) {
      A a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = lefts[j * kTilePitch + m + 16 * i], b[i] = rights[j * kTilePitch + n + 16 * i];
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += a[i / 4] * b[i % 4];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) total[i / 4][i % 4] += sum[i / 4][i % 4];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int64_t to_row = row + m + i / 4 * 16, to_column = column + n + i % 4 * 16;
    if (to_row < rows && to_column < columns) store(to_row, to_column, total[i / 4][i % 4]);
  }
}

}  // namespace handtuned::cuda
