// Attention backward on tensor cores, for bfloat16 and float16 and widths up to 256.
//
//   P = e^(S - lse),   dS = P (keep dP - delta),   dS' = dS by the slope of the softcap
//
// Plan: a block of four warps owns 64 rows of one side, a warp 16 of them, and the other side streams by in tiles of
// GradientBlock::kOthers rows. P and dS are sums of a warp's products and, rounded to T, operands of its next ones, in
// the same registers. Each gradient has one owner, which adds up in one order.
//
//   kernel           owns                 streams        of a tile                       adds up
//   grad_query       64 flat rows Q, dO   K, V           S = Q K^T, dP = dO V^T          dQ += dS' K
//   grad_key         64 keys K, V         Q, dO of all   S^T = K Q^T, dP^T = V dO^T      dK += dS'^T Q
//                                         heads' rows                                    dV += (keep P)^T dO
//
//   shared memory   own tiles 2 x [64, W], streamed ones [2, 2, kOthers, W] in two buffers, swizzled
//                   (attention_tile.cuh); grad_key: what streamed rows are; gradients leave through the own tiles
//   registers       of a thread: S and dP 2 rows x kOthers / 4, each gradient 2 rows x W / 4, where W is 64 own rows
//
//   per tile:  it is there | barrier | start the next one | S, dP | P, dS | sums
//
// W is 64, 128 or 256, whatever is the least to hold both widths. Where it is 256, dK and dV are made by blocks of
// their own: their sums are all the registers that a block has.
#pragma once
#include "attention_gradients.cuh"
#include "attention_warp.cuh"

namespace handtuned::cuda {

template <int W, int Others>
struct GradientBlock {
  static constexpr int kOthers = Others;
  static constexpr bool kBoth = W <= 128;  // dK and dV in one block
  static constexpr int kSums = kBoth ? 2 : 1;
  static constexpr int kThreads = 128, kBlocks = 2;  // of a multiprocessor, by registers
  static constexpr int kFragments = kOthers / 8;     // of S
  // In chunks of 16 bytes:
  static constexpr int kOwn = 0, kOwnTile = kTileRows * W / 8;
  static constexpr int kOther = 2 * kOwnTile, kOtherTile = kOthers * W / 8;
  static constexpr int kRows = kOther + 4 * kOtherTile, kRowsOfTile = kOthers * 5 / 2;
  static constexpr int kQueryBytes = 16 * kRows, kKeyBytes = kQueryBytes + 16 * 2 * kRowsOfTile;

  // The first chunk of streamed tile `which`, 0 or 1.
  __device__ static int other(int buffer, int which) { return kOther + (2 * buffer + which) * kOtherTile; }
};

// As many others as leave registers enough.
template <int W>
inline constexpr int kKeysAtOnce = W <= 128 ? 32 : 16;
template <int W>
inline constexpr int kRowsAtOnce = W <= 64 ? 32 : 16;
template <int W>
using QueryBlock = GradientBlock<W, kKeysAtOnce<W>>;
template <int W>
using KeyBlock = GradientBlock<W, kRowsAtOnce<W>>;

// What a gradient needs of a query row beside its score: lse in units of log2, -infinity for rows that see nothing or
// are not there.
struct alignas(8) RowSums {
  float lse, delta;
};

__device__ inline RowSums load_sums(const AttentionBackward& p, int64_t index) {
  return {load_global(static_cast<const float*>(p.lse) + index),
          load_global(static_cast<const float*>(p.delta) + index)};
}

// Works through the tiles of the other side: load(n, buffer) starts to bring tile n and may keep something of it in
// registers, which publish(n, buffer) puts into shared memory; then work(n, buffer).
template <class Load, class Publish, class Work>
__device__ inline void stream(int tiles, Load load, Publish publish, Work work) {
  if (tiles > 0) load(0, 0);
  cp_async_commit();
  for (int n = 0; n < tiles; ++n) {
    publish(n, n % 2);
    cp_async_wait<0>();
    __syncthreads();  // the tile is there for all, and nobody reads the other buffer any more
    if (n + 1 < tiles) load(n + 1, (n + 1) % 2);
    cp_async_commit();
    work(n, n % 2);
  }
  cp_async_wait<0>();  // where there is no tile, own rows may still be coming to where gradients go
}

// S becomes P with dropout, dP becomes dS'. Lane: what is where, of a lane's two lines of kLine elements; bit
// `half` * kLine + n of kept(): whether dropout keeps it.
template <class Lane, int N>
__device__ inline void gradients_of_tile(const AttentionBackward& p, const Scores<float, Units::log2>& scores,
                                         const Keep<float>& keep, const Lane& lane, float (&s)[N][4],
                                         float (&dp)[N][4]) {
  constexpr int kLine = 2 * N;
  const bool drops = keep.seed_address != nullptr;
  const uint32_t kept = drops ? lane.kept(keep, keep.seed()) : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float line[kLine], slope[kLine];
#pragma unroll
    for (int n = 0; n < kLine; ++n) line[n] = s[n / 2][2 * half + n % 2];
    weights_of_line(
        p, scores, [&](int n) { return lane.row(half, n); }, [&](int n) { return lane.sums(half, n).lse; }, line,
        [&](int n) { return lane.key(half, n); }, lane.hides(half), slope);
#pragma unroll
    for (int n = 0; n < kLine; ++n) {
      const bool is_kept = kept >> (half * kLine + n) & 1;
      float factor = 1;
      if (drops) factor = is_kept ? keep.scale : 0.0f;
      float& gradient = dp[n / 2][2 * half + n % 2];
      gradient = gradient_of_score(line[n] * slope[n], gradient * factor, lane.sums(half, n).delta);
      s[n / 2][2 * half + n % 2] = line[n] * factor;
    }
  }
}

