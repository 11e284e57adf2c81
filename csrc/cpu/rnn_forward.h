// Recurrent layers, forward. One parallel region a layer; both directions side by side.
//
// Plan of a slice, which owns panels of hidden units for all steps:
//   for each stretch of steps:    X = rows of input * W_x, own panels, ahead of the recurrence     (scratch in L2)
//     for each step, each panel:  S = h * W_h;  gates of X and S;  h, c of the own units           (scratch in L1)
//                                 h goes to the ring that all slices read in the next step, and to its outputs
//     tell the others, and wait for them before the next step
// With a projection the ring carries what is to be projected, and a second half of the step does h = that * W_r.
// The ring has two places: whoever writes one has seen that everybody is done with reading it.
// Panels are taken from the first to the last and back in turns, from call to call where a sequence is of one step: of
// weights that are larger than a cache, what was read last is still in it. A single step makes X panel by panel.
// Where rows are normalised, slices also meet once all X and S are there, and once all c are.
#pragma once
#include "rnn_forward_layer.h"

namespace handtuned::HANDTUNED_ISA {

// One task's share of a layer.
template <class E, class T>
class ForwardTask {
  using A = Accumulate<E>;
  using O = Operand<E>;
  using W = Weight<E, T>;
  using Layer = LayerForward<E, T>;
  using Slice = ForwardPart<A>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kSumRows = 16;

 public:
  ForwardTask(const Layer& layer, Team& team)
      : y_(layer),
        p_(layer.p),
        parts_(team, p_.directions, panels_of<A>(y_.wh), y_.projects() ? panels_of<A>(y_.wr) : 0),
        columns_(y_.wh.vectors() * L),
        arena_(bytes()) {
    rows_ = arena_.template take<O>(stretch_rows() * round_up(y_.wx.in, 2));
    sums_ = arena_.template take<A>(most(p_.batch, kSumRows) * 4 * L);
    factor_ = arena_.template take<A>(round_up(y_.wx.in, kDropoutBlock));
    h0_ = arena_.template take<O>(h0_numbers());
    row_ = arena_.template take<int64_t>(p_.batch);
    for (Slice& part : parts_) {
      part.h = arena_.template take<A>(part.panels() * p_.batch * units());
      part.c = arena_.template take<A>(part.panels() * p_.batch * units());
      part.r = arena_.template take<A>((part.r_end - part.r_begin) * p_.batch * units_of<A>(y_.wr));
      part.x = arena_.template take<A>(part.panels() * stretch_rows() * columns_);
      part.s = arena_.template take<A>(p_.layer_norm * part.panels() * p_.batch * columns_);
      for (int which = 0; which < 3; ++which) {
        part.mean[which] = arena_.template take<A>(moments(which));
        part.rstd[which] = arena_.template take<A>(moments(which));
      }
      if (const int64_t n = cover_h(part)) part.zone_h.data = arena_.template take<A>(n);
      if (const int64_t n = cover_c(part)) part.zone_c.data = arena_.template take<A>(n);
    }
  }

  void run() {
    for (Slice& part : parts_) begin(part);
    for (int64_t s = 0; s < y_.steps; ++s) {
      if (y_.steps > 1 && s % y_.stretch == 0)
        for (Slice& part : parts_) project_input(part, s, least(s + y_.stretch, y_.steps));
      if (s > 0) parts_.wait();
      if (p_.layer_norm) {
        step_normalised(s);
      } else {
        for (Slice& part : parts_) step(part, s);
      }
      if (y_.projects()) {
        parts_.meet();
        for (Slice& part : parts_) project_state(part, s);
      }
      parts_.finish_phase();
    }
  }

 private:
  int64_t units() const { return units_of<A>(y_.wh); }
  int64_t stretch_rows() const { return y_.stretch * p_.batch; }
  int64_t moments(int which) const { return p_.layer_norm ? rnn_row_pitch(which ? p_.batch : stretch_rows()) : 0; }
  int64_t cover_h(Slice& part) const {
    const int64_t units = units_of<A>(state_shape());
    return part.zone_h.cover(p_, p_.zoneout, part.state_begin * units, part.state_end * units);
  }
  int64_t cover_c(Slice& part) const {
    return part.zone_c.cover(p_, p_.cell_zoneout, part.begin * units(), part.end * units());
  }
  const PanelShape& state_shape() const { return y_.projects() ? y_.wr : y_.wh; }
  int64_t h0_numbers() const { return p_.h0 ? p_.directions * p_.batch * round_up(p_.state, 2) : 0; }

