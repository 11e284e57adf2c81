#include "../rnn.h"

#include "kernels.h"
#include "rnn_backward_normalised.h"
#include "rnn_backward_stack.h"
#include "rnn_forward_normalised.h"
#include "rnn_pack.h"

namespace handtuned::HANDTUNED_ISA {

// Calls use(E(), T()) with the element types of the products' operands and of the tensors.
template <class Use>
static void with_elements(DType dtype, Use use) {
  switch (dtype) {
    case DType::f32: return use(float(), float());
    case DType::f64: return use(double(), double());
    case DType::f16: return use(float(), f16());
    case DType::bf16: return use(std::conditional_t<kMultipliesPairs, pair, float>(), bf16());
  }
}

void rnn_pack(const RnnPack& p) {
  with_elements(p.dtype, [&](auto e, auto t) { rnn_pack_in<decltype(e), decltype(t)>(p); });
}

void rnn_forward(const RnnForward& p) {
  with_elements(p.dtype, [&](auto e, auto t) { rnn_forward_in<decltype(e), decltype(t)>(p); });
}

void rnn_backward(const RnnBackward& p) {
  with_elements(p.dtype, [&](auto e, auto t) { rnn_backward_in<decltype(e), decltype(t)>(p); });
}

}  // namespace handtuned::HANDTUNED_ISA
