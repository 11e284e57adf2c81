// Attention forward (Dao et al., "FlashAttention", 2022; online softmax: Milakov and Gimelshein, 2018).
//
// For a tile of 64 query rows of one kv head, four panels (attention_panel.h) on AVX2, keys pass in blocks of 128:
//   S[j][lane]  = sum_d K[j][d] Q^T[d][lane]
//   m'          = max(m, max_j S),   P = 2^(S - m'),   a = 2^(m - m')
//   l           = a l + sum_j P,     O^T[d][lane] = a O^T + sum_j V[j][d] P[j][lane]
// and at the end out = O / l, lse = ln(2) m + ln(l). Scores count in log2, so the exponential is a power of 2.
// Plan of memory (AVX2, D = 64, float): Q^T of a panel 4 KB, S 8 KB, O^T 4 KB stay in L1 while the block's K and V, 64
// KB, pass from L2 once per panel. 16-bit keys and values are converted once per block, for all panels of the tile.
// Blocks that no row of a panel sees are skipped, and a panel works only on the part of a block that some row sees.
//
// Pieces of work are (batch, kv head, tile). Where they are few, as in decoding, the keys are cut into chunks whose
// (O, m, l) are merged in order. Shapes alone decide, so results do not depend on the number of threads.
#pragma once
#include "attention_panel.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kLeastChunk = 512;      // keys
inline constexpr double kSerialFlops = 1 << 19;  // below, waking other threads costs more than it brings

HT_INLINE double attention_flops(const Attention& p) {
  return 2.0 * double(p.batch * p.heads) * double(p.query_rows) * double(p.key_rows) * double(p.width + p.value_width);
}

struct ForwardCut {
  int64_t tiles, chunks, chunk_keys;
  explicit ForwardCut(const Attention& p) {
    tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
    const int64_t pieces = most(1, p.batch * p.kv_heads * tiles);
    chunks = most(1, least((kPieces + pieces - 1) / pieces, p.key_rows / kLeastChunk));
    chunk_keys = (p.key_rows + chunks * kKeyBlock - 1) / (chunks * kKeyBlock) * kKeyBlock;
  }
};

// What a panel has seen so far.
template <class A>
struct Running {
  static constexpr int W = kPanel<A>;
  alignas(64) A max[W], sum[W];  // m, l
  A *query, *out;                // Q^T [width][W], O^T [value_width][W]
};

// S becomes P; max and sum are brought up to date. Returns whether O^T must be scaled by a[W] first.
template <class A>
HT_INLINE bool softmax_block(const Panel<A>& panel, Running<A>& run, int64_t n, A factor, A* s, A* a) {
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  bool moved = false;
  for (int v = 0; v < panel.vectors; ++v) {
    A* column = s + v * L;
    vec<A> top[4];
    for (auto& t : top) t = broadcast(-A(__builtin_inf()));
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int u = 0; u < 4; ++u) top[u] = larger(load(column + (j + u) * W), top[u]);
    for (; j < n; ++j) top[0] = larger(load(column + j * W), top[0]);
    const vec<A> before = load(run.max + v * L);
    const vec<A> max = larger(larger(larger(top[0], top[1]), larger(top[2], top[3])) * factor, before);
    const vec<A> from = max == -A(__builtin_inf()) ? vec<A>{} : max;  // nothing seen yet: -inf - -inf would be NaN
    const vec<A> scale = exp2(before - from);
    vec<A> sum[2] = {};
    auto weigh = [&](int64_t row, int u) HT_LAMBDA {
      // P = 2^(factor * S - m)
      vec<A> w = exp2(load(column + row * W) * factor - from);
      sum[u] += w;
      store(column + row * W, w);
    };
    for (j = 0; j + 2 <= n; j += 2) {
      weigh(j, 0);
      weigh(j + 1, 1);
    }
    if (j < n) weigh(j, 0);
    store(run.sum + v * L, load(run.sum + v * L) * scale + (sum[0] + sum[1]));
    store(run.max + v * L, max);
    store(a + v * L, scale);
    for (int i = 0; i < L; ++i) moved |= scale[i] != 1;
  }
  return moved;
}

