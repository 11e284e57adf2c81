// Recurrent layers, backward: what is left when all steps are done. With the gradients d of all pre-activations, of all
// rows (times and places), and the rows' inputs x, states before h and what was projected m:
//   grad W_x = d^T x,   grad W_h = d^T h,   grad W_r = (gradient of the projection)^T m,   grad b = sum of d
//   grad x   = d W_x
// Where rows are normalised, the steps have summed up the gradients of biases and peepholes.
// Plan: a piece of work is a tile of one of these. It is summed over blocks of its depth, for which both operands are
// packed: one into panels of four vectors, the other (of a transposed product) into a block of its tile_ columns. Sums
// over rows, which may be many, are made of sums of kSum, those over gates of twice as many: the rounding errors of one
// long chain would show.
#pragma once
#include "rnn_backward.h"

namespace handtuned::HANDTUNED_ISA {

template <class E, class T>
class LayerGradients {
  using A = Accumulate<E>;
  using O = Operand<E>;
  using Layer = LayerBackward<E, T>;
  static constexpr int L = kLanes<A>, W = 4 * L;
  static constexpr int64_t kTile = 128, kColumns = 256, kDepth = 128, kSum = 32;
  static constexpr int64_t kLater = 8;  // rows of d, which lie far apart, are asked for so many rows before
  static_assert(kColumns % W == 0);

 public:
  // input: [rows][width] of the layer below (under dropout), nullptr: the caller's. grad_input likewise.
  LayerGradients(const Layer& layer, const A* input, A* grad_input, const int64_t* before, const int64_t* time,
                 const int64_t* place)
      : y_(layer),
        p_(layer.p),
        input_(input),
        grad_input_(grad_input),
        before_(before),
        time_(time),
        place_(place),
        width_(rnn_input_size(p_, layer.layer)),
        gates_(gates_of(p_.cell)),
        rows_(first_row(p_, p_.steps)),
        tile_(gates_ * tiles(p_.hidden, 2 * kTile) * (columns(width_) + columns(p_.state)) >= 4 * thread_count()
                  ? 2 * kTile
                  : kTile) {}

  void run() {
    const bool wants_input = grad_input_ || p_.grad_input.data;
    const int64_t of_input = wants_input ? tiles(rows_) * columns(width_) : 0;
    const int64_t of_x = gates_ * tiles(p_.hidden) * columns(width_),
                  of_h = gates_ * tiles(p_.hidden) * columns(p_.state),
                  of_r = y_.projects() ? tiles(p_.state) * columns(p_.hidden) : 0,
                  of_bias = p_.bias && !p_.layer_norm ? slots_of(p_) * columns(p_.hidden) : 0,
                  of_peepholes = p_.layer_norm ? 0 : rnn_peepholes(p_) * columns(p_.hidden);
    const int64_t each = of_x + of_h + of_r + of_bias + of_peepholes,
                  of_weights = y_.grads[0] ? p_.directions * each : 0;
    const double numbers = double(gates_ * p_.hidden) * double(width_ + p_.state);
    parallel_pieces(of_input + of_weights, double(rows_) * numbers < (1 << 17), [&](int64_t i) {
      if (i < of_input) return input_tile(i / columns(width_), i % columns(width_));
      i -= of_input;
      const int64_t d = i / each;
      i %= each;
      if (i < of_x) return weight_tile(Source::x, d, i, columns(width_));
      if ((i -= of_x) < of_h) return weight_tile(Source::h, d, i, columns(p_.state));
      if ((i -= of_h) < of_r) return weight_tile(Source::r, d, i, columns(p_.hidden));
      if ((i -= of_r) < of_bias) return bias_tile(d, i / columns(p_.hidden), i % columns(p_.hidden));
      i -= of_bias;
      peephole_tile(d, i / columns(p_.hidden), i % columns(p_.hidden));
    });
  }

 private:
  enum class Source { x, h, r };

