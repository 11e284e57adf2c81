// Attention, what forward and backward share: panels of queries, blocks of keys, scores.
//
// A panel is the work's smallest unit: kPanel query rows of one kv head, one to a lane. Scores stand transposed, one
// row per key, S[key][lane], so the softmax runs down the rows with no operation across lanes, K and V are read element
// by element where they lie (gemm.h), and only the queries are packed. Query heads that share a kv head (GQA) are rows
// of the same panels: row r of a kv head is query r % query_rows of its head r / query_rows.
#pragma once
#include "../attention.h"

#include "gemm.h"
#include "math.h"
#include "philox.h"
#include "row.h"
#include "scratch.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int kMaxPanel = 2 * kLanes<float>;
static_assert(kAttentionTile % kMaxPanel == 0);
inline constexpr int64_t kKeyBlock = kDropoutBlock;  // keys whose scores a panel holds at a time

HT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HT_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// Width in whole vectors, in elements.
template <class A>
HT_INLINE int64_t padded(int64_t width) {
  return (width + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Too little work to wake other threads for.
inline bool is_small(const Attention& p) {
  constexpr double kSmallFlops = 1 << 19;
  const double products = 2.0 * double(p.batch * p.heads) * double(p.query_rows) * double(p.key_rows);
  return products * double(p.width + p.value_width) < kSmallFlops;
}

// What is known of each lane. Lanes past `rows` see no key.
template <class A>
struct Panel {
  static constexpr int W = kPanel<A>, L = kLanes<A>;
  int rows, vectors;                                             // in use
  int64_t query[W], head[W];                                     // index in its sequence, query head
  alignas(64) A centre[W], slope[W];                             // position among the keys (for ALiBi), slope
  alignas(64) ints<A> begin[kPanelVectors], end[kPanelVectors];  // visible keys by window and length
  KeyRange any, all;                                             // keys that some row sees, keys that all see
};

// Of rows [first, end) of (b, kv head), as many as fit.
template <class A>
inline Panel<A> make_panel(const Attention& p, const AttentionEntry& e, int64_t b, int64_t kv_head, int64_t first,
                           int64_t end) {
  Panel<A> panel;
  const int64_t group = p.heads / p.kv_heads;
  panel.rows = int(least(end - first, Panel<A>::W));
  panel.vectors = (panel.rows + Panel<A>::L - 1) / Panel<A>::L;
  panel.any = {e.key_rows, 0};
  panel.all = {0, e.key_rows};
  int64_t head = kv_head * group + first / e.query_rows, i = first % e.query_rows;
  for (int lane = 0; lane < Panel<A>::W; ++lane) {
    KeyRange seen{0, 0};
    if (lane < panel.rows) {
      seen = visible_keys(p, e, i);
      if (seen.begin < seen.end) panel.any = {least(panel.any.begin, seen.begin), most(panel.any.end, seen.end)};
      panel.all = {most(panel.all.begin, seen.begin), least(panel.all.end, seen.end)};
      panel.query[lane] = i;
      panel.head[lane] = head;
      panel.centre[lane] = A(i + e.offset);
      panel.slope[lane] = p.slopes ? A(p.slopes[b * p.heads + head]) : A(0);
      if (++i == e.query_rows) i = 0, ++head;
    } else {
      panel.query[lane] = panel.query[0], panel.head[lane] = panel.head[0];
      panel.centre[lane] = panel.slope[lane] = 0;
    }
    panel.begin[lane / Panel<A>::L][lane % Panel<A>::L] = seen.begin;
    panel.end[lane / Panel<A>::L][lane % Panel<A>::L] = seen.end;
  }
  return panel;
}

// ---- packing ----------------------------------------------------------------------------------------------------

// Only rows of tensors know of 16 bits: everything between is float, or double for double tensors.
template <class A, class Use>
HT_INLINE void with_type(DType dtype, Use use) {
  if constexpr (std::is_same_v<A, double>) return use(static_cast<double*>(nullptr));
  if (dtype == DType::f32) return use(static_cast<float*>(nullptr));
  dtype == DType::bf16 ? use(static_cast<bf16*>(nullptr)) : use(static_cast<f16*>(nullptr));
}

// A row of `dtype` as A: in place where it is that already, else converted into `to` [padded(width)].
template <class A>
HT_INLINE const A* read_row(DType dtype, const void* row, int64_t width, A* to) {
  if (!is_narrow(dtype)) return static_cast<const A*>(row);
  with_type<A>(dtype, [&](auto* type) HT_LAMBDA {
    auto* from = static_cast<decltype(type)>(const_cast<void*>(row));
    for (int64_t c = 0; c < width; c += kLanes<A>) {
      if constexpr (std::is_same_v<Accumulate<std::remove_pointer_t<decltype(type)>>, A>)
        store(to + c, load_first(from + c, width - c));
    }
  });
  return to;
}

// row[c] = from[c] * scale
template <class A>
HT_INLINE void write_row(DType dtype, void* row, int64_t width, const A* from, A scale) {
  with_type<A>(dtype, [&](auto* type) HT_LAMBDA {
    auto* to = static_cast<decltype(type)>(row);
    for (int64_t c = 0; c < width; c += kLanes<A>) {
      if constexpr (std::is_same_v<Accumulate<std::remove_pointer_t<decltype(type)>>, A>)
        store_first(to + c, load(from + c) * scale, width - c);
    }
  });
}

// to[c][lane] = element c of lane's row, c < width, lane < rows; zero for the other lanes of `vectors` vectors. Row
// pitch W. from(lane, c, n) gives elements c .. c + n as a vector, n <= L.
template <class A, class From>
HT_INLINE void pack_transposed(int64_t width, int rows, int vectors, A* to, From from) {
  constexpr int L = kLanes<A>, W = kPanel<A>;
  for (int v = 0; v < vectors; ++v) {
    for (int64_t c = 0; c < width; c += L) {
      vec<A> square[L];
      const int64_t n = least(L, width - c);
      for (int i = 0; i < L; ++i) square[i] = v * L + i < rows ? from(v * L + i, c, n) : vec<A>{};
      transpose<A>(square);
      for (int64_t i = 0; i < n; ++i) store(to + (c + i) * W + v * L, square[i]);
    }
  }
}

// rows[lane][c] = from[c][lane], c < width, lane < rows; rows have room for padded(width).
template <class A>
HT_INLINE void unpack_transposed(int64_t width, int rows, const A* from, A* to, int64_t pitch) {
  constexpr int L = kLanes<A>, W = kPanel<A>;
  for (int first = 0; first < rows; first += L) {
    for (int64_t c = 0; c < width; c += L) {
      vec<A> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = c + i < width ? load(from + (c + i) * W + first) : vec<A>{};
      transpose<A>(square);
      for (int i = 0; i < L && first + i < rows; ++i) store(to + (first + i) * pitch + c, square[i]);
    }
  }
}

// Where a row starts.
HT_INLINE void* query_row(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b,
                          int64_t head, int64_t row) {
  const int64_t at = b * t.batch + head * t.head + (e.first_query + row) * t.row;
  return static_cast<char*>(t.data) + at * bytes_of(p.dtype);
}
HT_INLINE void* key_row(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b, int64_t head,
                        int64_t row) {
  int64_t at = b * t.batch + (e.first_key + row) * t.row;
  if (p.pages) at = p.pages[b * p.max_pages + row / p.page_size] * t.batch + row % p.page_size * t.row;
  return static_cast<char*>(t.data) + (at + head * t.head) * bytes_of(p.dtype);
}

// ---- keys and values --------------------------------------------------------------------------------------------

// Keys (or values) [first, first + n) as rows of A: in place where they are that already, else converted or gathered
// from their pages into `scratch` [n][padded(width)].
template <class A>
HT_INLINE Broadcast<A> key_block(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b,
                                 int64_t kv_head, int64_t first, int64_t n, int64_t width, A* scratch) {
  const bool wide = !is_narrow(p.dtype);
  if (wide && !p.pages) return {static_cast<A*>(key_row(p, t, e, b, kv_head, first)), t.row, 1};
  const int64_t pitch = padded<A>(width);
  for (int64_t j = 0; j < n; ++j) {
    A* to = scratch + j * pitch;
    const A* row = read_row(p.dtype, key_row(p, t, e, b, kv_head, first + j), width, to);
    if (wide) __builtin_memcpy(to, row, width * sizeof(A));
  }
  return {scratch, pitch, 1};
}

template <class A>
inline bool all_finite(Broadcast<A> rows, int64_t n, int64_t width) {
  ints<A> finite = ~ints<A>{};
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < width; c += kLanes<A>)
      finite &= absolute(load_first(rows.data + j * rows.row + c, width - c)) < A(__builtin_inf());
  for (int i = 0; i < kLanes<A>; ++i)
    if (!finite[i]) return false;
  return true;
}

// ---- scores -----------------------------------------------------------------------------------------------------

// bias[j][lane] = the mask of (lane's query, key first + j): what is added to the score, -infinity to hide.
template <class M, class A>
inline void load_mask(const AttentionMask& m, const Panel<A>& panel, int64_t b, int64_t first, int64_t n, A* bias) {
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  auto keys_of = [&](int lane, int64_t j, int64_t count) {
    const M* row = static_cast<const M*>(m.data) + b * m.batch + panel.head[lane] * m.head + panel.query[lane] * m.row +
                   (first + j) * m.key;
    M near[L] = {};
    if (m.key != 1 || count < L) {
      for (int64_t i = 0; i < count; ++i) near[i] = row[i * m.key];
      row = near;
    }
    return load_bias(row, A());
  };
  if (m.row == 0 && (m.head == 0 || panel.head[0] == panel.head[panel.rows - 1])) {  // one row for all lanes
    for (int64_t j = 0; j < n; j += L) {
      const vec<A> keys = keys_of(0, j, least(L, n - j));
      for (int64_t i = 0; i < least(L, n - j); ++i)
        for (int v = 0; v < panel.vectors; ++v) store(bias + (j + i) * W + v * L, broadcast(A(keys[i])));
    }
  } else {
    pack_transposed(n, panel.rows, panel.vectors, bias, keys_of);
  }
}

template <class A>
inline void load_mask_of_any_type(const AttentionMask& m, const Panel<A>& panel, int64_t b, int64_t first, int64_t n,
                                  A* bias) {
  if (m.boolean) return load_mask<boolean>(m, panel, b, first, n, bias);
  with_type<A>(m.dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<Accumulate<M>, A>) load_mask<M>(m, panel, b, first, n, bias);
  });
}

