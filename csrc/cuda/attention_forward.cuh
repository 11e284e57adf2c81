// Attention forward on tensor cores, for bfloat16 and float16 and widths up to 256 (Dao, "FlashAttention-2", 2023).
//
//   S = Q K^T,   P = softmax's weights of S, rounded to T,   O = P V, sums in float
//
// Plan: a block of four warps owns 64 flat rows (attention_plan.h), a warp 16 of them. K and V come in tiles of
// ForwardTile::kKeys keys, each in two buffers: while a tile is worked on the next one is under way, K and V in groups
// of copies of their own.
//
//   shared memory   Q [64, W], K [2, kKeys, W], V [2, kKeys, W], swizzled (attention_tile.cuh); O takes Q's place
//   registers       of a thread: S 2 rows x kKeys / 4, O 2 rows x W / 4, Q's fragments where W is 64
//
//   per tile:  K is there | barrier | start the next K, V | S = Q K^T | V is there | softmax | barrier | O += P V
//
// W is 64, 128 or 256, whatever is the least to hold both widths; what is beyond a width is 0, and is left out in
// steps of 16.
#pragma once
#include "attention_scores.cuh"
#include "attention_warp.cuh"

namespace handtuned::cuda {

template <int W>
struct ForwardTile {
  static constexpr int kKeys = W <= 128 ? 64 : 32;
  static constexpr int kThreads = 128;
  static constexpr int kChunks = W / 8;  // of 16 bytes, of a row
  static constexpr int kQuery = 0, kKey = kTileRows * kChunks, kValue = kKey + 2 * kKeys * kChunks;  // in chunks
  static constexpr int kSharedBytes = 16 * (kValue + 2 * kKeys * kChunks);
};

// A warp's share: 16 rows (attention_warp.cuh), of whose keys a lane has kLine.
template <class T, int W>
class WarpRows {
 public:
  static constexpr int kKeys = ForwardTile<W>::kKeys, kLine = kKeys / 4;

  __device__ WarpRows(const AttentionForward& p, const Scores<float, Units::log2>& scores, const Keep<float>& keep,
                      const RowTile& tile, int64_t kv_head)
      : p_(p),
        scores_(scores),
        keep_(keep),
        g_(threadIdx.x % kWarp / 4),
        t_(threadIdx.x % 4),
        query_(shared<uint4>(16 * ForwardTile<W>::kQuery), first_row()) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      row_[half] = score_row(p, scores, tile.e, row_place(p, tile, kv_head, first_row() + g_ + 8 * half));
  }

  // sink: these are the first keys, and a sink takes part.
  __device__ void start(const RowTile& tile, int64_t kv_head, bool sink) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowPlace place = row_place(p_, tile, kv_head, first_row() + g_ + 8 * half);
      run_[half].start(p_, scores_, tile.e, place, sink, t_ == 0);
    }
    clear(o_);
  }

  __device__ bool finite() const { return all_finite(o_); }
  __device__ static int first_row() { return int(threadIdx.x) / kWarp * kWarpRows; }
  __device__ void load_query() { query_.load(); }

  // S = Q K^T
  __device__ void products(Shared<uint4> key) { multiply_rows<T>(s_, query_, key, int(p_.width)); }

  // S becomes P, of the tile that begins with key `first`; O is scaled to the new maximum.
  __device__ void softmax(int first) {
    const auto column = [&](int n) { return first + n / 2 * 8 + 2 * t_ + n % 2; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float line[kLine];
#pragma unroll
      for (int n = 0; n < kLine; ++n) line[n] = s_[n / 2][2 * half + n % 2];
      const auto row = [&](int) -> const ScoreRow<float>& { return row_[half]; };
      finish_scores(p_, scores_, row, line, column, !row_[half].sees_all(first, kKeys));
      const float scale = run_[half].template weigh<4>(scores_, line);
      if (keep_.seed_address != nullptr) drop(line, row_[half].index, column);
#pragma unroll
      for (int n = 0; n < kLine; ++n) s_[n / 2][2 * half + n % 2] = line[n];
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
        o_[n][2 * half] *= scale;
        o_[n][2 * half + 1] *= scale;
      }
    }
  }

  // O += P V. value: its tile's first chunk in shared memory.
  __device__ void weigh_values(int value, bool careful) {
    if (careful) {
      accumulate_carefully<T, W>(o_, s_, shared<uint32_t>(16 * value));
    } else {
      accumulate_rows<T, W>(o_, s_, shared<uint4>(16 * value), int(p_.value_width));
    }
  }

  // O / l and the lse. O takes its rows' place in Q's tile.
  __device__ void write(const RowTile& tile, int64_t kv_head, bool wide) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningRow<float>& run = run_[half];
      run.template finish<4>();
      inverse[half] = run.inverse();
      if (t_ == 0 && row_place(p_, tile, kv_head, first_row() + g_ + 8 * half).there)
        store_global(static_cast<float*>(p_.lse) + row_[half].index, run.lse(scores_));
    }
    store_rows<T, W, 8>(o_, inverse, ForwardTile<W>::kQuery, first_row(), int(p_.value_width), wide, [&](int r) -> T* {
      const RowPlace place = row_place(p_, tile, kv_head, r);
      return place.there ? query_row<T>(p_.output, tile.e, place.head, place.i) : nullptr;
    });
  }

  // O, m and l of a chunk of keys.
  __device__ void write_partial(const RowTile& tile, int64_t kv_head, const AttentionPlan& plan, int64_t chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningRow<float>& run = run_[half];
      run.template finish<4>();
      if (!row_place(p_, tile, kv_head, first_row() + g_ + 8 * half).there) continue;
      float* partial = partial_row<float>(p_, plan, row_[half].index, chunk);
#pragma unroll
      for (int n = 0; n < W / 4; ++n) {
        const int c = n / 2 * 8 + 2 * t_ + n % 2;
        if (c < p_.value_width) store_global(partial + c, o_[n / 2][2 * half + n % 2]);
      }
      if (t_ == 0) {
        store_global(partial + p_.value_width, run.max);
        store_global(partial + p_.value_width + 1, run.sum);
      }
    }
  }

 private:
  // Dropout of a line's weights. Keys 16 apart share a call of the generator.
  template <class Column>
  __device__ void drop(float (&line)[kLine], int64_t index, Column column) {
    const uint64_t seed = keep_.seed();
#pragma unroll
    for (int of = 0; of < 4; ++of) {
      const uint4 words = shared_call(seed, index, column(of));
#pragma unroll
      for (int n = of; n < kLine; n += 4) line[n] *= factor_of(keep_, words, column(n));
    }
  }

  const AttentionForward& p_;
  const Scores<float, Units::log2>& scores_;
  const Keep<float>& keep_;
  int g_, t_;
  ScoreRow<float> row_[2];
  RunningRow<float> run_[2];
  WarpOperand<W> query_;
  float s_[kKeys / 8][4];
  float o_[W / 8][4];
};