// One tile of queries and one chunk of keys.
template <class T>
class ForwardPiece {
  using A = Accumulate<T>;
  static constexpr int W = kPanel<A>, L = kLanes<A>, kPanels = int(kAttentionTile) / W;

 public:
  ForwardPiece(const AttentionForward& p, int64_t b, int64_t kv_head, int64_t first_row, KeyRange chunk)
      : p_(p), e_(attention_entry(p, b)), b_(b), kv_head_(kv_head), arena_(bytes(p)) {
    const int64_t total = p.heads / p.kv_heads * e_.query_rows;
    keys_ = {chunk.end, chunk.begin};
    for (panels_ = 0; panels_ < kPanels && first_row + panels_ * W < total; ++panels_) {
      panel_[panels_] = make_panel<A>(p, e_, b, kv_head, first_row + panels_ * W, total);
      start(panel_[panels_], run_[panels_], chunk.begin == 0);
      const KeyRange any = panel_[panels_].any;
      keys_ = {least(keys_.begin, most(any.begin, chunk.begin)), most(keys_.end, least(any.end, chunk.end))};
    }
    scores_ = arena_.template take<A>(kKeyBlock * W);
    bias_ = arena_.template take<A>(kKeyBlock * W);
    factor_ = arena_.template take<A>(kKeyBlock * W);
    factor_row_ = arena_.template take<A>(kKeyBlock * W);
    key_scratch_ = arena_.template take<A>(kKeyBlock * padded<A>(p.width));
    value_scratch_ = arena_.template take<A>(kKeyBlock * padded<A>(p.value_width));
  }