// What p.dropout multiplies the weights of the block with, transposed like the scores. row: scratch [W][kKeyBlock].
template <class A>
inline void load_dropout(const Attention& p, const AttentionEntry& e, const Panel<A>& panel, int64_t b, int64_t first,
                         int64_t n, A* factor, A* row) {
  for (int lane = 0; lane < panel.rows; ++lane)
    dropout_row<false>(row + lane * kKeyBlock, n, lse_index(p, e, b, panel.head[lane], panel.query[lane]), p.dropout,
                       first);
  pack_transposed(n, panel.rows, panel.vectors, factor,
                  [&](int lane, int64_t j, int64_t) { return load(row + lane * kKeyBlock + j); });
}

// The part of a block that a panel works on: keys [first, first + n), and whether some row does not see some of them.
struct PanelBlock {
  int64_t first, n;
  bool partial;
};

// Dropout factors come in whole blocks, so with dropout the part begins where the block does.
template <class A>
HT_INLINE PanelBlock visible_part(const Attention& p, const Panel<A>& panel, int64_t first, int64_t n) {
  const int64_t begin = p.dropout.p > 0 ? first : most(first, panel.any.begin), end = least(first + n, panel.any.end);
  return {begin, panel.any.begin < first + n ? end - begin : 0, begin < panel.all.begin || end > panel.all.end};
}

