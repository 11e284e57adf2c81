// Dropout from a counter-based generator: the mask is a function of (seed, row, column) alone, so it is the same on
// any number of threads, instruction set and backend, and the backward regenerates it instead of storing it.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
//   key     = (seed low, seed high)
//   counter = (16 * (column / 128) + column % 16, row low, row high, 0)
//   result  = eight 16-bit numbers, low half first; the column uses number (column / 16) % 8
// One call of the generator serves eight columns, 16 apart: sixteen lanes of counters give eight runs of sixteen
// neighbouring columns, with no shuffle at any vector width.
// An element is kept when its number >= round(p * 2^16), and then scaled by 1 / (1 - p). So p counts in steps of
// 1/65536; 32 bits per element would be finer than a mask can show and take twice the time of all the rest.
#pragma once
#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

// Counters are held one to a 64-bit lane, in its low half; the high halves carry garbage that multiply_low32 ignores.
struct PhiloxBlock {
  u64 c0, c1, c2, c3;
};

HT_INLINE PhiloxBlock philox(PhiloxBlock c, uint64_t seed) {
  const u64 m0 = u64{} + 0xD2511F53u, m1 = u64{} + 0xCD9E8D57u;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    u64 p0 = multiply_low32(c.c0, m0), p1 = multiply_low32(c.c2, m1);
    // (c0, c1, c2, c3) <- (hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0))
    c = {(p1 >> 32) ^ c.c1 ^ uint64_t(k0), p1, (p0 >> 32) ^ c.c3 ^ uint64_t(k1), p0};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// factor[c] = scale where element (row, first + c) is kept, else 0, for c < cols rounded up to kDropoutBlock, of
// which first is a multiple; Paired: in the row order of row.h.
inline constexpr int64_t kDropoutBlock = 128;

template <bool Paired, class A>
inline void kept_row(A* factor, A scale, int64_t cols, int64_t row, Dropout dropout, int64_t first) {
  constexpr int L = kLanes<float>;
  const int32_t threshold = int32_t(dropout.p * 65536.0 + 0.5);
  const u64 row_low = u64{} + uint64_t(uint32_t(row)), row_high = u64{} + (uint64_t(row) >> 32);
  // Vector l of a run of sixteen columns holds columns l * L + i, or, paired, column 2 * i + l, in lane i.
  static_assert(!Paired || L == 8);
  constexpr int step = Paired ? 2 : 1, next_vector = Paired ? 1 : L;
  u64 even = {};  // the columns of lanes 0, 2, 4 ...
  for (int i = 0; i < L / 2; ++i) even[i] = 2 * i * step;

  auto write = [=](A* out, i32 number) HT_LAMBDA {
    i32 kept = number >= threshold;  // all ones or zero
    if constexpr (sizeof(A) == sizeof(float)) {
      store(out, (f32)(kept & (i32)broadcast(scale)));
    } else {
      for (int i = 0; i < L; ++i) out[i] = kept[i] ? scale : A(0);
    }
  };
  for (int64_t c = 0; c < cols; c += kDropoutBlock) {
    for (int lane = 0; lane < 16; lane += L) {
      u64 counter = even + uint64_t((first + c) / 8 + lane / L * next_vector);
      PhiloxBlock a = philox({counter, row_low, row_high, u64{}}, dropout.seed);
      PhiloxBlock b = philox({counter + step, row_low, row_high, u64{}}, dropout.seed);
      const u64 wa[4] = {a.c0, a.c1, a.c2, a.c3}, wb[4] = {b.c0, b.c1, b.c2, b.c3};
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        u32 bits = (u32)((wa[word] & 0xffffffffu) | (wb[word] << 32));
        write(factor + c + 32 * word + lane, (i32)(bits & 0xffffu));
        write(factor + c + 32 * word + 16 + lane, (i32)(bits >> 16));
      }
    }
  }
}

// With the scale that keeps the expectation.
template <bool Paired, class A>
HT_INLINE void dropout_row(A* factor, int64_t cols, int64_t row, Dropout dropout, int64_t first = 0) {
  kept_row<Paired, A>(factor, dropout.p < 1 ? A(1.0 / (1.0 - dropout.p)) : A(0), cols, row, dropout, first);
}

}  // namespace handtuned::HANDTUNED_ISA
