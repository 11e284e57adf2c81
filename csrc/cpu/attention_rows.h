// Attention forward of few query rows and many keys, as in decoding: lanes run along the width.
//
//   S[j][row]  = K[j] . Q[row]                          (dot products, gemm.h)
//   O[row][c]  = a O + sum_j P[j][row] V[j][c],  a and P from attention_softmax.h
// One row to a lane would leave most lanes empty. Keys and values are read once, so memory is the limit: they are
// converted as they are loaded, in place, row after row and page after page, and asked for before their turn. Only
// values whose width is no whole number of vectors are gathered, block by block.
#pragma once
#include "attention_softmax.h"

namespace handtuned::HANDTUNED_ISA {

// The rows left of one tile and one chunk of keys. T: the tensors' type.
template <class T>
class RowsPiece {
  using A = Accumulate<T>;
  static constexpr int W = kPanel<A>, L = kLanes<A>, kMost = L / 2;

 public:
  static bool suits(const Attention& p, int64_t rows) {
    return 0 < rows && rows <= kMost && p.key_rows >= 2 * kKeyBlock;
  }

  RowsPiece(const AttentionForward& p, int64_t b, int64_t kv_head, int64_t first_row, KeyRange chunk)
      : p_(p), e_(attention_entry(p, b)), b_(b), kv_head_(kv_head), arena_(bytes(p)) {
    panel_ = make_panel<A>(p, e_, b, kv_head, first_row, p.heads / p.kv_heads * e_.query_rows);
    for (dense_ = 1; dense_ < panel_.rows;) dense_ *= 2;
    softmax_.start(p, panel_, chunk.begin == 0);
    keys_ = {most(panel_.any.begin, chunk.begin), least(panel_.any.end, chunk.end)};
    const int64_t pitch = padded<A>(p.width), value_pitch = padded<A>(p.value_width);
    query_ = arena_.template take<A>(kMost * pitch);
    out_ = arena_.template take<A>(kMost * value_pitch);
    scores_ = arena_.template take<A>(kKeyBlock * L);
    bias_ = arena_.template take<A>(kKeyBlock * W);
    factor_ = arena_.template take<A>(kKeyBlock * W);
    value_scratch_ = arena_.template take<T>(kKeyBlock * value_pitch);
    __builtin_memset(query_, 0, kMost * pitch * sizeof(A));
    __builtin_memset(out_, 0, kMost * value_pitch * sizeof(A));
    for (int row = 0; row < panel_.rows; ++row) {
      auto* from = static_cast<const T*>(query_row(p, p.query, e_, b, panel_.head[row], panel_.query[row]));
      for (int64_t c = 0; c < p.width; c += L)
        store(query_ + row * pitch + c, load_first(from + c, p.width - c) * A(p.scale));
    }
  }

  void run() {
    for (int64_t first = keys_.begin / kKeyBlock * kKeyBlock; first < keys_.end; first += kKeyBlock) {
      const PanelBlock part = visible_part(p_, panel_, first, least(kKeyBlock, keys_.end - first));
      if (part.n <= 0) continue;
      const bool hides = panel_.masked || part.partial;
      const bool guarded = hides && !all_finite<A>(p_, p_.value, e_, b_, kv_head_, part.first, part.n, p_.value_width);
      add_block(part, guarded);
    }
  }

  // out = O / l, lse = m + ln(l)
  void write() {
    alignas(64) A lse[W], inverse[W];
    finish_softmax(softmax_, 1, lse, inverse);
    for (int row = 0; row < panel_.rows; ++row) {
      const int64_t h = panel_.head[row], q = panel_.query[row];
      write_row(p_.dtype, query_row(p_, p_.output, e_, b_, h, q), p_.value_width,
                out_ + row * padded<A>(p_.value_width), inverse[row]);
      static_cast<A*>(p_.lse)[lse_index(p_, e_, b_, h, q)] = lse[row];
    }
  }

