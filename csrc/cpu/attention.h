// Attention forward (Dao et al., "FlashAttention", 2022; online softmax: Milakov and Gimelshein, 2018).
//
// For a tile of 64 query rows of one kv head, four panels (attention_panel.h) on AVX2, keys pass in blocks of 128:
//   S[j][lane]  = sum_d K[j][d] Q^T[d][lane],  Q scaled
//   m'          = max(m, max_j S),   P = e^(S - m'),   a = e^(m - m')
//   l           = a l + sum_j P,     O^T[d][lane] = a O^T + sum_j V[j][d] P[j][lane]
// and at the end out = O / l, lse = m + ln(l).
// Plan of memory (AVX2, D = 64, float): Q^T of a panel 4 KB, S 8 KB, O^T 4 KB stay in L1 while the block's K and V, 64
// KB, pass from L2 once per panel. 16-bit keys and values are converted once per block, for all panels of the tile.
// Blocks that no row of a panel sees are skipped, and a panel works only on the part of a block that some row sees.
//
// In decoding a tile may have so few rows that most lanes would stand empty. Then lanes run along the width: S by dot
// products, and O[row][c] += P V[j][c]; the softmax between them is the same.
//
// Pieces of work are (batch, kv head, tile). Where they are few, as in decoding, the keys are cut into chunks whose
// (O, m, l) are merged in order. Shapes alone decide, so results do not depend on the number of threads.
#pragma once
#include "attention_panel.h"
#include "parallel.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kLeastChunk = 512;  // keys

struct ForwardCut {
  int64_t tiles, chunks, chunk_keys;
  explicit ForwardCut(const Attention& p) {
    tiles = (p.heads / p.kv_heads * p.query_rows + kAttentionTile - 1) / kAttentionTile;
    const int64_t pieces = most(1, p.batch * p.kv_heads * tiles);
    const int64_t wanted = most(1, least((kPieces + pieces - 1) / pieces, p.key_rows / kLeastChunk));
    chunk_keys = most(1, (p.key_rows + wanted * kKeyBlock - 1) / (wanted * kKeyBlock)) * kKeyBlock;
    chunks = most(1, (p.key_rows + chunk_keys - 1) / chunk_keys);
  }
};

// What a panel has seen so far.
template <class A>
struct Running {
  static constexpr int W = kPanel<A>;
  alignas(64) A max[W], sum[W];  // m, l
  A *query, *out;                // Q^T [width][W], O^T [value_width][W]; of few rows Q [8][padded], O [row][padded]
};