  static int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }
  int64_t tiles(int64_t n) const { return tiles(n, tile_); }
  static int64_t columns(int64_t n) { return (n + kColumns - 1) / kColumns; }
  int64_t output_width() const { return p_.directions * p_.state; }
  T* gradient(int64_t d, int64_t which) const { return static_cast<T*>(y_.grads[d][which]); }

  // Two rows of numbers, or one where an element is one, into row r of panels: number k at [k / W][r][k % W], zeros
  // after n. A row that is nullptr is zero.
  static void to_panels(E* panels, int64_t r, const A* first, const A* second, int64_t n) {
    auto copy = [&](auto load_row) HT_LAMBDA {
      for (int64_t k = 0; k < n; k += W) {
        E* to = panels + k * kDepth + r * W;
#pragma GCC unroll 4
        for (int64_t v = 0; v < W; v += L) store_elements(to + v, load_row(first, k + v), load_row(second, k + v));
      }
    };
    if (n % W == 0 && first && (second || kPack<E> == 1))
      copy([](const A* row, int64_t k) HT_LAMBDA { return row ? load(row + k) : vec<A>{}; });
    else
      copy([&](const A* row, int64_t k) HT_LAMBDA { return row && k < n ? load_first(row + k, n - k) : vec<A>{}; });
  }

  // n numbers as the accumulate type: in place where they are of it, else in `room`.
  template <class S>
  HT_INLINE static const A* as_wide(const S* from, int64_t n, A* room) {
    if constexpr (std::is_same_v<S, A>) return from;
    for (int64_t k = 0; from && k < n; k += L) store(room + k, load_first(from + k, n - k));
    return from ? room : nullptr;
  }

  // In the order of the steps' gradients, so that the initial state, which is often larger than all others, comes last:
  // what is added to it is rounded as coarsely as it is. -1 after the last.
  int64_t nth_row(int64_t d, int64_t i) const { return i >= rows_ ? -1 : d == 0 ? rows_ - 1 - i : i; }

  // Numbers [first, first + n) of a row (-1: zeros) of what a weight's gradient is made with.
  const A* row_of_source(Source source, int64_t d, int64_t row, int64_t first, int64_t n, A* room) {
    if (row < 0) return nullptr;
    if (source == Source::x) {
      if (input_) return input_ + row * width_ + first;
      return as_wide(caller_row<const T>(p_, p_.input, time_[row], place_[row]) + first, n, room);
    }
    if (source == Source::h) {
      const int64_t before = before_[d * p_.rows + row];
      const A* h = before >= 0 ? y_.output + before * output_width() + d * p_.state + first
                   : p_.h0     ? as_wide(initial(p_.h0, d, row, p_.state) + first, n, room)
                               : nullptr;
      if (!h || !y_.masks) return h;
      const A* mask = y_.mask(d, place_[row]) + first;
      for (int64_t k = 0; k < n; k += L) store(room + k, load_first(h + k, n - k) * load(mask + k));
      return room;
    }
    const Variant<vec<A>> variant{p_.hard_sigmoid, p_.hard_tanh, false, {}};
    for (int64_t k = 0; k < n; k += L)
      store(room + k, at_step(d, row, first + k, [&](auto cell, const auto& kept, vec<A> c) HT_LAMBDA {
              using C = decltype(cell);
              if (!p_.layer_norm) return C::output(variant, kept, c);
              const Normalised<vec<A>> normalised{variant, bent(d, row, first + k, C::next_cell(kept, c)), {}};
              return C::output(normalised, kept, c);
            }));
    return room;
  }

  // What tanh made of c', after its layer norm, of the units [unit, unit + L).
  vec<A> bent(int64_t d, int64_t row, int64_t unit, vec<A> cell) const {
    const int64_t n = p_.hidden - unit;
    const void* const* gains = y_.gains[d] + 2;
    const vec<A> gain = load_first(static_cast<const T*>(gains[0]) + unit, n);
    const vec<A> bias = p_.bias ? load_first(static_cast<const T*>(gains[1]) + unit, n) : vec<A>{};
    return bend(p_, normed_row(p_, y_.normed[d], row), cell, gain, bias);
  }