  // The same unfinished: O [padded value_width], m, l of each row, rows `pitch` apart.
  void write_partial(A* partial, int64_t pitch) {
    for (int row = 0; row < panel_.rows; ++row, partial += pitch) {
      __builtin_memcpy(partial, out_ + row * (pitch - 2), (pitch - 2) * sizeof(A));
      partial[pitch - 2] = softmax_.max[row];
      partial[pitch - 1] = softmax_.sum[row];
    }
  }

 private:
  static size_t bytes(const Attention& p) {
    const int64_t pitch = padded<A>(p.width), value_pitch = padded<A>(p.value_width);
    return Arena::bytes_of<A>(kMost * pitch) + Arena::bytes_of<A>(kMost * value_pitch) +
           Arena::bytes_of<A>(kKeyBlock * L) + 2 * Arena::bytes_of<A>(kKeyBlock * W) +
           Arena::bytes_of<T>(kKeyBlock * value_pitch);
  }

  // Runs use(j, rows, n) on rows [first + j, first + j + n) of keys or values, all of them where they lie one after the
  // other. The hardware does not foresee rows far apart, so they are asked for before their turn, a few at a time.
  template <class Use>
  void each_run(const AttentionTensor& t, int64_t first, int64_t n, int64_t width, Use use) {
    const bool apart = p_.pages || t.row != width;
    const int64_t end = first + n, few = apart ? 16 : n;
    auto run_from = [&](int64_t row, int64_t stop) HT_LAMBDA {
      if (p_.pages) stop = least(stop, row + p_.page_size - row % p_.page_size);
      return KeyRange{row, least(stop, row + few)};
    };
    for (KeyRange run = run_from(first, end), next; run.begin < end; run = next) {
      next = run_from(run.end, run.end < end ? end : keys_.end);
      if (apart && next.begin < next.end) {
        auto* row = static_cast<const T*>(key_row(p_, t, e_, b_, kv_head_, next.begin));
        for (int64_t i = 0; i < next.end - next.begin; ++i) prefetch_row(row + i * t.row, width * sizeof(T));
      }
      auto* row = static_cast<const T*>(key_row(p_, t, e_, b_, kv_head_, run.begin));
      use(run.begin - first, Broadcast<T>{row, t.row, 1}, run.end - run.begin);
    }
  }

  void add_block(PanelBlock part, bool guarded) {
    if (!load_bias(p_, panel_, b_, part, bias_)) return;
    const int64_t pitch = padded<A>(p_.width), value_pitch = padded<A>(p_.value_width);
    auto dots = dots_for(dense_);
    each_run(p_.key, part.first, part.n, p_.width, [&](int64_t j, Broadcast<T> keys, int64_t n) {
      dots(n, keys, query_, pitch, p_.width, scores_ + j * dense_);
    });
    alignas(64) A scale[W];
    const bool plain = !panel_.masked && !part.partial && !p_.slopes && p_.softcap == 0 && p_.dropout.p == 0;
    const Broadcast<A> weights = plain ? dense_softmax(part.n, scale) : softmax(part, scale);
    for (int row = 0; row < panel_.rows; ++row)
      for (int64_t c = 0; c < value_pitch; c += L)
        store(out_ + row * value_pitch + c, load(out_ + row * value_pitch + c) * scale[row]);
    each_run(p_.value, part.first, part.n, p_.value_width, [&](int64_t j, Broadcast<T> values, int64_t n) {
      if (p_.value_width % L != 0) values = widened(values, n);
      auto add = guarded ? &multiply_visible<A, true, T> : &multiply<A, true, T>;
      add(panel_.rows, value_pitch / L, {weights.data + j * weights.step, 1, weights.step}, values.data, values.row, n,
          out_, value_pitch);
    });
  }

  // Copies of n rows with zeros after the width.
  Broadcast<T> widened(Broadcast<T> values, int64_t n) {
    const int64_t pitch = padded<A>(p_.value_width);
    for (int64_t j = 0; j < n; ++j) {
      __builtin_memset(value_scratch_ + j * pitch + pitch - L, 0, L * sizeof(T));
      __builtin_memcpy(value_scratch_ + j * pitch, values.data + j * values.row, p_.value_width * sizeof(T));
    }
    return {value_scratch_, pitch, 1};
  }

