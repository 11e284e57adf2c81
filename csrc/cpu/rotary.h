// Rotary position embedding (Su et al. 2021), alone and on the way into a cache of keys and values.
//
//   a' = a cos - b sin      b' = b cos + a sin      (a, b): features (i, i + R / 2), or (2 i, 2 i + 1) interleaved
//
// Turned back, which is also the gradient, by the negative sine. One pass: each row is read once and written once, in
// any layout. Products and sums are float (double for double), rounded once.
#pragma once
#include "../rotary.h"

#include "parallel.h"
#include "row.h"

namespace handtuned::HANDTUNED_ISA {

// Up to n elements; none where n <= 0.
template <class T>
HT_INLINE vec<Accumulate<T>> load_some(const T* p, int64_t n) {
  return n > 0 ? load_first(p, n) : vec<Accumulate<T>>{};
}
template <class T>
HT_INLINE void store_some(T* p, vec<Accumulate<T>> v, int64_t n) {
  if (n > 0) store_first(p, v, n);
}

// Two vectors of pairs to the firsts and the seconds of each pair, and back.
template <class V, int... lane>
HT_INLINE void unzip(V& a, V& b, std::integer_sequence<int, lane...>) {
  const V firsts = __builtin_shufflevector(a, b, (2 * lane)...);
  b = __builtin_shufflevector(a, b, (2 * lane + 1)...);
  a = firsts;
}
template <class V, int... lane>
HT_INLINE void zip(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * L)...);
  b = __builtin_shufflevector(a, b, (L / 2 + lane / 2 + lane % 2 * L)...);
  a = low;
}

// One row x [width] to y. C: type of the tables.
template <class T, class C>
void turn_row(const Turn& p, const T* x, const C* cos, const C* sin, T* y) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using Lanes = std::make_integer_sequence<int, L>;
  const int64_t n = p.angles;
  const A sign = p.inverse ? A(-1) : A(1);
  auto turn = [&](vec<A>& a, vec<A>& b, int64_t i) HT_LAMBDA {
    // a, b = a cos - b sin, b cos + a sin
    const vec<A> c = load_first(cos + i, n - i), s = sign * load_first(sin + i, n - i), before = a;
    a = a * c - b * s;
    b = b * c + before * s;
  };
  for (int64_t i = 0; i < n; i += L) {
    const int64_t left = n - i;
    if (p.interleaved) {
      vec<A> a = load_some(x + 2 * i, 2 * left), b = load_some(x + 2 * i + L, 2 * left - L);
      unzip(a, b, Lanes());
      turn(a, b, i);
      zip(a, b, Lanes());
      store_some(y + 2 * i, a, 2 * left);
      store_some(y + 2 * i + L, b, 2 * left - L);
    } else {
      vec<A> a = load_first(x + i, left), b = load_first(x + n + i, left);
      turn(a, b, i);
      store_first(y + i, a, left);
      store_first(y + n + i, b, left);
    }
  }
  __builtin_memcpy(y + 2 * n, x + 2 * n, (p.width - 2 * n) * sizeof(T));
}

// Rows of a strided tensor one after the other, without a division each.
template <class T>
class RowWalk {
 public:
  RowWalk(const StridedRows& rows, int64_t first) : rows_(rows), p_(row_of<T>(rows, first)) {
    for (int d = rows.ndim - 1; d > 0; --d) at_[d] = first % rows.size[d], first /= rows.size[d];
  }
  T* operator*() const { return p_; }
  void operator++() {
    int d = rows_.ndim - 1;
    for (; d > 0 && ++at_[d] == rows_.size[d]; --d) p_ -= (at_[d] - 1) * rows_.stride[d], at_[d] = 0;
    p_ += rows_.stride[d];
  }

 private:
  const StridedRows& rows_;
  T* p_;
  int64_t at_[StridedRows::kMaxDims];
};

inline constexpr int64_t kTurnedAtOnce = 1 << 14;  // numbers of a piece

template <class T, class C>
void rotary_in(const Rotary& p) {
  const int64_t run = most(kTurnedAtOnce / p.width, 1);
  parallel_pieces((p.rows + run - 1) / run, p.rows <= 2 * run, [&](int64_t piece) {
    const int64_t first = piece * run, n = least(run, p.rows - first);
    RowWalk<const T> x(p.input, first);
    RowWalk<T> y(p.output, first);
    RowWalk<const C> cos(p.cos, first), sin(p.sin, first);
    for (int64_t r = 0; r < n; ++r, ++x, ++y, ++cos, ++sin) turn_row(p, *x, *cos, *sin, *y);
  });
}

template <class T>
HT_INLINE T* row_at(const HeadRows& rows, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(rows.data) + b * rows.batch + h * rows.head + t * rows.row;
}

// Everything of new row t of sequence b.
template <class T, class C>
void append_row(const AppendKv& p, int64_t b, int64_t t) {
  const int64_t position = p.lengths[b] + t, asked = p.in_order ? position : p.lengths[b];
  auto table = [&](const void* data, int64_t at) HT_LAMBDA { return static_cast<const C*>(data) + at * p.angles; };
  for (int64_t h = 0; h < p.heads && t < p.query_rows && p.angles; ++h)
    turn_row(p, row_at<const T>(p.query, b, h, t), table(p.cos, asked), table(p.sin, asked),
             row_at<T>(p.output, b, h, t));
  if (t >= p.new_rows) return;
  const int64_t entry = p.pages ? p.pages[b * p.max_pages + position / p.page_size] : b;
  const int64_t slot = p.pages ? position % p.page_size : position;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    turn_row(p, row_at<const T>(p.key, b, h, t), table(p.cos, position), table(p.sin, position),
             row_at<T>(p.key_cache, entry, h, slot));
    __builtin_memcpy(row_at<T>(p.value_cache, entry, h, slot), row_at<const T>(p.value, b, h, t),
                     p.value_width * sizeof(T));
  }
}

template <class T, class C>
void append_kv_in(const AppendKv& p) {
  const int64_t rows = most(p.query_rows, p.new_rows), numbers = (p.heads + 2 * p.kv_heads) * p.width;
  parallel_pieces(p.batch * rows, p.batch * rows * numbers < 2 * kTurnedAtOnce,
                  [&](int64_t piece) { append_row<T, C>(p, piece / rows, piece % rows); });
}

}  // namespace handtuned::HANDTUNED_ISA