// o += w B, of a streamed tile, of which `tile` is the first chunk.
template <class T, int W, int N>
__device__ inline void add_up(float (&o)[W / 8][4], const float (&w)[N][4], int tile, int width, bool careful) {
  if (careful) {
    accumulate_carefully<T, W>(o, w, shared<uint32_t>(16 * tile));
  } else {
    accumulate_rows<T, W>(o, w, shared<uint4>(16 * tile), width);
  }
}

// Lane 4 g + t of a warp that owns query rows: rows g and g + 8, and of every eight keys 2 t and the next one.
template <int W>
struct QueryLane {
  ScoreRow<float> rows[2];
  RowSums of_row[2];
  int first = 0;  // key of the tile

  // own: the warp's first row of the tile.
  __device__ QueryLane(const AttentionBackward& p, const Scores<float, Units::log2>& scores, const RowTile& tile,
                       int64_t kv_head, int own) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowPlace place = row_place(p, tile, kv_head, own + int(threadIdx.x) % kWarp / 4 + 8 * half);
      rows[half] = score_row(p, scores, tile.e, place);
      of_row[half] = {hidden<float>(), 0};
      if (place.there) of_row[half] = load_sums(p, rows[half].index);
      of_row[half].lse *= scores.from_natural;
    }
  }

  __device__ const ScoreRow<float>& row(int half, int) const { return rows[half]; }
  __device__ const RowSums& sums(int half, int) const { return of_row[half]; }
  __device__ int key(int, int n) const { return first + n / 2 * 8 + int(threadIdx.x) % 4 * 2 + n % 2; }
  __device__ bool hides(int half) const { return !rows[half].sees_all(first, QueryBlock<W>::kOthers); }

  // Keys 16 apart share a call of the generator.
  __device__ uint32_t kept(const Keep<float>& keep, uint64_t seed) const {
    constexpr int kLine = QueryBlock<W>::kOthers / 4;
    uint32_t kept = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int of = 0; of < 4; ++of) {
        const uint4 words = shared_call(seed, rows[half].index, key(half, of));
#pragma unroll
        for (int n = of; n < kLine; n += 4) kept |= uint32_t(is_kept(keep, words, key(half, n))) << (half * kLine + n);
      }
    return kept;
  }
};