  // Row of an initial state.
  const T* initial(const void* states, int64_t d, int64_t row, int64_t width) const {
    const int64_t entry = (y_.layer * p_.directions + d) * p_.batch + caller_of(p_, place_[row]);
    return static_cast<const T*>(states) + entry * width;
  }

  // use(cell, kept, c) with an LSTM's step: what it kept and c before it, of the units [unit, unit + L).
  template <class Use>
  HT_INLINE vec<A> at_step(int64_t d, int64_t row, int64_t unit, Use use) const {
    const int64_t before = before_[d * p_.rows + row], n = p_.hidden - unit;
    const vec<A> c = before >= 0 ? load_first(y_.kept_cell(d, before) + unit, n)
                     : p_.c0     ? load_first(initial(p_.c0, d, row, p_.hidden) + unit, n)
                                 : vec<A>{};
    auto with = [&](auto cell) HT_LAMBDA {
      constexpr int K = decltype(cell)::kKept;
      vec<A> kept[K];
      for (int k = 0; k < K; ++k) kept[k] = load_first(y_.keep[d] + (row * K + k) * p_.hidden + unit, n);
      return use(cell, kept, c);
    };
    return p_.cell == RnnCell::lstm ? with(Lstm<vec<A>>()) : with(CoupledLstm<vec<A>>());
  }

  // C[tile_][kColumns] += B * panels in sums of `sum`; it and `depth` in elements. A block of C stays in L1 for all
  // sums.
  static void add_product(int64_t rows, Broadcast<E> b, const E* panels, int64_t vectors, int64_t depth, int64_t sum,
                          A* c) {
    constexpr int64_t kRows = kBlockRows<4>;
    for (int64_t v = 0; v < vectors; v += 4)
      for (int64_t i = 0; i < rows; i += kRows)
        for (int64_t k = 0; k < depth; k += sum)
          multiply_rows<E, 4, true>(least(kRows, rows - i), {b.data + i * b.row + k * b.step, b.row, b.step},
                                    panels + v * L * kDepth + k * W, W, least(sum, depth - k), c + i * kColumns + v * L,
                                    kColumns);
  }