  size_t bytes() {
    size_t all = Arena::bytes_of<O>(stretch_rows() * round_up(y_.wx.in, 2)) +
                 Arena::bytes_of<A>(most(p_.batch, kSumRows) * 4 * L) +
                 Arena::bytes_of<A>(round_up(y_.wx.in, kDropoutBlock)) + Arena::bytes_of<O>(h0_numbers()) +
                 Arena::bytes_of<int64_t>(p_.batch);
    for (Slice& part : parts_)
      all += 2 * Arena::bytes_of<A>(part.panels() * p_.batch * units()) +
             Arena::bytes_of<A>((part.r_end - part.r_begin) * p_.batch * units_of<A>(y_.wr)) +
             Arena::bytes_of<A>(part.panels() * stretch_rows() * columns_) + Arena::bytes_of<A>(cover_h(part)) +
             Arena::bytes_of<A>(cover_c(part)) +
             Arena::bytes_of<A>(p_.layer_norm * part.panels() * p_.batch * columns_) +
             2 * Arena::bytes_of<A>(moments(0)) + 4 * Arena::bytes_of<A>(moments(1));
    return all;
  }

  // Initial states, of h all (as operands: nobody waits for others before the first step); final ones of rows without a
  // step. What fills up a pair of operands is 0.
  void begin(Slice& part) {
    const int64_t d = part.direction, cell = y_.layer * p_.directions + d;
    for (int64_t place = 0; place < p_.batch; ++place) {
      const int64_t at = cell * p_.batch + caller_of(p_, place);
      const bool over = length_of(p_, place) == 0;
      auto copy = [&](const void* from, void* final, A* to, int64_t unit, int64_t width, int64_t end) {
        for (int64_t u = unit; u < unit + width; u += L, to += L) {
          const int64_t n = end - u;
          const vec<A> v = from && n > 0 ? load_first(static_cast<const T*>(from) + at * end + u, n) : vec<A>{};
          store(to, v);
          if (over && n > 0) store_first(static_cast<T*>(final) + at * end + u, v, n);
        }
      };
      const int64_t width = units_of<A>(state_shape());
      A* h = (y_.projects() ? part.r : part.h) + place * width;
      for (int64_t i = part.state_begin; i < part.state_end; ++i, h += p_.batch * width) {
        copy(p_.h0, p_.hn, h, i * width, width, p_.state);
      }
      A* c = part.c + place * units();
      for (int64_t i = part.begin; i < part.end && has_cell_state(p_.cell); ++i, c += p_.batch * units())
        copy(p_.c0, p_.cn, c, i * units(), units(), p_.hidden);
      O* h0 = h0_ + (d * p_.batch + place) * round_up(p_.state, 2);
      if (p_.h0) copy_row<O, T>(h0, static_cast<const T*>(p_.h0) + at * p_.state, p_.state, y_.mask(d, place));
      if (p_.h0 && p_.state & 1) h0[p_.state] = O{};
      for (int64_t s = 0; s < 2 && p_.state & 1; ++s) y_.h_row(d, s, place)[p_.state] = O{};
      if (y_.projects() && p_.hidden & 1) y_.m_row(d, place)[p_.hidden] = O{};
    }
  }

  // X = W_x x + b_x for the steps [from, to), own panels.
  void project_input(Slice& part, int64_t from, int64_t to) {
    const int64_t rows = first_row(p_, to) - first_row(p_, from);
    const Broadcast<E> x = take_input(part.direction, from, to);
    for (int64_t i = 0; i < part.panels(); ++i) multiply_input(part, i, rows, x);
  }
  void multiply_input(Slice& part, int64_t own, int64_t rows, Broadcast<E> x) {
    A* sums = part.x + own * stretch_rows() * columns_;
    const A* bias = weights(part.direction).x_bias + (part.begin + own) * columns_;
    multiply(rows, x, weights(part.direction).x, y_.wx, part.begin + own, sums, bias);
  }

