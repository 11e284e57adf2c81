// LayerNorm and RMSNorm backward, xhat = (h - mean) * rstd, g = dy * weight:
//   dx      = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_new_residual      (no mean(g) for RMSNorm)
//   dweight = sum_rows dy * xhat,   dbias = sum_rows dy
//
// Plan, all of it by shape (norm_plan.h), so that every sum has one order:
//   rows      a block goes through the rows of a chunk. dy and h of a row are read once and stay in registers:
//             sum(g), sum(g * xhat); then dx. Each element's thread adds dy * xhat and dy to its own two sums in shared
//             memory; at the end of the chunk they become one row of partial sums.
//   columns   makes those partial sums for rows too long for that: a block owns a tile of columns of a chunk.
//   partials  adds the rows of partial sums up, always in the same order.
#pragma once
#include <device/philox.h>
#include <device/reduce.h>
#include <device/vector.h>

#include "norm_plan.h"
#include "norm_rows.cuh"

namespace handtuned::cuda {

// partials is [chunks, 2, cols]: dweight, dbias.
template <class A>
__device__ inline A* partial_sums(const NormBackward& p, int64_t chunk, int which) {
  return static_cast<A*>(p.partials) + (chunk * 2 + which) * p.cols;
}

// The sums of a block: element i of pack k of this thread, for dweight (0) and dbias (1).
template <class T>
struct ColumnSums {
  using A = Accumulate<T>;
  Shared<A> sums;
  int packs, pitch;

  __device__ int at(int which, int pack, int i, int thread) const {
    return ((which * packs + pack) * kLanes<T> + i) * pitch + thread;
  }
  __device__ void add(int pack, int i, A dweight, A dbias) const {
    sums[at(0, pack, i, threadIdx.x)] += dweight;
    sums[at(1, pack, i, threadIdx.x)] += dbias;
  }
  __device__ void clear() const {
    for (int k = 0; k < packs; ++k)
      for (int i = 0; i < kLanes<T>; ++i)
        for (int which = 0; which < 2; ++which) sums[at(which, k, i, threadIdx.x)] = A(0);
  }

  // Adds the block's rows up, in order, and writes one row of partial sums.
  __device__ void write(const NormBackward& p, const RowPlan& plan, int64_t chunk) const {
    __syncthreads();  // a column's sums are those of several threads
    for (int which = 0; which < 2; ++which) {
      for (int64_t c = threadIdx.x; c < p.cols; c += blockDim.x) {
        const int64_t pack = c / kLanes<T>;
        const int first = at(which, int(pack / plan.threads), int(c % kLanes<T>), int(pack % plan.threads));
        A sum = 0;
        for (int row = 0; row < plan.rows; ++row) sum += sums[first + row * plan.threads];
        store_global(partial_sums<A>(p, chunk, which) + c, sum);
      }
    }
  }
};

// One row: its statistics, and the two means that dx needs.
template <class A>
struct RowState {
  A mean, rstd, mean_g, mean_gx;

  __device__ RowState(const NormBackward& p, int64_t row, bool there) : mean(0), rstd(0), mean_g(0), mean_gx(0) {
    if (there) {
      if (p.centre) mean = load_global(static_cast<const A*>(p.mean) + row);
      rstd = load_global(static_cast<const A*>(p.rstd) + row);
    }
  }
};

template <class T, class Column>
__device__ void write_dx(const NormBackward& p, const RowShare<T>& share, const RowState<Accumulate<T>>& state,
                         const Keep<Accumulate<T>>& keep, uint64_t seed, const T* extra, const Pack<T>& dy,
                         const Pack<T>& h, Column column, int count, bool wide) {
  using A = Accumulate<T>;
  A weight[kLanes<T>], dx[kLanes<T>];
  load_parameter<T>(weight, p.weight, p.weight_dtype != p.dtype, column, count, wide, A(1));
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    // dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    const A xhat = (widen(h.value[i]) - state.mean) * state.rstd;
    dx[i] = state.rstd * (widen(dy.value[i]) * weight[i] - state.mean_g - xhat * state.mean_gx);
  }
  Pack<T> out;
  if (extra != nullptr) {
    out = load_pack(extra + column, count, wide);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) dx[i] += widen(out.value[i]);
  }
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) out.value[i] = narrow<T>(dx[i]);
  const int64_t offset = share.row * p.cols + column;
  store_pack(static_cast<T*>(p.grad_normalised) + offset, out, count, wide);
  if (p.grad_dropped != nullptr) {
    const unsigned flags = keep.template flags<kLanes<T>>(seed, share.row, column);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) out.value[i] = narrow<T>(dx[i] * keep.factor(flags, i));
    store_pack(static_cast<T*>(p.grad_dropped) + offset, out, count, wide);
  }
}

