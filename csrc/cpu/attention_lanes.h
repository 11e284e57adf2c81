// Attention forward, a tile of 64 query rows: one row to a lane.
//
//   S[j][lane]  = sum_d K[j][d] Q^T[d][lane],  Q scaled
//   O^T[d][lane] = a O^T + sum_j V[j][d] P[j][lane],  a and P from attention_softmax.h
// and at the end out = O / l, lse = m + ln(l).
// Plan of memory (AVX2, D = 64, float): Q^T of a panel 4 KB, S 8 KB, O^T 4 KB stay in L1 while a block's K and V, 64
// KB, pass from L2 once per panel. With AVX-512 twice that. 16-bit keys and values are converted once per block for all
// panels of the tile; where pairs are multiplied, keys are read in place and values packed two rows to a pair.
// Blocks that no row of a panel sees are skipped, and a panel works only on the part of a block that some row sees.
#pragma once
#include "attention_softmax.h"

namespace handtuned::HANDTUNED_ISA {

// One tile of queries and one chunk of keys.
template <class E>
class LanesPiece {
  using A = Accumulate<E>;
  static constexpr int W = kPanel<A>, L = kLanes<A>, kPanels = int(kAttentionTile) / W;

 public:
  LanesPiece(const AttentionForward& p, int64_t b, int64_t kv_head, int64_t first_row, KeyRange chunk)
      : p_(p), e_(attention_entry(p, b)), b_(b), kv_head_(kv_head), scale_(p.scale), arena_(bytes(p)) {
    const int64_t total = p.heads / p.kv_heads * e_.query_rows;
    rows_ = arena_.template take<A>(W * padded<A>(most(p.width, p.value_width)));
    scores_ = arena_.template take<A>(kKeyBlock * W);
    bias_ = arena_.template take<A>(kKeyBlock * W);
    factor_ = arena_.template take<A>(kKeyBlock * W);
    key_scratch_ = arena_.template take<A>(kKeyBlock * padded<A>(p.width));
    value_scratch_ = arena_.template take<A>(kKeyBlock * padded<A>(p.value_width));
    first_of_head_ = first_row + kAttentionTile >= total;
    keys_ = {chunk.end, chunk.begin};
    for (panels_ = 0; panels_ < kPanels && first_row + panels_ * W < total; ++panels_) {
      Panel<A>& panel = panel_[panels_];
      panel = make_panel<A>(p, e_, b, kv_head, first_row + panels_ * W, total);
      softmax_[panels_].start(p, panel, chunk.begin == 0);
      load_queries(panels_);
      out_[panels_] = arena_.template take<A>(padded<A>(p.value_width) * W);
      started_[panels_] = false;
      keys_ = {least(keys_.begin, most(panel.any.begin, chunk.begin)),
               most(keys_.end, least(panel.any.end, chunk.end))};
    }
  }

  void run() {
    for (int64_t first = keys_.begin / kKeyBlock * kKeyBlock; first < keys_.end; first += kKeyBlock) {
      const int64_t n = least(kKeyBlock, keys_.end - first);
      const auto keys = key_block<E>(p_, p_.key, e_, b_, kv_head_, first, n, p_.width, key_scratch_);
      const auto values = key_columns<E>(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width, value_scratch_);
      if (first_of_head_) prefetch_keys(first + kKeyBlock);
      bool hides = false;
      for (int i = 0; i < panels_; ++i) hides |= panel_[i].masked || visible_part(p_, panel_[i], first, n).partial;
      const bool guarded = hides && !all_finite<A>(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width);
      for (int i = 0; i < panels_; ++i) {
        const PanelBlock part = visible_part(p_, panel_[i], first, n);
        if (part.n > 0)
          add_block(i, part, skip_rows(keys, part.first - first), skip_columns(values, part.first - first), guarded);
      }
    }
    for (int i = 0; i < panels_; ++i)
      if (!started_[i]) __builtin_memset(out_[i], 0, p_.value_width * W * sizeof(A));
  }

  // out = O / l, lse = m + ln(l)
  void write() {
    const int64_t pitch = padded<A>(p_.value_width);
    for (int i = 0; i < panels_; ++i) {
      const Panel<A>& panel = panel_[i];
      alignas(64) A lse[W], inverse[W];
      finish_softmax(softmax_[i], panel.vectors, lse, inverse);
      unpack_transposed(p_.value_width, panel.rows, out_[i], inverse, rows_, pitch);
      for (int lane = 0; lane < panel.rows; ++lane) {
        const int64_t h = panel.head[lane], q = panel.query[lane];
        write_row(p_.dtype, query_row(p_, p_.output, e_, b_, h, q), p_.value_width, rows_ + lane * pitch, A(1));
        static_cast<A*>(p_.lse)[lse_index(p_, e_, b_, h, q)] = lse[lane];
      }
    }
  }

