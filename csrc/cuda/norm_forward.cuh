// LayerNorm and RMSNorm forward, with optional dropout and residual add. One row h[0..cols):
//   h      = x                          or  round(x * keep / (1-p) + residual)      (saved as new_residual)
//   mean   = sum(h) / cols              (0 for RMSNorm)
//   rstd   = 1 / sqrt(sum((h - mean)^2) / cols + eps)
//   y      = (h - mean) * rstd * weight + bias
//
// Plan: a row belongs to `threads` threads (norm_plan.h); thread t owns the packs of 16 bytes t, t + threads, ... of
// it, in every pass. Rows of at most 4 packs a thread are read once and stay in registers; longer ones are read again.
//   pass 1  gather h, store new_residual, sum(h)
//   pass 2  d = h - mean: sum(d^2), and sum(d), which repairs the rounding of the mean (corrected two-pass, Chan et
//           al. 1983). RMSNorm sums h^2 in pass 1 and needs no pass 2.
//   pass 3  y
#pragma once
#include <device/philox.h>
#include <device/reduce.h>
#include <device/vector.h>

#include "norm_plan.h"
#include "norm_rows.cuh"

namespace handtuned::cuda {

template <class A>
__device__ inline A square_root(A v) {
  return sqrt(v);
}

// Pass 1 for one pack: h, rounded to T. x, residual: the row.
template <class T, class Column>
__device__ Pack<T> gather(const NormForward& p, const RowShare<T>& share, const T* x, const T* residual,
                          const Keep<Accumulate<T>>& keep, uint64_t seed, Column column, int count, bool wide) {
  using A = Accumulate<T>;
  Pack<T> h = load_pack(x + column, count, wide);
  if (residual == nullptr) return h;
  const Pack<T> add = load_pack(residual + column, count, wide);
  A value[kLanes<T>];
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) value[i] = widen(h.value[i]);
  if (keep.seed_address != nullptr) {
    const unsigned flags = keep.template flags<kLanes<T>>(seed, share.row, column);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) value[i] *= keep.factor(flags, i);
  }
  // h = round(x * factor + residual)
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) h.value[i] = narrow<T>(value[i] + widen(add.value[i]));
  store_pack(static_cast<T*>(p.new_residual) + share.row * p.cols + column, h, count, wide);
  return h;
}

// wide: every row of every tensor starts at a multiple of 16 bytes and ends at one.
template <class T, bool InRegisters>
__global__ void __launch_bounds__(kMostThreadsForward, 1)
    norm_forward_kernel(NormForward p, Keep<Accumulate<T>> keep, RowPlan plan, bool wide) {
  using A = Accumulate<T>;
  const RowShare<T> share(plan, int64_t(blockIdx.x) * plan.rows, p.rows, p.cols);
  const uint64_t seed = keep.seed();
  const bool as_float = p.weight_dtype != p.dtype;
  const int64_t offset = share.row * p.cols;  // of the row in every output
  const T *x = share.of(p.input), *residual = share.of(p.residual);
  const T* h_row = residual != nullptr ? static_cast<const T*>(p.new_residual) + offset : x;
  RowPacks<T, InRegisters> row(plan, h_row, 2 * kReduceBytes<A>);

  Sums<A> sums = {0, 0};
  share.template each_pack<InRegisters>(plan.packs, [&](int pack, auto column, int count) {
    const Pack<T> h = gather(p, share, x, residual, keep, seed, column, count, wide);
    row.put(pack, h);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {  // those beyond the row are 0
      const A v = widen(h.value[i]);
      sums.first += p.centre ? v : v * v;
    }
  });
  A mean = 0, variance = sum_over_row(sums, plan.threads, shared<A>(0)).first / A(p.cols);
  if (p.centre) {
    mean = variance;
    sums = {0, 0};
    share.template each_pack<InRegisters>(plan.packs, [&](int pack, auto column, int count) {
      const Pack<T> h = row.get(pack, column, count, wide);
#pragma unroll
      for (int i = 0; i < kLanes<T> && i < count; ++i) {
        // d = h - mean;  first += d;  second += d * d
        const A d = widen(h.value[i]) - mean;
        sums.first += d;
        sums.second += d * d;
      }
    });
    sums = sum_over_row(sums, plan.threads, shared<A>(kReduceBytes<A>));
    const A correction = sums.first / A(p.cols), excess = correction * correction;
    mean += correction;
    variance = sums.second / A(p.cols);
    if (excess < variance) variance -= excess;  // not so where both overflowed
  }
  const A rstd = A(1) / square_root(variance + A(p.eps));

  share.template each_pack<InRegisters>(plan.packs, [&](int pack, auto column, int count) {
    const Pack<T> h = row.get(pack, column, count, wide);
    A weight[kLanes<T>], bias[kLanes<T>];
    load_parameter<T>(weight, p.weight, as_float, column, count, wide, A(1));
    load_parameter<T>(bias, p.bias, as_float, column, count, wide, A(0));
    Pack<T> y;
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i)  // y = (h - mean) * rstd * weight + bias
      y.value[i] = narrow<T>((widen(h.value[i]) - mean) * rstd * weight[i] + bias[i]);
    store_pack(static_cast<T*>(p.output) + offset + column, y, count, wide);
  });
  if (share.there && share.thread == 0) {
    if (p.mean != nullptr) store_global(static_cast<A*>(p.mean) + share.row, mean);
    if (p.rstd != nullptr) store_global(static_cast<A*>(p.rstd) + share.row, rstd);
  }
}

}  // namespace handtuned::cuda
