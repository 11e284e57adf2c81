// Recurrent layers, forward: what all slices of a layer share, and what each keeps of its part.
#pragma once
#include "rnn_slice.h"

namespace handtuned::HANDTUNED_ISA {

// The weights of one direction, in panels.
template <class A, class T>
struct DirectionWeights {
  const T *x, *h, *r;
  const A *x_bias, *h_bias;  // [panels][vectors][L]
  const A* peepholes;        // [kPeepholes][pitch]
  Gains<A> gains;
};

template <class E, class T>
struct LayerForward : LayerOf<Accumulate<E>, RnnForward> {
  using A = Accumulate<E>;
  using O = Operand<E>;
  using LayerOf<A, RnnForward>::p;

  const A* input;  // [rows][width] of the layer below, nullptr: the caller's
  A* output;       // [rows][directions * state], nullptr: the caller's alone
  bool last;       // output goes to the caller
  A* keep[2];      // of each direction, nullptr: nothing to keep
  A* normed[2];    // likewise
  GateLoop<A> gates;
  PanelShape wx, wh, wr;
  DirectionWeights<A, T> weights[2];
  int64_t stretch;  // steps whose X is made ahead
  bool turned;      // panels are taken from the last to the first in the first step
  O* ring;          // [direction][2][batch][state]: h of the last two steps
  O* m_ring;        // [direction][batch][hidden]: what is to be projected
  A* left;          // what panels leave of rows that are normalised, of each direction that of x, of h and of c'

  O* h_row(int64_t direction, int64_t step, int64_t place) const {  // h after `step`
    return ring + ((direction * 2 + (step & 1)) * p.batch + place) * round_up(p.state, 2);
  }
  O* m_row(int64_t direction, int64_t place) const {
    return m_ring + (direction * p.batch + place) * round_up(p.hidden, 2);
  }
  // which: of x, of h, of c'
  Left<A> left_of(int64_t direction, int which) const {
    const int64_t panels = panels_of<A>(wh), x = rnn_row_pitch(stretch * p.batch), others = rnn_row_pitch(p.batch);
    A* at = left + direction * panels * 2 * (x + 2 * others);
    return {at + (which ? panels * 2 * (x + (which - 1) * others) : 0), panels, 2, which ? others : x};
  }
};

// What a slice keeps of its part.
template <class A>
struct ForwardPart : Part {
  A *h, *c;              // [panels][batch][units]; h is what is to be projected where there is a projection
  A* r;                  // [projection's panels][batch][units]: the state where there is one
  A* x;                  // [panels][rows of a stretch][vectors][L]
  A* s;                  // [panels][batch][vectors][L] where they are normalised
  A *mean[3], *rstd[3];  // of rows of x (of a stretch), of h and of c'
  Shares<A> zone_h, zone_c;
};

}  // namespace handtuned::HANDTUNED_ISA
