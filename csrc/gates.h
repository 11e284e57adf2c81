// The recurrent cells: one struct each, its maths alone, on vectors of hidden units (CPU) or on one (CUDA). HT_INLINE,
// sigmoid, tanh and clamp are those of whoever includes it: cpu/math.h or cuda/rnn_cells.cuh.
//
//   p       which functions the gates are: Plain or Variant
//   x, s    W_x x_t + b_x and W_h h + b_h, a vector of each gate
//   h, c    the unit's state and cell state before the step
//   kCell   whether there is a c at all
//   keep    what the step leaves for the backward; the caller adds c after the step as the last, if there is one
//   d       gradients of the pre-activations in slots: those of x are the first kGates, those of s the slots that
//           kStateSlots names (they differ where a gate multiplies one of the two before they meet)
// step() returns h' and leaves c' in c. back() takes the gradient dh of h', in dc that of c', and one state more: c
// before the step (LSTM) or h before it (GRU). It leaves the gradient of c in dc and returns the part of h's that does
// not go through W_h.
#pragma once

namespace handtuned::HANDTUNED_ISA {

// The numbers that a vector is of, or a number's own type.
template <class V>
auto number_of(int) -> decltype(V{}[0] + V{}[0]);
template <class V>
V number_of(...);

// What gates are made of: as torch has them.
template <class V>
struct Plain {
  static constexpr bool kPlain = true, kNormalises = false;

  HT_INLINE V sigmoid(V x) const { return HANDTUNED_ISA::sigmoid(x); }
  HT_INLINE V tanh(V x) const { return HANDTUNED_ISA::tanh(x); }
  // Their derivatives, of their values.
  HT_INLINE V sigmoid_slope(V y) const { return y * (1 - y); }
  HT_INLINE V tanh_slope(V y) const { return 1 - y * y; }
  // What gate k sees of the cell state.
  HT_INLINE V peep(int, V) const { return V{}; }
  // What o multiplies of the new cell state, and c's gradient from that of tanh's argument.
  HT_INLINE V bend(V c) const { return tanh(c); }
  HT_INLINE V unbend(V d) const { return d; }
};

// As options say, alike for all units but for the peepholes.
template <class V>
struct Variant {
  static constexpr bool kPlain = false, kNormalises = false;
  using A = decltype(number_of<V>(0));

  bool hard_sigmoid, hard_tanh, peepholes;
  V peephole[3];  // of i, f, o; of the coupled cell i, o

  // min(max(x + 3, 0), 6) / 6 and min(max(x, -1), 1);  NaN stays
  HT_INLINE V sigmoid(V x) const { return hard_sigmoid ? clamp(x + 3, 0, 6) * A(1.0 / 6) : Plain<V>().sigmoid(x); }
  HT_INLINE V tanh(V x) const { return hard_tanh ? clamp(x, -1, 1) : Plain<V>().tanh(x); }
  HT_INLINE V sigmoid_slope(V y) const {
    return hard_sigmoid ? ((y > 0) & (y < 1) ? V{} + A(1.0 / 6) : V{}) : Plain<V>().sigmoid_slope(y);
  }
  HT_INLINE V tanh_slope(V y) const {
    return hard_tanh ? ((y > -1) & (y < 1) ? V{} + 1 : V{}) : Plain<V>().tanh_slope(y);
  }
  HT_INLINE V peep(int k, V c) const { return peepholes ? peephole[k] * c : V{}; }
  HT_INLINE V bend(V c) const { return tanh(c); }
  HT_INLINE V unbend(V d) const { return d; }
};

// The same where the new cell state is normalised before its tanh. For that all of its units must be known, so both are
// found outside and put in.
template <class V>
struct Normalised : Variant<V> {
  static constexpr bool kNormalises = true;

  V bent, unbent;

  HT_INLINE V bend(V) const { return bent; }
  HT_INLINE V unbend(V) const { return unbent; }
};

// Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000; peepholes: Gers & Schmidhuber 2000)
template <class V>
struct Lstm {
  static constexpr bool kCell = true;
  static constexpr int kGates = 4, kKept = 5, kSlots = 4, kPeepholes = 3;
  static constexpr int kStateSlots[kGates] = {0, 1, 2, 3};

  template <class P>
  HT_INLINE static V step(const P& p, const V (&x)[4], const V (&s)[4], V, V& c, V (&keep)[5]) {
    const V i = p.sigmoid(x[0] + s[0] + p.peep(0, c)), f = p.sigmoid(x[1] + s[1] + p.peep(1, c));
    const V g = p.tanh(x[2] + s[2]);
    c = f * c + i * g;
    const V o = p.sigmoid(x[3] + s[3] + p.peep(2, c));
    keep[0] = i, keep[1] = f, keep[2] = g, keep[3] = o;
    return o * p.bend(c);
  }

  HT_INLINE static V next_cell(const V (&kept)[5], V c) { return kept[1] * c + kept[0] * kept[2]; }
  template <class P>
  HT_INLINE static V output(const P& p, const V (&kept)[5], V c) {
    return kept[3] * p.bend(next_cell(kept, c));
  }

