// Attention, the scores of a panel and a block of keys: products, mask, window, slopes, softcap, dropout factors.
#pragma once
#include "attention_panel.h"

namespace handtuned::HANDTUNED_ISA {

// bias[j][lane] = the mask of (lane's query, key first + j): what is added to the score, -infinity to hide. Returns
// whether it leaves anything to see.
template <class M, class A>
inline bool load_mask(const M* data, const AttentionMask& m, const Panel<A>& panel, int64_t b, int64_t first, int64_t n,
                      A* bias) {
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  const M* rows[W];
  for (int lane = 0; lane < panel.rows; ++lane)
    rows[lane] = data + b * m.batch + panel.head[lane] * m.head + panel.query[lane] * m.row + first * m.key;
  vec<A> top = broadcast(-A(__builtin_inf()));
  auto keys_of = [&](int lane, int64_t j, int64_t count) HT_LAMBDA {
    const M* row = rows[lane] + j * m.key;
    M near[L];
    if (m.key != 1 || count < L) {
      for (int64_t i = 0; i < L; ++i) near[i] = row[least(i, count - 1) * m.key];
      row = near;
    }
    const vec<A> keys = load_bias(row, A());
    top = larger(keys, top);
    return keys;
  };
  if (one_mask_row(m, panel)) {
    for (int64_t j = 0; j < n; j += L) {
      const vec<A> keys = keys_of(0, j, least(L, n - j));
      for (int64_t i = 0; i < least(L, n - j); ++i)
        for (int v = 0; v < panel.vectors; ++v) store(bias + (j + i) * W + v * L, broadcast(A(keys[i])));
    }
  } else {
    pack_transposed(n, panel.rows, panel.vectors, bias, keys_of);
  }
  return any(top != -A(__builtin_inf()));
}

// Asks for what load_mask() will read of a panel: short stretches of rows far apart, which no hardware foresees.
template <class A>
inline void prefetch_mask(const Attention& p, const Panel<A>& panel, int64_t b, int64_t first, int64_t n) {
  const AttentionMask& m = p.mask;
  if (!panel.masked || m.key != 1 || one_mask_row(m, panel)) return;
  const int64_t element = m.boolean ? 1 : bytes_of(m.dtype);
  const char* data = static_cast<const char*>(m.data) + (b * m.batch + first) * element;
  for (int lane = 0; lane < panel.rows; ++lane)
    prefetch_row(data + (panel.head[lane] * m.head + panel.query[lane] * m.row) * element, n * element);
}

// factor[j][lane] = what p.dropout multiplies the weights of the block with, lines as far apart as a panel is wide.
template <class A>
inline void load_dropout(const Attention& p, const AttentionEntry& e, const Panel<A>& panel, int64_t b, int64_t first,
                         int64_t n, A* factor) {
  constexpr int W = Panel<A>::W, L = kLanes<float>;
  int64_t rows[W] = {};
  for (int lane = 0; lane < panel.rows; ++lane) rows[lane] = lse_index(p, e, b, panel.head[lane], panel.query[lane]);
  dropout_lanes(factor, W, n, rows, (panel.rows + L - 1) / L * L, p.dropout, first);
}

// The part of a block that a panel works on: keys [first, first + n), and whether some row does not see some of them.
struct PanelBlock {
  int64_t first, n;
  bool partial;
};

// Dropout factors come in whole blocks, so with dropout the part begins where the block does. It begins at an even key:
// two make a pair.
template <class A>
HT_INLINE PanelBlock visible_part(const Attention& p, const Panel<A>& panel, int64_t first, int64_t n) {
  const int64_t begin = p.dropout.p > 0 ? first : most(first, panel.any.begin) & ~int64_t(1);
  const int64_t end = least(first + n, panel.any.end);
  return {begin, panel.any.begin < first + n ? end - begin : 0, begin < panel.all.begin || end > panel.all.end};
}

// bias [kKeyBlock][W] = the mask of a panel's block, if the panel is masked. Whether it leaves anything to see.
template <class A>
inline bool load_bias(const Attention& p, const Panel<A>& panel, int64_t b, PanelBlock block, A* bias) {
  bool some = true;
  if (panel.masked)
    with_mask<A>(p.mask, [&](auto* data) { some = load_mask(data, p.mask, panel, b, block.first, block.n, bias); });
  return some;
}

// Turns the products scale / rest * q.k in s[j][lane] into scores. Keys that a row does not see get -infinity. bias:
// what load_bias() gave. derivative [kKeyBlock][W], if given, gets that of the softcap.
//   s = rest * s;  s = softcap * tanh(s / softcap);  s += mask;  s -= slope * |centre - j|
template <class A>
inline void finish_scores(const Attention& p, const Panel<A>& panel, PanelBlock block, A rest, A* s, int64_t pitch,
                          const A* bias, A* derivative) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  const A hidden = -A(__builtin_inf());
  auto each = [&](auto change) HT_LAMBDA {
    for (int64_t j = 0; j < block.n; ++j)
      for (int v = 0; v < panel.vectors; ++v) store(s + j * pitch + v * L, change(load(s + j * pitch + v * L), j, v));
  };
  if (rest != 1) each([&](vec<A> x, int64_t, int) HT_LAMBDA { return x * rest; });
  if (p.softcap > 0) {
    const A cap = A(p.softcap), inverse = A(1 / p.softcap);
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      vec<A> t = tanh(x * inverse);
      if (derivative) store(derivative + j * W + v * L, A(1) - t * t);
      return cap * t;
    });
  }
  if (panel.masked) {
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      vec<A> m = load(bias + j * W + v * L);
      return m == hidden ? m : x + m;  // NaN of a hidden key goes no further
    });
  }
  if (p.slopes) {
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      return x - load(panel.slope + v * L) * absolute(load(panel.centre + v * L) - A(block.first + j));
    });
  }
  if (block.partial) {
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      const ints<A> key = ints<A>{} + Index(block.first + j);
      return (panel.begin[v] <= key) & (key < panel.end[v]) ? x : broadcast(hidden);
    });
  }
}

// S[j][lane] = K[j] . Q^T over the width, of floats in stretches whose sums are rounded on their own.
template <class E>
HT_INLINE void multiply_width(int64_t n, int vectors, Broadcast<E> rows, const E* transposed, int64_t width,
                              Accumulate<E>* s, int64_t pitch) {
  constexpr int W = kPanel<Accumulate<E>>;
  const int64_t depth = elements<E>(width), stretch = kPack<E> == 1 ? 128 : depth;
  multiply<E, false>(n, vectors, rows, transposed, W, least(depth, stretch), s, pitch);
  for (int64_t c = stretch; c < depth; c += stretch) {
    rows.data += stretch;
    multiply<E, true>(n, vectors, rows, transposed + c * W, W, least(depth - c, stretch), s, pitch);
  }
}

}  // namespace handtuned::HANDTUNED_ISA
