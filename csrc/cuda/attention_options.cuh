// The gradients of what attention may be given beside queries, keys and values, for every type and width:
//
//   attention_grad_mask_kernel    a block owns a tile of the mask, and adds up whatever the mask is broadcast over
//   attention_grad_sinks_kernel   a block owns a head:  dsink = -sum_i exp(sink - lse_i) delta_i
#pragma once
#include "attention_gradients.cuh"

namespace handtuned::cuda {

template <class A>
__device__ inline void store_mask(const AttentionBackward& p, int64_t at, A value) {
  switch (p.mask.dtype) {
    case DType::f64: store_global(static_cast<double*>(p.grad_mask) + at, double(value)); break;
    case DType::f32: store_global(static_cast<float*>(p.grad_mask) + at, float(value)); break;
    case DType::bf16: store_global(static_cast<bf16*>(p.grad_mask) + at, narrow<bf16>(float(value))); break;
    case DType::f16: store_global(static_cast<f16*>(p.grad_mask) + at, narrow<f16>(float(value))); break;
  }
}

// A block's tile of the mask's gradient, summed over the dims that are 1. sums: of 64 rows x 64 keys, in shared memory.
template <class T, class A>
__device__ inline void write_mask(const AttentionBackward& p, int64_t of_head, int64_t first_row, int64_t first_key) {
  const Shared<A> sums = ProductMemory<T>::weights(), of_rows = ProductMemory<T>::stage();
  const int lane = threadIdx.x % kWarp, t = int(threadIdx.x);
  const int64_t from = of_head * p.mask.rows * p.mask.keys;
  if (p.mask.keys == 1) {
    constexpr int kOfWarp = kTileRows / (kProductThreads / kWarp);
    A own = 0;  // lane n: the sum of the warp's row n
    for (int n = 0; n < kOfWarp; ++n) {
      const int at = (t / kWarp * kOfWarp + n) * kWeightPitch + lane;
      Sums<A> sum = {sums[at] + sums[at + kWarp], 0};
      sum = sum_over_lanes(sum, kWarp);
      if (lane == n) own = sum.first;
    }
    if (lane < kOfWarp) of_rows[t / kWarp * kOfWarp + lane] = own;
    __syncthreads();
    if (p.mask.rows == 1) {
      Sums<A> sum = {of_rows[lane] + of_rows[lane + kWarp], 0};
      sum = sum_over_lanes(sum, kWarp);
      if (t == 0) store_mask(p, from, sum.first);
    } else if (t < kTileRows && first_row + t < p.mask.rows) {
      store_mask(p, from + first_row + t, A(of_rows[t]));
    }
  } else if (p.mask.rows == 1) {
    if (t < kTileKeys && first_key + t < p.mask.keys) {
      A sum = 0;
      for (int r = 0; r < kTileRows; ++r) sum += sums[r * kWeightPitch + t];
      store_mask(p, from + first_key + t, sum);
    }
  } else {
    const int c = t % kTileKeys;
    for (int r = t / kTileKeys; r < kTileRows; r += kProductThreads / kTileKeys) {
      const int64_t i = first_row + r, j = first_key + c;
      if (i < p.mask.rows && j < p.mask.keys) store_mask(p, from + i * p.mask.keys + j, A(sums[r * kWeightPitch + c]));
    }
  }
}

// Grid: the mask's batches x heads, tiles of its rows, of its keys.
template <class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    attention_grad_mask_kernel(const AttentionBackward p, const Scores<Accumulate<T>> scores,
                               const Keep<Accumulate<T>> keep) {
  using A = Accumulate<T>;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const int64_t group = p.heads / p.kv_heads, of_head = blockIdx.x;
  const int64_t batch = of_head / p.mask.heads, head = of_head % p.mask.heads;
  const bool all_batches = p.mask.batches == 1, all_heads = p.mask.heads == 1;
  const bool all_rows = p.mask.rows == 1, all_keys = p.mask.keys == 1;
  const int64_t row_from = int64_t(blockIdx.y) * kTileRows, key_from = int64_t(blockIdx.z) * kTileKeys;
  const uint64_t seed = keep.seed();
  const Shared<A> sums = ProductMemory<T>::weights();  // each thread its own, until the end
  const auto own = [&](int r, int c) { return (y + kSide * r) * kWeightPitch + x + kSide * c; };
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int c = 0; c < kOwn; ++c) sums[own(r, c)] = A(0);
  const int64_t first_batch = all_batches ? 0 : batch, end_batch = all_batches ? p.batch : batch + 1;
  const int64_t first_head = all_heads ? 0 : head, end_head = all_heads ? p.heads : head + 1;
  for (int64_t b = first_batch; b < end_batch; ++b) {
    const Entry e = entry_at(p, b);
    const int64_t end_row = all_rows || e.query_rows < row_from + kTileRows ? e.query_rows : row_from + kTileRows;
    const int64_t end_key = all_keys || e.key_rows < key_from + kTileKeys ? e.key_rows : key_from + kTileKeys;
    for (int64_t h = first_head; h < end_head; ++h)
      for (int64_t i = row_from; i < end_row; i += kTileRows) {
        GradientRows<T> rows;
        rows.load(p, scores, e, [&](int r) { return RowPlace{h, i + r, i + r < end_row}; });
        for (int64_t j = key_from; j < end_key; j += kTileKeys) {
          fill_key_tables<T>(p, e, h / group, j, end_key);
          for (int which = 0; which < 2; ++which) {
            const AttentionTensor& t = which == 0 ? p.query : p.grad_output;
            fill_table<T>(which == 0 ? kQueryRows : kGradRows,
                          [&](int r) { return i + r < end_row ? query_row<const T>(t, e, h, i + r) : nullptr; });
          }
          A s[kOwn][kOwn];
          gradient_tile<T>(p, scores, keep, seed, rows, int(j), Wanted::of_score, s);
#pragma unroll
          for (int r = 0; r < kOwn; ++r)
#pragma unroll
            for (int c = 0; c < kOwn; ++c) sums[own(r, c)] += s[r][c];
        }
      }
  }
  __syncthreads();
  write_mask<T, A>(p, of_head, row_from, key_from);
}

