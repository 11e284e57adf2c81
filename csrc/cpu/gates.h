// The recurrent cells: one struct each, its maths alone, on vectors of hidden units.
//
//   x, s    W_x x_t + b_x and W_h h + b_h, a vector of each gate
//   h, c    the unit's state and cell state before the step
//   kCell   whether there is a c at all
//   keep    what the step leaves for the backward
//   d       gradients of the pre-activations in slots: those of x are the first kGates; those of s are the slots that
//           kStateSlots names (they differ where a gate multiplies one of the two before they meet)
// step() returns h'. back() takes the gradient dh of h', in dc that of c', and one state more: c before the step
// (LSTM), h before it (GRU) or h' (RNN). It leaves the gradient of c in dc and returns the part of h's that does not go
// through W_h.
#pragma once
#include "math.h"

namespace handtuned::HANDTUNED_ISA {

// Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000)
template <class V>
struct Lstm {
  static constexpr bool kCell = true;
  static constexpr int kGates = 4, kKept = 5, kSlots = 4;
  static constexpr int kStateSlots[kGates] = {0, 1, 2, 3};

  HT_INLINE static V step(const V (&x)[4], const V (&s)[4], V, V& c, V (&keep)[5]) {
    const V i = sigmoid(x[0] + s[0]), f = sigmoid(x[1] + s[1]), g = tanh(x[2] + s[2]), o = sigmoid(x[3] + s[3]);
    c = f * c + i * g;
    keep[0] = i, keep[1] = f, keep[2] = g, keep[3] = o, keep[4] = c;
    return o * tanh(c);
  }

  HT_INLINE static V back(const V (&kept)[5], V c, V dh, V& dc, V (&d)[4]) {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], y = tanh(kept[4]);
    const V inside = dc + dh * o * (1 - y * y);
    d[0] = inside * g * i * (1 - i);
    d[1] = inside * c * f * (1 - f);
    d[2] = inside * i * (1 - g * g);
    d[3] = dh * y * o * (1 - o);
    dc = inside * f;
    return V{};
  }
};

// Gated recurrent unit (Cho et al. 2014), with r after W_nh as torch and cuDNN have it
template <class V>
struct Gru {
  static constexpr bool kCell = false;
  static constexpr int kGates = 3, kKept = 4, kSlots = 4;
  static constexpr int kStateSlots[kGates] = {0, 1, 3};

  HT_INLINE static V step(const V (&x)[3], const V (&s)[3], V h, V&, V (&keep)[4]) {
    const V r = sigmoid(x[0] + s[0]), z = sigmoid(x[1] + s[1]), n = tanh(x[2] + r * s[2]);
    keep[0] = r, keep[1] = z, keep[2] = n, keep[3] = s[2];
    return n + z * (h - n);
  }

  HT_INLINE static V back(const V (&kept)[4], V h, V dh, V&, V (&d)[4]) {
    const V r = kept[0], z = kept[1], n = kept[2], s = kept[3];
    d[2] = dh * (1 - z) * (1 - n * n);
    d[0] = d[2] * s * r * (1 - r);
    d[1] = dh * (h - n) * z * (1 - z);
    d[3] = d[2] * r;
    return dh * z;
  }
};

// Simple recurrent network (Elman 1990)
template <class V>
struct ElmanTanh {
  static constexpr bool kCell = false;
  static constexpr int kGates = 1, kKept = 0, kSlots = 1;
  static constexpr int kStateSlots[kGates] = {0};

  HT_INLINE static V step(const V (&x)[1], const V (&s)[1], V, V&, V*) { return tanh(x[0] + s[0]); }
  HT_INLINE static V back(const V*, V next, V dh, V&, V (&d)[1]) {
    d[0] = dh * (1 - next * next);
    return V{};
  }
};

template <class V>
struct ElmanRelu {
  static constexpr bool kCell = false;
  static constexpr int kGates = 1, kKept = 0, kSlots = 1;
  static constexpr int kStateSlots[kGates] = {0};

  HT_INLINE static V step(const V (&x)[1], const V (&s)[1], V, V&, V*) {
    const V a = x[0] + s[0];
    return a < 0 ? V{} : a;  // NaN stays
  }
  HT_INLINE static V back(const V*, V next, V dh, V&, V (&d)[1]) {
    d[0] = next > 0 ? dh : V{};
    return V{};
  }
};

}  // namespace handtuned::HANDTUNED_ISA