  // The rows of input of these steps, as operands: where they lie, or copies.
  Broadcast<E> take_input(int64_t d, int64_t from, int64_t to) {
    const int64_t width = y_.wx.in, pitch = round_up(width, 2);
    if (d == 0 && width % kPack<E> == 0) {
      auto in_place = [&](const O* first, int64_t row) {
        return Broadcast<E>{reinterpret_cast<const E*>(first), row / kPack<E>, 1};
      };
      const RnnTensor& x = p_.input;
      if constexpr (std::is_same_v<O, A>)
        if (y_.input && p_.dropout.p == 0) return in_place(y_.input + first_row(p_, from) * width, width);
      if constexpr (std::is_same_v<O, T>)
        if (!y_.input && x.batch % kPack<E> == 0 && (p_.packed || (!p_.order && x.step == p_.batch * x.batch)))
          return in_place(caller_row<const T>(p_, x, from, 0), x.batch);
    }
    O* out = rows_;
    for (int64_t s = from; s < to; ++s) {
      for (int64_t place = 0; place < active_at(p_, s); ++place, out += pitch) {
        const int64_t time = time_of(p_, d, s, place);
        if (width & 1) out[width] = O{};
        if (!y_.input) {
          copy_row<O, T>(out, caller_row<const T>(p_, p_.input, time, place), width, nullptr);
          continue;
        }
        if (p_.dropout.p > 0)
          dropout_row<false>(factor_, width, draw_row(p_, RnnDraw::input, y_.layer - 1, time, place), p_.dropout);
        copy_row<O, A>(out, y_.input + (first_row(p_, time) + place) * width, width,
                       p_.dropout.p > 0 ? factor_ : nullptr);
      }
    }
    return {reinterpret_cast<const E*>(rows_), pitch / kPack<E>, 1};
  }

