// Sums over the threads that share a row. Every thread gets the result, and the order of the additions is fixed.
#pragma once
#include <device/intrinsics.h>

namespace handtuned::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

template <class A>
struct Sums {
  A first, second;
};

// Bytes of shared memory that sum_over_row() needs for rows of several warps.
template <class A>
constexpr int kReduceBytes = 2 * kWarp * int(sizeof(A));

template <class A>
__device__ inline Sums<A> sum_over_lanes(Sums<A> sums, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    sums.first += __shfl_xor_sync(kWholeWarp, sums.first, step);
    sums.second += __shfl_xor_sync(kWholeWarp, sums.second, step);
  }
  return sums;
}

// threads: of a row. A power of two up to a warp, or the whole block, in whole warps; then `scratch` [kReduceBytes]
// carries the warps' sums, and the caller uses another one for the next call: the barrier of that call keeps a fast
// warp from writing here before a slow one has read.
template <class A>
__device__ inline Sums<A> sum_over_row(Sums<A> sums, int threads, Shared<A> scratch) {
  if (threads <= kWarp) return sum_over_lanes(sums, threads);
  sums = sum_over_lanes(sums, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
    scratch[warp] = sums.first;
    scratch[kWarp + warp] = sums.second;
  }
  __syncthreads();
  Sums<A> of_warp = {0, 0};
  if (lane < threads / kWarp) of_warp = {scratch[lane], scratch[kWarp + lane]};
  return sum_over_lanes(of_warp, kWarp);
}

}  // namespace handtuned::cuda