// Grid: row tiles, kv heads. wide: every row of the tensors begins at a multiple of 16 bytes.
template <class T, int W>
__global__ void __launch_bounds__(QueryBlock<W>::kThreads, QueryBlock<W>::kBlocks)
    attention_grad_query_kernel(const AttentionBackward p, const Scores<float, Units::log2> scores,
                                const Keep<float> keep, const AttentionPlan plan, const float scale, const bool wide) {
  using Block = QueryBlock<W>;
  const RowTile tile = row_tile(p, plan, blockIdx.x);
  if (!tile.there || tile.e.b == p.batch) return;
  const int64_t kv_head = blockIdx.y;
  const KeyRange keys = keys_of_tile(p, tile, Block::kOthers);
  const int own = int(threadIdx.x) / kWarp * kWarpRows;
  const int width = int(p.width), value_width = int(p.value_width);

  const auto load_own = [&](const AttentionTensor& t, int which, int width) {
    load_tile<T, W, kTileRows, Block::kThreads>(shared<uint4>(16 * (Block::kOwn + which * Block::kOwnTile)), width,
                                                wide, static_cast<const T*>(t.data),
                                                [&](int r) { return row_or_none<T>(p, t, tile, kv_head, r); });
  };
  load_own(p.query, 0, width);
  load_own(p.grad_output, 1, value_width);
  const auto load_other = [&](const AttentionTensor& t, int n, int buffer, int which, int width) {
    const int64_t first = keys.begin + int64_t(n) * Block::kOthers;
    load_tile<T, W, Block::kOthers, Block::kThreads>(
        shared<uint4>(16 * Block::other(buffer, which)), width, wide, static_cast<const T*>(t.data), [&](int r) {
          return first + r < keys.end ? key_row_unpaged<const T>(t, tile.e, kv_head, first + r) : nullptr;
        });
  };
  QueryLane<W> lane(p, scores, tile, kv_head, own);
  WarpOperand<W> query(shared<uint4>(16 * Block::kOwn), own);
  WarpOperand<W> grad_output(shared<uint4>(16 * (Block::kOwn + Block::kOwnTile)), own);
  const bool idle = own >= tile.count();                                                 // it helps to bring tiles
  const int tiles = int((keys.end - keys.begin + Block::kOthers - 1) / Block::kOthers);  // none: not positive
  float o[W / 8][4];
  bool careful = false;
  do {
    clear(o);
    const auto load = [&](int n, int buffer) {
      load_other(p.key, n, buffer, 0, width);
      load_other(p.value, n, buffer, 1, value_width);
    };
    const auto work = [&](int n, int buffer) {
      if (idle) return;
      if (n == 0) {
        query.load();
        grad_output.load();
      }
      lane.first = int(keys.begin) + n * Block::kOthers;
      float s[Block::kFragments][4], dp[Block::kFragments][4];
      multiply_rows<T>(s, query, shared<uint4>(16 * Block::other(buffer, 0)), width);
      multiply_rows<T>(dp, grad_output, shared<uint4>(16 * Block::other(buffer, 1)), value_width);
      gradients_of_tile(p, scores, keep, lane, s, dp);
      add_up<T, W>(o, dp, Block::other(buffer, 0), width, careful);
    };
    stream(tiles, load, [](int, int) {}, work);
  } while (starts_again(careful, idle || all_finite(o)));
  if (idle) return;
  const float factor[2] = {scale, scale};
  store_rows<T, W, 8>(o, factor, Block::kOwn, own, width, wide, [&](int r) -> T* {
    const RowPlace place = row_place(p, tile, kv_head, r);
    return place.there ? query_row<T>(p.grad_query, tile.e, place.head, place.i) : nullptr;
  });
}

// What streamed rows are, in shared memory, [kOthers] of each: both halves of a ScoreRow, RowSums.
template <int W>
struct StoredRows {
  static constexpr int kOthers = KeyBlock<W>::kOthers;
  static_assert(sizeof(ScoreRow<float>) == 32, "two chunks");
  Shared<uint4> halves;
  Shared<RowSums> of_row;

  __device__ explicit StoredRows(int buffer)
      : halves(shared<uint4>(16 * (KeyBlock<W>::kRows + buffer * KeyBlock<W>::kRowsOfTile))),
        of_row(shared<RowSums>(16 * (KeyBlock<W>::kRows + buffer * KeyBlock<W>::kRowsOfTile + 2 * kOthers))) {}

  __device__ void put(int r, const ScoreRow<float>& row, const RowSums& sums) const {
    uint4 half[2];
    __builtin_memcpy(half, &row, sizeof half);
    halves[r] = half[0];
    halves[kOthers + r] = half[1];
    of_row[r] = sums;
  }
  __device__ ScoreRow<float> row(int r) const {
    const uint4 half[2] = {halves[r], halves[kOthers + r]};
    ScoreRow<float> row;
    __builtin_memcpy(&row, half, sizeof row);
    return row;
  }
};

