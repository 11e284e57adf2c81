#include "attention.h"

#include "attention_backward.h"
#include "kernels.h"

namespace handtuned::HANDTUNED_ISA {

// Calls use(E()) with the element type of the products' operands.
template <class Use>
static void with_elements(DType dtype, Use use) {
  if (dtype == DType::f64) return use(double());
  if constexpr (kMultipliesPairs) {
    if (dtype == DType::bf16) return use(pair());
  }
  use(float());
}

void attention_forward(const AttentionForward& p) {
  with_elements(p.dtype, [&](auto element) { attention_forward_in<decltype(element)>(p); });
}

void attention_backward(const AttentionBackward& p) {
  with_elements(p.dtype, [&](auto element) { attention_backward_in<decltype(element)>(p); });
}

}  // namespace handtuned::HANDTUNED_ISA
