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

// Width in whole vectors, in elements.
template <class A>
HT_INLINE int64_t padded(int64_t width) {
  return (width + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Elements of type E in a row of numbers: float or double, or pair for bf16 where the ISA multiplies pairs.
template <class E>
HT_INLINE int64_t elements(int64_t width) {
  return (width + kPack<E> - 1) / kPack<E>;
}

// How many of n pieces a thread takes at a time: all of them where other threads are not worth waking. Neighbours share
// keys and values or lie side by side in memory, and threads that write side by side hold each other up; so several, as
// long as kPieces threads find work and the last ones do not wait for long.
inline int64_t run_of(const Attention& p, int64_t n) {
  constexpr double kSmallFlops = 1 << 19, kLeastFlops = 1 << 19, kMostFlops = 1 << 24;
  const double flops =
      2.0 * double(p.batch * p.heads) * double(p.query_rows) * double(p.key_rows) * double(p.width + p.value_width);
  if (flops < kSmallFlops) return most(1, n);
  const double each = flops / double(n);
  return most(1, most(least(n / kPieces, int64_t(kMostFlops / each)), int64_t(kLeastFlops / each)));
}

// Only rows of tensors know of 16 bits: everything between is float, or double for double tensors.
template <class A, class Use>
HT_INLINE void with_type(DType dtype, Use use) {
  if constexpr (std::is_same_v<A, double>) return use(static_cast<double*>(nullptr));
  if (dtype == DType::f32) return use(static_cast<float*>(nullptr));
  dtype == DType::bf16 ? use(static_cast<bf16*>(nullptr)) : use(static_cast<f16*>(nullptr));
}

// What is known of each lane. Lanes past `rows` see no key.
template <class A>
struct Panel {
  static constexpr int W = kPanel<A>, L = kLanes<A>;
  int rows, vectors;                                             // in use
  int64_t query[W], head[W];                                     // index in its sequence, query head
  alignas(64) A centre[W], slope[W];                             // of ALiBi alone: position among the keys, slope
  alignas(64) ints<A> begin[kPanelVectors], end[kPanelVectors];  // visible keys by window and length
  KeyRange any, all;                                             // keys that some row sees, keys that all see
  bool masked;                                                   // whether the mask says more than these
};

// Runs use(data) on the elements of a mask of any type.
template <class A, class Use>
HT_INLINE void with_mask(const AttentionMask& m, Use use) {
  if (m.boolean) return use(static_cast<const boolean*>(m.data));
  with_type<A>(m.dtype, [&](auto* type) HT_LAMBDA {
    using M = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<Accumulate<M>, A>) use(static_cast<const M*>(m.data));
  });
}

// What one row of a mask leaves to see: keys of `range`, all of them and unchanged if `plain`. Most padding masks are
// plain, so lengths by another name.
struct KeyPadding {
  KeyRange range;
  bool plain;
};

template <class A, class M>
inline KeyPadding key_padding(const M* mask, int64_t step, int64_t keys) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int L = kLanes<A>;
  ints<A> lane{}, first = lane + Index(keys), end{}, count{}, changed{};
  for (int i = 0; i < L; ++i) lane[i] = i;
  for (int64_t j = 0; j < keys; j += L) {
    const M* row = mask + j;
    M near[L];
    if (step != 1 || j + L > keys) {
      for (int i = 0; i < L; ++i) near[i] = mask[least(j + i, keys - 1) * step];
      row = near;
    }
    // seen = mask[key] > -infinity
    const vec<A> bias = load_bias(row, A());
    const ints<A> key = lane + Index(j), seen = (bias != -A(__builtin_inf())) & (key < Index(keys));
    first = seen & (key < first) ? key : first;
    end = seen ? key + Index(1) : end;
    count -= seen;
    changed |= seen & (bias != A(0));
  }
  KeyPadding found{{keys, 0}, !any(changed)};
  int64_t total = 0;
  for (int i = 0; i < L; ++i) {
    found.range = {least(found.range.begin, first[i]), most(found.range.end, end[i])};
    total += count[i];
  }
  found.plain &= total == most(0, found.range.end - found.range.begin);
  return found;
}

// Whether one row of the mask holds for all rows of a panel.
template <class A>
HT_INLINE bool one_mask_row(const AttentionMask& m, const Panel<A>& panel) {
  return m.data && m.row == 0 && (m.head == 0 || panel.head[0] == panel.head[panel.rows - 1]);
}