  // The gates of own panels at a step. Of few rows, several panels' together: they wait for results less that way.
  void step(Slice& part, int64_t s) {
    const int64_t n = active_at(p_, s), own = part.panels(), together = most(1, kSumRows / n);
    const int64_t groups = (own + together - 1) / together;
    const bool back = (s + y_.turned) & 1;
    find_rows(part.direction, s, n);
    draw_zoneout(part, s, n);
    const Broadcast<E> x = y_.steps == 1 ? take_input(part.direction, 0, 1) : Broadcast<E>{};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = (back ? groups - 1 - g : g) * together;
      step(part, s, n, first, least(together, own - first), back, x);
    }
    give(part, s, n);
  }
  // Of `panels` panels, the first one `own` panels after the part's first; their products from the last to the first if
  // `back`. x: operands of a single step's input.
  void step(Slice& part, int64_t s, int64_t n, int64_t own, int64_t panels, bool back, Broadcast<E> x) {
    const int64_t d = part.direction, state = p_.batch * units(), unit = (part.begin + own) * units();
    const int64_t before = first_row(p_, s) - first_row(p_, s - s % y_.stretch);
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t i = back ? panels - 1 - j : j;
      multiply_state(part, s, n, own + i, sums_ + i * n * columns_, x);
    }
    const int64_t x_panel = stretch_rows() * columns_;
    y_.gates({p_, panels, n, part.x + own * x_panel + before * columns_, sums_, x_panel, n * columns_,
              part.h + own * state, part.c + own * state, state, y_.keep[d], row_, weights(d).peepholes,
              y_.projects() ? Shares<A>{} : part.zone_h, part.zone_c, unit});
  }
  // S = h * W_h + b_h of one panel; a single step's X too, from its operands.
  void multiply_state(Slice& part, int64_t s, int64_t n, int64_t own, A* sums, Broadcast<E> x) {
    const int64_t d = part.direction, panel = part.begin + own;
    const A* bias = weights(d).h_bias + panel * columns_;
    if (y_.steps == 1) multiply_input(part, own, n, x);
    if (s > 0 || p_.h0)
      multiply(n, state_operand(d, s - 1), weights(d).h, y_.wh, panel, sums, bias);
    else
      for (int64_t r = 0; r < n; ++r) fill_row(sums + r * columns_, bias, columns_);
  }
  // h and c of a step to all who read them.
  void give(const Slice& part, int64_t s, int64_t n) {
    if (y_.projects()) {
      for (int64_t r = 0; r < n; ++r)
        put(y_.m_row(part.direction, r), part.h + r * units(), y_.wh, part.begin, part.end);
    } else {
      give_state(part, s, n);
    }
    if (has_cell_state(p_.cell)) give_cell(part, s, n);
  }

  SplitRow gate_rows() const { return {y_.wh.gates, p_.hidden, units()}; }
  SplitRow cells() const { return {1, p_.hidden, units()}; }
  // One of those who normalise a row leaves its moments for the backward.
  A* moments_to(const Part& part) const {
    return part.begin == 0 && part.end > 0 ? y_.normed[part.direction] : nullptr;
  }

  // A step of all parts where rows are normalised: rnn_forward_normalised.h.
  void step_normalised(int64_t s);
  void multiply_and_leave(Slice& part, int64_t s, int64_t n);
  void normalise_and_step(Slice& part, int64_t s, int64_t n);
  void join(Slice& part, int which, const SplitRow& m, int64_t rows);
  void bend(Slice& part, int64_t n);

  // h = W_r m, own panels.
  void project_state(Slice& part, int64_t s) {
    const int64_t n = active_at(p_, s), d = part.direction, width = units_of<A>(y_.wr);
    const Broadcast<E> m{reinterpret_cast<const E*>(y_.m_row(d, 0)), round_up(p_.hidden, 2) / kPack<E>, 1};
    find_rows(d, s, n);
    A* h = part.r;
    for (int64_t i = part.r_begin; i < part.r_end; ++i, h += p_.batch * width) {
      multiply(n, m, weights(d).r, y_.wr, i, sums_, kZeros<A>);
      for (int64_t j = 0; j < n * width; j += L)
        store(h + j, zone(part.zone_h.of(j / width, i * width + j % width), load(sums_ + j), load(h + j)));
    }
    give_state(part, s, n);
  }

  void draw_zoneout(Slice& part, int64_t s, int64_t n) {
    const int64_t cell = y_.layer * p_.directions + part.direction;
    part.zone_h.draw(p_, RnnDraw::zoneout, p_.zoneout, cell, s, n);
    part.zone_c.draw(p_, RnnDraw::cell_zoneout, p_.cell_zoneout, cell, s, n);
  }

  const DirectionWeights<A, T>& weights(int64_t d) const { return y_.weights[d]; }

  // sums[rows] = base + B * a panel
  void multiply(int64_t rows, Broadcast<E> b, const T* matrix, const PanelShape& m, int64_t panel, A* sums,
                const A* base) {
    const W* weights = reinterpret_cast<const W*>(matrix + panel * panel_numbers<A>(m));
    multiply_panel(rows, b, weights, m.vectors(), (m.in + kPack<E> - 1) / kPack<E>, sums, base, 0);
  }

  Broadcast<E> state_operand(int64_t d, int64_t step) const {
    const int64_t pitch = round_up(p_.state, 2);
    const O* rows = step < 0 ? h0_ + d * p_.batch * pitch : y_.h_row(d, step, 0);
    return {reinterpret_cast<const E*>(rows), pitch / kPack<E>, 1};
  }

  void find_rows(int64_t d, int64_t s, int64_t n) {
    for (int64_t place = 0; place < n; ++place) row_[place] = row_of(p_, d, s, place);
  }

  // Panels [begin, end) of a place's state, [panels][batch][units], to their units of a row, times those of `factor`
  // unless that is nullptr.
  template <class To>
  HT_INLINE void put(To* to, const A* from, const PanelShape& m, int64_t begin, int64_t end,
                     const A* factor = nullptr) {
    const int64_t width = units_of<A>(m);
    for (int64_t i = begin; i < end; ++i, from += p_.batch * width)
      for (int64_t k = 0, u = i * width; k < width && u < m.out; k += L, u += L)
        store_first(to + u, factor ? load(from + k) * load(factor + u) : load(from + k), m.out - u);
  }

  // h of a step to all who read it.
  void give_state(const Slice& part, int64_t s, int64_t n) {
    const int64_t d = part.direction, cell = y_.layer * p_.directions + d;
    const A* h = y_.projects() ? part.r : part.h;
    for (int64_t place = 0; place < n; ++place, h += units_of<A>(state_shape())) {
      auto give = [&](auto* to, const A* factor) {
        put(to, h, state_shape(), part.state_begin, part.state_end, factor);
      };
      give(y_.h_row(d, s, place), y_.mask(d, place));
      const int64_t time = time_of(p_, d, s, place);
      if (y_.output) give(y_.output + (row_[place] * p_.directions + d) * p_.state, nullptr);
      if (y_.last && p_.output.data) give(caller_row<T>(p_, p_.output, time, place) + d * p_.state, nullptr);
      if (s + 1 == length_of(p_, place))
        give(static_cast<T*>(p_.hn) + (cell * p_.batch + caller_of(p_, place)) * p_.state, nullptr);
    }
  }
  void give_cell(const Slice& part, int64_t s, int64_t n) {
    const int64_t d = part.direction, cell = y_.layer * p_.directions + d;
    const A* c = part.c;
    for (int64_t place = 0; place < n; ++place, c += units()) {
      auto give = [&](T* to) { put(to, c, y_.wh, part.begin, part.end); };
      if (y_.last && p_.cells.data) give(caller_row<T>(p_, p_.cells, time_of(p_, d, s, place), place) + d * p_.hidden);
      if (s + 1 == length_of(p_, place))
        give(static_cast<T*>(p_.cn) + (cell * p_.batch + caller_of(p_, place)) * p_.hidden);
    }
  }

  const Layer& y_;
  const RnnForward& p_;
  Parts<Slice> parts_;
  const int64_t columns_;  // of a panel
  Arena arena_;
  O *rows_, *h0_;  // inputs of a stretch, and initial states [direction][batch][state], as operands
  A *sums_, *factor_;
  int64_t* row_;  // of each place at the present step
};

