// Recurrent layers: what is drawn at random. Every mask is a function of the seed and of its row's number alone
// (philox.h), and each kind of mask has row numbers of its own; so a backward draws what its forward did.
//   dropout of a layer's input      row (layer - 1, step, batch entry), R * directions columns
//   zoneout of h; of c              row (layer, direction, step, batch entry), R columns; H
//   dropout of h for W_h            row (layer, direction, batch entry), R columns
//   dropout of W_h                  row (layer, direction, row of W_h), R columns
#pragma once
#include "rnn_panel.h"

namespace handtuned::HANDTUNED_ISA {

HT_INLINE int64_t draw_row(RnnDraw kind, int64_t row) { return (int64_t(kind) << 48) + row; }
// Of a time and place, in the caller's order; nth: layer, or layer and direction.
HT_INLINE int64_t draw_row(const Rnn& p, RnnDraw kind, int64_t nth, int64_t time, int64_t place) {
  const int64_t row = p.packed ? first_row(p, time) + place : time * p.batch + caller_of(p, place);
  return draw_row(kind, nth * p.rows + row);
}

// ---- zoneout (Krueger et al. 2017):  w * new + (1 - w) * old --------------------------------------------------------

// w is 0 or 1 at random, or in the expectation 1 - p; `shares` nullptr: 1.
template <class A>
HT_INLINE vec<A> zone(const A* shares, vec<A> next, vec<A> old) {
  if (!shares) return next;
  const vec<A> w = load(shares);
  return w * next + (1 - w) * old;
}

// w of all places at a step, for the units that a slice owns.
template <class A>
struct Shares {
  A* data = nullptr;  // [places][pitch], units from `first`; nullptr: no zoneout
  int64_t first, pitch;

  // Sets the range to units [begin, end) and what lies beside them in the generator's blocks; returns the numbers
  // needed.
  int64_t cover(const Rnn& p, const Dropout& zoneout, int64_t begin, int64_t end) {
    first = begin / kDropoutBlock * kDropoutBlock;
    pitch = begin < end ? round_up(end, kDropoutBlock) - first : 0;
    return zoneout.p > 0 ? p.batch * pitch : 0;
  }
  const A* of(int64_t place, int64_t unit) const { return data ? data + place * pitch + unit - first : nullptr; }

  void draw(const Rnn& p, RnnDraw kind, const Dropout& zoneout, int64_t cell, int64_t s, int64_t n) {
    const int64_t direction = cell % p.directions;
    for (int64_t place = 0; data && place < n; ++place) {
      A* to = data + place * pitch;
      if (p.samples_zoneout) {
        kept_row<false>(to, A(1), pitch, draw_row(p, kind, cell, time_of(p, direction, s, place), place), zoneout,
                        first);
      } else {
        for (int64_t i = 0; i < pitch; i += kLanes<A>) store(to + i, broadcast(A(1 - zoneout.p)));
      }
    }
  }
};

// ---- dropout --------------------------------------------------------------------------------------------------------

// Of the states that W_h multiplies, one mask a sequence (Gal & Ghahramani 2016): fills [directions][places][pitch] for
// a layer. Returns it, or nullptr where there is none.
template <class A>
A* draw_state_masks(const Rnn& p, int64_t layer, A* masks) {
  if (!(p.state_dropout.p > 0)) return nullptr;
  parallel_for(p.directions * p.batch, 1 + (16 << 10) / p.state, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t entry = (layer * p.directions + i / p.batch) * p.batch + caller_of(p, i % p.batch);
      dropout_row<false>(masks + i * rnn_mask_pitch(p), p.state, draw_row(RnnDraw::state, entry), p.state_dropout);
    }
  });
  return masks;
}

HT_INLINE int64_t weight_row(const Rnn& p, int64_t cell, int64_t row) {
  return draw_row(RnnDraw::weight, cell * gates_of(p.cell) * p.hidden + row);
}

// Of W_h itself (DropConnect, Wan et al. 2013; on recurrent weights Merity et al. 2018).
template <class A, class T>
const T* drop_weights(const Rnn& p, int64_t cell, const T* from, T* to) {
  parallel_for(gates_of(p.cell) * p.hidden, 1 + (16 << 10) / p.state, [&](int64_t begin, int64_t end) {
    Scratch<A> factor(round_up(p.state, kDropoutBlock));
    for (int64_t row = begin; row < end; ++row) {
      dropout_row<false>(factor.data, p.state, weight_row(p, cell, row), p.weight_dropout);
      copy_row<T, T>(to + row * p.state, from + row * p.state, p.state, factor.data);
    }
  });
  return to;
}

}  // namespace handtuned::HANDTUNED_ISA
