// Dropout for threads whose keys lie 16 apart: those of one block of 128 share a call of the generator
// (device/philox.h).
#pragma once
#include <device/philox.h>

namespace handtuned::cuda {

// The call that key `column` and its likes share.
__device__ inline uint4 shared_call(uint64_t seed, int64_t row, int column) {
  return philox(uint32_t(16 * (column / 128) + column % 16), uint32_t(row), uint32_t(row >> 32), 0, seed);
}

// Whether one of them is kept.
template <class A>
__device__ inline bool is_kept(const Keep<A>& keep, const uint4& words, int column) {
  const int number = column / 16 % 8;
  const uint32_t low = (number & 2) != 0 ? words.y : words.x, high = (number & 2) != 0 ? words.w : words.z;
  const uint32_t word = (number & 4) != 0 ? high : low, half = (number & 1) != 0 ? word >> 16 : word & 0xffffu;
  return half >= keep.threshold;
}

// What one of them is multiplied by.
template <class A>
__device__ inline A factor_of(const Keep<A>& keep, const uint4& words, int column) {
  return is_kept(keep, words, column) ? keep.scale : A(0);
}

}  // namespace handtuned::cuda
