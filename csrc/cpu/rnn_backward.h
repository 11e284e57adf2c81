// Recurrent layers, backward: the steps in reverse. The gradients of the weights and of the input are products over all
// steps at once, made afterwards (rnn_gradients.h).
//
// Plan of a slice, which owns panels of hidden units for all steps:
//   for each step from the last, each panel:  dh += gradient of the output;  d = the cell's back()
//                                             d goes to the ring that all slices read, and to its row in memory
//     tell the others, and wait for them
//     each panel:                             dh = what the cell passed on + d * W_h      (own columns of W_h)
// What is exchanged is d, not partial sums of dh: so the order of every sum is that of W_h's rows.
// Where rows are normalised, d are gradients of the rows of W_x x and of W_h h. Slices also meet before them, where
// they know the gradients of what the gates are of, and, of the LSTM, before these, for c'. With a projection a first
// half of the step makes dh of the projection's panels and what they pass on through W_r.
#pragma once
#include "rnn_backward_layer.h"

namespace handtuned::HANDTUNED_ISA {

template <class E, class T>
class BackwardTask {
  using A = Accumulate<E>;
  using O = Operand<E>;
  using Layer = LayerBackward<E, T>;
  using Slice = BackwardPart<E>;
  static constexpr int L = kLanes<A>, W = 4 * L;

 public:
  BackwardTask(const Layer& layer, Team& team)
      : y_(layer),
        p_(layer.p),
        parts_(team, p_.directions, (p_.hidden + W - 1) / W, y_.projects() ? (p_.state + W - 1) / W : 0),
        arena_(bytes()) {
    m_ = arena_.template take<A>(p_.batch * W);
    state_ = arena_.template take<A>(p_.batch * W);
    around_ = arena_.template take<A>(p_.batch * W);
    sums_ = arena_.template take<A>(p_.batch * W);
    row_ = arena_.template take<int64_t>(p_.batch);
    place_ = arena_.template take<int64_t>(p_.batch);
    for (int64_t i = 0; i < p_.batch; ++i) place_[i] = i;
    for (A*& mean : means_) mean = arena_.template take<A>(rnn_row_pitch(p_.batch));
    for (Slice& part : parts_) {
      part.dh = arena_.template take<A>(part.state_panels() * p_.batch * W);
      part.dc = arena_.template take<A>(part.panels() * p_.batch * W);
      part.around = arena_.template take<A>(zones_h() * part.state_panels() * p_.batch * W);
      part.peepholes = arena_.template take<A>(part.panels() * rnn_peepholes(p_) * W);
      if (const int64_t n = cover_h(part)) part.zone_h.data = arena_.template take<A>(n);
      if (const int64_t n = cover_c(part)) part.zone_c.data = arena_.template take<A>(n);
      if (p_.layer_norm) take_normed(part);
      part.wh = arena_.template take<E>(part.state_panels() * wh_elements());
      part.wr = arena_.template take<E>(y_.projects() ? part.panels() * wr_elements() : 0);
    }
  }

  void run() {
    for (Slice& part : parts_) take_weights(part), begin(part);
    for (int64_t s = y_.steps - 1; s >= 0; --s) {
      for (Slice& part : parts_) take_gradient(part, s);
      if (y_.projects()) parts_.meet();
      if (p_.layer_norm) {
        step_normalised(s);
      } else {
        for (Slice& part : parts_) step(part, s);
      }
      parts_.finish_phase();
      if (s == 0 && !p_.grad_h0) break;
      parts_.wait();
      for (Slice& part : parts_) pass_on(part, s);
    }
    for (Slice& part : parts_) end(part);
  }

 private:
  // Of one panel.
  int64_t wh_elements() const { return gates_of(p_.cell) * y_.pitch() / kPack<E> * W; }
  int64_t wr_elements() const { return y_.r_pitch() / kPack<E> * W; }
  bool zones_h() const { return p_.zoneout.p > 0; }
  int64_t cover_h(Slice& part) const {
    return part.zone_h.cover(p_, p_.zoneout, part.state_begin * W, part.state_end * W);
  }
  int64_t cover_c(Slice& part) const { return part.zone_c.cover(p_, p_.cell_zoneout, part.begin * W, part.end * W); }

  size_t bytes() {
    size_t all = 4 * Arena::bytes_of<A>(p_.batch * W) + 2 * Arena::bytes_of<int64_t>(p_.batch) +
                 4 * Arena::bytes_of<A>(rnn_row_pitch(p_.batch));
    for (Slice& part : parts_)
      all += Arena::bytes_of<A>(part.state_panels() * p_.batch * W) + Arena::bytes_of<A>(part.panels() * p_.batch * W) +
             Arena::bytes_of<A>(zones_h() * part.state_panels() * p_.batch * W) +
             Arena::bytes_of<A>(part.panels() * rnn_peepholes(p_) * W) + Arena::bytes_of<A>(cover_h(part)) +
             Arena::bytes_of<A>(cover_c(part)) + normed_bytes(part.panels()) +
             Arena::bytes_of<E>(part.state_panels() * wh_elements()) +
             Arena::bytes_of<E>(y_.projects() ? part.panels() * wr_elements() : 0);
    return all;
  }

