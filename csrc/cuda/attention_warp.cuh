// Products of tiles in shared memory (attention_tile.cuh) by a warp, which owns 16 rows: two groups of eight, Gap
// apart. Lane 4 g + t has row g of either group, and of every eight columns 2 t and the next one.
#pragma once
#include "attention_tile.cuh"

namespace handtuned::cuda {

constexpr int kWarpRows = 16;

// The warp's rows of a tile as an operand: held in registers where they are 64 wide, else read anew for each product.
template <int W, int Gap = 8>
struct WarpOperand {
  static constexpr bool kHeld = W <= 64;
  Shared<uint4> tile;
  int first;  // row
  uint32_t held[kHeld ? W / 16 : 1][4];

  __device__ WarpOperand(Shared<uint4> tile, int first) : tile(tile), first(first) {}

  // When the tile is there.
  __device__ void load() {
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < W / 16; ++k) load_a<W, Gap>(held[k], tile, first, k);
    }
  }

  // Columns [16 k, 16 k + 16).
  __device__ void fragment(uint32_t (&a)[4], int k) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[k][i];
    } else {
      load_a<W, Gap>(a, tile, first, k);
    }
  }
};

template <int N>
__device__ inline void clear(float (&sums)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] = 0;
}

template <int N>
__device__ inline bool all_finite(const float (&sums)[N][4]) {
  bool finite = true;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) finite = finite && isfinite(sums[n][i]);
  return finite;
}

// s = A B^T: the warp's rows by 8 N rows of a tile, of `width` columns.
template <class T, int W, int Gap, int N>
__device__ inline void multiply_rows(float (&s)[N][4], const WarpOperand<W, Gap>& rows, Shared<uint4> tile, int width) {
  clear(s);
#pragma unroll
  for (int k = 0; k < W / 16; ++k) {
    if (16 * k < width) {
      uint32_t a[4];
      rows.fragment(a, k);
#pragma unroll
      for (int n = 0; n < N / 2; ++n) {
        uint32_t b[4];
        load_b<W>(b, tile, 16 * n, k);
        mma_16x8x16<T>(s[2 * n], a, b[0], b[1]);
        mma_16x8x16<T>(s[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
}

// o += w B: weights of the warp's rows, rounded to T, by the 8 N rows of a tile, of `width` columns.
template <class T, int W, int N>
__device__ inline void accumulate_rows(float (&o)[W / 8][4], const float (&w)[N][4], Shared<uint4> tile, int width) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
    const uint32_t a[4] = {narrow_pair<T>(w[2 * k][0], w[2 * k][1]), narrow_pair<T>(w[2 * k][2], w[2 * k][3]),
                           narrow_pair<T>(w[2 * k + 1][0], w[2 * k + 1][1]),
                           narrow_pair<T>(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < W / 16; ++n) {
      if (16 * n < width) {
        uint32_t b[4];
        load_b_trans<W>(b, tile, 16 * k, n);
        mma_16x8x16<T>(o[2 * n], a, b[0], b[1]);
        mma_16x8x16<T>(o[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
}

// The same without tensor cores: what has a weight of 0 adds nothing, whatever it is. pairs: the tile, two columns
// each.
template <class T, int W, int N>
__device__ inline void accumulate_carefully(float (&o)[W / 8][4], const float (&w)[N][4], Shared<uint32_t> pairs) {
  const int t = threadIdx.x % 4, quad = threadIdx.x % kWarp / 4 * 4;
#pragma unroll
  for (int n = 0; n < 2 * N; ++n) {
#pragma unroll 1
    for (int of = 0; of < 4; ++of) {
      const int row = n / 2 * 8 + 2 * of + n % 2;  // its weights are with lane `of` of the four that share the rows
      float weight[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weight[half] = __shfl_sync(kWholeWarp, w[n / 2][2 * half + n % 2], quad + of);
#pragma unroll
      for (int c = 0; c < W / 8; ++c) {
        const uint32_t pair = pairs[4 * chunk_at<W>(row, c) + t];
        const float value[2] = {widen(T{uint16_t(pair)}), widen(T{uint16_t(pair >> 16)})};
#pragma unroll
        for (int i = 0; i < 4; ++i) o[c][i] += weight[i / 2] == 0 ? 0.0f : weight[i / 2] * value[i % 2];
      }
    }
  }
}

// factor o, rounded, to memory, by way of the warp's rows of a tile, which nobody needs any more, so that rows are
// stored 16 bytes at a time. tile: its first chunk in shared memory; row_of(r): where row r of the tile goes, or
// nullptr.
template <class T, int W, int Gap, class RowOf>
__device__ inline void store_rows(const float (&o)[W / 8][4], const float (&factor)[2], int tile, int first, int width,
                                  bool wide, RowOf row_of) {
  constexpr int kChunks = W / 8, kAtOnce = kWarp / kChunks;  // rows
  const Shared<uint32_t> pairs = shared<uint32_t>(16 * tile);
  const Shared<uint4> chunks = shared<uint4>(16 * tile);
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, chunk = lane % kChunks;
  __syncwarp();  // the warp's last product has read them
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
      pairs[4 * chunk_at<W>(first + g + Gap * half, n) + t] =
          narrow_pair<T>(o[n][2 * half] * factor[half], o[n][2 * half + 1] * factor[half]);
  __syncwarp();
  const int count = width - 8 * chunk;
#pragma unroll 1
  for (int m = 0; m < kWarpRows; m += kAtOnce) {
    const int own = m + lane / kChunks, r = first + own % 8 + own / 8 * Gap;
    T* row = row_of(r);
    const uint4 bits = chunks[chunk_at<W>(r, chunk)];
    if (row == nullptr || count <= 0) continue;
    Pack<T> pack;
    __builtin_memcpy(&pack, &bits, sizeof bits);
    store_pack(row + 8 * chunk, pack, count < 8 ? count : 8, wide && count >= 8);
  }
}

}  // namespace handtuned::cuda