  // The same unfinished: O [padded value_width], m, l of each row of the tile, rows `pitch` apart.
  void write_partial(A* partial, int64_t pitch) {
    alignas(64) A one[W];
    for (A& x : one) x = 1;
    for (int i = 0; i < panels_; ++i) {
      A* rows = partial + i * W * pitch;
      unpack_transposed(p_.value_width, panel_[i].rows, out_[i], one, rows, pitch);
      for (int lane = 0; lane < panel_[i].rows; ++lane) {
        rows[lane * pitch + pitch - 2] = softmax_[i].max[lane];
        rows[lane * pitch + pitch - 1] = softmax_[i].sum[lane];
      }
    }
  }

 private:
  // Asks for the mask that is needed after that of panel i for the keys before `end`.
  void prefetch_next_mask(int i, int64_t end) {
    if (!panel_[i].masked) return;
    const int64_t first = i + 1 < panels_ ? (end - 1) / kKeyBlock * kKeyBlock : end;
    prefetch_mask(p_, panel_[i + 1 < panels_ ? i + 1 : 0], b_, first, least(kKeyBlock, keys_.end - first));
  }

  // Asks for the block of keys and values at `first`.
  void prefetch_keys(int64_t first) {
    const int64_t n = least(kKeyBlock, keys_.end - first);
    prefetch_rows(p_, p_.key, e_, b_, kv_head_, first, n, p_.width);
    prefetch_rows(p_, p_.value, e_, b_, kv_head_, first, n, p_.value_width);
  }

  static size_t bytes(const Attention& p) {
    return Arena::bytes_of<A>(kPanels * padded<A>(p.width) * W) +
           Arena::bytes_of<A>(kPanels * padded<A>(p.value_width) * W) + 3 * Arena::bytes_of<A>(kKeyBlock * W) +
           Arena::bytes_of<A>(kKeyBlock * padded<A>(p.width)) +
           Arena::bytes_of<A>(kKeyBlock * padded<A>(p.value_width)) +
           Arena::bytes_of<A>(W * padded<A>(most(p.width, p.value_width))) + 64 * 2 * kPanels;
  }

  void load_queries(int i) {
    const Panel<A>& panel = panel_[i];
    const int64_t pitch = padded<A>(p_.width);
    const A* rows[W];
    for (int lane = 0; lane < panel.rows; ++lane)
      rows[lane] = row_elements<E>(p_.dtype, query_row(p_, p_.query, e_, b_, panel.head[lane], panel.query[lane]),
                                   p_.width, rows_ + lane * pitch);
    A* to = arena_.template take<A>(pitch * W);
    pack_transposed(elements<E>(p_.width), panel.rows, panel.vectors, to,
                    [&](int lane, int64_t c, int64_t n)
                        HT_LAMBDA { return scaled<E>(load_first(rows[lane] + c, n), scale_.power); });
    query_[i] = reinterpret_cast<const E*>(to);
  }

  void add_block(int i, PanelBlock part, Broadcast<E> keys, Broadcast<E> values, bool guarded) {
    const Panel<A>& panel = panel_[i];
    if (!load_bias(p_, panel, b_, part, bias_)) return;
    prefetch_next_mask(i, part.first + part.n);
    multiply_width(part.n, panel.vectors, keys, query_[i], p_.width, scores_, W);
    finish_scores(p_, panel, part, scale_.rest, scores_, W, bias_, static_cast<A*>(nullptr));
    const A* keep = nullptr;
    if (p_.dropout.p > 0) {
      load_dropout(p_, e_, panel, b_, part.first, part.n, factor_);
      keep = factor_;
    }
    alignas(64) A scale[W];
    const bool moved = softmax_block<E>(panel.vectors, softmax_[i], part.n, scores_, W, keep, scale);
    // O^T[c][lane] = scale O^T + sum_j V[j][c] P[j][lane]
    A* out = out_[i];
    if (!started_[i] && guarded) __builtin_memset(out, 0, p_.value_width * W * sizeof(A));
    for (int64_t c = 0; started_[i] && moved && c < p_.value_width; ++c)
      for (int v = 0; v < panel.vectors; ++v)
        store(out + c * W + v * L, load(out + c * W + v * L) * load(scale + v * L));
    auto add = guarded ? &multiply_visible<E, false> : started_[i] ? &multiply<E, true> : &multiply<E, false>;
    add(p_.value_width, panel.vectors, values, reinterpret_cast<const E*>(scores_), W, elements<E>(part.n), out, W);
    started_[i] = true;
  }

  const AttentionForward& p_;
  AttentionEntry e_;
  int64_t b_, kv_head_;
  Scale<E> scale_;
  Arena arena_;
  int panels_;
  bool first_of_head_;  // the tile that is worked on first, so keys and values come from memory
  Panel<A> panel_[kPanels];
  Running<A> softmax_[kPanels];
  const E* query_[kPanels];  // Q^T [elements(width)][W]
  A* out_[kPanels];          // O^T [value_width][W]
  bool started_[kPanels];    // whether `out` holds anything
  KeyRange keys_;
  A *rows_, *scores_, *bias_, *factor_, *key_scratch_, *value_scratch_;
};

}  // namespace handtuned::HANDTUNED_ISA