  // Calls use(vector, unit, n) for the vectors of a panel that hold units below `end`, n of them.
  template <class Use>
  HT_INLINE void each_vector(int64_t panel, int64_t end, Use use) {
    for (int64_t v = 0; v < 4 && panel * W + v * L < end; ++v) use(v, panel * W + v * L, end - panel * W - v * L);
  }

  // Columns [panel * W, + W) of a matrix [rows][columns].
  void take_columns(const T* matrix, int64_t rows, int64_t columns, int64_t panel, E* to) {
    for (int64_t r = 0; r < rows; r += kPack<E>)
      for (int64_t v = 0; v < 4; ++v, to += L) {
        const int64_t first = panel * W + v * L, n = columns - first;
        auto row = [&](int64_t i) {
          return i < rows && n > 0 ? load_first(matrix + i * columns + first, n) : vec<A>{};
        };
        store_elements(to, row(r), row(r + 1));
      }
  }
  void take_weights(Slice& part) {
    const int64_t d = part.direction, of_gate = y_.pitch() / kPack<E> * W;
    for (int64_t i = 0; i < part.state_panels(); ++i)
      for (int64_t g = 0; g < gates_of(p_.cell); ++g)
        take_columns(y_.wh[d] + g * p_.hidden * p_.state, p_.hidden, p_.state, part.state_begin + i,
                     part.wh + i * wh_elements() + g * of_gate);
    for (int64_t i = part.begin; i < part.end && y_.projects(); ++i)
      take_columns(y_.wr[d], p_.state, p_.hidden, i, part.wr + (i - part.begin) * wr_elements());
    A* to = part.peepholes;
    for (int64_t i = part.begin; i < part.end; ++i)
      for (int64_t k = 0; k < rnn_peepholes(p_); ++k, to += W)
        each_vector(i, p_.hidden, [&](int64_t v, int64_t unit, int64_t n) {
          store(to + v * L, load_first(y_.peepholes[d] + k * p_.hidden + unit, n));
        });
  }

  int64_t state_row(int64_t d, int64_t place) const {  // in h0, hn and their like
    return (y_.layer * p_.directions + d) * p_.batch + caller_of(p_, place);
  }

  // Gradients of the final states, where each row starts.
  void begin(Slice& part) {
    auto copy = [&](const void* from, int64_t width, int64_t panel, A* to) {
      for (int64_t place = 0; place < p_.batch; ++place, to += W) {
        for (int v = 0; v < 4; ++v) store(to + v * L, vec<A>{});
        if (!from) continue;
        const T* row = static_cast<const T*>(from) + state_row(part.direction, place) * width;
        each_vector(panel, width,
                    [&](int64_t v, int64_t unit, int64_t n) { store(to + v * L, load_first(row + unit, n)); });
      }
    };
    for (int64_t i = 0; i < part.state_panels(); ++i)
      copy(p_.grad_hn, p_.state, part.state_begin + i, part.dh + i * p_.batch * W);
    for (int64_t i = part.begin; i < part.end; ++i)
      copy(has_cell_state(p_.cell) ? p_.grad_cn : nullptr, p_.hidden, i, part.dc + (i - part.begin) * p_.batch * W);
  }

  // Under zoneout, of the gradient of a state [n][4 L]: the old state's part goes around, the new one's stays.
  static void part_ways(const Shares<A>& zone, int64_t n, int64_t panel, A* gradient, A* around) {
    for (int64_t j = 0; zone.data && j < n * W; j += L) {
      const vec<A> w = load(zone.of(j / W, panel * W + j % W)), all = load(gradient + j);
      store(around + j, (1 - w) * all), store(gradient + j, w * all);
    }
  }
  static void rejoin(const Shares<A>& zone, int64_t n, const A* around, A* gradient) {
    for (int64_t j = 0; zone.data && j < n * W; j += L) store(gradient + j, load(gradient + j) + load(around + j));
  }