// sum_columns: whether this kernel makes the partial sums.
template <class T, bool InRegisters>
__global__ void __launch_bounds__(kMostThreadsBackward, 1)
    norm_backward_rows_kernel(NormBackward p, Keep<Accumulate<T>> keep, RowPlan plan, int64_t chunk_rows,
                              bool sum_columns, bool wide) {
  using A = Accumulate<T>;
  const int64_t begin = int64_t(blockIdx.x) * chunk_rows;
  const int64_t end = begin + chunk_rows < p.rows ? begin + chunk_rows : p.rows;
  const ColumnSums<T> columns{shared<A>(2 * kReduceBytes<A>), plan.packs, plan.pitch};
  const uint64_t seed = keep.seed();
  if (InRegisters && sum_columns) columns.clear();

  int turn = 0;  // of two scratches
  for (int64_t first_row = begin; first_row < end; first_row += plan.rows, turn ^= 1) {
    const RowShare<T> share(plan, first_row, end, p.cols);
    RowState<A> state(p, share.row, share.there);
    const T *dy_row = share.of(p.grad_output), *h_row = share.of(p.input);
    const T* extra = p.grad_new_residual.data != nullptr ? share.of(p.grad_new_residual) : nullptr;
    const int first = 2 * kReduceBytes<A>, second = first + plan.packs * int(blockDim.x) * 16;
    RowPacks<T, InRegisters> dy_packs(plan, dy_row, first), h_packs(plan, h_row, second);
    Sums<A> sums = {0, 0};
    share.template each_pack<InRegisters>(plan.packs, [&](int pack, auto column, int count) {
      const Pack<T> dy = load_pack(dy_row + column, count, wide), h = load_pack(h_row + column, count, wide);
      dy_packs.put(pack, dy);
      h_packs.put(pack, h);
      A weight[kLanes<T>];
      load_parameter<T>(weight, p.weight, p.weight_dtype != p.dtype, column, count, wide, A(1));
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        // xhat = (h - mean) * rstd;  dweight += dy * xhat;  dbias += dy;  g = dy * weight
        const A grad = widen(dy.value[i]), g = grad * weight[i];
        const A xhat = (widen(h.value[i]) - state.mean) * state.rstd;
        sums.first += g;
        sums.second += g * xhat;
        if (InRegisters && sum_columns) columns.add(pack, i, grad * xhat, grad);
      }
    });
    if (p.grad_normalised == nullptr) continue;
    sums = sum_over_row(sums, plan.threads, shared<A>(turn * kReduceBytes<A>));
    if (p.centre) state.mean_g = sums.first / A(p.cols);
    state.mean_gx = sums.second / A(p.cols);
    share.template each_pack<InRegisters>(plan.packs, [&](int pack, auto column, int count) {
      const Pack<T> dy = dy_packs.get(pack, column, count, wide), h = h_packs.get(pack, column, count, wide);
      write_dx(p, share, state, keep, seed, extra, dy, h, column, count, wide);
    });
  }
  if (InRegisters && sum_columns) columns.write(p, plan, blockIdx.x);
}

// The partial sums of long rows. A block of kColumnGroups warps owns 32 packs of columns of one chunk; the warps share
// out its rows.
constexpr int kColumnGroups = 8;

template <class T>
__global__ void __launch_bounds__(kWarp* kColumnGroups, 1)
    norm_backward_columns_kernel(NormBackward p, int64_t chunk_rows, bool wide) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t column = (int64_t(blockIdx.x) * kWarp + lane) * kLanes<T>, left = p.cols - column;
  const int count = left >= kLanes<T> ? kLanes<T> : int(left);
  const int64_t begin = int64_t(blockIdx.y) * chunk_rows;
  const int64_t end = begin + chunk_rows < p.rows ? begin + chunk_rows : p.rows;
  A dweight[kLanes<T>] = {}, dbias[kLanes<T>] = {};
  for (int64_t row = begin + group; row < end; row += kColumnGroups) {
    const RowState<A> state(p, row, true);
    const Pack<T> dy = load_pack(row_of<T>(p.grad_output, row) + column, count, wide);
    const Pack<T> h = load_pack(row_of<T>(p.input, row) + column, count, wide);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      // dweight += dy * xhat;  dbias += dy
      dweight[i] += widen(dy.value[i]) * ((widen(h.value[i]) - state.mean) * state.rstd);
      dbias[i] += widen(dy.value[i]);
    }
  }
  const Shared<A> sums = shared<A>(0);  // [2, kLanes, kColumnGroups, kWarp]
  auto at = [=](int which, int i, int group) {
    return ((which * kLanes<T> + i) * kColumnGroups + group) * kWarp + lane;
  };
  for (int i = 0; i < kLanes<T>; ++i) {
    sums[at(0, i, group)] = dweight[i];
    sums[at(1, i, group)] = dbias[i];
  }
  __syncthreads();
  for (int which = 0; which < 2; ++which) {
    for (int i = group; i < count; i += kColumnGroups) {
      A sum = 0;
      for (int of = 0; of < kColumnGroups; ++of) sum += sums[at(which, i, of)];
      store_global(partial_sums<A>(p, blockIdx.y, which) + column + i, sum);
    }
  }
}

// out[c] = sum over chunks of partials[chunk][which][c]. A block owns 32 columns; its warps take every
// kPartialGroups-th chunk, and their sums are added in order. blockIdx.y: which.
constexpr int kPartialGroups = 8;

template <class T>
__global__ void __launch_bounds__(kWarp* kPartialGroups) norm_partials_kernel(NormBackward p, int64_t chunks) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp, which = int(blockIdx.y);
  const int64_t c = int64_t(blockIdx.x) * kWarp + lane;
  void* out = which == 0 ? p.grad_weight : p.grad_bias;
  if (out == nullptr) return;
  A sum = 0;
  if (c < p.cols) {
    for (int64_t k = group; k < chunks; k += kPartialGroups) sum += load_global(partial_sums<A>(p, k, which) + c);
  }
  const Shared<A> sums = shared<A>(0);  // [kPartialGroups, kWarp]
  sums[group * kWarp + lane] = sum;
  __syncthreads();
  if (group == 0 && c < p.cols) {
    sum = 0;
    for (int of = 0; of < kPartialGroups; ++of) sum += sums[of * kWarp + lane];
    if (p.weight_dtype == p.dtype) {
      store_global(static_cast<T*>(out) + c, narrow<T>(sum));
    } else {
      store_global(static_cast<A*>(out) + c, sum);
    }
  }
}

}  // namespace handtuned::cuda