// S becomes P; max and sum are brought up to date. Returns whether O^T must be scaled by a[W] first.
template <class A>
HT_INLINE bool softmax_block(const Panel<A>& panel, Running<A>& run, int64_t n, A* s, A* a) {
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
    const vec<A> max = larger(larger(larger(top[0], top[1]), larger(top[2], top[3])), before);
    const vec<A> from = max == -A(__builtin_inf()) ? vec<A>{} : max;  // nothing seen yet: -inf - -inf would be NaN
    const vec<A> scale = exponential(before - from);
    vec<A> sum[2] = {};
    auto weigh = [&](int64_t row, int u) HT_LAMBDA {
      // P = e^(S - m)
      vec<A> w = exponential(load(column + row * W) - from);
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
template <class A>
class ForwardPiece {
  static constexpr int W = kPanel<A>, L = kLanes<A>, kPanels = int(kAttentionTile) / W;

 public:
  ForwardPiece(const AttentionForward& p, int64_t b, int64_t kv_head, int64_t first_row, KeyRange chunk)
      : p_(p), e_(attention_entry(p, b)), b_(b), kv_head_(kv_head), arena_(bytes(p)) {
    const int64_t total = p.heads / p.kv_heads * e_.query_rows;
    rows_ = arena_.template take<A>(W * padded<A>(most(p.width, p.value_width)));
    keys_ = {chunk.end, chunk.begin};
    for (panels_ = 0; panels_ < kPanels && first_row + panels_ * W < total; ++panels_) {
      panel_[panels_] = make_panel<A>(p, e_, b, kv_head, first_row + panels_ * W, total);
      few_ = panels_ == 0 && has_few_rows(p, total - first_row);
      start(panel_[panels_], run_[panels_], chunk.begin == 0);
      const KeyRange any = panel_[panels_].any;
      keys_ = {least(keys_.begin, most(any.begin, chunk.begin)), most(keys_.end, least(any.end, chunk.end))};
    }
    scores_ = arena_.template take<A>(kKeyBlock * W);
    if (few_) __builtin_memset(scores_, 0, kKeyBlock * W * sizeof(A));  // lanes that no product writes
    bias_ = arena_.template take<A>(kKeyBlock * W);
    factor_ = arena_.template take<A>(kKeyBlock * W);
    factor_row_ = arena_.template take<A>(kKeyBlock * W);
    key_scratch_ = arena_.template take<A>(kKeyBlock * padded<A>(p.width));
    value_scratch_ = arena_.template take<A>(kKeyBlock * padded<A>(p.value_width));
  }

  void run() {
    for (int64_t first = keys_.begin / kKeyBlock * kKeyBlock; first < keys_.end; first += kKeyBlock) {
      const int64_t n = least(kKeyBlock, keys_.end - first);
      const auto keys = key_block(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, key_scratch_);
      const auto values = key_block(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width, value_scratch_);
      bool hides = p_.mask.data;
      for (int i = 0; i < panels_; ++i) hides |= visible_part(p_, panel_[i], first, n).partial;
      const bool guarded = hides && !all_finite(values, n, p_.value_width);
      for (int i = 0; i < panels_; ++i) {
        PanelBlock part = visible_part(p_, panel_[i], first, n);
        if (part.n <= 0) continue;
        add_block(panel_[i], run_[i], part, at(keys, part.first - first), at(values, part.first - first), guarded);
      }
    }
  }

  // out = O / l, lse = m + ln(l)
  void write() {
    for (int i = 0; i < panels_; ++i) {
      const Panel<A>& panel = panel_[i];
      const Running<A>& run = run_[i];
      const int64_t pitch = padded<A>(p_.value_width);
      if (!few_) unpack_transposed(p_.value_width, panel.rows, run.out, rows_, pitch);
      for (int lane = 0; lane < panel.rows; ++lane) {
        const int64_t h = panel.head[lane], q = panel.query[lane];
        const A inverse = run.sum[lane] == 0 ? A(0) : A(1) / run.sum[lane];
        const A* row = (few_ ? run.out : rows_) + lane * pitch;
        write_row(p_.dtype, query_row(p_, p_.output, e_, b_, h, q), p_.value_width, row, inverse);
        static_cast<A*>(p_.lse)[lse_index(p_, e_, b_, h, q)] = run.max[lane] + logarithm(run.sum[lane]);
      }
    }
  }

  // The same unfinished: O [padded value_width], m, l of each row of the tile, rows `pitch` apart.
  void write_partial(A* partial, int64_t pitch) {
    for (int i = 0; i < panels_; ++i) {
      A* rows = partial + i * W * pitch;
      if (!few_) unpack_transposed(p_.value_width, panel_[i].rows, run_[i].out, rows, pitch);
      for (int lane = 0; lane < panel_[i].rows; ++lane) {
        if (few_) __builtin_memcpy(rows + lane * pitch, run_[i].out + lane * (pitch - 2), (pitch - 2) * sizeof(A));
        rows[lane * pitch + pitch - 2] = run_[i].max[lane];
        rows[lane * pitch + pitch - 1] = run_[i].sum[lane];
      }
    }
  }

 private:
  static size_t bytes(const Attention& p) {
    return Arena::bytes_of<A>(kPanels * padded<A>(p.width) * W) +
           Arena::bytes_of<A>(kPanels * padded<A>(p.value_width) * W) + 4 * Arena::bytes_of<A>(kKeyBlock * W) +
           Arena::bytes_of<A>(kKeyBlock * padded<A>(p.width)) +
           Arena::bytes_of<A>(kKeyBlock * padded<A>(p.value_width)) +
           Arena::bytes_of<A>(W * padded<A>(most(p.width, p.value_width))) + 64 * 2 * kPanels;
  }

  // Of a long row of keys: over a short one the lanes are soon through.
  static bool has_few_rows(const Attention& p, int64_t rows) {
    const bool whole_vectors = p.value_width % L == 0 || is_narrow(p.dtype) || p.pages;
    return rows <= L / 2 && p.key_rows >= 2 * kKeyBlock && whole_vectors;
  }

  static Broadcast<A> at(Broadcast<A> rows, int64_t row) { return {rows.data + row * rows.row, rows.row, rows.step}; }

  void start(const Panel<A>& panel, Running<A>& run, bool with_sink) {
    for (int lane = 0; lane < W; ++lane) {
      const bool sink = p_.sinks && with_sink;
      run.max[lane] = sink ? A(p_.sinks[panel.head[lane]]) : -A(__builtin_inf());
      run.sum[lane] = sink ? A(1) : A(0);
    }
    const int64_t pitch = padded<A>(p_.width), out_size = padded<A>(p_.value_width) * W;
    run.query = arena_.template take<A>(pitch * W);
    run.out = arena_.template take<A>(out_size);
    __builtin_memset(run.out, 0, out_size * sizeof(A));
    if (few_) __builtin_memset(run.query, 0, pitch * W * sizeof(A));
    const A* rows[W];
    const A scale = A(p_.scale);
    for (int lane = 0; lane < panel.rows; ++lane) {
      const void* row = query_row(p_, p_.query, e_, b_, panel.head[lane], panel.query[lane]);
      rows[lane] = read_row(p_.dtype, row, p_.width, (few_ ? run.query : rows_) + lane * pitch);
      for (int64_t c = 0; few_ && c < p_.width; c += L)
        store(run.query + lane * pitch + c, load_first(rows[lane] + c, p_.width - c) * scale);
    }
    if (few_) return;
    pack_transposed(p_.width, panel.rows, panel.vectors, run.query,
                    [&](int lane, int64_t c, int64_t n) HT_LAMBDA { return load_first(rows[lane] + c, n) * scale; });
  }

  void add_block(const Panel<A>& panel, Running<A>& run, PanelBlock part, Broadcast<A> keys, Broadcast<A> values,
                 bool guarded) {
    if (few_)
      few_dots(panel.rows)(part.n, keys, run.query, padded<A>(p_.width), p_.width, scores_, W);
    else
      multiply_width(part.n, panel.vectors, keys, run.query, p_.width, scores_, W);
    finish_scores(p_, panel, b_, part, scores_, W, bias_, static_cast<A*>(nullptr));
    alignas(64) A scale[W];
    const bool moved = softmax_block(panel, run, part.n, scores_, scale);
    if (p_.dropout.p > 0) {
      load_dropout(p_, e_, panel, b_, part.first, part.n, factor_, factor_row_);
      for (int64_t i = 0; i < part.n * W; i += L) store(scores_ + i, load(scores_ + i) * load(factor_ + i));
    }
    few_ ? add_rows(panel, run, part.n, values, guarded, scale)
         : add_lanes(panel, run, part.n, values, guarded, moved ? scale : nullptr);
  }

  // O^T[c][lane] = scale O^T + sum_j V[j][c] P[j][lane]
  void add_lanes(const Panel<A>& panel, Running<A>& run, int64_t n, Broadcast<A> values, bool guarded, const A* scale) {
    for (int64_t c = 0; scale && c < p_.value_width; ++c)
      for (int v = 0; v < panel.vectors; ++v)
        store(run.out + c * W + v * L, load(run.out + c * W + v * L) * load(scale + v * L));
    auto add = guarded ? &multiply_visible<A, false> : &multiply<A, true>;
    add(p_.value_width, panel.vectors, {values.data, values.step, values.row}, scores_, W, n, run.out, W);
  }

  // O[row][c] = scale O + sum_j P[j][row] V[j][c]
  void add_rows(const Panel<A>& panel, Running<A>& run, int64_t n, Broadcast<A> values, bool guarded, const A* scale) {
    const int64_t pitch = padded<A>(p_.value_width);
    for (int row = 0; row < panel.rows; ++row)
      for (int64_t c = 0; c < pitch; c += L)
        store(run.out + row * pitch + c, load(run.out + row * pitch + c) * scale[row]);
    auto add = guarded ? &multiply_visible<A, true> : &multiply<A, true>;
    add(panel.rows, pitch / L, {scores_, 1, W}, values.data, values.row, n, run.out, pitch);
  }

  static auto few_dots(int rows) {
    if constexpr (L >= 16)
      if (rows > 4) return &multiply_dots<A, 8>;
    if constexpr (L >= 8)
      if (rows > 2) return &multiply_dots<A, 4>;
    if constexpr (L >= 4)
      if (rows > 1) return &multiply_dots<A, 2>;
    return &multiply_dots<A, 1>;
  }

  const AttentionForward& p_;
  AttentionEntry e_;
  int64_t b_, kv_head_;
  Arena arena_;
  int panels_;
  bool few_ = false;
  Panel<A> panel_[kPanels];
  Running<A> run_[kPanels];
  KeyRange keys_;
  A *rows_, *scores_, *bias_, *factor_, *factor_row_, *key_scratch_, *value_scratch_;
};

// out and lse of row `flat` of (b, kv head) from its chunks' (O, m, l), in order.
template <class A>
void merge_chunks(const AttentionForward& p, int64_t chunks, int64_t b, int64_t kv_head, int64_t flat, A* partial,
                  int64_t pitch, int64_t chunk_pitch) {
  const AttentionEntry e = attention_entry(p, b);
  const int64_t h = kv_head * (p.heads / p.kv_heads) + flat / e.query_rows, i = flat % e.query_rows;
  A max = -A(__builtin_inf()), sum = 0;
  for (int64_t k = 0; k < chunks; ++k) {
    const A m = partial[k * chunk_pitch + pitch - 2];
    if (m > max) max = m;
  }
  const A from = max == -A(__builtin_inf()) ? A(0) : max;
  for (int64_t k = 0; k < chunks; ++k) {
    const A* own = partial + k * chunk_pitch;
    const A scale = exponential(own[pitch - 2] - from);
    sum += own[pitch - 1] * scale;
    for (int64_t c = 0; c < p.value_width; c += kLanes<A>)  // into the first
      store(partial + c, (k ? load(partial + c) : vec<A>{}) + load(own + c) * scale);
  }
  write_row(p.dtype, query_row(p, p.output, e, b, h, i), p.value_width, partial, sum == 0 ? A(0) : A(1) / sum);
  static_cast<A*>(p.lse)[lse_index(p, e, b, h, i)] = max + logarithm(sum);
}

template <class A>
void attention_forward_in(const AttentionForward& p) {
  const ForwardCut cut(p);
  const bool serial = is_small(p);
  const int64_t pitch = padded<A>(p.value_width) + 2, tile_pitch = kAttentionTile * pitch;
  const int64_t heads = p.batch * p.kv_heads;
  Scratch<A> partials(cut.chunks > 1 ? heads * cut.tiles * cut.chunks * tile_pitch : 0);
  // Head by head, so that its keys and values stay in the cache for all its tiles. The last tiles have the most work
  // under a causal window, so they come first.
  parallel_pieces(heads * cut.tiles * cut.chunks, serial, [&](int64_t piece) {
    const int64_t chunk = piece % cut.chunks, head = piece / cut.chunks / cut.tiles;
    const int64_t tile = cut.tiles - 1 - piece / cut.chunks % cut.tiles;
    const KeyRange keys{chunk * cut.chunk_keys, least((chunk + 1) * cut.chunk_keys, p.key_rows)};
    ForwardPiece<A> work(p, head / p.kv_heads, head % p.kv_heads, tile * kAttentionTile, keys);
    work.run();
    if (cut.chunks == 1) return work.write();
    work.write_partial(partials.data + ((head * cut.tiles + tile) * cut.chunks + chunk) * tile_pitch, pitch);
  });
  if (cut.chunks == 1) return;
  parallel_pieces(heads, serial, [&](int64_t head) {
    const int64_t rows = p.heads / p.kv_heads * attention_entry(p, head / p.kv_heads).query_rows;
    for (int64_t flat = 0; flat < rows; ++flat) {
      const int64_t tile = flat / kAttentionTile, row = flat % kAttentionTile;
      merge_chunks(p, cut.chunks, head / p.kv_heads, head % p.kv_heads, flat,
                   partials.data + (head * cut.tiles + tile) * cut.chunks * tile_pitch + row * pitch, pitch,
                   tile_pitch);
    }
  });
}

}  // namespace handtuned::HANDTUNED_ISA