  // dh += gradient of the output at this step.
  void take_gradient(Slice& part, int64_t s) {
    const int64_t n = active_at(p_, s), d = part.direction;
    part.zone_h.draw(p_, RnnDraw::zoneout, p_.zoneout, y_.layer * p_.directions + d, s, n);
    for (int64_t i = 0; i < part.state_panels(); ++i) {
      const int64_t panel = part.state_begin + i;
      A* dh = part.dh + i * p_.batch * W;
      for (int64_t place = 0; place < n; ++place, dh += W) {
        auto add = [&](const auto* row) {
          each_vector(panel, p_.state, [&](int64_t v, int64_t unit, int64_t left) {
            store(dh + v * L, load(dh + v * L) + load_first(row + d * p_.state + unit, left));
          });
        };
        const int64_t time = time_of(p_, d, s, place), row = first_row(p_, time) + place;
        if (y_.grad_output)
          add(y_.grad_output + row * p_.directions * p_.state);
        else if (p_.grad_output.data)
          add(caller_row<const T>(p_, p_.grad_output, time, place));
      }
      dh = part.dh + i * p_.batch * W;
      part_ways(part.zone_h, n, panel, dh, part.around + i * p_.batch * W);
      for (int64_t place = 0; place < n && y_.projects(); ++place, dh += W) {
        const int64_t row = row_of(p_, d, s, place);
        each_vector(panel, p_.state, [&](int64_t v, int64_t unit, int64_t left) {
          O* to[2] = {y_.r_row(d, place) + unit, y_.grad_r[d] + row * y_.r_pitch() + unit};
          for (O* one : to) {
            store_first(one, load(dh + v * L), left);
            if (left < L && left < y_.r_pitch() - unit) one[left] = O{};
          }
        });
      }
    }
  }

  // d of own panels.
  void step(Slice& part, int64_t s) {
    const int64_t n = active_at(p_, s), d = part.direction;
    find_rows(part, s, n);
    for (int64_t i = part.begin; i < part.end; ++i) {
      BackCall<A, O> call = call_of<O>(part, n, i, gradient_of_h(part, n, i, m_));
      call.gates = y_.gates[d], call.to = row_, call.pitch = y_.pitch();
      go_back(part, s, i, y_.back, call);
      for (int64_t place = 0; place < n && y_.scatters(d); ++place) bring_together(d, s, place, i);
    }
  }

  void find_rows(Slice& part, int64_t s, int64_t n) {
    const int64_t d = part.direction;
    for (int64_t place = 0; place < n; ++place) row_[place] = row_of(p_, d, s, place);
    part.zone_c.draw(p_, RnnDraw::cell_zoneout, p_.cell_zoneout, y_.layer * p_.directions + d, s, n);
  }

  // The gradient of what the cells give, of panel i: that of h, or with a projection that * W_r in `room`.
  A* gradient_of_h(Slice& part, int64_t n, int64_t i, A* room) {
    const int64_t own = i - part.begin;
    if (!y_.projects()) return part.dh + own * p_.batch * W;
    const Broadcast<E> gradient{reinterpret_cast<const E*>(y_.r_row(part.direction, 0)), y_.r_pitch() / kPack<E>, 1};
    multiply_panel(n, gradient, part.wr + own * wr_elements(), 4, y_.r_pitch() / kPack<E>, room, kZeros<A>, 0);
    return room;
  }

  // But for where d goes.
  template <class To>
  BackCall<A, To> call_of(const Slice& part, int64_t n, int64_t i, A* dh) const {
    // What a step of the simple cells left is its output, unless zoneout parts the two.
    const bool in_output = rnn_kept(p_) == 0;
    const A* keep = in_output ? y_.output + part.direction * p_.state : y_.keep[part.direction];
    const int64_t keep_row = in_output ? p_.directions * p_.state : rnn_kept(p_) * p_.hidden, own = i - part.begin;
    return {p_,
            n,
            keep,
            keep_row,
            row_,
            part.peepholes + own * rnn_peepholes(p_) * W,
            nullptr,
            nullptr,
            state_,
            dh,
            part.dc + own * p_.batch * W,
            nullptr,
            nullptr,
            0,
            i * W};
  }

  template <class To>
  void go_back(Slice& part, int64_t s, int64_t i, BackLoop<A, To> back, const BackCall<A, To>& call) {
    const int64_t n = call.rows, d = part.direction;
    for (int64_t place = 0; place < n; ++place) take_state(d, s, place, i);
    for (int64_t place = 0; place < n && p_.grad_cells.data && y_.layer + 1 == p_.layers; ++place) {
      const T* row = caller_row<const T>(p_, p_.grad_cells, time_of(p_, d, s, place), place) + d * p_.hidden;
      A* to = call.dc + place * W;
      each_vector(i, p_.hidden, [&](int64_t v, int64_t unit, int64_t left) {
        store(to + v * L, load(to + v * L) + load_first(row + unit, left));
      });
    }
    part_ways(part.zone_c, n, i, call.dc, around_);
    back(call);
    rejoin(part.zone_c, n, around_, call.dc);
    if (!y_.projects()) rejoin(part.zone_h, n, part.around + (i - part.begin) * p_.batch * W, call.dh);
  }