// Turns the products scale * q.k in s[j][lane] into scores. Keys that a row does not see get -infinity. bias: scratch
// [kKeyBlock][W]. derivative [kKeyBlock][W], if given, gets that of the softcap.
//   s = softcap * tanh(s / softcap);  s += mask;  s -= slope * |centre - j|
template <class A>
inline void finish_scores(const Attention& p, const Panel<A>& panel, int64_t b, PanelBlock block, A* s, int64_t pitch,
                          A* bias, A* derivative) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  const A hidden = -A(__builtin_inf());
  auto each = [&](auto change) HT_LAMBDA {
    for (int64_t j = 0; j < block.n; ++j)
      for (int v = 0; v < panel.vectors; ++v) store(s + j * pitch + v * L, change(load(s + j * pitch + v * L), j, v));
  };
  if (p.softcap > 0) {
    const A cap = A(p.softcap), inverse = A(1 / p.softcap);
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      vec<A> t = tanh(x * inverse);
      if (derivative) store(derivative + j * W + v * L, A(1) - t * t);
      return cap * t;
    });
  }
  if (p.mask.data) {
    load_mask_of_any_type(p.mask, panel, b, block.first, block.n, bias);
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

// S[j][lane] = K[j] . Q^T over the width, in stretches whose sums are rounded on their own.
template <class A>
HT_INLINE void multiply_width(int64_t n, int vectors, Broadcast<A> rows, const A* transposed, int64_t width, A* s,
                              int64_t pitch) {
  constexpr int64_t kStretch = 128;
  multiply<A, false>(n, vectors, rows, transposed, kPanel<A>, least(width, kStretch), s, pitch);
  for (int64_t c = kStretch; c < width; c += kStretch) {
    rows.data += kStretch;
    multiply<A, true>(n, vectors, rows, transposed + c * kPanel<A>, kPanel<A>, least(width - c, kStretch), s, pitch);
  }
}

}  // namespace handtuned::HANDTUNED_ISA