// The rows of all heads of a kv head that see any key of a tile, in tiles of kOthers rows of a head.
template <class T, int W>
class StreamedRows {
 public:
  using Block = KeyBlock<W>;
  static constexpr int kOthers = Block::kOthers;

  __device__ StreamedRows(const AttentionBackward& p, const Scores<float, Units::log2>& scores, const KeyTile& keys,
                          int64_t kv_head, bool wide)
      : p_(p), scores_(scores), keys_(keys), wide_(wide), group_(int(p.heads / p.kv_heads)) {
    const RowRange seeing = rows_of_tile(p, keys);
    first_ = int(seeing.begin);
    end_ = int(seeing.end);
    of_head_ = (end_ - first_ + kOthers - 1) / kOthers;
    first_head_ = int(kv_head) * group_;
  }

  __device__ int tiles() const { return group_ * of_head_; }  // none: not positive

  // As stream() asks for them.
  __device__ void load(int n, int buffer) {
    load_rows(p_.query, n, Block::other(buffer, 0), int(p_.width));
    load_rows(p_.grad_output, n, Block::other(buffer, 1), int(p_.value_width));
    const int r = int(threadIdx.x), i = row_of(n) + r;
    next_ = {hidden<float>(), 0};
    if (r < kOthers && i < end_) next_ = load_sums(p_, lse_index(p_, keys_.e, head_of(n), i));
  }
  __device__ void publish(int n, int buffer) const {
    const int r = int(threadIdx.x), i = row_of(n) + r;
    if (r >= kOthers) return;
    const ScoreRow<float> row = score_row(p_, scores_, keys_.e, {head_of(n), i, i < end_});
    StoredRows<W>(buffer).put(r, row, {next_.lse * scores_.from_natural, next_.delta});
  }

  // Whether the window may hide any key of the block from any row of the tile.
  __device__ bool hides(int n) const {
    const int first = row_of(n), last = first + kOthers - 1;
    return keys_of_rows(p_, keys_.e, last, last).begin > keys_.first ||
           keys_of_rows(p_, keys_.e, first, first).end < keys_.first + kTileKeys;
  }

 private:
  __device__ int head_of(int n) const { return first_head_ + n / of_head_; }
  __device__ int row_of(int n) const { return first_ + n % of_head_ * kOthers; }
  __device__ void load_rows(const AttentionTensor& t, int n, int tile, int width) const {
    const int64_t head = head_of(n);
    const int first = row_of(n);
    load_tile<T, W, kOthers, Block::kThreads>(
        shared<uint4>(16 * tile), width, wide_, static_cast<const T*>(t.data),
        [&](int r) { return first + r < end_ ? query_row<const T>(t, keys_.e, head, first + r) : nullptr; });
  }

  const AttentionBackward& p_;
  const Scores<float, Units::log2>& scores_;
  const KeyTile& keys_;
  bool wide_;
  int group_, first_head_, first_, end_, of_head_;
  RowSums next_ = {};
};

// Lane 4 g + t of a warp that owns keys: two of them, 16 apart, and of every eight rows 2 t and the next one.
template <int W>
struct KeyLane {
  StoredRows<W> rows;
  int first;  // of its keys
  bool window;

  __device__ static int of_tile(int n) { return n / 2 * 8 + int(threadIdx.x) % 4 * 2 + n % 2; }
  __device__ ScoreRow<float> row(int, int n) const { return rows.row(of_tile(n)); }
  __device__ RowSums sums(int, int n) const { return rows.of_row[of_tile(n)]; }
  __device__ int key(int half, int) const { return first + 16 * half; }
  __device__ bool hides(int) const { return window; }

  // Both keys share a call of the generator.
  __device__ uint32_t kept(const Keep<float>& keep, uint64_t seed) const {
    constexpr int kLine = KeyBlock<W>::kOthers / 4;
    uint32_t kept = 0;
#pragma unroll
    for (int n = 0; n < kLine; ++n) {
      const uint4 words = shared_call(seed, row(0, n).index, first);
#pragma unroll
      for (int half = 0; half < 2; ++half) kept |= uint32_t(is_kept(keep, words, key(half, n))) << (half * kLine + n);
    }
    return kept;
  }
};