  template <class P>
  HT_INLINE static V back(const P& p, const V (&kept)[5], V c, V dh, V& dc, V (&d)[4]) {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], y = p.bend(next_cell(kept, c));
    d[3] = dh * y * p.sigmoid_slope(o);
    const V inside = dc + p.unbend(dh * o * p.tanh_slope(y)) + p.peep(2, d[3]);
    d[0] = inside * g * p.sigmoid_slope(i);
    d[1] = inside * c * p.sigmoid_slope(f);
    d[2] = inside * i * p.tanh_slope(g);
    dc = inside * f + p.peep(0, d[0]) + p.peep(1, d[1]);
    return V{};
  }
};

// The same with f = 1 - i (Greff et al. 2017), so of three gates i, g, o
template <class V>
struct CoupledLstm {
  static constexpr bool kCell = true;
  static constexpr int kGates = 3, kKept = 4, kSlots = 3, kPeepholes = 2;
  static constexpr int kStateSlots[kGates] = {0, 1, 2};

  template <class P>
  HT_INLINE static V step(const P& p, const V (&x)[3], const V (&s)[3], V, V& c, V (&keep)[4]) {
    const V i = p.sigmoid(x[0] + s[0] + p.peep(0, c)), g = p.tanh(x[1] + s[1]);
    c = (1 - i) * c + i * g;
    const V o = p.sigmoid(x[2] + s[2] + p.peep(1, c));
    keep[0] = i, keep[1] = g, keep[2] = o;
    return o * p.bend(c);
  }

  HT_INLINE static V next_cell(const V (&kept)[4], V c) { return (1 - kept[0]) * c + kept[0] * kept[1]; }
  template <class P>
  HT_INLINE static V output(const P& p, const V (&kept)[4], V c) {
    return kept[2] * p.bend(next_cell(kept, c));
  }

  template <class P>
  HT_INLINE static V back(const P& p, const V (&kept)[4], V c, V dh, V& dc, V (&d)[3]) {
    const V i = kept[0], g = kept[1], o = kept[2], y = p.bend(next_cell(kept, c));
    d[2] = dh * y * p.sigmoid_slope(o);
    const V inside = dc + p.unbend(dh * o * p.tanh_slope(y)) + p.peep(1, d[2]);
    d[0] = inside * (g - c) * p.sigmoid_slope(i);
    d[1] = inside * i * p.tanh_slope(g);
    dc = inside * (1 - i) + p.peep(0, d[0]);
    return V{};
  }
};

// Gated recurrent unit (Cho et al. 2014), with r after W_nh as torch and cuDNN have it
template <class V>
struct Gru {
  static constexpr bool kCell = false;
  static constexpr int kGates = 3, kKept = 4, kSlots = 4, kPeepholes = 0;
  static constexpr int kStateSlots[kGates] = {0, 1, 3};

  template <class P>
  HT_INLINE static V step(const P& p, const V (&x)[3], const V (&s)[3], V h, V&, V (&keep)[4]) {
    const V r = p.sigmoid(x[0] + s[0]), z = p.sigmoid(x[1] + s[1]), n = p.tanh(x[2] + r * s[2]);
    keep[0] = r, keep[1] = z, keep[2] = n, keep[3] = s[2];
    return n + z * (h - n);
  }

  template <class P>
  HT_INLINE static V back(const P& p, const V (&kept)[4], V h, V dh, V&, V (&d)[4]) {
    const V r = kept[0], z = kept[1], n = kept[2], s = kept[3];
    d[2] = dh * (1 - z) * p.tanh_slope(n);
    d[0] = d[2] * s * p.sigmoid_slope(r);
    d[1] = dh * (h - n) * p.sigmoid_slope(z);
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

  template <class P>
  HT_INLINE static V step(const P& p, const V (&x)[1], const V (&s)[1], V, V&, V (&keep)[1]) {
    return keep[0] = p.tanh(x[0] + s[0]);
  }
  template <class P>
  HT_INLINE static V back(const P& p, const V (&kept)[1], V, V dh, V&, V (&d)[1]) {
    d[0] = dh * p.tanh_slope(kept[0]);
    return V{};
  }
};

template <class V>
struct ElmanRelu {
  static constexpr bool kCell = false;
  static constexpr int kGates = 1, kKept = 1, kSlots = 1, kPeepholes = 0;
  static constexpr int kStateSlots[kGates] = {0};

  template <class P>
  HT_INLINE static V step(const P&, const V (&x)[1], const V (&s)[1], V, V&, V (&keep)[1]) {
    const V a = x[0] + s[0];
    return keep[0] = a < 0 ? V{} : a;  // NaN stays
  }
  template <class P>
  HT_INLINE static V back(const P&, const V (&kept)[1], V, V dh, V&, V (&d)[1]) {
    d[0] = kept[0] > 0 ? dh : V{};
    return V{};
  }
};

}  // namespace handtuned::HANDTUNED_ISA