  // Rows [tile * tile_, ..) of one gate, columns [.. * kColumns, ..) of a weight's gradient.
  void weight_tile(Source source, int64_t d, int64_t i, int64_t column_tiles) {
    const int64_t height = source == Source::r ? p_.state : p_.hidden, per_gate = tiles(height);
    const int64_t gate = i / column_tiles / per_gate, tile = i / column_tiles % per_gate;
    const int64_t width = source == Source::x ? width_ : source == Source::h ? p_.state : p_.hidden;
    const int64_t j = tile * tile_, rows = least(tile_, height - j);
    const int64_t first = i % column_tiles * kColumns, n = least(kColumns, width - first);
    const int64_t slot = source == Source::h ? state_slot(p_, gate) : gate;
    const O* left = source == Source::r ? y_.grad_r[d] + j : y_.gates[d] + slot * y_.pitch() + j;
    const int64_t pitch = source == Source::r ? y_.r_pitch() : y_.slots();

    Arena arena(Arena::bytes_of<A>(tile_ * kColumns) + Arena::bytes_of<E>(kDepth * kColumns) +
                Arena::bytes_of<E>(kDepth * tile_) + 2 * Arena::bytes_of<A>(kColumns));
    A* sums = arena.template take<A>(tile_ * kColumns);
    E* panels = arena.template take<E>(kDepth * kColumns);
    E* block = arena.template take<E>(kDepth * tile_);
    A* room[2] = {arena.template take<A>(kColumns), arena.template take<A>(kColumns)};
    for (int64_t k = 0; k < tile_ * kColumns; k += L) store(sums + k, vec<A>{});
    for (int64_t row = 0; row < rows_; row += kDepth * kPack<E>) {
      const int64_t depth = least(kDepth, whole<E>(rows_ - row) / kPack<E>);
      for (int64_t r = 0; r < depth; ++r) {
        const int64_t one = nth_row(d, row + r * kPack<E>), two = nth_row(d, row + r * kPack<E> + 1);
        const A* first_row = row_of_source(source, d, one, first, n, room[0]);
        to_panels(panels, r, first_row, kPack<E> == 2 ? row_of_source(source, d, two, first, n, room[1]) : nullptr, n);
        const O* later = left + most(0, nth_row(d, row + (r + kLater) * kPack<E>)) * pitch;
        for (int64_t k = 0; k < rows; k += L) {
          __builtin_prefetch(later + k);
          auto load_d = [&](int64_t i) { return i >= 0 ? load_first(left + i * pitch + k, rows - k) : vec<A>{}; };
          store_elements(block + r * tile_ + k, load_d(one), kPack<E> == 2 ? load_d(two) : vec<A>{});
        }
      }
      add_product(rows, {block, 1, tile_}, panels, round_up(n, W) / L, depth, kSum, sums);
    }
    const int64_t which = source == Source::x ? 0 : source == Source::h ? 1 : 2 + 2 * p_.bias;
    T* to = gradient(d, which) + (gate * height + j) * width + first;
    const bool drops = source == Source::h && p_.weight_dropout.p > 0;
    for (int64_t r = 0; r < rows; ++r) {
      A* sum = sums + r * kColumns;
      if (drops) {
        const int64_t drawn = weight_row(p_, y_.layer * p_.directions + d, gate * height + j + r);
        dropout_row<false>(room[0], n, drawn, p_.weight_dropout, first);
      }
      for (int64_t k = 0; k < n; k += L)
        store_first(to + r * width + k, drops ? load(sum + k) * load(room[0] + k) : load(sum + k), n - k);
    }
  }

  // total[k] = sum over all rows of term(row, k), n of them.
  template <class Term>
  HT_INLINE void sum_rows(int64_t n, A* total, Term term) {
    alignas(64) A sum[kColumns];
    for (int64_t k = 0; k < n; k += L) store(total + k, vec<A>{});
    for (int64_t row = 0; row < rows_; row += kSum) {
      for (int64_t k = 0; k < n; k += L) store(sum + k, vec<A>{});
      for (int64_t r = row; r < least(row + kSum, rows_); ++r)
        for (int64_t k = 0; k < n; k += L) store(sum + k, load(sum + k) + term(r, k));
      for (int64_t k = 0; k < n; k += L) store(total + k, load(total + k) + load(sum + k));
    }
  }

  // Sums of kColumns columns of a slot of d over all rows.
  void bias_tile(int64_t d, int64_t slot, int64_t column_tile) {
    const int64_t first = column_tile * kColumns, n = least(kColumns, p_.hidden - first);
    alignas(64) A total[kColumns];
    sum_rows(n, total, [&](int64_t row, int64_t k) HT_LAMBDA {
      const O* from = y_.gates[d] + row * y_.slots() + slot * y_.pitch() + first + k;
      __builtin_prefetch(from + kLater * y_.slots());
      return load_first(from, n - k);
    });
    for (int64_t g = 0; g < gates_; ++g)
      for (int64_t k = 0; k < n; k += L) {
        const int64_t at = g * p_.hidden + first + k;
        if (g == slot) store_first(gradient(d, 2) + at, load(total + k), n - k);
        if (state_slot(p_, g) == slot) store_first(gradient(d, 3) + at, load(total + k), n - k);
      }
  }