// Grid: key tiles, kv heads, and where a block makes one gradient alone dK and dV. wide: as above.
template <class T, int W>
__global__ void __launch_bounds__(KeyBlock<W>::kThreads, KeyBlock<W>::kBlocks)
    attention_grad_key_kernel(const AttentionBackward p, const Scores<float, Units::log2> scores,
                              const Keep<float> keep, const float scale, const bool wide) {
  using Block = KeyBlock<W>;
  constexpr int kGap = 16;
  const KeyTile tile = key_tile(p, blockIdx.x);
  const bool of_key = p.grad_key.data != nullptr && (Block::kBoth || blockIdx.z == 0);
  const bool of_value = p.grad_value.data != nullptr && (Block::kBoth || blockIdx.z == 1);
  if (!tile.there || !(of_key || of_value)) return;
  const Entry& e = tile.e;
  const int64_t kv_head = blockIdx.y;
  const int warp = int(threadIdx.x) / kWarp, g = threadIdx.x % kWarp / 4;
  const int own = warp / 2 * 32 + warp % 2 * 8;  // rows [own, own + 8) and [own + kGap, own + kGap + 8) of the tile
  const int width = int(p.width), value_width = int(p.value_width);

  const auto load_own = [&](const AttentionTensor& t, int which, int width) {
    load_tile<T, W, kTileKeys, Block::kThreads>(
        shared<uint4>(16 * (Block::kOwn + which * Block::kOwnTile)), width, wide, static_cast<const T*>(t.data),
        [&](int r) {
          return tile.first + r < tile.end ? key_row_unpaged<const T>(t, e, kv_head, tile.first + r) : nullptr;
        });
  };
  load_own(p.key, 0, width);
  load_own(p.value, 1, value_width);

  StreamedRows<T, W> rows(p, scores, tile, kv_head, wide);
  WarpOperand<W, kGap> key(shared<uint4>(16 * Block::kOwn), own);
  WarpOperand<W, kGap> value(shared<uint4>(16 * (Block::kOwn + Block::kOwnTile)), own);
  const bool idle = tile.first + own >= tile.end;  // it helps to bring tiles
  float o[Block::kSums][W / 8][4];
  float (&grad_key)[W / 8][4] = o[0], (&grad_value)[W / 8][4] = o[Block::kSums - 1];
  bool careful = false;
  do {
    clear(grad_key);
    clear(grad_value);
    const auto load = [&](int n, int buffer) { rows.load(n, buffer); };
    const auto publish = [&](int n, int buffer) { rows.publish(n, buffer); };
    const auto work = [&](int n, int buffer) {
      if (idle) return;
      if (n == 0) {
        key.load();
        value.load();
      }
      const KeyLane<W> lane = {StoredRows<W>(buffer), int(tile.first) + own + g, rows.hides(n)};
      float s[Block::kFragments][4], dp[Block::kFragments][4];
      multiply_rows<T>(s, key, shared<uint4>(16 * Block::other(buffer, 0)), width);
      multiply_rows<T>(dp, value, shared<uint4>(16 * Block::other(buffer, 1)), of_key ? value_width : 0);
      gradients_of_tile(p, scores, keep, lane, s, dp);
      if (of_key) add_up<T, W>(grad_key, dp, Block::other(buffer, 0), width, careful);
      if (of_value) add_up<T, W>(grad_value, s, Block::other(buffer, 1), value_width, careful);
    };
    stream(rows.tiles(), load, publish, work);
  } while (starts_again(careful, idle || (all_finite(grad_key) && all_finite(grad_value))));
  if (idle) return;
  const auto write = [&](const float (&o)[W / 8][4], float factor, int which, const AttentionTensor& t, int width) {
    const float factors[2] = {factor, factor};
    store_rows<T, W, kGap>(o, factors, Block::kOwn + which * Block::kOwnTile, own, width, wide, [&](int r) -> T* {
      return tile.first + r < tile.end ? key_row_unpaged<T>(t, e, kv_head, tile.first + r) : nullptr;
    });
  };
  if (of_key) write(grad_key, scale, 0, p.grad_key, width);
  if (of_value) write(grad_value, 1, 1, p.grad_value, value_width);
}

}  // namespace handtuned::cuda
