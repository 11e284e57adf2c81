// Attention backward, a tile of 64 query rows: everything that gradients of queries, keys, values and mask are made of.
//
//   P  = e^(S - lse),   dP[j][lane] = sum_c V[j][c] dO^T[c][lane],   delta = sum_c dO O - dlse
//   dS = P * (dP * keep - delta), through the derivative of the softcap where there is one
// for one block of keys at a time. P * keep and dS stand as [key][64 rows], for the products that sum over rows; for
// dQ, which sums over keys, dS of floats is the same and of pairs has a second form, two keys to a pair.
#pragma once
#include "attention_scores.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kBackwardBlock = 128;  // keys
static_assert(kKeyBlock % kBackwardBlock == 0);

// A tile of query rows and what stays the same for all keys: panels, Q and dO in both orders, lse and delta.
template <class E>
class BackwardTile {
 public:
  using A = Accumulate<E>;
  static constexpr int W = kPanel<A>, L = kLanes<A>, kPanels = int(kAttentionTile) / W;
  static constexpr int64_t kRows = kAttentionTile, kPitch = kRows / kPack<E>;
  static constexpr bool kPairs = kPack<E> == 2;

  BackwardTile(const AttentionBackward& p, Arena& arena) : scale(p.scale), p_(p) {
    query_t = arena.take<E>(kPanels * p.width * W);
    grad_t = arena.take<E>(kPanels * p.value_width * W);
    query = arena.take<E>(kRows * padded<A>(p.width));
    grad = arena.take<E>(kRows * padded<A>(p.value_width));
    score_grad = arena.take<E>(kBackwardBlock * kPitch);
    weight_ = arena.take<A>(kBackwardBlock * kRows);
    dropped = kPairs || p.dropout.p > 0 ? arena.take<E>(kBackwardBlock * kPitch) : reinterpret_cast<E*>(weight_);
    grad_by_key = kPairs ? arena.take<E>(kBackwardBlock * kPitch) : score_grad;
    weight_grad_ = kPairs ? arena.take<A>(kBackwardBlock * W) : reinterpret_cast<A*>(score_grad);
    row_ = arena.take<A>(W * padded<A>(most(p.width, p.value_width)));
    bias_ = arena.take<A>(kKeyBlock * W);
    factor_ = arena.take<A>(kKeyBlock * W);
    derivative_ = arena.take<A>(kBackwardBlock * W);
  }

  static size_t bytes(const Attention& p) {
    return Arena::bytes_of<A>(kPanels * p.width * W) + Arena::bytes_of<A>(kPanels * p.value_width * W) +
           Arena::bytes_of<A>(kRows * padded<A>(p.width)) + Arena::bytes_of<A>(kRows * padded<A>(p.value_width)) +
           Arena::bytes_of<A>(W * padded<A>(most(p.width, p.value_width))) +
           5 * Arena::bytes_of<A>(kBackwardBlock * kRows) + 3 * Arena::bytes_of<A>(kKeyBlock * W);
  }

  // Rows [first_row, first_row + 64) of (b, kv head), or those before `end_row`. delta: like the lse.
  void load(const AttentionEntry& e, int64_t b, int64_t kv_head, int64_t first_row, int64_t end_row, const A* delta) {
    e_ = e, b_ = b, rows = least(end_row - first_row, kRows);
    any = {e.key_rows, 0};
    finite = true;
    for (panels = 0; panels < kPanels && panels * W < rows; ++panels) {
      panel[panels] = make_panel<A>(p_, e, b, kv_head, first_row + panels * W, end_row);
      // The last row's partner in a pair sees nothing, NaN keys included.
      if (kPairs && panel[panels].rows % 2) panel[panels].all.end = 0;
      any = {least(any.begin, panel[panels].any.begin), most(any.end, panel[panels].any.end)};
      load_statistics(panels, delta);
      load_rows(panels, p_.query, p_.width, scale.power, query, query_t);
      load_rows(panels, p_.grad_output, p_.value_width, A(1), grad, grad_t);
    }
  }

