// Attention backward, a tile of 64 query rows: everything that gradients of queries, keys, values and mask are made of.
//
//   P  = e^(S - lse),   dP[j][lane] = sum_c V[j][c] dO^T[c][lane],   delta = sum_c dO O - dlse
//   dS = P * (dP * keep - delta), through the derivative of the softcap where there is one
// for one block of keys at a time, standing as [key][64 rows].
#pragma once
#include "attention_panel.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kBackwardBlock = 128;  // keys
static_assert(kKeyBlock % kBackwardBlock == 0);

// A tile of query rows and what stays the same for all keys: panels, Q and dO in both orders, lse and delta.
template <class A>
class BackwardTile {
 public:
  static constexpr int W = kPanel<A>, L = kLanes<A>, kPanels = int(kAttentionTile) / W;
  static constexpr int64_t kRows = kAttentionTile;

  BackwardTile(const AttentionBackward& p, Arena& arena) : p_(p) {
    query_t = arena.take<A>(kPanels * p.width * W);
    grad_t = arena.take<A>(kPanels * p.value_width * W);
    query = arena.take<A>(kRows * padded<A>(p.width));
    grad = arena.take<A>(kRows * padded<A>(p.value_width));
    weight = arena.take<A>(kBackwardBlock * kRows);
    dropped = p.dropout.p > 0 ? arena.take<A>(kBackwardBlock * kRows) : weight;
    score_grad = arena.take<A>(kBackwardBlock * kRows);
    bias_ = arena.take<A>(kKeyBlock * W);
    factor_ = arena.take<A>(kKeyBlock * W);
    factor_row_ = arena.take<A>(kKeyBlock * W);
    derivative_ = arena.take<A>(kBackwardBlock * W);
  }

  static size_t bytes(const Attention& p) {
    return Arena::bytes_of<A>(kPanels * p.width * W) + Arena::bytes_of<A>(kPanels * p.value_width * W) +
           Arena::bytes_of<A>(kRows * padded<A>(p.width)) + Arena::bytes_of<A>(kRows * padded<A>(p.value_width)) +
           4 * Arena::bytes_of<A>(kBackwardBlock * kRows) + 3 * Arena::bytes_of<A>(kKeyBlock * W);
  }

  // Rows [first_row, first_row + 64) of (b, kv head), or those before `end_row`. delta: like the lse.
  void load(const AttentionEntry& e, int64_t b, int64_t kv_head, int64_t first_row, int64_t end_row, const A* delta) {
    e_ = e, b_ = b, rows = least(end_row - first_row, kRows);
    any = {e.key_rows, 0};
    for (panels = 0; panels < kPanels && panels * W < rows; ++panels) {
      panel[panels] = make_panel<A>(p_, e, b, kv_head, first_row + panels * W, end_row);
      any = {least(any.begin, panel[panels].any.begin), most(any.end, panel[panels].any.end)};
      load_panel(panels, delta);
    }
    finite = all_finite<A>({query, padded<A>(p_.width), 1}, rows, p_.width) &&
             all_finite<A>({grad, padded<A>(p_.value_width), 1}, rows, p_.value_width);
  }

  // weight (P), dropped (P * keep) and score_grad (dS) [key][64 rows] of keys [first, first + n), zero where not
  // visible. Returns whether a row does not see some of them.
  bool scores(int64_t first, int64_t n, Broadcast<A> keys, Broadcast<A> values) {
    bool hides = p_.mask.data;
    for (int i = 0; i < panels; ++i) {
      const PanelBlock part = visible_part(p_, panel[i], first, n);
      hides |= part.partial;
      if (part.n < n)
        for (A* block : {weight, dropped, score_grad}) clear(block + i * W, part, first, n);
      if (part.n > 0) panel_scores(i, part, part.first - first, keys, values);
    }
    return hides;
  }

  bool through_softcap = true;  // whether score_grad is that of q.k, or of what the mask is added to
  int panels;
  int64_t rows;
  KeyRange any;
  bool finite;
  Panel<A> panel[kPanels];
  A *query_t, *grad_t;               // [panel][width][W], [panel][value_width][W]
  A *query, *grad;                   // [64][padded width]; query scaled
  A *weight, *dropped, *score_grad;  // [kBackwardBlock][64]