// Grid: row tiles, kv heads, chunks of keys. wide: every row of query, key, value and output begins at a multiple of 16
// bytes.
template <class T, int W>
__global__ void __launch_bounds__(ForwardTile<W>::kThreads, 2)
    attention_forward_kernel(const AttentionForward p, const Scores<float, Units::log2> scores, const Keep<float> keep,
                             const AttentionPlan plan, bool wide) {
  using Tile = ForwardTile<W>;
  constexpr int kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  const RowTile tile = row_tile(p, plan, blockIdx.x);
  if (!tile.there) return;
  const int64_t kv_head = blockIdx.y, chunk = blockIdx.z;
  KeyRange keys = keys_of_tile(p, tile, kKeys);
  if (keys.begin < chunk * plan.chunk_keys) keys.begin = chunk * plan.chunk_keys;
  if (keys.end > (chunk + 1) * plan.chunk_keys) keys.end = (chunk + 1) * plan.chunk_keys;

  const T *any_key = static_cast<const T*>(p.key.data), *any_value = static_cast<const T*>(p.value.data);
  // Starts to bring a tile of keys and one of values, in groups of their own; nothing where there are none left.
  const int begin = int(keys.begin), end = int(keys.end);
  const auto load = [&](int first, int buffer) {
    const auto row_of = [&](const AttentionTensor& t, int r) -> const T* {
      return first + r < end ? key_row<const T>(p, t, tile.e, kv_head, first + r) : nullptr;
    };
    const int at = buffer * kKeys * Tile::kChunks;
    if (first < end) {
      load_tile<T, W, kKeys, kThreads>(shared<uint4>(16 * (Tile::kKey + at)), int(p.width), wide, any_key,
                                       [&](int r) { return row_of(p.key, r); });
    }
    cp_async_commit();
    if (first < end) {
      load_tile<T, W, kKeys, kThreads>(shared<uint4>(16 * (Tile::kValue + at)), int(p.value_width), wide, any_value,
                                       [&](int r) { return row_of(p.value, r); });
    }
    cp_async_commit();
  };
  load_tile<T, W, kTileRows, kThreads>(shared<uint4>(16 * Tile::kQuery), int(p.width), wide,
                                       static_cast<const T*>(p.query.data),
                                       [&](int r) { return row_or_none<T>(p, p.query, tile, kv_head, r); });
  WarpRows<T, W> rows(p, scores, keep, tile, kv_head);
  const bool idle = WarpRows<T, W>::first_row() >= tile.count();  // it helps to bring tiles
  bool careful = false;
  do {
    load(begin, 0);  // Q is in the group of the first K
    rows.start(tile, kv_head, chunk == 0);
    int buffer = 0;
    for (int first = begin; first < end; first += kKeys) {
      cp_async_wait<1>();
      __syncthreads();  // K is there for all, and nobody reads the other buffers any more
      load(first + kKeys, 1 - buffer);
      const int at = buffer * kKeys * Tile::kChunks;
      if (!idle) {
        if (first == begin) rows.load_query();
        rows.products(shared<uint4>(16 * (Tile::kKey + at)));
        rows.softmax(first);
      }
      cp_async_wait<2>();
      __syncthreads();  // V is there for all
      if (!idle) rows.weigh_values(Tile::kValue + at, careful);
      buffer = 1 - buffer;
    }
    cp_async_wait<0>();  // where there was no key, Q may still be coming to where O goes
  } while (starts_again(careful, idle || rows.finite()));
  if (idle) return;
  if (plan.chunks > 1) {
    rows.write_partial(tile, kv_head, plan, chunk);
  } else {
    rows.write(tile, kv_head, wide);
  }
}

}  // namespace handtuned::cuda