// ---- the stack ----------------------------------------------------------------------------------------------------

template <class E, class T>
void rnn_forward_in(const RnnForward& p) {
  using A = Accumulate<E>;
  using O = Operand<E>;
  Flag* flags = static_cast<Flag*>(p.scratch);
  O* ring = reinterpret_cast<O*>(flags + kMostSlices);
  O* m_ring = ring + 2 * p.directions * p.batch * round_up(p.state, 2);
  A* between[2];
  between[0] = reinterpret_cast<A*>(static_cast<char*>(p.scratch) + rnn_ring_bytes(p));
  between[1] = between[0] + p.rows * p.directions * p.state;
  A* masks = reinterpret_cast<A*>(reinterpret_cast<char*>(between[0]) + rnn_between_bytes(p, p.saved));
  A* left = reinterpret_cast<A*>(reinterpret_cast<char*>(masks) + round_up(rnn_mask_bytes(p), 64));

  const char* packed = static_cast<const char*>(p.packed_weights) + kRnnHeaderBytes;
  const int64_t gates = gates_of(p.cell);
  static thread_local bool turned;
  turned ^= p.steps == 1;
  LayerForward<E, T> y{{p, 0, p.longest},
                       nullptr,
                       nullptr,
                       false,
                       {},
                       {},
                       gate_loop_of<A>(p),
                       {},
                       {},
                       {},
                       {},
                       1,
                       turned,
                       ring,
                       m_ring,
                       left};
  y.stretch = rnn_stretch(p, p.steps);
  for (y.layer = 0; y.layer < p.layers; ++y.layer) {
    const int64_t width = rnn_input_size(p, y.layer);
    y.last = y.layer + 1 == p.layers;
    y.wx = {gates, p.hidden, width}, y.wh = {gates, p.hidden, p.state}, y.wr = {1, p.state, p.hidden};
    for (int64_t d = 0; d < p.directions; ++d) {
      auto next = [&](int64_t bytes) { return packed += bytes, packed - bytes; };
      y.weights[d].x = reinterpret_cast<const T*>(next(rnn_matrix_bytes(p.dtype, gates, p.hidden, width)));
      y.weights[d].h = reinterpret_cast<const T*>(next(rnn_matrix_bytes(p.dtype, gates, p.hidden, p.state)));
      if (y.projects())
        y.weights[d].r = reinterpret_cast<const T*>(next(rnn_matrix_bytes(p.dtype, 1, p.state, p.hidden)));
      y.weights[d].x_bias = reinterpret_cast<const A*>(next(rnn_bias_bytes(p)));
      y.weights[d].peepholes = reinterpret_cast<const A*>(next(rnn_peephole_bytes(p)));
      y.weights[d].h_bias = y.weights[d].x_bias + rnn_bias_numbers(p);
      y.weights[d].gains = Gains<A>::of(p, reinterpret_cast<const A*>(next(rnn_norm_bytes(p))));
    }
    y.input = y.output;
    y.output = y.last ? nullptr : between[y.layer & 1];
    if (p.saved) {
      const SavedLayer<A> saved = saved_layer<A>(p, p.saved, y.layer);
      y.output = saved.output;
      for (int d = 0; d < 2; ++d) {
        y.keep[d] = rnn_kept(p) ? saved.keep[d] : nullptr;
        y.normed[d] = p.layer_norm ? saved.normed[d] : nullptr;
      }
    }
    y.masks = draw_state_masks(p, y.layer, masks);
    const int slices = slices_for(p, width, p.directions * panels_of<A>(y.wh), thread_count());
    run_slices(slices, y.steps > 1 || y.projects() || p.layer_norm, flags,
               [&](Team& team) { ForwardTask<E, T>(y, team).run(); });
  }
  clear_padding<T>(p, p.output, p.directions * p.state);
  clear_padding<T>(p, p.cells, p.directions * p.hidden);
}

}  // namespace handtuned::HANDTUNED_ISA