  void run() {
    for (int64_t first = keys_.begin / kKeyBlock * kKeyBlock; first < keys_.end; first += kKeyBlock) {
      const int64_t n = least(kKeyBlock, keys_.end - first);
      const auto keys = key_block<T>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, key_scratch_);
      const auto values = key_block<T>(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width, value_scratch_);
      bool hides = p_.mask.type != AttentionMask::Type::none;
      for (int i = 0; i < panels_; ++i) hides |= visible_part(p_, panel_[i], first, n).partial;
      const bool guarded = hides && !all_finite(values, n, p_.value_width);
      for (int i = 0; i < panels_; ++i) {
        PanelBlock part = visible_part(p_, panel_[i], first, n);
        if (part.n <= 0) continue;
        add_block(panel_[i], run_[i], part, at(keys, part.first - first), at(values, part.first - first), guarded);
      }
    }
  }

  // out = O / l, lse = ln(2) m + ln(l)
  void write() {
    for (int i = 0; i < panels_; ++i) {
      const Panel<A>& panel = panel_[i];
      const Running<A>& run = run_[i];
      T* rows[W];
      A inverse[W];
      for (int lane = 0; lane < panel.rows; ++lane) {
        const int64_t h = panel.head[lane], q = panel.query[lane];
        rows[lane] = query_row<T>(p_.output, e_, b_, h, q);
        inverse[lane] = run.sum[lane] == 0 ? A(0) : A(1) / run.sum[lane];
        static_cast<A*>(p_.lse)[lse_index(p_, e_, b_, h, q)] = run.max[lane] * A(kLn2) + logarithm(run.sum[lane]);
      }
      unpack_transposed<A>(p_.value_width, panel.rows, run.out,
                           [&](int lane, int64_t c, vec<A> v, int64_t n)
                               HT_LAMBDA { store_first(rows[lane] + c, v * inverse[lane], n); });
    }
  }

  // The same unfinished: O [value_width], m, l of each row of the tile, rows `pitch` apart.
  void write_partial(A* partial, int64_t pitch) {
    for (int i = 0; i < panels_; ++i) {
      A* rows = partial + i * W * pitch;
      for (int lane = 0; lane < panel_[i].rows; ++lane) {
        rows[lane * pitch + p_.value_width] = run_[i].max[lane];
        rows[lane * pitch + p_.value_width + 1] = run_[i].sum[lane];
      }
      unpack_transposed<A>(p_.value_width, panel_[i].rows, run_[i].out,
                           [&](int lane, int64_t c, vec<A> v, int64_t n)
                               HT_LAMBDA { store_first(rows + lane * pitch + c, v, n); });
    }
  }

 private:
  static size_t bytes(const Attention& p) {
    return Arena::bytes_of<A>(kPanels * p.width * W) + Arena::bytes_of<A>(kPanels * p.value_width * W) +
           4 * Arena::bytes_of<A>(kKeyBlock * W) + Arena::bytes_of<A>(kKeyBlock * padded<A>(p.width)) +
           Arena::bytes_of<A>(kKeyBlock * padded<A>(p.value_width)) + 64 * 2 * kPanels;
  }

  static Broadcast<A> at(Broadcast<A> rows, int64_t row) { return {rows.data + row * rows.row, rows.row, rows.step}; }

  void start(const Panel<A>& panel, Running<A>& run, bool with_sink) {
    for (int lane = 0; lane < W; ++lane) {
      const bool sink = p_.sinks && with_sink;
      run.max[lane] = sink ? A(p_.sinks[panel.head[lane]] * kLog2e) : -A(__builtin_inf());
      run.sum[lane] = sink ? A(1) : A(0);
    }
    run.query = arena_.template take<A>(p_.width * W);
    run.out = arena_.template take<A>(p_.value_width * W);
    __builtin_memset(run.out, 0, p_.value_width * W * sizeof(A));
    const T* rows[W];
    for (int lane = 0; lane < panel.rows; ++lane)
      rows[lane] = query_row<const T>(p_.query, e_, b_, panel.head[lane], panel.query[lane]);
    pack_transposed(p_.width, panel.rows, panel.vectors, run.query,
                    [&](int lane, int64_t c, int64_t n) HT_LAMBDA { return load_first(rows[lane] + c, n); });
  }

  void add_block(const Panel<A>& panel, Running<A>& run, PanelBlock part, Broadcast<A> keys, Broadcast<A> values,
                 bool guarded) {
    multiply<A, false>(part.n, panel.vectors, keys, run.query, W, p_.width, scores_, W);
    const A factor = finish_scores<T>(p_, panel, b_, part, scores_, W, bias_, static_cast<A*>(nullptr));
    alignas(64) A scale[W];
    if (softmax_block(panel, run, part.n, factor, scores_, scale)) {
      for (int64_t c = 0; c < p_.value_width; ++c)
        for (int v = 0; v < panel.vectors; ++v)
          store(run.out + c * W + v * L, load(run.out + c * W + v * L) * load(scale + v * L));
    }
    if (p_.dropout.p > 0) {
      load_dropout(p_, e_, panel, b_, part.first, part.n, factor_, factor_row_);
      for (int64_t i = 0; i < part.n * W; i += L) store(scores_ + i, load(scores_ + i) * load(factor_ + i));
    }
    const Broadcast<A> transposed{values.data, values.step, values.row};
    auto add = guarded ? &multiply_visible<A, false> : &multiply<A, true>;
    add(p_.value_width, panel.vectors, transposed, scores_, W, part.n, run.out, W);
  }

  const AttentionForward& p_;
  AttentionEntry e_;
  int64_t b_, kv_head_;
  Arena arena_;
  int panels_;
  Panel<A> panel_[kPanels];
  Running<A> run_[kPanels];
  KeyRange keys_;
  A *scores_, *bias_, *factor_, *factor_row_, *key_scratch_, *value_scratch_;
};

