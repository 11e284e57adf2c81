// Recurrent layers: layer normalisation (Ba et al. 2016) of rows that slices hold a part of each.
//   LN(v) = (v - mean) * rstd,   rstd = 1 / sqrt(var + eps)
// Forward. A panel leaves of each row the mean of its own numbers and the sum of their squares about it. When all have
// met, every slice puts the panels' together in their order (Chan et al. 1983), n numbers from each:
//   mean = sum_p n_p mean_p / n,   n var = sum_p squares_p + n_p (mean_p - mean)^2
// Backward, with the gradient g of y = LN(v):
//   gradient of v = rstd * (g - mean(g) - y * mean(g * y))
// of which panels leave the sums of g and of g * y. So all bits follow from the panels, not from who holds them.
#pragma once
#include "rnn_step.h"

namespace handtuned::HANDTUNED_ISA {

// ---- what panels leave for each other -------------------------------------------------------------------------------

// Of one direction: [panels][numbers][pitch of rows].
template <class A>
struct Left {
  A* data;
  int64_t panels, numbers, pitch;

  A* of(int64_t panel, int64_t number) const { return data + (panel * numbers + number) * pitch; }
  int64_t size() const { return panels * numbers * pitch; }
};

// Ones in the lanes below n.
template <class A>
HT_INLINE vec<A> lanes_below(int64_t n) {
  vec<A> ones{};
  for (int i = 0; i < kLanes<A>; ++i) ones[i] = A(i < n);
  return ones;
}

// Rows of all gates of all units, in panels of some units.
struct SplitRow {
  int64_t gates, units, panel_units;
  int64_t numbers() const { return gates * units; }
  int64_t numbers_of(int64_t panel) const { return gates * least(panel_units, units - panel * panel_units); }
};

// Of v [rows][vectors][L], rows `row` apart, numbers of units past the last being 0: each row's mean and squares.
template <class A>
void leave_moments(const Left<A>& left, const SplitRow& m, int64_t panel, const A* v, int64_t rows, int64_t row) {
  constexpr int L = kLanes<A>;
  const int64_t V = m.gates * m.panel_units / L, n = m.numbers_of(panel);
  vec<A> there[4];
  for (int64_t j = 0, unit = panel * m.panel_units; j < V; unit += L)
    for (int64_t g = 0; g < m.gates; ++g, ++j)
      there[j] = m.units - unit >= L ? vec<A>{} + 1 : lanes_below<A>(m.units - unit);
  A *means = left.of(panel, 0), *squares = left.of(panel, 1);
  for (int64_t r = 0; r < rows; ++r, v += row) {
    vec<A> sum{}, square{};
    for (int64_t j = 0; j < V; ++j) sum += load(v + j * L);
    const A mean = sum_lanes(sum) / A(n);
    for (int64_t j = 0; j < V; ++j) {
      const vec<A> d = (load(v + j * L) - mean) * there[j];
      square += d * d;
    }
    means[r] = mean, squares[r] = sum_lanes(square);
  }
}

// mean and rstd [rows, rounded up to vectors] of all numbers.
template <class A>
void join_moments(const Left<A>& left, const SplitRow& m, int64_t rows, A* mean, A* rstd) {
  constexpr int L = kLanes<A>;
  const A n = A(m.numbers());
  for (int64_t r = 0; r < rows; r += L) {
    vec<A> all{}, squares{};
    for (int64_t i = 0; i < left.panels; ++i) all += A(m.numbers_of(i)) * load(left.of(i, 0) + r);
    all /= n;
    for (int64_t i = 0; i < left.panels; ++i) {
      const vec<A> apart = load(left.of(i, 0) + r) - all;
      squares += load(left.of(i, 1) + r) + A(m.numbers_of(i)) * (apart * apart);
    }
    store(mean + r, all), store(rstd + r, squares / n);
  }
  for (int64_t r = 0; r < rows; ++r) rstd[r] = 1 / square_root(rstd[r] + A(kRnnEpsilon));
}

// means [rows, rounded up to vectors] of a row of n numbers, from the panels' sums.
template <class A>
void join_sums(const Left<A>& left, int64_t number, int64_t n, int64_t rows, A* means) {
  for (int64_t r = 0; r < rows; r += kLanes<A>) {
    vec<A> sum{};
    for (int64_t i = 0; i < left.panels; ++i) sum += load(left.of(i, number) + r);
    store(means + r, sum / A(n));
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// What a direction's rows become, from the packed weights: gains and biases of the rows of x and of h,
// [panels][vectors] [L] each; of c' [units].
template <class A>
struct Gains {
  const A *gain[2], *bias[2], *c_gain, *c_bias;

  static Gains of(const Rnn& p, const A* packed) {
    const int64_t columns = rnn_bias_numbers(p), units = has_cell_state(p.cell) * rnn_peephole_pitch(p);
    const A *c = packed + 2 * columns, *bias = c + 2 * units;
    return {{packed, packed + columns}, {bias, bias + columns}, c, c + units};
  }
};

// Of rows [which: of x, of h] of one panel, in place:  v = gain * LN(v) + bias.  LN(v) stays in `normed`, of row r the
// row[r]th, [2][gates][hidden], unless it is nullptr.
template <class A>
void normalise_rows(const Rnn& p, const PanelShape& m, const Gains<A>& gains, int which, int64_t panel, A* v,
                    int64_t rows, const A* mean, const A* rstd, A* normed, const int64_t* row) {
  constexpr int L = kLanes<A>;
  const int64_t numbers = m.vectors() * L, first = panel * units_of<A>(m);
  for (int64_t r = 0; r < rows; ++r) {
    const A *gain = gains.gain[which] + panel * numbers, *bias = gains.bias[which] + panel * numbers;
    for (int64_t unit = first; unit < first + units_of<A>(m); unit += L)
      for (int64_t gate = 0; gate < m.gates; ++gate, v += L, gain += L, bias += L) {
        const vec<A> y = (load(v) - mean[r]) * rstd[r];
        if (normed && unit < p.hidden)
          store_first(normed + ((row[r] * 2 + which) * m.gates + gate) * p.hidden + unit, y, p.hidden - unit);
        store(v, y * load(gain) + load(bias));
      }
  }
}

// Where `normed` has a row's numbers beside LN(v): rstd of x, of h; mean and rstd of c'.
template <class A>
HT_INLINE A* moments_of(const Rnn& p, A* normed, int64_t row) {
  return normed + p.rows * rnn_normed_numbers(p) + row * rnn_moments(p);
}
template <class A>
void keep_moment(const Rnn& p, int64_t at, int64_t rows, const A* moment, A* normed, const int64_t* row) {
  for (int64_t r = 0; r < rows; ++r) moments_of(p, normed, row[r])[at] = moment[r];
}

// h' = o * tanh(gain_c * LN(c') + bias_c) of one panel, under zoneout. o and c' stand where the step's W_h h stood, in
// rows of [vectors][L], as the gates' loop left them.
template <class A>
void bend_cells(const Rnn& p, const PanelShape& m, const Gains<A>& gains, int64_t panel, const A* s, int64_t rows,
                const A* mean, const A* rstd, const Shares<A>& zone_h, A* h) {
  constexpr int L = kLanes<A>;
  const Variant<vec<A>> gates{p.hard_sigmoid, p.hard_tanh, false, {}};
  const int64_t unit = panel * L;
  const vec<A> gain = load(gains.c_gain + unit), bias = load(gains.c_bias + unit);
  for (int64_t r = 0; r < rows; ++r, s += m.vectors() * L, h += L) {
    const vec<A> y = (load(s + L) - mean[r]) * rstd[r];
    store(h, zone(zone_h.of(r, unit), load(s) * gates.tanh(y * gain + bias), load(h)));
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What a slice keeps of its panels of one direction, W = 4 L units each; numbers of a panel stand together.
template <class A>
struct NormedBack {
  static constexpr int L = kLanes<A>, W = 4 * L;

  A* gains;  // [panels][2 gates + 2][W]: of x and of h of each gate; gain_c and bias_c
  A* sums;  // [panels][2][kinds][W], of the steps since the last flush, and of all:  gradients of the gains of x and of
            // h, of b_x and b_h, of gain_c and bias_c, of peepholes
  A* d;     // [places][the cell's slots][panels * W]: gradients of what the gates are of
  A *cell, *bent;  // [panels][places][W]: c', and tanh(gain_c * LN(c') + bias_c)
  A* gradient;     // likewise: of LN(c'), then of c'

  static int64_t kinds(const Rnn& p) { return 4 * gates_of(p.cell) + 2 + 3; }
  static int64_t numbers_of_gains(const Rnn& p) { return (2 * gates_of(p.cell) + 2) * W; }
  static int64_t numbers_of_sums(const Rnn& p) { return 2 * kinds(p) * W; }
};

// A row of `normed` as the forward left it.
template <class A>
struct NormedRow {
  const A *data, *moments;
  int64_t hidden, gates;

  vec<A> of(int which, int64_t gate, int64_t unit) const {
    return load_first(data + (which * gates + gate) * hidden + unit, hidden - unit);
  }
  A moment(int at) const { return moments[at]; }
};
template <class A>
HT_INLINE NormedRow<A> normed_row(const Rnn& p, const A* normed, int64_t row) {
  return {normed + row * rnn_normed_numbers(p), moments_of(p, normed, row), p.hidden, gates_of(p.cell)};
}

// What tanh makes of c', given its mean and rstd.
template <class A>
HT_INLINE vec<A> bend(const Rnn& p, const NormedRow<A>& row, vec<A> cell, vec<A> gain, vec<A> bias) {
  const Variant<vec<A>> gates{p.hard_sigmoid, p.hard_tanh, false, {}};
  return gates.tanh((cell - row.moment(2)) * row.moment(3) * gain + bias);
}

template <class A>
HT_INLINE void add(A* to, vec<A> v) {
  store(to, load(to) + v);
}

// use(C()) with the cell of vectors; with_cell_state only where there is one.
template <class A, class Use>
void with_cell_state(RnnCell cell, Use use) {
  cell == RnnCell::lstm ? use(Lstm<vec<A>>()) : use(CoupledLstm<vec<A>>());
}
template <class A, class Use>
void with_cell(RnnCell cell, Use use) {
  if (has_cell_state(cell)) return with_cell_state<A>(cell, use);
  cell == RnnCell::gru ? use(Gru<vec<A>>()) : use(ElmanTanh<vec<A>>());  // the simple ones are of one shape
}

// The first half of a step back, of an LSTM's panel, `own` the slice's: c', its tanh, and of the gradient of LN(c')
// what the panel leaves. state: c before the step, dh, [rows][W].
template <class C, class A>
void unbend_panel(const BackCall<A, A>& call, const NormedBack<A>& part, int64_t own, const A* normed,
                  const Left<A>& left, int64_t panel) {
  constexpr int L = kLanes<A>, W = 4 * L, G = C::kGates;
  const Rnn& p = call.p;
  const Variant<vec<A>> gates{p.hard_sigmoid, p.hard_tanh, false, {}};
  const int64_t at = own * p.batch * W;
  const A* gain = part.gains + own * part.numbers_of_gains(p) + 2 * G * W;
  A* sums = part.sums + own * part.numbers_of_sums(p) + 4 * G * W;
  for (int64_t r = 0; r < call.rows; ++r) {
    const NormedRow<A> row = normed_row(p, normed, call.row[r]);
    vec<A> sum{}, with_y{};
    for (int64_t v = 0; v < 4 && call.first + v * L < p.hidden; ++v) {
      const int64_t unit = call.first + v * L, i = r * W + v * L;
      vec<A> kept[C::kKept];
      for (int k = 0; k < C::kKept; ++k)
        kept[k] = load_first(call.keep + call.row[r] * call.keep_row + k * p.hidden + unit, p.hidden - unit);
      const vec<A> cell = C::next_cell(kept, load(call.state + i)), o = kept[G - 1];
      const vec<A> bent = bend(p, row, cell, load(gain + v * L), load(gain + W + v * L));
      // y = LN(c'),  d = gradient of gain * y + bias,  g = that of y
      const vec<A> y = (cell - row.moment(2)) * row.moment(3), d = load(call.dh + i) * o * gates.tanh_slope(bent);
      const vec<A> g = d * load(gain + v * L);
      add(sums + v * L, d * y), add(sums + W + v * L, d);
      store(part.cell + at + i, cell), store(part.bent + at + i, bent), store(part.gradient + at + i, g);
      sum += g, with_y += g * y;
    }
    left.of(panel, 0)[r] = sum_lanes(sum), left.of(panel, 1)[r] = sum_lanes(with_y);
  }
}

// The gradient of c' in place of that of LN(c'), of one panel, given the means of all.
template <class A>
void gradient_of_cells(const Rnn& p, const NormedBack<A>& part, int64_t own, int64_t rows, const A* normed,
                       const int64_t* row, const A* mean, const A* mean_with_y) {
  constexpr int L = kLanes<A>, W = 4 * L;
  A* g = part.gradient + own * p.batch * W;
  const A* cell = part.cell + own * p.batch * W;
  for (int64_t i = 0; i < rows * W; i += L) {
    const NormedRow<A> at = normed_row(p, normed, row[i / W]);
    const vec<A> y = (load(cell + i) - at.moment(2)) * at.moment(3);
    store(g + i, at.moment(3) * (load(g + i) - mean[i / W] - y * mean_with_y[i / W]));
  }
}

// What a panel leaves of the gradients of its rows of x and of h, and adds to its sums. d as back() made it.
template <class C, class A>
void leave_gradients(const Rnn& p, const NormedBack<A>& part, int64_t own, int64_t own_panels, int64_t rows,
                     const A* normed, const int64_t* row, const A* state, const Left<A>& left, int64_t panel) {
  constexpr int L = kLanes<A>, W = 4 * L, G = C::kGates;
  const A* gains = part.gains + own * part.numbers_of_gains(p);
  A* sums = part.sums + own * part.numbers_of_sums(p);
  for (int64_t r = 0; r < rows; ++r) {
    const NormedRow<A> at = normed_row(p, normed, row[r]);
    const A* d = part.d + r * C::kSlots * own_panels * W + own * W;
    vec<A> left_sums[4] = {};
    for (int64_t v = 0; v < 4 && panel * W + v * L < p.hidden; ++v) {
      const int64_t unit = panel * W + v * L;
      auto d_of = [&](int slot) HT_LAMBDA { return load(d + slot * own_panels * W + v * L); };
      for (int which = 0; which < 2; ++which)
        for (int g = 0; g < G; ++g) {
          const vec<A> one = d_of(which ? C::kStateSlots[g] : g), y = at.of(which, g, unit);
          const vec<A> inside = one * load(gains + (which * G + g) * W + v * L);
          left_sums[2 * which] += inside, left_sums[2 * which + 1] += inside * y;
          add(sums + (which * G + g) * W + v * L, one * y);
          add(sums + ((2 + which) * G + g) * W + v * L, one);
        }
      for (int k = 0; k < C::kPeepholes && p.peepholes; ++k) {
        const bool last = k + 1 == C::kPeepholes;
        const vec<A> c = last ? load(part.cell + (own * p.batch + r) * W + v * L) : load(state + r * W + v * L);
        add(sums + (4 * G + 2 + k) * W + v * L, d_of(last ? G - 1 : k) * c);
      }
    }
    for (int k = 0; k < 4; ++k) left.of(panel, k)[r] = sum_lanes(left_sums[k]);
  }
}

// The gradients of a panel's rows of W_x x and W_h h into rows [2 gates][pitch] of O, given the means of all [4].
template <class C, class A, class O>
void gradients_of_rows(const Rnn& p, const NormedBack<A>& part, int64_t own, int64_t own_panels, int64_t rows,
                       const A* normed, const int64_t* row, A* const (&means)[4], int64_t panel, O* to, int64_t pitch) {
  constexpr int L = kLanes<A>, W = 4 * L, G = C::kGates;
  const A* gains = part.gains + own * part.numbers_of_gains(p);
  for (int64_t r = 0; r < rows; ++r) {
    const NormedRow<A> at = normed_row(p, normed, row[r]);
    const A* d = part.d + r * C::kSlots * own_panels * W + own * W;
    for (int64_t v = 0; v < 4 && panel * W + v * L < p.hidden; ++v) {
      const int64_t unit = panel * W + v * L, n = p.hidden - unit;
      for (int which = 0; which < 2; ++which)
        for (int g = 0; g < G; ++g) {
          const int slot = which ? C::kStateSlots[g] : g;
          const vec<A> inside = load(d + slot * own_panels * W + v * L) * load(gains + (which * G + g) * W + v * L);
          const vec<A> y = at.of(which, g, unit);
          O* one = to + (row[r] * 2 * G + which * G + g) * pitch + unit;
          store_first(one, at.moment(which) * (inside - means[2 * which][r] - y * means[2 * which + 1][r]), n);
          if (n < pitch - unit && n < L) one[n] = O{};
        }
    }
  }
}

// Sums since the last flush join those of all steps: one long chain's rounding errors would show.
template <class A>
void flush_sums(const Rnn& p, const NormedBack<A>& part, int64_t own_panels) {
  const int64_t numbers = part.kinds(p) * part.W;
  for (int64_t own = 0; own < own_panels; ++own) {
    A *some = part.sums + own * 2 * numbers, *all = some + numbers;
    for (int64_t i = 0; i < numbers; i += part.L) add(all + i, load(some + i)), store(some + i, vec<A>{});
  }
}

}  // namespace handtuned::HANDTUNED_ISA
