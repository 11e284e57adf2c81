// The recurrent cells: one struct each, its maths alone, on vectors of hidden units.
//
//   x, s    W_x x_t + b_x and W_h h + b_h, a vector of each gate
//   h, c    the unit's state and cell state before the step
//   kCell   whether there is a c at all
//   keep    what the step leaves for the backward; of a cell with c, the last is c after the step, which the caller
//   adds d       gradients of the pre-activations in slots: those of x are the first kGates; those of s are the slots
//   that
//           kStateSlots names (they differ where a gate multiplies one of the two before they meet)
// step() returns h' and leaves c' in c. back() takes the gradient dh of h', in dc that of c', and one state more: c
// before the step (LSTM) or h before it (GRU). It leaves the gradient of c in dc and returns the part of h's that does
// not go through W_h.
#pragma once
#include "math.h"

namespace handtuned::HANDTUNED_ISA {

// What a variant of a cell changes, alike in all units but for the peepholes: a branch on it costs nothing beside an
// exponential.
template <class V>
struct Variant {
  using A = decltype(V{}[0] + V{}[0]);

  bool hard_sigmoid, hard_tanh, peepholes;
  V peephole[3];  // of i, f, o; of the coupled cell i, o

  // sigmoid, or min(max(x + 3, 0), 6) / 6;  tanh, or min(max(x, -1), 1);  NaN stays
  HT_INLINE V sigmoid(V x) const { return hard_sigmoid ? clamp(x + 3, 0, 6) * A(1.0 / 6) : HANDTUNED_ISA::sigmoid(x); }
  HT_INLINE V tanh(V x) const { return hard_tanh ? clamp(x, -1, 1) : HANDTUNED_ISA::tanh(x); }
  // Their derivatives, of their values.
  HT_INLINE V sigmoid_slope(V y) const {
    return hard_sigmoid ? ((y > 0) & (y < 1) ? V{} + A(1.0 / 6) : V{}) : y * (1 - y);
  }
  HT_INLINE V tanh_slope(V y) const { return hard_tanh ? ((y > -1) & (y < 1) ? V{} + 1 : V{}) : 1 - y * y; }
  // What gate k sees of the cell state.
  HT_INLINE V peep(int k, V c) const { return peepholes ? peephole[k] * c : V{}; }

 private:
  HT_INLINE static V clamp(V x, A low, A high) {
    x = x < low ? V{} + low : x;
    return x > high ? V{} + high : x;
  }
};

// Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000; peepholes: Gers & Schmidhuber 2000)
template <class V>
struct Lstm {
  static constexpr bool kCell = true;
  static constexpr int kGates = 4, kKept = 5, kSlots = 4, kPeepholes = 3;
  static constexpr int kStateSlots[kGates] = {0, 1, 2, 3};

  HT_INLINE static V step(const Variant<V>& v, const V (&x)[4], const V (&s)[4], V, V& c, V (&keep)[5]) {
    const V i = v.sigmoid(x[0] + s[0] + v.peep(0, c)), f = v.sigmoid(x[1] + s[1] + v.peep(1, c));
    const V g = v.tanh(x[2] + s[2]);
    c = f * c + i * g;
    const V o = v.sigmoid(x[3] + s[3] + v.peep(2, c));
    keep[0] = i, keep[1] = f, keep[2] = g, keep[3] = o;
    return o * v.tanh(c);
  }

  HT_INLINE static V next_cell(const V (&kept)[5], V c) { return kept[1] * c + kept[0] * kept[2]; }
  HT_INLINE static V output(const Variant<V>& v, const V (&kept)[5], V c) {
    return kept[3] * v.tanh(next_cell(kept, c));
  }

  HT_INLINE static V back(const Variant<V>& v, const V (&kept)[5], V c, V dh, V& dc, V (&d)[4]) {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], y = v.tanh(next_cell(kept, c));
    d[3] = dh * y * v.sigmoid_slope(o);
    const V inside = dc + dh * o * v.tanh_slope(y) + v.peep(2, d[3]);
    d[0] = inside * g * v.sigmoid_slope(i);
    d[1] = inside * c * v.sigmoid_slope(f);
    d[2] = inside * i * v.tanh_slope(g);
    dc = inside * f + v.peep(0, d[0]) + v.peep(1, d[1]);
    return V{};
  }
};

