// Recurrent layers, backward: what all slices of a layer share, and what each keeps of its part.
#pragma once
#include "rnn_slice.h"

namespace handtuned::HANDTUNED_ISA {

// Slot of the gradient that goes through gate g's rows of W_h.
HT_INLINE int64_t state_slot(const Rnn& p, int64_t g) {
  return p.layer_norm ? gates_of(p.cell) + g : p.cell == RnnCell::gru && g == 2 ? 3 : g;
}

template <class E, class T>
struct LayerBackward : LayerOf<Accumulate<E>, RnnBackward> {
  using A = Accumulate<E>;
  using O = Operand<E>;
  using LayerOf<A, RnnBackward>::p;

  explicit LayerBackward(const RnnBackward& params)
      : LayerOf<A, RnnBackward>{params},
        back(back_loop_of<Variant, A, O>(p.cell)),
        normed_back(back_loop_of<Normalised, A, A>(p.cell)) {}

  const A* grad_output = nullptr;  // [rows][directions * state] of the layer above, nullptr: the caller's
  const A* output;                 // of the forward, [rows][directions * state]
  const A *keep[2], *normed[2];
  const T *wx[2], *wh[2], *wr[2];  // of each direction, as the caller has them; wh under its dropout
  const T* peepholes[2];
  const void* const* gains[2];  // of layer norms: of x, of h, of c', bias of c'
  void* const* grads[2];        // beside each of a direction's weights, nullptr: not wanted
  BackLoop<A, O> back;
  BackLoop<A, A> normed_back;  // where rows are normalised
  O* ring;                     // [direction][2][batch][slots * pitch]
  O* r_ring;                   // [direction][batch][r_pitch]: gradient of the projection at a step
  O* gates[2];                 // [rows][slots * pitch]: d
  O* grad_r[2];                // [rows][r_pitch]: gradient of the projection
  A* left;  // what panels leave of rows that are normalised, of each direction that of c', and of x and of h

  int64_t pitch() const { return whole<E>(p.hidden); }
  int64_t r_pitch() const { return whole<E>(p.state); }
  int64_t slots() const { return slots_of(p) * pitch(); }
  // Whether the rows of a step lie apart, so that a product needs them brought together.
  bool scatters(int64_t direction) const { return direction == 1 && p.lengths; }
  const A* kept_cell(int64_t direction, int64_t row) const {  // c after a step
    return keep[direction] + ((row + 1) * rnn_kept(p) - 1) * p.hidden;
  }
  O* ring_row(int64_t direction, int64_t step, int64_t place) const {
    return ring + ((direction * 2 + (step & 1)) * p.batch + place) * slots();
  }
  // d of all places at a step, one row after the other.
  const O* d_rows(int64_t direction, int64_t step) const {
    return scatters(direction) ? ring_row(direction, step, 0)
                               : gates[direction] + row_of(p, direction, step, 0) * slots();
  }
  O* r_row(int64_t direction, int64_t place) const { return r_ring + (direction * p.batch + place) * r_pitch(); }
  Left<A> left_of(int64_t direction, bool cells) const {
    const int64_t panels = (p.hidden + 4 * kLanes<A> - 1) / (4 * kLanes<A>), pitch = rnn_row_pitch(p.batch);
    A* at = left + direction * panels * 6 * pitch;
    return cells ? Left<A>{at, panels, 2, pitch} : Left<A>{at + panels * 2 * pitch, panels, 4, pitch};
  }
};

// What a slice keeps of its part. Without a projection the panels of the state are those of the hidden units.
template <class E>
struct BackwardPart : Part {
  // [panels of the state][batch][4 L], [panels of hidden units][batch][4 L]
  Accumulate<E>*dh, *dc;
  Accumulate<E>* around;     // like dh: the gradient that zoneout leads past a step to the state before it
  Accumulate<E>* peepholes;  // [panels of hidden units][kPeepholes][4 L]
  Shares<Accumulate<E>> zone_h, zone_c;
  NormedBack<Accumulate<E>> normed;
  Accumulate<E>* m;  // [panels of hidden units][batch][4 L]: gradient of what is projected, where rows are normalised
  // As elements: W_h's columns [panels of the state][gates * pitch][4 L], W_r's [panels of hidden units][r_pitch][4 L]
  E *wh, *wr;
};

}  // namespace handtuned::HANDTUNED_ISA