// Of rows [first, end) of (b, kv head), as many as fit.
template <class A>
inline Panel<A> make_panel(const Attention& p, const AttentionEntry& e, int64_t b, int64_t kv_head, int64_t first,
                           int64_t end) {
  constexpr int W = Panel<A>::W, L = Panel<A>::L;
  Panel<A> panel;
  panel.rows = int(least(end - first, W));
  panel.vectors = (panel.rows + L - 1) / L;
  const int64_t h = kv_head * (p.heads / p.kv_heads) + first / e.query_rows, i = first % e.query_rows;
  for (int lane = 0; lane < W; ++lane) panel.query[lane] = i + lane, panel.head[lane] = h;
  for (int lane = int(least(W, e.query_rows - i)); lane < panel.rows; ++lane) {  // the next heads
    panel.query[lane] = (i + lane) % e.query_rows;
    panel.head[lane] = h + (i + lane) / e.query_rows;
  }
  for (int lane = panel.rows; lane < W; ++lane) panel.query[lane] = i, panel.head[lane] = h;
  panel.any = {e.key_rows, 0};
  panel.all = {0, e.key_rows};
  const bool same = p.window_left < 0 && p.window_right < 0;
  KeyPadding padding{{0, e.key_rows}, !p.mask.data};
  if (one_mask_row(p.mask, panel))
    with_mask<A>(p.mask, [&](auto* data) {
      padding = key_padding<A>(data + b * p.mask.batch + h * p.mask.head, p.mask.key, e.key_rows);
    });
  panel.masked = !padding.plain;
  alignas(64) int64_t begin[W] = {}, stop[W] = {};
  for (int lane = 0; lane < panel.rows; ++lane) {
    KeyRange seen = same ? KeyRange{0, e.key_rows} : visible_keys(p, e, panel.query[lane]);
    seen = {most(seen.begin, padding.range.begin), least(seen.end, padding.range.end)};
    if (seen.begin < seen.end) panel.any = {least(panel.any.begin, seen.begin), most(panel.any.end, seen.end)};
    panel.all = {most(panel.all.begin, seen.begin), least(panel.all.end, seen.end)};
    begin[lane] = seen.begin, stop[lane] = seen.end;
  }
  for (int v = 0; v < kPanelVectors; ++v)
    for (int l = 0; l < L; ++l) panel.begin[v][l] = begin[v * L + l], panel.end[v][l] = stop[v * L + l];
  for (int lane = 0; p.slopes && lane < W; ++lane) {
    panel.centre[lane] = A(panel.query[lane] + e.offset);
    panel.slope[lane] = A(p.slopes[b * p.heads + panel.head[lane]]);
  }
  return panel;
}

// ---- packing ----------------------------------------------------------------------------------------------------

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

// rows[lane][c] = from[c][lane] * factor[lane], c < width, lane < rows; rows have room for padded(width).
template <class A>
HT_INLINE void unpack_transposed(int64_t width, int rows, const A* from, const A* factor, A* to, int64_t pitch) {
  constexpr int L = kLanes<A>, W = kPanel<A>;
  for (int first = 0; first < rows; first += L) {
    const vec<A> scale = load(factor + first);
    for (int64_t c = 0; c < width; c += L) {
      vec<A> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = c + i < width ? load(from + (c + i) * W + first) * scale : vec<A>{};
      transpose<A>(square);
      for (int i = 0; i < L && first + i < rows; ++i) store(to + (first + i) * pitch + c, square[i]);
    }
  }
}