  // Of gate `nth` that has peepholes, kColumns of them: sums over all rows of d * c, and of d * c' for the last, o.
  void peephole_tile(int64_t d, int64_t nth, int64_t column_tile) {
    const int64_t first = column_tile * kColumns, n = least(kColumns, p_.hidden - first);
    const bool after = nth + 1 == rnn_peepholes(p_);
    const O* gate = y_.gates[d] + (after ? gates_ - 1 : nth) * y_.pitch() + first;
    alignas(64) A total[kColumns];
    sum_rows(n, total, [&](int64_t row, int64_t k) HT_LAMBDA {
      const vec<A> seen = at_step(d, row, first + k, [&](auto cell, const auto& kept, vec<A> c) HT_LAMBDA {
        return after ? decltype(cell)::next_cell(kept, c) : c;
      });
      return load_first(gate + row * y_.slots() + k, n - k) * seen;
    });
    T* to = gradient(d, rnn_weights_each(p_, p_.bias) - 1) + nth * p_.hidden + first;
    for (int64_t k = 0; k < n; k += L) store_first(to + k, load(total + k), n - k);
  }

  // grad x, rows [tile * tile_, ..), columns [column_tile * kColumns, ..).
  void input_tile(int64_t tile, int64_t column_tile) {
    const int64_t row = tile * tile_, rows = least(tile_, rows_ - row);
    const int64_t first = column_tile * kColumns, n = least(kColumns, width_ - first);
    Arena arena(Arena::bytes_of<A>(tile_ * kColumns) + Arena::bytes_of<E>(kDepth * kColumns) +
                Arena::bytes_of<A>(round_up(width_, kDropoutBlock)) + 2 * Arena::bytes_of<A>(kColumns));
    A* sums = arena.template take<A>(tile_ * kColumns);
    E* panels = arena.template take<E>(kDepth * kColumns);
    A* factor = arena.template take<A>(round_up(width_, kDropoutBlock));
    A* room[2] = {arena.template take<A>(kColumns), arena.template take<A>(kColumns)};
    for (int64_t k = 0; k < tile_ * kColumns; k += L) store(sums + k, vec<A>{});
    for (int64_t d = 0; d < p_.directions; ++d) {
      const int64_t elements = gates_ * y_.pitch() / kPack<E>;
      auto weights_row = [&](int64_t k, A* to) {  // of column k of d, which may be the one that fills up a pair
        const int64_t gate = k / y_.pitch(), unit = k % y_.pitch();
        return unit < p_.hidden ? as_wide(y_.wx[d] + (gate * p_.hidden + unit) * width_ + first, n, to) : nullptr;
      };
      for (int64_t k = 0; k < elements; k += kDepth) {
        const int64_t some = least(kDepth, elements - k);
        for (int64_t r = 0; r < some; ++r) {
          const int64_t one = (k + r) * kPack<E>;
          to_panels(panels, r, weights_row(one, room[0]), kPack<E> == 2 ? weights_row(one + 1, room[1]) : nullptr, n);
        }
        const E* gradient = reinterpret_cast<const E*>(y_.gates[d] + row * y_.slots()) + k;
        add_product(rows, {gradient, y_.slots() / kPack<E>, 1}, panels, round_up(n, W) / L, some, 2 * kSum, sums);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t time = time_[row + r], place = place_[row + r];
      const A* sum = sums + r * kColumns;
      if (grad_input_) {
        const bool drops = p_.dropout.p > 0;
        if (drops)
          dropout_row<false>(factor, width_, draw_row(p_, RnnDraw::input, y_.layer - 1, time, place), p_.dropout);
        A* to = grad_input_ + (row + r) * width_ + first;
        for (int64_t k = 0; k < n; k += L)
          store_first(to + k, drops ? load(sum + k) * load_first(factor + first + k, n - k) : load(sum + k), n - k);
      } else {
        T* to = caller_row<T>(p_, p_.grad_input, time, place) + first;
        for (int64_t k = 0; k < n; k += L) store_first(to + k, load(sum + k), n - k);
      }
    }
  }

  const Layer& y_;
  const RnnBackward& p_;
  const A* input_;
  A* grad_input_;
  const int64_t *before_, *time_, *place_;
  const int64_t width_, gates_, rows_;  // rows_: those that exist
  const int64_t
      tile_;  // rows of a tile: many pack less, as long as all threads have some tiles. Sums do not depend on it
};

}  // namespace handtuned::HANDTUNED_ISA