// Grid: heads.
constexpr int kSinkThreads = 256;
template <class T>
__global__ void __launch_bounds__(kSinkThreads) attention_grad_sinks_kernel(const AttentionBackward p) {
  using A = Accumulate<T>;
  const int64_t head = blockIdx.x;
  const bool packed = p.device.query_starts.data != nullptr;
  const double sink = number_at<double>(p.device.sinks, head);
  const int64_t rows = (packed ? 1 : p.batch) * p.total_rows;
  Sums<double> sums = {0, 0};
  for (int64_t row = threadIdx.x; row < rows; row += kSinkThreads) {
    const int64_t index =
        packed ? head * p.total_rows + row : (row / p.total_rows * p.heads + head) * p.total_rows + row % p.total_rows;
    const double lse = double(load_global(static_cast<const A*>(p.lse) + index));
    if (lse > hidden<double>()) {
      // dsink -= exp(sink - lse) delta
      sums.first -= exp(sink - lse) * double(load_global(static_cast<const A*>(p.delta) + index));
    }
  }
  sums = sum_over_row(sums, kSinkThreads, shared<double>(0));
  if (threadIdx.x != 0) return;
  switch (p.device.sinks.type) {
    case NumberType::f64: store_global(static_cast<double*>(p.device_grad_sinks) + head, sums.first); break;
    case NumberType::bf16:
      store_global(static_cast<bf16*>(p.device_grad_sinks) + head, narrow<bf16>(float(sums.first)));
      break;
    case NumberType::f16:
      store_global(static_cast<f16*>(p.device_grad_sinks) + head, narrow<f16>(float(sums.first)));
      break;
    default: store_global(static_cast<float*>(p.device_grad_sinks) + head, float(sums.first));
  }
}

}  // namespace handtuned::cuda
