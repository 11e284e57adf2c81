// Tiles of 16-bit rows in shared memory, as the tensor cores want them: W elements a row, in chunks of 16 bytes, chunk
// c of row r at c ^ (r % 8). Eight neighbouring rows then have a chunk in eight different places modulo 128 bytes, so
// neither copies nor ldmatrix meet a bank conflict.
#pragma once
#include <device/cp_async.h>
#include <device/ldmatrix.h>
#include <device/mma.h>
#include <device/vector.h>

namespace handtuned::cuda {

template <int W>
__device__ inline int chunk_at(int row, int chunk) {
  return row * (W / 8) + (chunk ^ (row % 8));
}

// Starts to bring `Rows` rows of `width` elements into a tile; row_of(r) is where one begins, or nullptr for zeros,
// which also fill the row up to W. wide: rows begin at multiples of 16 bytes; else elements are moved one by one, at
// once.
template <class T, int W, int Rows, int Threads, class RowOf>
__device__ inline void load_tile(Shared<uint4> tile, int width, bool wide, const T* somewhere, RowOf row_of) {
  constexpr int kChunks = W / 8;
  static_assert(Threads % kChunks == 0, "a thread brings the same chunk of every row");
  const int chunk = threadIdx.x % kChunks, column = 8 * chunk;
  const int most = width - column < 8 ? width - column : 8;
  for (int r = threadIdx.x / kChunks; r < Rows; r += Threads / kChunks) {
    const T* row = row_of(r);
    const int count = row != nullptr && most > 0 ? most : 0;
    const T* from = count > 0 ? row + column : somewhere;
    if (wide) {
      cp_async(tile + chunk_at<W>(r, chunk), from, 2 * count);
    } else {
      const Pack<T> pack = load_pack(from, count, false);
      uint4 bits;
      __builtin_memcpy(&bits, &pack, sizeof bits);
      tile[chunk_at<W>(r, chunk)] = bits;
    }
  }
}

// A of mma.h: rows [row, row + 8) and [row + Gap, row + Gap + 8), columns [16 k, 16 k + 16) of a tile.
template <int W, int Gap>
__device__ inline void load_a(uint32_t (&a)[4], Shared<uint4> tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(a, tile + chunk_at<W>(row + lane % 8 + lane / 8 % 2 * Gap, 2 * k + lane / 16));
}

// Two B of mma.h from a tile of [n][k]: columns n of B are rows [row, row + 8), in b[0] and b[1], and [row + 8, row +
// 16) in b[2] and b[3]; its rows k are columns [16 k, 16 k + 16).
template <int W>
__device__ inline void load_b(uint32_t (&b)[4], Shared<uint4> tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(b, tile + chunk_at<W>(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
}

// Likewise from a tile of [k][n]: rows k of B are rows [row, row + 16), its columns are columns [16 n, 16 n + 16).
template <int W>
__device__ inline void load_b_trans(uint32_t (&b)[4], Shared<uint4> tile, int row, int n) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4_trans(b, tile + chunk_at<W>(row + lane % 16, 2 * n + lane / 16));
}

}  // namespace handtuned::cuda
