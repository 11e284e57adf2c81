// Attention backward without tensor cores, for every type and width. A block owns 64 flat rows and 128 columns of dQ,
// or 64 keys and 128 columns of dK or of dV, and adds up in one order:
//
//   dQ = scale sum_j dS' K,   dK = scale sum_i dS'^T Q,   dV = sum_i (keep P)^T dO
#pragma once
#include "attention_gradients.cuh"

namespace handtuned::cuda {

// Grid: row tiles, kv heads, chunks of kColumns columns.
template <class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    attention_grad_query_general_kernel(const AttentionBackward p, const Scores<Accumulate<T>> scores,
                                        const Keep<Accumulate<T>> keep, const AttentionPlan plan,
                                        const Accumulate<T> scale) {
  using A = Accumulate<T>;
  const RowTile tile = row_tile(p, plan, blockIdx.x);
  if (!tile.there || tile.e.b == p.batch) return;
  const int64_t kv_head = blockIdx.y;
  const int first_column = int(blockIdx.z) * kColumns<A>, x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const uint64_t seed = keep.seed();
  const KeyRange keys = keys_of_tile(p, tile, kTileKeys);
  GradientRows<T> rows;
  rows.load(p, scores, tile.e, [&](int r) { return row_place(p, tile, kv_head, r); });
  fill_row_table<T>(p, kQueryRows, p.query, tile, kv_head);
  fill_row_table<T>(p, kGradRows, p.grad_output, tile, kv_head);
  Accumulated<A> o;
  bool careful = false;
  do {
    o.clear();
    for (int64_t first = keys.begin; first < keys.end; first += kTileKeys) {
      fill_key_tables<T>(p, tile.e, kv_head, first, keys.end);
      A s[kOwn][kOwn];
      gradient_tile<T>(p, scores, keep, seed, rows, int(first), Wanted::of_product, s);
      const Shared<A> weights = ProductMemory<T>::weights();
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int c = 0; c < kOwn; ++c) weights[(y + kSide * r) * kWeightPitch + x + kSide * c] = s[r][c];
      const int count = keys.end - first < kTileKeys ? int(keys.end - first) : kTileKeys;
      accumulate_tile<T>(o, kWeightPitch, 1, kKeyRows, count, first_column, int(p.width), careful);
    }
  } while (starts_again(careful, o.finite()));
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const RowPlace place = row_place(p, tile, kv_head, y + kSide * r);
    if (!place.there) continue;
    T* out = query_row<T>(p.grad_query, tile.e, place.head, place.i);
#pragma unroll
    for (int c = 0; c < kOwnColumns<A>; ++c) {
      const int at = first_column + x + kSide * c;
      if (at < p.width) store_global(out + at, narrow<T>(scale * o.at(r, c)));
    }
  }
}

// Grid: key tiles, kv heads, chunks of kColumns columns: of dK, then of dV; of one alone where the other is not wanted.
template <class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    attention_grad_key_general_kernel(const AttentionBackward p, const Scores<Accumulate<T>> scores,
                                      const Keep<Accumulate<T>> keep, const Accumulate<T> scale, const int key_chunks) {
  using A = Accumulate<T>;
  const KeyTile tile = key_tile(p, blockIdx.x);
  if (!tile.there) return;
  const Entry& e = tile.e;
  const int64_t kv_head = blockIdx.y, group = p.heads / p.kv_heads;
  const bool of_key = int(blockIdx.z) < key_chunks;
  const int first_column = (int(blockIdx.z) - (of_key ? 0 : key_chunks)) * kColumns<A>;
  const int width = int(of_key ? p.width : p.value_width), x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const uint64_t seed = keep.seed();
  const RowRange seeing = rows_of_tile(p, tile);
  fill_key_tables<T>(p, e, kv_head, tile.first, tile.end);
  Accumulated<A> o;
  bool careful = false;
  do {
    o.clear();
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      for (int64_t i = seeing.begin; i < seeing.end; i += kTileRows) {
        const auto place_of = [&](int r) { return RowPlace{h, i + r, i + r < seeing.end}; };
        GradientRows<T> rows;
        rows.load(p, scores, e, place_of);
        for (int which = 0; which < 2; ++which) {
          const AttentionTensor& t = which == 0 ? p.query : p.grad_output;
          fill_table<T>(which == 0 ? kQueryRows : kGradRows,
                        [&](int r) { return i + r < seeing.end ? query_row<const T>(t, e, h, i + r) : nullptr; });
        }
        A s[kOwn][kOwn];
        gradient_tile<T>(p, scores, keep, seed, rows, int(tile.first), of_key ? Wanted::of_product : Wanted::weights,
                         s);
        const Shared<A> weights = ProductMemory<T>::weights();
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int c = 0; c < kOwn; ++c) weights[(y + kSide * r) * kWeightPitch + x + kSide * c] = s[r][c];
        const int count = seeing.end - i < kTileRows ? int(seeing.end - i) : kTileRows;
        accumulate_tile<T>(o, 1, kWeightPitch, of_key ? kQueryRows : kGradRows, count, first_column, width, careful);
      }
    }
  } while (starts_again(careful, o.finite()));
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int64_t j = tile.first + y + kSide * r;
    if (j >= tile.end) continue;
    T* out = key_row_unpaged<T>(of_key ? p.grad_key : p.grad_value, e, kv_head, j);
#pragma unroll
    for (int c = 0; c < kOwnColumns<A>; ++c) {
      const int at = first_column + x + kSide * c;
      if (at < width) store_global(out + at, narrow<T>(of_key ? scale * o.at(r, c) : o.at(r, c)));
    }
  }
}

}  // namespace handtuned::cuda