  // P[j][row] of n keys in place, where the products are the scores: whole vectors, L / dense_ keys to each.
  Broadcast<A> dense_softmax(int64_t n, A* scale) {
    A* s = scores_;
    const vec<A> hidden = broadcast(-A(__builtin_inf()));
    const int64_t total = n * dense_;
    store_first(s + total, hidden, padded<A>(total) - total);
    alignas(64) A lanes[L];
    // of a row's lanes: lane % dense_ == row
    auto fold = [&](vec<A> x, A none, auto join) HT_LAMBDA {
      store(lanes, x);
      for (int lane = L - 1; lane >= dense_; --lane) {
        lanes[lane - dense_] = join(lanes[lane - dense_], lanes[lane]);
        lanes[lane] = none;
      }
      return load(lanes);
    };
    vec<A> top = hidden, sum[2] = {};
    for (int64_t i = 0; i < total; i += L) top = larger(load(s + i), top);
    top = fold(top, hidden[0], [](A a, A b) HT_LAMBDA { return a > b ? a : b; });
    const vec<A> before = load(softmax_.max), max = larger(before, top), from = max == hidden ? vec<A>{} : max;
    const vec<A> shrunk = exponential(before - from);
    store(lanes, from);
    for (int lane = dense_; lane < L; ++lane) lanes[lane] = lanes[lane - dense_];
    const vec<A> every = load(lanes);
    for (int64_t i = 0; i < total; i += 2 * L) {
      // P = e^(S - m)
      vec<A> w[2] = {load(s + i) - every, i + L < total ? load(s + i + L) - every : hidden};
      exponential(w);
      store(s + i, w[0]), store(s + i + L, w[1]);
      sum[0] += w[0], sum[1] += w[1];
    }
    store(softmax_.max, max);
    store(softmax_.sum,
          load(softmax_.sum) * shrunk + fold(sum[0] + sum[1], A(0), [](A a, A b) HT_LAMBDA { return a + b; }));
    store(scale, shrunk);
    return {s, 1, dense_};
  }

  // The same through the panel's softmax, one row to a lane: masks, windows, slopes, softcap and dropout.
  Broadcast<A> softmax(PanelBlock part, A* scale) {
    for (int64_t j = part.n - 1; j >= 0; --j) store(scores_ + j * L, load_first(scores_ + j * dense_, dense_));
    finish_scores(p_, panel_, part, A(1), scores_, L, bias_, static_cast<A*>(nullptr));
    const A* keep = nullptr;
    if (p_.dropout.p > 0) {
      load_dropout(p_, e_, panel_, b_, part.first, part.n, factor_);
      keep = factor_;
    }
    softmax_block<A>(1, softmax_, part.n, scores_, L, keep, scale);
    return {scores_, 1, L};
  }

  static auto dots_for(int rows) {
    if constexpr (L >= 16)
      if (rows == 8) return &multiply_dots<A, 8, 0, T>;
    if constexpr (L >= 8)
      if (rows == 4) return &multiply_dots<A, 4, 0, T>;
    if constexpr (L >= 4)
      if (rows == 2) return &multiply_dots<A, 2, 0, T>;
    return &multiply_dots<A, 1, 0, T>;
  }

  const AttentionForward& p_;
  AttentionEntry e_;
  int64_t b_, kv_head_;
  Arena arena_;
  Panel<A> panel_;
  int dense_;  // rows, a power of two: scores stand as [key][dense_]
  Running<A> softmax_;
  KeyRange keys_;
  A *query_, *out_, *scores_, *bias_, *factor_;  // Q [kMost][padded width], O [row][padded value_width]
  T* value_scratch_;                             // [kKeyBlock][padded value_width]
};

}  // namespace handtuned::HANDTUNED_ISA
