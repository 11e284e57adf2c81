// Attention forward without tensor cores (attention_products.cuh), for every type and width. A block owns 64 flat rows
// (attention_plan.h) and 128 columns of values; a wider O is made by several blocks, each with scores of its own.
//
//   per tile of 64 keys:  S = Q K^T | softmax in registers | P to shared memory | O += P V
#pragma once
#include "attention_products.cuh"

namespace handtuned::cuda {

// Tables of row addresses.
enum : int { kQueryRows = 0, kKeyRows = 1, kValueRows = 2, kGradRows = 3 };

// Keys [first, first + kTileKeys) of a tile and what lies behind its end.
template <class T>
__device__ inline void fill_key_tables(const Attention& p, const Entry& e, int64_t kv_head, int64_t first,
                                       int64_t end) {
  fill_table<T>(kKeyRows,
                [&](int r) { return first + r < end ? key_row<const T>(p, p.key, e, kv_head, first + r) : nullptr; });
  fill_table<T>(kValueRows,
                [&](int r) { return first + r < end ? key_row<const T>(p, p.value, e, kv_head, first + r) : nullptr; });
}

// The same of query rows, from any tensor laid out like them.
template <class T>
__device__ inline void fill_row_table(const Attention& p, int which, const AttentionTensor& t, const RowTile& tile,
                                      int64_t kv_head) {
  fill_table<T>(which, [&](int r) { return row_or_none<T>(p, t, tile, kv_head, r); });
}

// Grid: row tiles, kv heads, chunks of keys x chunks of kColumns columns.
template <class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    attention_forward_general_kernel(const AttentionForward p, const Scores<Accumulate<T>> scores,
                                     const Keep<Accumulate<T>> keep, const AttentionPlan plan) {
  using A = Accumulate<T>;
  const RowTile tile = row_tile(p, plan, blockIdx.x);
  if (!tile.there) return;
  const int64_t kv_head = blockIdx.y, chunk = blockIdx.z % plan.chunks;
  const int first_column = int(blockIdx.z / plan.chunks) * kColumns<A>;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const uint64_t seed = keep.seed();
  KeyRange keys = keys_of_tile(p, tile, kTileKeys);
  if (keys.begin < chunk * plan.chunk_keys) keys.begin = chunk * plan.chunk_keys;
  if (keys.end > (chunk + 1) * plan.chunk_keys) keys.end = (chunk + 1) * plan.chunk_keys;

  ScoreRow<A> row[kOwn];
  RunningRow<A> run[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const RowPlace place = row_place(p, tile, kv_head, y + kSide * r);
    row[r] = score_row(p, scores, tile.e, place);
  }
  fill_row_table<T>(p, kQueryRows, p.query, tile, kv_head);
  Accumulated<A> o;
  bool careful = false;
  do {
    o.clear();
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
      run[r].start(p, scores, tile.e, row_place(p, tile, kv_head, y + kSide * r), chunk == 0, x == 0);
    for (int64_t first = keys.begin; first < keys.end; first += kTileKeys) {
      const auto column = [&](int c) { return int(first) + x + kSide * c; };
      fill_key_tables<T>(p, tile.e, kv_head, first, keys.end);
      A s[kOwn][kOwn];
      product_tile<T>(s, kQueryRows, kKeyRows, int(p.width));
      const Shared<A> weights = ProductMemory<T>::weights();
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const auto row_of = [&](int) -> const ScoreRow<A>& { return row[r]; };
        finish_scores(p, scores, row_of, s[r], column, !row[r].sees_all(int(first), kTileKeys));
        const A scale = run[r].template weigh<kSide>(scores, s[r]);
#pragma unroll
        for (int c = 0; c < kOwnColumns<A>; ++c) o.at(r, c) *= scale;
        if (keep.seed_address != nullptr) {
          const uint4 words = shared_call(seed, row[r].index, column(0));
#pragma unroll
          for (int c = 0; c < kOwn; ++c) s[r][c] *= factor_of(keep, words, column(c));
        }
#pragma unroll
        for (int c = 0; c < kOwn; ++c) weights[(y + kSide * r) * kWeightPitch + x + kSide * c] = s[r][c];
      }
      const int count = keys.end - first < kTileKeys ? int(keys.end - first) : kTileKeys;
      accumulate_tile<T>(o, kWeightPitch, 1, kValueRows, count, first_column, int(p.value_width), careful);
    }
  } while (starts_again(careful, o.finite()));
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    run[r].template finish<kSide>();
    const RowPlace place = row_place(p, tile, kv_head, y + kSide * r);
    if (!place.there) continue;
    const bool first_lane = x == 0 && first_column == 0;
    if (plan.chunks > 1) {
      A* partial = partial_row<A>(p, plan, row[r].index, chunk);
#pragma unroll
      for (int c = 0; c < kOwnColumns<A>; ++c) {
        const int at = first_column + x + kSide * c;
        if (at < p.value_width) store_global(partial + at, o.at(r, c));
      }
      if (first_lane) {
        store_global(partial + p.value_width, run[r].max);
        store_global(partial + p.value_width + 1, run[r].sum);
      }
    } else {
      T* out = query_row<T>(p.output, tile.e, place.head, place.i);
      const A inverse = run[r].inverse();
#pragma unroll
      for (int c = 0; c < kOwnColumns<A>; ++c) {
        const int at = first_column + x + kSide * c;
        if (at < p.value_width) store_global(out + at, narrow<T>(o.at(r, c) * inverse));
      }
      if (first_lane) store_global(static_cast<A*>(p.lse) + row[r].index, run[r].lse(scores));
    }
  }
}

}  // namespace handtuned::cuda