  // dropped (P * keep), score_grad and grad_by_key (dS) of keys [first, first + n), zero where not visible. Returns
  // whether a row does not see some of them.
  bool scores(int64_t first, int64_t n, Broadcast<E> keys, Broadcast<E> values) {
    bool hides = false;
    for (int i = 0; i < panels; ++i) {
      const PanelBlock part = visible_part(p_, panel[i], first, n);
      hides |= panel[i].masked || part.partial;
      seen[i] = part.n > 0 && load_bias(p_, panel[i], b_, part, bias_);
      if (part.n < n || !seen[i])
        for (E* block : {dropped, score_grad}) clear(block + i * W / kPack<E>, seen[i] ? part : PanelBlock{}, first, n);
      // The mask of the next panel, or of the next block.
      if (i + 1 < panels)
        prefetch_mask(p_, panel[i + 1], b_, first, n);
      else
        prefetch_mask(p_, panel[0], b_, first + n, least(kBackwardBlock, any.end - first - n));
      if (seen[i]) panel_scores(i, part, part.first - first, keys, values);
    }
    return hides;
  }

  bool through_softcap = true;  // whether score_grad is that of q.k, or of what the mask is added to
  A* mask_grad = nullptr;       // [key of the block][64 rows] where the latter is added up as well
  int panels;
  int64_t rows;
  KeyRange any;
  bool finite;
  Scale<E> scale;  // query and query_t have its power
  Panel<A> panel[kPanels];
  bool seen[kPanels];       // whether a panel sees anything of the block that scores() was last given
  E *query_t, *grad_t;      // [panel][elements(width)][W], [panel][elements(value_width)][W]
  E *query, *grad;          // [elements(64)][padded width]
  E *dropped, *score_grad;  // [kBackwardBlock][elements(64)]
  E* grad_by_key;           // [elements(kBackwardBlock)][64]

 private:
  void load_statistics(int i, const A* delta) {
    const Panel<A>& own = panel[i];
    for (int lane = 0; lane < W; ++lane) {
      lse_[i][lane] = A(__builtin_inf()), delta_[i][lane] = 0;  // a lane without a row, or a row without keys: P = 0
      if (lane >= own.rows) continue;
      const int64_t at = lse_index(p_, e_, b_, own.head[lane], own.query[lane]);
      const A lse = static_cast<const A*>(p_.lse)[at];
      if (lse != -A(__builtin_inf())) lse_[i][lane] = lse;
      delta_[i][lane] = delta[at];
    }
  }

  // Rows of panel i, times `power`, into both orders: over rows, and transposed.
  void load_rows(int i, const AttentionTensor& t, int64_t width, A power, E* over_rows, E* transposed) {
    const Panel<A>& own = panel[i];
    const int64_t pitch = padded<A>(width);
    auto row_of = [&](int64_t lane) HT_LAMBDA { return query_row(p_, t, e_, b_, own.head[lane], own.query[lane]); };
    E* own_rows = over_rows + i * W / kPack<E> * pitch;
    A* own_transposed = reinterpret_cast<A*>(transposed + i * width * W);
    if constexpr (kPairs) {
      finite &= all_finite<A>(p_.dtype, own.rows, width, row_of);
      pack_row_pairs(own.rows, width, power, own_rows,
                     [&](int64_t lane) HT_LAMBDA { return static_cast<const bf16*>(row_of(lane)); });
      const A* words[W];
      for (int lane = 0; lane < own.rows; ++lane)
        words[lane] = row_elements<E>(p_.dtype, row_of(lane), width, row_ + lane * pitch);
      pack_transposed(elements<E>(width), own.rows, own.vectors, own_transposed,
                      [&](int lane, int64_t c, int64_t n)
                          HT_LAMBDA { return scaled<E>(load_first(words[lane] + c, n), power); });
    } else {
      ints<A> odd{};
      for (int lane = 0; lane < own.rows; ++lane) {
        A* to = own_rows + lane * pitch;
        const A* from = read_row(p_.dtype, row_of(lane), width, to);
        for (int64_t c = 0; c < width; c += L) {
          const vec<A> x = load_first(from + c, width - c) * power;
          odd |= ~(absolute(x) < A(__builtin_inf()));
          store(to + c, x);
        }
      }
      finite &= !HANDTUNED_ISA::any(odd);
      pack_transposed(width, own.rows, own.vectors, own_transposed, [&](int lane, int64_t c, int64_t) HT_LAMBDA {
        return HANDTUNED_ISA::load(own_rows + lane * pitch + c);
      });
    }
  }

