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
#include "attention_tile.cuh"

namespace handtuned::cuda {

template <int W>
struct ForwardTile {
  static constexpr int kKeys = W <= 128 ? 64 : 32;
  static constexpr int kThreads = 128;
  static constexpr int kChunks = W / 8;  // of 16 bytes, of a row
  static constexpr bool kHoldsQuery = W <= 64;
  static constexpr int kHeld = kHoldsQuery ? W / 16 : 1;                                             // fragments of Q
  static constexpr int kQuery = 0, kKey = kTileRows * kChunks, kValue = kKey + 2 * kKeys * kChunks;  // in chunks
  static constexpr int kSharedBytes = 16 * (kValue + 2 * kKeys * kChunks);
};

// A warp's share: 16 rows. Lane 4 g + t has rows g and g + 8, and of S the keys 8 n + 2 t and the next one, of O the
// columns likewise.
template <class T, int W>
class WarpRows {
 public:
  static constexpr int kKeys = ForwardTile<W>::kKeys, kLine = kKeys / 4;  // of a row's keys, a lane's

  __device__ WarpRows(const AttentionForward& p, const Scores<float, Units::log2>& scores, const Keep<float>& keep,
                      const RowTile& tile, int64_t kv_head)
      : p_(p), scores_(scores), keep_(keep), seed_(keep.seed()), g_(threadIdx.x % kWarp / 4), t_(threadIdx.x % 4) {
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
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[n][i] = 0;
  }

  __device__ bool finite() const {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) finite = finite && isfinite(o_[n][i]);
    return finite;
  }

  __device__ static int first_row() { return int(threadIdx.x) / kWarp * 16; }

  __device__ void load_query(Shared<uint4> query) {
    if constexpr (ForwardTile<W>::kHoldsQuery) {
#pragma unroll
      for (int k = 0; k < W / 16; ++k) load_a<W>(q_[k], query, first_row(), k);
    }
  }