// to[j / 2][c] = numbers c of rows j and j + 1 of bf16, times a power of two; zero past n and past width. Rows of `to`
// are padded(width) apart.
template <class RowOf>
HT_INLINE void pack_row_pairs(int64_t n, int64_t width, float power, pair* to, RowOf row_of) {
  constexpr int L = kLanes<float>;
  auto pack = [&](auto halves) HT_LAMBDA {  // the upper halves are the numbers
    for (int64_t j = 0; j < n; j += 2) {
      const bf16 *first = row_of(j), *second = j + 1 < n ? row_of(j + 1) : nullptr;
      for (int64_t c = 0; c < width; c += L) {
        const u32 low = halves(first + c, width - c), high = second ? halves(second + c, width - c) : u32{};
        const u32 both = low >> 16 | high;
        __builtin_memcpy(to + j / 2 * padded<float>(width) + c, &both, sizeof both);
      }
    }
  };
  if (power == 1)
    pack([](const bf16* p, int64_t left) HT_LAMBDA { return (u32)load_first(p, left); });
  else
    pack([&](const bf16* p, int64_t left) HT_LAMBDA { return (u32)(load_first(p, left) * power); });
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

// Asks for what is needed soon: a row, and rows [first, first + n) of keys or values. The empty statement is an effect:
// GCC takes a function that only prefetches for one without any, and drops calls of it.
HT_INLINE void prefetch_row(const void* row, int64_t bytes) {
  asm volatile("");
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
}
HT_INLINE void prefetch_rows(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b,
                             int64_t kv_head, int64_t first, int64_t n, int64_t width) {
  for (int64_t j = first; j < first + n; ++j) prefetch_row(key_row(p, t, e, b, kv_head, j), width * bytes_of(p.dtype));
}

// ---- operands of the products -------------------------------------------------------------------------------------

// What queries are multiplied with as they are packed, and what is left for their scores: pairs stay bf16, so they take
// a power of two.
template <class E>
struct Scale {
  Accumulate<E> power, rest = 1;
  explicit Scale(double scale) : power(Accumulate<E>(scale)) {
    if constexpr (kPack<E> == 2) {
      int exponent;
      const double mantissa = __builtin_frexp(scale, &exponent);
      power = float(__builtin_ldexp(1, exponent - 1)), rest = float(2 * mantissa);
    }
  }
};

// A row as elements, stored in words of A: in place where it is that already, else in `to` [padded(width)].
template <class E, class A = Accumulate<E>>
HT_INLINE const A* row_elements(DType dtype, const void* row, int64_t width, A* to) {
  if constexpr (kPack<E> == 1) return read_row(dtype, row, width, to);
  if (width % 2 == 0) return static_cast<const A*>(row);
  to[width / 2] = 0;
  __builtin_memcpy(to, row, width * sizeof(bf16));
  return to;
}

// Elements times the power of a Scale.
template <class E>
HT_INLINE f32 scaled(f32 words, float power) {
  if constexpr (kPack<E> == 1) return words * power;
  const u32 pairs = (u32)words;
  return (f32)((u32)(first_of(pairs) * power) >> 16 | (u32)(second_of(pairs) * power));
}
template <class E>
HT_INLINE f64 scaled(f64 words, double power) {
  return words * power;
}

// Keys (or values) [first, first + n): element [j][c], for sums over the width. In place where they are elements that
// already, else converted or gathered from their pages into `scratch` [n][padded(width)].
template <class E, class A = Accumulate<E>>
HT_INLINE Broadcast<E> key_block(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b,
                                 int64_t kv_head, int64_t first, int64_t n, int64_t width, A* scratch) {
  const bool in_place = kPack<E> == 2 ? width % 2 == 0 && t.row % 2 == 0 : !is_narrow(p.dtype);
  if (in_place && !p.pages) return {static_cast<const E*>(key_row(p, t, e, b, kv_head, first)), t.row / kPack<E>, 1};
  const int64_t pitch = padded<A>(width);
  for (int64_t j = 0; j < n; ++j) {
    A* to = scratch + j * pitch;
    const A* row = row_elements<E>(p.dtype, key_row(p, t, e, b, kv_head, first + j), width, to);
    if (row != to) __builtin_memcpy(to, row, elements<E>(width) * sizeof(E));
  }
  return {reinterpret_cast<const E*>(scratch), pitch, 1};
}

// The same for sums over the keys: element [c][j], two keys to a pair. `keys`: what key_block() gave, used where it can
// be; scratch [elements(n)][padded(width)].
template <class E, class A = Accumulate<E>>
HT_INLINE Broadcast<E> key_columns(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b,
                                   int64_t kv_head, int64_t first, int64_t n, int64_t width, A* scratch) {
  if constexpr (kPack<E> == 1) {
    const Broadcast<E> rows = key_block<E>(p, t, e, b, kv_head, first, n, width, scratch);
    return {rows.data, rows.step, rows.row};
  } else {
    pair* to = reinterpret_cast<pair*>(scratch);
    pack_row_pairs(n, width, 1, to, [&](int64_t j) HT_LAMBDA {
      return static_cast<const bf16*>(key_row(p, t, e, b, kv_head, first + j));
    });
    return {to, 1, padded<A>(width)};
  }
}

// Keys [first, ...) of a block that begins at key 0: `skipped` of them are left out, an even number.
template <class E>
HT_INLINE Broadcast<E> skip_rows(Broadcast<E> keys, int64_t skipped) {
  return {keys.data + skipped * keys.row, keys.row, keys.step};
}
template <class E>
HT_INLINE Broadcast<E> skip_columns(Broadcast<E> keys, int64_t skipped) {
  return {keys.data + skipped / kPack<E> * keys.step, keys.row, keys.step};
}

// Whether rows of a tensor hold neither infinity nor NaN.
template <class A, class RowOf>
inline bool all_finite(DType dtype, int64_t n, int64_t width, RowOf row_of) {
  ints<A> odd{};
  with_type<A>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<Accumulate<T>, A>) {
      for (int64_t j = 0; j < n; ++j) {
        const T* row = static_cast<const T*>(row_of(j));
        for (int64_t c = 0; c < width; c += kLanes<A>)
          odd |= ~(absolute(load_first(row + c, width - c)) < A(__builtin_inf()));
      }
    }
  });
  return !any(odd);
}
template <class A>
inline bool all_finite(const Attention& p, const AttentionTensor& t, const AttentionEntry& e, int64_t b,
                       int64_t kv_head, int64_t first, int64_t n, int64_t width) {
  return all_finite<A>(p.dtype, n, width, [&](int64_t j) { return key_row(p, t, e, b, kv_head, first + j); });
}

}  // namespace handtuned::HANDTUNED_ISA