 private:
  void load_panel(int i, const A* delta) {
    const Panel<A>& own = panel[i];
    for (int lane = 0; lane < W; ++lane) {
      lse_[i][lane] = A(__builtin_inf()), delta_[i][lane] = 0;  // a lane without a row, or a row without keys: P = 0
      if (lane >= own.rows) continue;
      const int64_t h = own.head[lane], q = own.query[lane], at = lse_index(p_, e_, b_, h, q);
      const A lse = static_cast<const A*>(p_.lse)[at];
      if (lse != -A(__builtin_inf())) lse_[i][lane] = lse;
      delta_[i][lane] = delta[at];
      copy_row(query_row(p_, p_.query, e_, b_, h, q), p_.width, query, i * W + lane, A(p_.scale));
      copy_row(query_row(p_, p_.grad_output, e_, b_, h, q), p_.value_width, grad, i * W + lane, A(1));
    }
    pack(i, own, p_.width, query, query_t);
    pack(i, own, p_.value_width, grad, grad_t);
  }

  void copy_row(const void* from, int64_t width, A* rows, int64_t row, A scale) {
    A* to = rows + row * padded<A>(width);
    const A* as_read = read_row(p_.dtype, from, width, to);
    for (int64_t c = 0; c < width; c += L) store(to + c, load_first(as_read + c, width - c) * scale);
  }

  void pack(int i, const Panel<A>& own, int64_t width, const A* rows, A* transposed) {
    const A* first = rows + i * W * padded<A>(width);
    pack_transposed(width, own.rows, own.vectors, transposed + i * width * W,
                    [&](int lane, int64_t c, int64_t)
                        HT_LAMBDA { return HANDTUNED_ISA::load(first + lane * padded<A>(width) + c); });
  }

  // Zeros in the lanes of one panel, for the keys outside `part`.
  static void clear(A* block, PanelBlock part, int64_t first, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      if (part.n > 0 && first + j >= part.first && first + j < part.first + part.n) continue;
      __builtin_memset(block + j * kRows, 0, W * sizeof(A));
    }
  }

  void panel_scores(int i, PanelBlock part, int64_t skipped, Broadcast<A> keys, Broadcast<A> values) {
    const Panel<A>& own = panel[i];
    A *s = weight + skipped * kRows + i * W, *ds = score_grad + skipped * kRows + i * W;
    keys.data += skipped * keys.row;
    values.data += skipped * values.row;
    multiply_width(part.n, own.vectors, keys, query_t + i * p_.width * W, p_.width, s, kRows);
    multiply_width(part.n, own.vectors, values, grad_t + i * p_.value_width * W, p_.value_width, ds, kRows);
    finish_scores(p_, own, b_, part, s, kRows, bias_, derivative_);
    const A* keep = nullptr;
    if (p_.dropout.p > 0) {
      const int64_t aligned = part.first / kKeyBlock * kKeyBlock, before = part.first - aligned;
      load_dropout(p_, e_, own, b_, aligned, before + part.n, factor_, factor_row_);
      keep = factor_ + before * W;
    }
    for (int64_t j = 0; j < part.n; ++j) {
      for (int v = 0; v < own.vectors; ++v) {
        const int64_t at = j * kRows + v * L;
        vec<A> p = exponential(HANDTUNED_ISA::load(s + at) - HANDTUNED_ISA::load(lse_[i] + v * L));
        vec<A> dp = HANDTUNED_ISA::load(ds + at);
        store(s + at, p);
        if (keep) {
          const vec<A> k = HANDTUNED_ISA::load(keep + j * W + v * L);
          dp = k == A(0) ? vec<A>{} : dp * k;
          store(dropped + skipped * kRows + i * W + at, p * k);
        }
        // dS = P * (dP - delta); nothing of a hidden key enters
        vec<A> grad_of = p * (dp - HANDTUNED_ISA::load(delta_[i] + v * L));
        if (p_.softcap > 0 && through_softcap) grad_of *= HANDTUNED_ISA::load(derivative_ + j * W + v * L);
        store(ds + at, p == A(0) ? vec<A>{} : grad_of);
      }
    }
  }

  const AttentionBackward& p_;
  AttentionEntry e_;
  int64_t b_;
  alignas(64) A lse_[kPanels][W], delta_[kPanels][W];
  A *bias_, *factor_, *factor_row_, *derivative_;
};

}  // namespace handtuned::HANDTUNED_ISA