// out and lse of row `flat` of (b, kv head) from its chunks' (O, m, l), in order.
template <class T>
void merge_chunks(const AttentionForward& p, int64_t chunks, int64_t b, int64_t kv_head, int64_t flat,
                  const Accumulate<T>* partial, int64_t chunk_pitch) {
  using A = Accumulate<T>;
  const AttentionEntry e = attention_entry(p, b);
  const int64_t h = kv_head * (p.heads / p.kv_heads) + flat / e.query_rows, i = flat % e.query_rows;
  A max = -A(__builtin_inf()), sum = 0;
  for (int64_t k = 0; k < chunks; ++k) {
    const A m = partial[k * chunk_pitch + p.value_width];
    if (m > max) max = m;
  }
  const A from = max == -A(__builtin_inf()) ? A(0) : max;
  for (int64_t k = 0; k < chunks; ++k) {
    const A* own = partial + k * chunk_pitch + p.value_width;
    sum += own[1] * power_of_2(own[0] - from);
  }
  T* out = query_row<T>(p.output, e, b, h, i);
  for (int64_t c = 0; c < p.value_width; c += kLanes<A>) {
    const int64_t n = least(kLanes<A>, p.value_width - c);
    vec<A> v = {};
    for (int64_t k = 0; k < chunks; ++k) {
      const A* own = partial + k * chunk_pitch;
      v += load_first(own + c, n) * power_of_2(own[p.value_width] - from);
    }
    store_first(out + c, sum == 0 ? vec<A>{} : v / sum, n);
  }
  static_cast<A*>(p.lse)[lse_index(p, e, b, h, i)] = max * A(kLn2) + logarithm(sum);
}

template <class T>
void attention_forward_of(const AttentionForward& p) {
  using A = Accumulate<T>;
  const ForwardCut cut(p);
  const bool serial = attention_flops(p) < kSerialFlops;
  const int64_t pitch = p.value_width + 2, tile_pitch = kAttentionTile * pitch, heads = p.batch * p.kv_heads;
  Scratch<A> partials(cut.chunks > 1 ? heads * cut.tiles * cut.chunks * tile_pitch : 0);
  // The last tiles have the most work under a causal window, so they come first.
  parallel_pieces(heads * cut.tiles * cut.chunks, serial, [&](int64_t piece) {
    const int64_t chunk = piece % cut.chunks, head = piece / cut.chunks % heads;
    const int64_t tile = cut.tiles - 1 - piece / cut.chunks / heads;
    const KeyRange keys{chunk * cut.chunk_keys, least((chunk + 1) * cut.chunk_keys, p.key_rows)};
    ForwardPiece<T> work(p, head / p.kv_heads, head % p.kv_heads, tile * kAttentionTile, keys);
    work.run();
    if (cut.chunks == 1) return work.write();
    work.write_partial(partials.data + ((head * cut.tiles + tile) * cut.chunks + chunk) * tile_pitch, pitch);
  });
  if (cut.chunks == 1) return;
  parallel_pieces(heads, serial, [&](int64_t head) {
    const int64_t rows = p.heads / p.kv_heads * attention_entry(p, head / p.kv_heads).query_rows;
    for (int64_t flat = 0; flat < rows; ++flat) {
      const int64_t tile = flat / kAttentionTile, row = flat % kAttentionTile;
      merge_chunks<T>(p, cut.chunks, head / p.kv_heads, head % p.kv_heads, flat,
                      partials.data + (head * cut.tiles + tile) * cut.chunks * tile_pitch + row * pitch, tile_pitch);
    }
  });
}

inline void attention_forward(const AttentionForward& p) {
  switch (p.dtype) {
    case DType::f32: return attention_forward_of<float>(p);
    case DType::f64: return attention_forward_of<double>(p);
    case DType::bf16: return attention_forward_of<bf16>(p);
    case DType::f16: return attention_forward_of<f16>(p);
  }
}

}  // namespace handtuned::HANDTUNED_ISA