  // Zeros in the lanes of one panel, for the keys outside `part`.
  static void clear(E* block, PanelBlock part, int64_t first, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      if (part.n > 0 && first + j >= part.first && first + j < part.first + part.n) continue;
      __builtin_memset(block + j * kPitch, 0, W / kPack<E> * sizeof(E));
    }
  }

  void panel_scores(int i, PanelBlock part, int64_t skipped, Broadcast<E> keys, Broadcast<E> values) {
    constexpr int64_t pitch = kPairs ? W : kRows;
    const Panel<A>& own = panel[i];
    const int64_t before = kPairs ? 0 : skipped * kRows + i * W;  // floats are made where they stay
    A *s = weight_ + before, *ds = weight_grad_ + before;
    multiply_width(part.n, own.vectors, skip_rows(keys, skipped), query_t + i * p_.width * W, p_.width, s, pitch);
    multiply_width(part.n, own.vectors, skip_rows(values, skipped), grad_t + i * p_.value_width * W, p_.value_width, ds,
                   pitch);
    finish_scores(p_, own, part, scale.rest, s, pitch, bias_, derivative_);
    const A* keep = nullptr;
    if (p_.dropout.p > 0) {
      const int64_t aligned = part.first / kKeyBlock * kKeyBlock, ahead = part.first - aligned;
      load_dropout(p_, e_, own, b_, aligned, ahead + part.n, factor_);
      keep = factor_ + ahead * W;
    }
    for (int v = 0; v < own.vectors; ++v) {
      for (int64_t j = 0; j < part.n; j += 2) {
        vec<A> p[2], kept[2], grad_of[2];
        const bool both = j + 1 < part.n;
        const vec<A> lse = HANDTUNED_ISA::load(lse_[i] + v * L), delta = HANDTUNED_ISA::load(delta_[i] + v * L);
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u)  // P = e^(S - lse)
          p[u] = HANDTUNED_ISA::load(s + (j + (both ? u : 0)) * pitch + v * L) - lse;
        exponential(p);
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
          const int64_t row = j + (both ? u : 0);
          vec<A> dp = HANDTUNED_ISA::load(ds + row * pitch + v * L);
          kept[u] = p[u];
          if (keep) {
            const vec<A> k = HANDTUNED_ISA::load(keep + row * W + v * L);
            dp = k == A(0) ? vec<A>{} : dp * k;
            kept[u] = p[u] * k;
          }
          // dS = P * (dP - delta); nothing of a hidden key enters
          grad_of[u] = p[u] == A(0) ? vec<A>{} : p[u] * (dp - delta);
          if (mask_grad && u <= both) {
            A* sum = mask_grad + (skipped + row) * kRows + i * W + v * L;
            store(sum, HANDTUNED_ISA::load(sum) + grad_of[u]);
          }
          if (p_.softcap > 0 && through_softcap) {
            const vec<A> derivative = HANDTUNED_ISA::load(derivative_ + row * W + v * L);
            grad_of[u] = p[u] == A(0) ? vec<A>{} : grad_of[u] * derivative;
          }
        }
        write(skipped + j, i * W + v * L, both, kept, grad_of);
      }
    }
  }

  // P * keep and dS of keys j and, if `both`, j + 1, rows `lane` and after.
  HT_INLINE void write(int64_t j, int64_t lane, bool both, const vec<A> (&kept)[2], const vec<A> (&grad_of)[2]) {
    if constexpr (kPairs) {
      auto at = [&](E* block, int64_t key) HT_LAMBDA { return reinterpret_cast<bf16*>(block + key * kPitch) + lane; };
      store(at(dropped, j), kept[0]), store(at(score_grad, j), grad_of[0]);
      if (both) store(at(dropped, j + 1), kept[1]), store(at(score_grad, j + 1), grad_of[1]);
      const u32 two = narrow_pair(grad_of[0], both ? grad_of[1] : vec<A>{});
      __builtin_memcpy(grad_by_key + j / 2 * kRows + lane, &two, sizeof two);
    } else {
      for (int u = 0; u < (both ? 2 : 1); ++u) {
        store(dropped + (j + u) * kRows + lane, kept[u]);
        store(score_grad + (j + u) * kRows + lane, grad_of[u]);
      }
    }
  }

  const AttentionBackward& p_;
  AttentionEntry e_;
  int64_t b_;
  alignas(64) A lse_[kPanels][W], delta_[kPanels][W];
  A *weight_, *weight_grad_;  // S and dP: of floats where P and dS will be, else [kBackwardBlock][W] of one panel
  A *row_, *bias_, *factor_, *derivative_;
};

}  // namespace handtuned::HANDTUNED_ISA
