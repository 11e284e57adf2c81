// Dropout's mask, bit for bit the CPU's (cpu/philox.h has the counter layout): a function of seed, row and column.
//
// One call of Philox4x32-10 serves eight columns, 16 apart, but a thread owns neighbouring columns. So each lane of a
// warp makes one call, and eight ballots carry the verdicts to where they are needed: ballot n holds, at bit l, whether
// lane l's column of number n is kept, and the columns of one lane are neighbouring bits of one ballot.
#pragma once
#include <cstdint>

#include <device/intrinsics.h>
#include <device/reduce.h>

#include "../../params.h"

namespace handtuned::cuda {

__device__ inline uint4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// A launch's dropout. The seed lies in device memory, so that no launch waits for it.
template <class A>
struct Keep {
  const uint64_t* seed_address;  // nullptr without dropout
  uint32_t threshold;
  A scale;  // of what is kept; at p = 1, where it is infinite, nothing is

  explicit Keep(const Dropout& dropout)
      : seed_address(static_cast<const uint64_t*>(dropout.seed_address)),
        threshold(uint32_t(dropout.p * 65536.0 + 0.5)),
        scale(A(1.0 / (1.0 - dropout.p))) {}

  __device__ uint64_t seed() const { return seed_address != nullptr ? load_global(seed_address) : 0; }

  // Bit i: whether column + i is kept, i < Columns (2, 4 or 8). All lanes of a warp call this together, with the same
  // row, and lane l with the column of lane 0 plus l * Columns; that of lane 0 is a multiple of 32 * Columns. The
  // warp's columns are at most two blocks of 128: lanes 0 to 15 make the calls of the first, 16 to 31 of the second.
  template <int Columns, class Column>
  __device__ unsigned flags(uint64_t seed, int64_t row, Column column) const {
    const int lane = threadIdx.x % kWarp;
    const Column block = (column - lane * Columns) / 128;  // of lane 0
    const uint4 words =
        philox(uint32_t(16 * (block + lane / 16) + lane % 16), uint32_t(row), uint32_t(row >> 32), 0, seed);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    const int number = int(column / 16 % 8), from = int(column / 128 - block) * 16 + int(column % 16);
    unsigned found = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const unsigned kept = __ballot_sync(kWholeWarp, (word[n / 2] >> (n % 2 * 16) & 0xffffu) >= threshold);
      if (number == n) found = kept;
    }
    return found >> from & ((1u << Columns) - 1);
  }

  __device__ A factor(unsigned flags, int i) const { return flags >> i & 1 ? scale : A(0); }
};

}  // namespace handtuned::cuda
