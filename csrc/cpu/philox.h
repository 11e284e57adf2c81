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

// N calls side by side: one alone would wait for its own chain of products.
template <int N>
HT_INLINE void philox(PhiloxBlock (&c)[N], uint64_t seed) {
  const u64 m0 = u64{} + 0xD2511F53u, m1 = u64{} + 0xCD9E8D57u;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    u64 p0[N], p1[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p0[i] = multiply_low32(c[i].c0, m0), p1[i] = multiply_low32(c[i].c2, m1);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      // (c0, c1, c2, c3) <- (hi(p1) ^ c1 ^ k0, lo(p1), hi(p0) ^ c3 ^ k1, lo(p0))
      c[i] = {(p1[i] >> 32) ^ c[i].c1 ^ uint64_t(k0), p1[i], (p0[i] >> 32) ^ c[i].c3 ^ uint64_t(k1), p0[i]};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

inline constexpr int64_t kDropoutBlock = 128;  // columns

// 1 / (1 - p), which keeps the expectation.
template <class A>
HT_INLINE A dropout_scale(Dropout d) {
  return d.p < 1 ? A(1.0 / (1.0 - d.p)) : A(0);
}

// What numbers become: the scale, or 0 below the threshold.
template <class A>
struct DropoutFactor {
  int32_t threshold;
  A scale;
  DropoutFactor(Dropout d, A scale) : threshold(int32_t(d.p * 65536.0 + 0.5)), scale(scale) {}

  // Of as many lanes as floats have.
  HT_INLINE void write(A* out, i32 number) const {
    constexpr int L = kLanes<float>;
    i32 kept = number >= threshold;  // all ones or zero
    if constexpr (sizeof(A) == sizeof(float)) {
      store(out, (f32)(kept & (i32)broadcast(scale)));
    } else {
      for (int i = 0; i < L; ++i) out[i] = kept[i] ? scale : A(0);
    }
  }

  // Of all eight numbers: those of lanes 0, 2, 4 ... in `even`, of 1, 3, 5 ... in `odd`; the next one `step` further.
  HT_INLINE void write(A* out, int64_t step, PhiloxBlock even, PhiloxBlock odd) const {
    const u64 a[4] = {even.c0, even.c1, even.c2, even.c3}, b[4] = {odd.c0, odd.c1, odd.c2, odd.c3};
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) {
      const u32 bits = (u32)((a[word] & 0xffffffffu) | (b[word] << 32));
      write(out + 2 * word * step, (i32)(bits & 0xffffu));
      write(out + (2 * word + 1) * step, (i32)(bits >> 16));
    }
  }
};

// factor[c] = scale where element (row, first + c) is kept, else 0, for c < cols rounded up to kDropoutBlock, of
// which first is a multiple; Paired: in the row order of row.h.
template <bool Paired, class A>
inline void kept_row(A* factor, A scale, int64_t cols, int64_t row, Dropout dropout, int64_t first) {
  constexpr int L = kLanes<float>;
  const DropoutFactor<A> kept(dropout, scale);
  const u64 row_low = u64{} + uint64_t(uint32_t(row)), row_high = u64{} + (uint64_t(row) >> 32);
  // Vector l of a run of sixteen columns holds columns l * L + i, or, paired, column 2 * i + l, in lane i.
  static_assert(!Paired || L == 8);
  constexpr int step = Paired ? 2 : 1, next_vector = Paired ? 1 : L;
  u64 even = {};  // the columns of lanes 0, 2, 4 ...
  for (int i = 0; i < L / 2; ++i) even[i] = 2 * i * step;

  for (int64_t c = 0; c < cols; c += kDropoutBlock) {
    for (int lane = 0; lane < 16; lane += L) {
      u64 counter = even + uint64_t((first + c) / 8 + lane / L * next_vector);
      PhiloxBlock block[2] = {{counter, row_low, row_high, u64{}}, {counter + step, row_low, row_high, u64{}}};
      philox(block, dropout.seed);
      kept.write(factor + c + lane, 16, block[0], block[1]);
    }
  }
}

template <bool Paired, class A>
HT_INLINE void dropout_row(A* factor, int64_t cols, int64_t row, Dropout dropout, int64_t first = 0) {
  kept_row<Paired, A>(factor, dropout_scale<A>(dropout), cols, row, dropout, first);
}

// The same for a row to a lane: factor[c][lane] of elements (rows[lane], first + c), lines of `factor` pitch apart,
// lanes a multiple of kLanes<float>. Eight lines come of one call of the generator, again without a shuffle.
template <class A>
inline void dropout_lanes(A* factor, int64_t pitch, int64_t cols, const int64_t* rows, int lanes, Dropout dropout,
                          int64_t first) {
  constexpr int L = kLanes<float>, N = kVectorBytes == 64 ? 2 : 1;  // as many chains as registers hold
  const DropoutFactor<A> kept(dropout, dropout_scale<A>(dropout));
  for (int lane = 0; lane < lanes; lane += L) {
    u64 low[2] = {}, high[2] = {};  // of the rows of lanes 0, 2, 4 ... and 1, 3, 5 ...
    for (int i = 0; i < L; ++i) {
      low[i % 2][i / 2] = uint32_t(rows[lane + i]);
      high[i % 2][i / 2] = uint64_t(rows[lane + i]) >> 32;
    }
    for (int64_t c = 0; c < cols; c += kDropoutBlock) {
      for (int64_t k = 0; k < 16; k += N) {
        PhiloxBlock block[2 * N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
          const u64 counter = u64{} + uint64_t((first + c) / 8 + k + i);
          block[2 * i] = {counter, low[0], high[0], u64{}}, block[2 * i + 1] = {counter, low[1], high[1], u64{}};
        }
        philox(block, dropout.seed);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i)
          kept.write(factor + (c + k + i) * pitch + lane, 16 * pitch, block[2 * i], block[2 * i + 1]);
      }
    }
  }
}

}  // namespace handtuned::HANDTUNED_ISA