// The same with f = 1 - i (Greff et al. 2017), so of three gates i, g, o
template <class V>
struct CoupledLstm {
  static constexpr bool kCell = true;
  static constexpr int kGates = 3, kKept = 4, kSlots = 3, kPeepholes = 2;
  static constexpr int kStateSlots[kGates] = {0, 1, 2};

  HT_INLINE static V step(const Variant<V>& v, const V (&x)[3], const V (&s)[3], V, V& c, V (&keep)[4]) {
    const V i = v.sigmoid(x[0] + s[0] + v.peep(0, c)), g = v.tanh(x[1] + s[1]);
    c = (1 - i) * c + i * g;
    const V o = v.sigmoid(x[2] + s[2] + v.peep(1, c));
    keep[0] = i, keep[1] = g, keep[2] = o;
    return o * v.tanh(c);
  }

  HT_INLINE static V next_cell(const V (&kept)[4], V c) { return (1 - kept[0]) * c + kept[0] * kept[1]; }
  HT_INLINE static V output(const Variant<V>& v, const V (&kept)[4], V c) {
    return kept[2] * v.tanh(next_cell(kept, c));
  }

  HT_INLINE static V back(const Variant<V>& v, const V (&kept)[4], V c, V dh, V& dc, V (&d)[3]) {
    const V i = kept[0], g = kept[1], o = kept[2], y = v.tanh(next_cell(kept, c));
    d[2] = dh * y * v.sigmoid_slope(o);
    const V inside = dc + dh * o * v.tanh_slope(y) + v.peep(1, d[2]);
    d[0] = inside * (g - c) * v.sigmoid_slope(i);
    d[1] = inside * i * v.tanh_slope(g);
    dc = inside * (1 - i) + v.peep(0, d[0]);
    return V{};
  }
};

// Gated recurrent unit (Cho et al. 2014), with r after W_nh as torch and cuDNN have it
template <class V>
struct Gru {
  static constexpr bool kCell = false;
  static constexpr int kGates = 3, kKept = 4, kSlots = 4, kPeepholes = 0;
  static constexpr int kStateSlots[kGates] = {0, 1, 3};

  HT_INLINE static V step(const Variant<V>& v, const V (&x)[3], const V (&s)[3], V h, V&, V (&keep)[4]) {
    const V r = v.sigmoid(x[0] + s[0]), z = v.sigmoid(x[1] + s[1]), n = v.tanh(x[2] + r * s[2]);
    keep[0] = r, keep[1] = z, keep[2] = n, keep[3] = s[2];
    return n + z * (h - n);
  }

  HT_INLINE static V back(const Variant<V>& v, const V (&kept)[4], V h, V dh, V&, V (&d)[4]) {
    const V r = kept[0], z = kept[1], n = kept[2], s = kept[3];
    d[2] = dh * (1 - z) * v.tanh_slope(n);
    d[0] = d[2] * s * v.sigmoid_slope(r);
    d[1] = dh * (h - n) * v.sigmoid_slope(z);
    d[3] = d[2] * r;
    return dh * z;
  }
};

// Simple recurrent network (Elman 1990). What it keeps is h', which the output has where nothing comes between.
template <class V>
struct ElmanTanh {
  static constexpr bool kCell = false;
  static constexpr int kGates = 1, kKept = 1, kSlots = 1, kPeepholes = 0;
  static constexpr int kStateSlots[kGates] = {0};

  HT_INLINE static V step(const Variant<V>& v, const V (&x)[1], const V (&s)[1], V, V&, V (&keep)[1]) {
    return keep[0] = v.tanh(x[0] + s[0]);
  }
  HT_INLINE static V back(const Variant<V>& v, const V (&kept)[1], V, V dh, V&, V (&d)[1]) {
    d[0] = dh * v.tanh_slope(kept[0]);
    return V{};
  }
};

template <class V>
struct ElmanRelu {
  static constexpr bool kCell = false;
  static constexpr int kGates = 1, kKept = 1, kSlots = 1, kPeepholes = 0;
  static constexpr int kStateSlots[kGates] = {0};

  HT_INLINE static V step(const Variant<V>&, const V (&x)[1], const V (&s)[1], V, V&, V (&keep)[1]) {
    const V a = x[0] + s[0];
    return keep[0] = a < 0 ? V{} : a;  // NaN stays
  }
  HT_INLINE static V back(const Variant<V>&, const V (&kept)[1], V, V dh, V&, V (&d)[1]) {
    d[0] = kept[0] > 0 ? dh : V{};
    return V{};
  }
};

}  // namespace handtuned::HANDTUNED_ISA
