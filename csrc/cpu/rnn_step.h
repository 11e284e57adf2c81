// Recurrent layers: one step of a cell (gates.h) for some places of some panels, forward and backward.
#pragma once
#include "rnn_noise.h"

namespace handtuned::HANDTUNED_ISA {

// ---- forward --------------------------------------------------------------------------------------------------------

// The step's gates for some places of some panels.
template <class A>
struct GateCall {
  const Rnn& p;
  int64_t panels, rows;
  const A* x;  // of a panel [rows][vectors][L], the next one's x_panel further; s likewise
  A* s;        // where c' is to be normalised it becomes o and c', of which h' is made later (rnn_normalise.h)
  int64_t x_panel, s_panel;
  A *h, *c;  // of a panel [rows][units], the next one's state_panel further; updated
  int64_t state_panel;
  A* keep;  // of place p row[p] times further [kKept][hidden]; nullptr: not wanted
  const int64_t* row;
  const A* peepholes;  // [kPeepholes][pitch]
  Shares<A> zone_h, zone_c;
  int64_t first;  // unit of the first panel
};

template <class A>
using GateLoop = void (*)(const GateCall<A>&);

// Gates: Plain, or Variant, which with its branches takes a tenth longer.
template <template <class> class Cell, template <class> class Gates, class A>
void gate_loop(const GateCall<A>& call) {
  using C = Cell<vec<A>>;
  using P = Gates<vec<A>>;
  constexpr int L = kLanes<A>, G = C::kGates, K = C::kKept, V = G == 1 ? 4 : 1;
  const Rnn& p = call.p;
  P gates;
  if constexpr (!P::kPlain) gates.Variant<vec<A>>::operator=({p.hard_sigmoid, p.hard_tanh, p.peepholes, {}});
  if constexpr (P::kNormalises) gates.bent = vec<A>{} + 1;
  for (int64_t i = 0; i < call.panels; ++i) {
    if constexpr (!P::kPlain)
      for (int k = 0; k < C::kPeepholes && p.peepholes; ++k)
        gates.peephole[k] = load(call.peepholes + k * rnn_peephole_pitch(p) + call.first + i * L);
    for (int64_t at = 0; at < call.rows * V; ++at) {
      const int64_t unit = call.first + (i * V + at % V) * L;
      const A* x = call.x + i * call.x_panel + at * G * L;
      A* s = call.s + i * call.s_panel + at * G * L;
      A *h = call.h + i * call.state_panel + at * L, *c = call.c + i * call.state_panel + at * L;
      vec<A> xs[G], ss[G], kept[K], cell = C::kCell ? load(c) : vec<A>{};
      for (int g = 0; g < G; ++g) xs[g] = load(x + g * L), ss[g] = load(s + g * L);
      vec<A> next = C::step(gates, xs, ss, load(h), cell, kept);
      if constexpr (P::kNormalises && C::kCell) store(s, next), store(s + L, cell), next = load(h);
      if constexpr (!P::kPlain) {
        next = zone(call.zone_h.of(at / V, unit), next, load(h));
        if (C::kCell) cell = zone(call.zone_c.of(at / V, unit), cell, load(c));
      }
      store(h, next);
      if (C::kCell) store(c, kept[K - 1] = cell);
      for (int k = 0; call.keep && k < K && unit < p.hidden; ++k)
        store_first(call.keep + (call.row[at / V] * K + k) * p.hidden + unit, kept[k], p.hidden - unit);
    }
  }
}

template <template <class> class Gates, class A>
GateLoop<A> gate_loop_with(RnnCell cell) {
  switch (cell) {
    case RnnCell::lstm: return &gate_loop<Lstm, Gates, A>;
    case RnnCell::coupled: return &gate_loop<CoupledLstm, Gates, A>;
    case RnnCell::gru: return &gate_loop<Gru, Gates, A>;
    case RnnCell::tanh: return &gate_loop<ElmanTanh, Gates, A>;
    default: return &gate_loop<ElmanRelu, Gates, A>;
  }
}
template <class A>
GateLoop<A> gate_loop_of(const Rnn& p) {
  if (p.layer_norm) return gate_loop_with<Normalised, A>(p.cell);
  const bool varies = p.hard_sigmoid || p.hard_tanh || p.peepholes || p.zoneout.p > 0 || p.cell_zoneout.p > 0;
  return varies ? gate_loop_with<Variant, A>(p.cell) : gate_loop_with<Plain, A>(p.cell);
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The cell's back() for some places of one panel.
template <class A, class O>
struct BackCall {
  const Rnn& p;
  int64_t rows;
  const A* keep;  // as the forward left it, of place i row[i] * keep_row further
  int64_t keep_row;
  const int64_t* row;
  const A* peepholes;      // [kPeepholes][4 L] of the panel
  const A *bent, *unbent;  // of Normalised, [rows][4 L]
  const A* state;          // the one that back() asks for, [rows][4 L] like the next two
  A *dh, *dc;              // dh becomes the part that does not go through W_h
  O* gates;                // d of place i goes to [to[i]][slots][pitch]
  const int64_t* to;
  int64_t pitch, first;
};

template <class A, class O>
using BackLoop = void (*)(const BackCall<A, O>&);

template <template <class> class Cell, template <class> class Gates, class A, class O>
void back_loop(const BackCall<A, O>& call) {
  using C = Cell<vec<A>>;
  constexpr int L = kLanes<A>, K = C::kKept, S = C::kSlots;
  const Rnn& p = call.p;
  Gates<vec<A>> gates;
  gates.Variant<vec<A>>::operator=({p.hard_sigmoid, p.hard_tanh, p.peepholes, {}});
  for (int64_t i = 0; i < call.rows; ++i) {
    for (int64_t v = 0; v < 4 && call.first + v * L < p.hidden; ++v) {
      const int64_t unit = call.first + v * L, n = p.hidden - unit, at = (i * 4 + v) * L;
      vec<A> kept[K], d[S], cell = C::kCell ? load(call.dc + at) : vec<A>{};
      for (int k = 0; k < K; ++k) {
        const A* keep = call.keep + k * p.hidden + unit;
        __builtin_prefetch(keep + call.row[least(i + 1, call.rows - 1)] * call.keep_row);
        kept[k] = load_first(keep + call.row[i] * call.keep_row, n);
      }
      for (int k = 0; k < C::kPeepholes && p.peepholes; ++k) gates.peephole[k] = load(call.peepholes + (k * 4 + v) * L);
      if constexpr (Gates<vec<A>>::kNormalises && C::kCell)
        gates.bent = load(call.bent + at), gates.unbent = load(call.unbent + at);
      const vec<A> state = C::kKept > 1 ? load(call.state + at) : vec<A>{};
      store(call.dh + at, C::back(gates, kept, state, load(call.dh + at), cell, d));
      if (C::kCell) store(call.dc + at, cell);
      for (int k = 0; k < S; ++k) {
        O* to = call.gates + (call.to[i] * S + k) * call.pitch + unit;
        store_first(to, d[k], n);
        if (n < call.pitch - unit && n < L) to[n] = O{};
      }
    }
  }
}

template <template <class> class Gates, class A, class O>
BackLoop<A, O> back_loop_of(RnnCell cell) {
  switch (cell) {
    case RnnCell::lstm: return &back_loop<Lstm, Gates, A, O>;
    case RnnCell::coupled: return &back_loop<CoupledLstm, Gates, A, O>;
    case RnnCell::gru: return &back_loop<Gru, Gates, A, O>;
    case RnnCell::tanh: return &back_loop<ElmanTanh, Gates, A, O>;
    default: return &back_loop<ElmanRelu, Gates, A, O>;
  }
}

}  // namespace handtuned::HANDTUNED_ISA