  // Where rows are normalised: rnn_backward_normalised.h.
  int64_t normed_bytes(int64_t own) const;
  void take_normed(Slice& part);
  void give_sums(const Slice& part);
  void step_normalised(int64_t s);
  void begin_normalised(Slice& part, int64_t s, int64_t n);
  void back_normalised(Slice& part, int64_t s, int64_t n);
  void give_normalised(Slice& part, int64_t s, int64_t n);
  A* room_of(Slice& part, int64_t i) const { return part.m + (i - part.begin) * p_.batch * W; }

  // Own panel of a row of d into the ring.
  void bring_together(int64_t d, int64_t s, int64_t place, int64_t panel) {
    const int64_t n = least(W, y_.pitch() - panel * W);
    for (int64_t slot = 0; slot < slots_of(p_); ++slot) {
      const int64_t at = slot * y_.pitch() + panel * W;
      __builtin_memcpy(y_.ring_row(d, s, place) + at, y_.gates[d] + row_[place] * y_.slots() + at, n * sizeof(O));
    }
  }

  // The state that the cell's back() asks for.
  void take_state(int64_t d, int64_t s, int64_t place, int64_t panel) {
    A* to = state_ + place * W;
    auto take = [&](const auto* row) {
      each_vector(panel, p_.hidden, [&](int64_t v, int64_t unit, int64_t n) {
        store(to + v * L, row ? load_first(row + unit, n) : vec<A>{});
      });
    };
    const bool cell = has_cell_state(p_.cell);
    if (!cell && p_.cell != RnnCell::gru) return;
    if (s == 0) {
      const void* first = cell ? p_.c0 : p_.h0;
      return take(first ? static_cast<const T*>(first) + state_row(d, place) * p_.hidden : nullptr);
    }
    const int64_t row = row_of(p_, d, s - 1, place);
    take(cell ? y_.kept_cell(d, row) : y_.output + (row * p_.directions + d) * p_.state);
  }

  // dh of own panels += d * W_h, under the mask of the states; with a projection nothing was left in dh.
  void pass_on(Slice& part, int64_t s) {
    const int64_t n = active_at(p_, s), d = part.direction, gates = gates_of(p_.cell), panels = part.state_panels();
    for (int64_t nth = 0; nth < panels; ++nth) {
      const int64_t i = s & 1 ? panels - 1 - nth : nth;  // back and forth: what was read last is still in the cache
      A *dh = part.dh + i * p_.batch * W, *sums = y_.masks ? sums_ : dh;
      const bool anew = y_.projects() || y_.masks;
      for (int64_t g = 0; g < gates; ++g) {
        const O* from = y_.d_rows(d, s) + state_slot(p_, g) * y_.pitch();
        const Broadcast<E> gradient{reinterpret_cast<const E*>(from), y_.slots() / kPack<E>, 1};
        const int64_t depth = y_.pitch() / kPack<E>;
        multiply_panel(n, gradient, part.wh + i * wh_elements() + g * depth * W, 4, depth, sums,
                       anew && g == 0 ? kZeros<A> : sums, anew && g == 0 ? 0 : W);
      }
      for (int64_t place = 0; place < n && y_.masks; ++place)
        each_vector(part.state_begin + i, p_.state, [&](int64_t v, int64_t unit, int64_t) {
          const int64_t at = place * W + v * L;
          const vec<A> through = load(sums + at) * load(y_.mask(d, place) + unit);
          store(dh + at, y_.projects() ? through : load(dh + at) + through);
        });
      if (y_.projects()) rejoin(part.zone_h, n, part.around + i * p_.batch * W, dh);
    }
  }

  // Gradients of the initial states.
  void end(const Slice& part) {
    if (p_.layer_norm && y_.grads[part.direction]) give_sums(part);
    auto give = [&](void* to, int64_t width, int64_t panel, const A* from) {
      for (int64_t place = 0; place < p_.batch && to; ++place, from += W) {
        T* row = static_cast<T*>(to) + state_row(part.direction, place) * width;
        each_vector(panel, width,
                    [&](int64_t v, int64_t unit, int64_t n) { store_first(row + unit, load(from + v * L), n); });
      }
    };
    for (int64_t i = 0; i < part.state_panels(); ++i)
      give(p_.grad_h0, p_.state, part.state_begin + i, part.dh + i * p_.batch * W);
    for (int64_t i = part.begin; i < part.end; ++i)
      give(p_.grad_c0, p_.hidden, i, part.dc + (i - part.begin) * p_.batch * W);
  }

  const Layer& y_;
  const RnnBackward& p_;
  Parts<Slice> parts_;
  Arena arena_;
  A *m_, *state_, *around_, *sums_;
  A* means_[4];            // of rows that are normalised
  int64_t *row_, *place_;  // place_: 0, 1, ..
};

}  // namespace handtuned::HANDTUNED_ISA