  // S = Q K^T
  __device__ void products(Shared<uint4> query, Shared<uint4> key) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s_[n][i] = 0;
#pragma unroll
    for (int k = 0; k < W / 16; ++k) {
      if (16 * k < p_.width) {
        uint32_t here[4];
        if constexpr (!ForwardTile<W>::kHoldsQuery) load_a<W>(here, query, first_row(), k);
        const uint32_t (&q)[4] = ForwardTile<W>::kHoldsQuery ? q_[k] : here;
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          load_b<W>(b, key, 16 * n, k);
          mma_16x8x16<T>(s_[2 * n], q, b[0], b[1]);
          mma_16x8x16<T>(s_[2 * n + 1], q, b[2], b[3]);
        }
      }
    }
  }

  // S becomes P, of the tile that begins with key `first`; O is scaled to the new maximum.
  __device__ void softmax(int first) {
    const auto column = [&](int n) { return first + n / 2 * 8 + 2 * t_ + n % 2; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float line[kLine];
#pragma unroll
      for (int n = 0; n < kLine; ++n) line[n] = s_[n / 2][2 * half + n % 2];
      finish_scores(p_, scores_, row_[half], line, column, first, kKeys);
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

  // O += P V
  __device__ void weigh_values(Shared<uint4> value) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t a[4] = {narrow_pair<T>(s_[2 * k][0], s_[2 * k][1]), narrow_pair<T>(s_[2 * k][2], s_[2 * k][3]),
                             narrow_pair<T>(s_[2 * k + 1][0], s_[2 * k + 1][1]),
                             narrow_pair<T>(s_[2 * k + 1][2], s_[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < W / 16; ++n) {
        if (16 * n < p_.value_width) {
          uint32_t b[4];
          load_b_trans<W>(b, value, 16 * k, n);
          mma_16x8x16<T>(o_[2 * n], a, b[0], b[1]);
          mma_16x8x16<T>(o_[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // The same without tensor cores: what has a weight of 0 adds nothing, whatever it is.
  // pairs: of V's tile, two columns each.
  __device__ void weigh_values_carefully(Shared<uint32_t> pairs) {
    const int quad = threadIdx.x % kWarp / 4 * 4;
#pragma unroll
    for (int n = 0; n < kKeys / 4; ++n) {
#pragma unroll 1
      for (int of = 0; of < 4; ++of) {
        const int key = n / 2 * 8 + 2 * of + n % 2;  // its weights are with lane `of` of the four that share the rows
        float weight[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          weight[half] = __shfl_sync(kWholeWarp, s_[n / 2][2 * half + n % 2], quad + of);
#pragma unroll
        for (int c = 0; c < W / 8; ++c) {
          const uint32_t pair = pairs[4 * chunk_at<W>(key, c) + t_];
          const float value[2] = {widen(T{uint16_t(pair)}), widen(T{uint16_t(pair >> 16)})};
#pragma unroll
          for (int i = 0; i < 4; ++i) o_[c][i] += weight[i / 2] == 0 ? 0.0f : weight[i / 2] * value[i % 2];
        }
      }
    }
  }

  // O / l and the lse. O takes its rows' place in Q's tile, so that rows are stored 16 bytes at a time.
  __device__ void write(const RowTile& tile, int64_t kv_head, Shared<uint4> query, bool wide) {
    const Shared<uint32_t> pairs = shared<uint32_t>(0);  // of Q's tile
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningRow<float>& run = run_[half];
      run.template finish<4>();
      const float inverse = run.inverse();
      const int r = first_row() + g_ + 8 * half;
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
        pairs[4 * chunk_at<W>(r, n) + t_] = narrow_pair<T>(o_[n][2 * half] * inverse, o_[n][2 * half + 1] * inverse);
      if (t_ == 0 && row_place(p_, tile, kv_head, r).there)
        store_global(static_cast<float*>(p_.lse) + row_[half].index, run.lse(scores_));
    }
    __syncwarp();
    constexpr int kAtOnce = kWarp / ForwardTile<W>::kChunks > 0 ? kWarp / ForwardTile<W>::kChunks : 1;  // rows
    const int lane = threadIdx.x % kWarp, chunk = lane % ForwardTile<W>::kChunks;
#pragma unroll
    for (int r = 0; r < 16; r += kAtOnce) {
      const int own = first_row() + r + lane / ForwardTile<W>::kChunks;
      const RowPlace place = row_place(p_, tile, kv_head, own);
      const uint4 bits = query[chunk_at<W>(own, chunk)];
      const int count = int(p_.value_width) - 8 * chunk;
      if (!place.there || count <= 0) continue;
      Pack<T> pack;
      __builtin_memcpy(&pack, &bits, sizeof bits);
      store_pack(query_row<T>(p_.output, tile.e, place.head, place.i) + 8 * chunk, pack, count < 8 ? count : 8,
                 wide && count >= 8);
    }
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
#pragma unroll
    for (int of = 0; of < 4; ++of) {
      const uint4 words = shared_call(seed_, index, column(of));
#pragma unroll
      for (int n = of; n < kLine; n += 4) line[n] *= factor_of(keep_, words, column(n));
    }
  }

  const AttentionForward& p_;
  const Scores<float, Units::log2>& scores_;
  const Keep<float>& keep_;
  uint64_t seed_;
  int g_, t_;
  ScoreRow<float> row_[2];
  RunningRow<float> run_[2];
  uint32_t q_[ForwardTile<W>::kHeld][4];
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

  const Shared<uint4> query = shared<uint4>(16 * Tile::kQuery);
  const T *any_key = static_cast<const T*>(p.key.data), *any_value = static_cast<const T*>(p.value.data);
  // Starts to bring a tile of keys and one of values, in groups of their own; nothing where there are none left.
  const auto load = [&](int64_t first, int buffer) {
    const auto row_of = [&](const AttentionTensor& t, int r) -> const T* {
      return first + r < keys.end ? key_row<const T>(p, t, tile.e, kv_head, first + r) : nullptr;
    };
    const int at = buffer * kKeys * Tile::kChunks;
    if (first < keys.end) {
      load_tile<T, W, kKeys, kThreads>(shared<uint4>(16 * (Tile::kKey + at)), int(p.width), wide, any_key,
                                       [&](int r) { return row_of(p.key, r); });
    }
    cp_async_commit();
    if (first < keys.end) {
      load_tile<T, W, kKeys, kThreads>(shared<uint4>(16 * (Tile::kValue + at)), int(p.value_width), wide, any_value,
                                       [&](int r) { return row_of(p.value, r); });
    }
    cp_async_commit();
  };
  load_tile<T, W, kTileRows, kThreads>(query, int(p.width), wide, static_cast<const T*>(p.query.data), [&](int r) {
    const RowPlace place = row_place(p, tile, kv_head, r);
    return place.there ? query_row<const T>(p.query, tile.e, place.head, place.i) : nullptr;
  });
  WarpRows<T, W> rows(p, scores, keep, tile, kv_head);
  const bool idle = WarpRows<T, W>::first_row() >= tile.count();  // it helps to bring tiles
  bool careful = false;
  do {
    load(keys.begin, 0);  // Q is in the group of the first K
    rows.start(tile, kv_head, chunk == 0);
    int buffer = 0;
    for (int64_t first = keys.begin; first < keys.end; first += kKeys) {
      cp_async_wait<1>();
      __syncthreads();  // K is there for all, and nobody reads the other buffers any more
      load(first + kKeys, 1 - buffer);
      const int at = buffer * kKeys * Tile::kChunks;
      if (!idle) {
        if (first == keys.begin) rows.load_query(query);
        rows.products(query, shared<uint4>(16 * (Tile::kKey + at)));
        rows.softmax(int(first));
      }
      cp_async_wait<2>();
      __syncthreads();  // V is there for all
      if (!idle && careful) rows.weigh_values_carefully(shared<uint32_t>(16 * (Tile::kValue + at)));
      if (!idle && !careful) rows.weigh_values(shared<uint4>(16 * (Tile::kValue + at)));
      buffer = 1 - buffer;
    }
    cp_async_wait<0>();  // where there was no key, Q may still be coming to where O goes
  } while (starts_again(careful, idle || rows.finite()));
  if (idle) return;
  if (plan.chunks > 1) {
    rows.write_partial(tile, kv_head, plan, chunk);
  } else {
    rows.write(tile, kv_head, query, wide);
  }
}

}  // namespace handtuned::cuda
