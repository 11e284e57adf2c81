// Activations of the linear family and their derivatives, on vectors of float or double.
//
//   gelu(z)      = z Phi(z),               gelu'(z) = Phi(z) + z phi(z),     Phi(z) = 1 - Phi(-z),  phi(z) = phi(-z)
//   gelu_tanh(z) = z (1 + tanh u) / 2,     u = sqrt(2 / pi) (z + 0.044715 z^3)
//   silu(z)      = z s(z),                 silu'(z) = s (1 + z (1 - s)),     s(z) = 1 / (1 + e^-z)
#pragma once
#include "../linear.h"

#include "math.h"

namespace handtuned::HANDTUNED_ISA {

template <class V>
using Lane = decltype(V{}[0] + 0);

struct NoActivation {
  template <class V>
  static HT_INLINE V value(V z) {
    return z;
  }
  template <class V>
  static HT_INLINE V slope(V) {
    return V{} + 1;
  }
};

struct Relu {
  template <class V>
  static HT_INLINE V value(V z) {
    return z < 0 ? V{} : z;
  }
  template <class V>
  static HT_INLINE V slope(V z) {
    return z <= 0 ? V{} : V{} + 1;
  }
};

struct Gelu {
  template <class V>
  static HT_INLINE V value(V z) {
    const V tail = normal_tail(absolute(z));
    return z * (z < 0 ? tail : 1 - tail);
  }
  template <class V>
  static HT_INLINE V slope(V z) {
    const V tail = normal_tail_slope(absolute(z));
    return z < 0 ? tail : 1 - tail;
  }
};

struct GeluTanh {
  template <class V>
  static HT_INLINE V value(V z) {
    using A = Lane<V>;
    return A(0.5) * z * (1 + tanh(A(0.7978845608028654) * (z + A(0.044715) * z * z * z)));
  }
  template <class V>
  static HT_INLINE V slope(V z) {
    using A = Lane<V>;
    const A c = A(0.7978845608028654);
    const V t = tanh(c * (z + A(0.044715) * z * z * z));
    return A(0.5) * (1 + t) + A(0.5) * z * (1 - t * t) * (c * (1 + A(3 * 0.044715) * z * z));
  }
};

struct Silu {
  template <class V>
  static HT_INLINE V sigmoid(V z) {
    const V e = exponential(-absolute(z));  // never overflows
    return (z < 0 ? e : V{} + 1) / (1 + e);
  }
  template <class V>
  static HT_INLINE V value(V z) {
    return z * sigmoid(z);
  }
  template <class V>
  static HT_INLINE V slope(V z) {
    const V s = sigmoid(z);
    return s * (1 + z * (1 - s));
  }
};

template <class Use>
HT_INLINE void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::none: return use(NoActivation());
    case Activation::relu: return use(Relu());
    case Activation::gelu: return use(Gelu());
    case Activation::gelu_tanh: return use(GeluTanh());
    case Activation::silu: return use(Silu());
  }
}

}  // namespace handtuned::HANDTUNED_ISA
