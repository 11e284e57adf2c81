// The (O, m, l) of the chunks of keys of each row, merged in order of the keys:
//   m = max_k m_k,   O = sum_k e^(m_k - m) O_k / l,   l = sum_k e^(m_k - m) l_k
#pragma once
#include "attention_scores.cuh"

namespace handtuned::cuda {

constexpr int kMergeWarps = 4;

// Grid: row tiles, kv heads, shares of a tile's rows. A warp takes a row.
template <class T, Units U>
__global__ void __launch_bounds__(kWarp* kMergeWarps, 1)
    attention_merge_kernel(const AttentionForward p, const Scores<Accumulate<T>, U> scores, const AttentionPlan plan) {
  using A = Accumulate<T>;
  const RowTile tile = row_tile(p, plan, blockIdx.x);
  if (!tile.there) return;
  const int lane = threadIdx.x % kWarp, r = int(blockIdx.z) * kMergeWarps + int(threadIdx.x) / kWarp;
  const RowPlace place = row_place(p, tile, blockIdx.y, r);
  if (!place.there) return;
  const int64_t index = lse_index(p, tile.e, place.head, place.i);
  RunningRow<A> run = {hidden<A>(), 0};
  for (int64_t k = 0; k < plan.chunks; ++k) {
    const A max = load_global(partial_row<A>(p, plan, index, k) + p.value_width);
    run.max = max > run.max ? max : run.max;
  }
  const A from = run.max == hidden<A>() ? A(0) : run.max;
  for (int64_t k = 0; k < plan.chunks; ++k) {
    const A* ml = partial_row<A>(p, plan, index, k) + p.value_width;
    run.sum += scores.power(load_global(ml) - from) * load_global(ml + 1);
  }
  const A inverse = run.inverse();
  T* out = query_row<T>(p.output, tile.e, place.head, place.i);
  for (int64_t c = lane; c < p.value_width; c += kWarp) {
    A sum = 0;
    for (int64_t k = 0; k < plan.chunks; ++k) {
      const A* partial = partial_row<A>(p, plan, index, k);
      sum += scores.power(load_global(partial + p.value_width) - from) * load_global(partial + c);
    }
    store_global(out + c, narrow<T>(sum * inverse));
  }
  if (lane == 0) store_global(static_cast<A*>(p.lse) + index, run.lse(scores));
}

}  // namespace handtuned::cuda
