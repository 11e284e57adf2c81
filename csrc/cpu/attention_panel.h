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
      panel.slope[lane] = p.slopes ? A(p.slopes[b * p.heads + head] * kLog2e) : A(0);
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

// First `n` elements as a vector, zeros after.
template <class T>
HT_INLINE vec<Accumulate<T>> load_first(const T* p, int64_t n) {
  using A = Accumulate<T>;
  if (n >= kLanes<A>) return load(p);
  T a[kLanes<A>] = {};
  __builtin_memcpy(a, p, n * sizeof(T));
  return load(a);
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

// to[lane][c] = from[c][lane]: calls put(lane, c, vector, n) with n <= L elements of a row.
template <class A, class Put>
HT_INLINE void unpack_transposed(int64_t width, int rows, const A* from, Put put) {
  constexpr int L = kLanes<A>, W = kPanel<A>;
  for (int first = 0; first < rows; first += L) {
    for (int64_t c = 0; c < width; c += L) {
      vec<A> square[L];
      const int64_t n = least(L, width - c);
      for (int64_t i = 0; i < L; ++i) square[i] = i < n ? load(from + (c + i) * W + first) : vec<A>{};
      transpose<A>(square);
      for (int i = 0; i < L && first + i < rows; ++i) put(first + i, c, square[i], n);
    }
  }
}

template <class T, class V>
HT_INLINE void store_first(T* p, V v, int64_t n) {
  if (n >= kLanes<Accumulate<T>>) return store(p, v);
  T a[kLanes<Accumulate<T>>];
  store(a, v);
  __builtin_memcpy(p, a, n * sizeof(T));
}

// Row `row` of a query-like tensor.
template <class T>
HT_INLINE T* query_row(const AttentionTensor& t, const AttentionEntry& e, int64_t b, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + b * t.batch + head * t.head + (e.first_query + row) * t.row;
}
template <class T>
HT_INLINE T* key_row(const AttentionTensor& t, const AttentionEntry& e, int64_t b, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + b * t.batch + head * t.head + (e.first_key + row) * t.row;
}

// ---- keys and values --------------------------------------------------------------------------------------------

// Keys (or values) [first, first + n) as rows of A: in place where they are that already, else converted or gathered
// from their pages into `scratch` [n][padded(width)].
template <class T>
HT_INLINE Broadcast<Accumulate<T>> key_block(const Attention& p, const AttentionTensor& t, const AttentionEntry& e,
                                             int64_t b, int64_t kv_head, int64_t first, int64_t n, int64_t width,
                                             Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (!p.pages) return {key_row<A>(t, e, b, kv_head, first), t.row, 1};
  }
  const int64_t pitch = padded<A>(width);
  for (int64_t j = 0; j < n; ++j) {
    const T* from;
    if (p.pages) {
      const int64_t page = p.pages[b * p.max_pages + (first + j) / p.page_size], slot = (first + j) % p.page_size;
      from = static_cast<const T*>(t.data) + page * t.batch + kv_head * t.head + slot * t.row;
    } else {
      from = key_row<T>(t, e, b, kv_head, first + j);
    }
    for (int64_t c = 0; c < width; c += kLanes<A>) store(scratch + j * pitch + c, load_first(from + c, width - c));
  }
  return {scratch, pitch, 1};
}

template <class A>
inline bool all_finite(Broadcast<A> rows, int64_t n, int64_t width) {
  vec<A> sum = {};
  for (int64_t j = 0; j < n; ++j)
    for (int64_t c = 0; c < width; c += kLanes<A>) sum += load_first(rows.data + j * rows.row + c, width - c) * A(0);
  for (int i = 0; i < kLanes<A>; ++i)
    if (sum[i] != 0) return false;
  return true;
}

// ---- scores -----------------------------------------------------------------------------------------------------

// bias[j][lane] = the mask of (lane's query, key first + j) in units of log2: additive * log2(e), or 0 and -infinity.
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
    return load_bias(row, A()) * A(kLog2e);
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

template <class T, class A>
inline void load_mask_of_any_type(const AttentionMask& m, const Panel<A>& panel, int64_t b, int64_t first, int64_t n,
                                  A* bias) {
  if (m.type == AttentionMask::Type::boolean) return load_mask<boolean>(m, panel, b, first, n, bias);
  if (m.type == AttentionMask::Type::same) return load_mask<T>(m, panel, b, first, n, bias);
  if constexpr (std::is_same_v<A, float>) return load_mask<float>(m, panel, b, first, n, bias);
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

// Turns the products q.k in s[j][lane] into what the exponent is made of: 2^(factor * s) is e^score. Keys that a row
// does not see get -infinity. Returns factor. bias: scratch [kKeyBlock][W]. derivative [kKeyBlock][W], if given, gets
// that of the softcap.
//   s = scale * s;  s = softcap * tanh(s / softcap);  s += mask;  s -= slope * |centre - j|
template <class T, class A>
inline A finish_scores(const Attention& p, const Panel<A>& panel, int64_t b, PanelBlock block, A* s, int64_t pitch,
                       A* bias, A* derivative) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  const A hidden = -A(__builtin_inf()), scale = A(p.scale * kLog2e);
  const bool has_mask = p.mask.type != AttentionMask::Type::none;
  const bool rescale = p.softcap > 0 || has_mask || p.slopes || !(p.scale > 0);
  auto each = [&](auto change) HT_LAMBDA {
    for (int64_t j = 0; j < block.n; ++j)
      for (int v = 0; v < panel.vectors; ++v) store(s + j * pitch + v * L, change(load(s + j * pitch + v * L), j, v));
  };
  if (p.softcap > 0) {
    const A inner = A(p.scale / p.softcap), outer = A(p.softcap * kLog2e);
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      vec<A> t = tanh(x * inner);
      if (derivative) store(derivative + j * W + v * L, A(1) - t * t);
      return outer * t;
    });
  }
  const A by = p.softcap > 0 ? A(1) : scale;
  if (has_mask) {
    load_mask_of_any_type<T>(p.mask, panel, b, block.first, block.n, bias);
    each([&](vec<A> x, int64_t j, int v) HT_LAMBDA {
      vec<A> m = load(bias + j * W + v * L);
      return m == hidden ? m : x * by + m;  // NaN of a hidden key goes no further
    });
  } else if (rescale && p.softcap <= 0) {
    each([&](vec<A> x, int64_t, int) HT_LAMBDA { return x * by; });
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
  return rescale ? A(1) : scale;
}

}  // namespace handtuned::HANDTUNED_ISA
