#include "attention.h"

#include "attention_backward.h"
#include "kernels.h"

namespace handtuned::HANDTUNED_ISA {

void attention_forward(const AttentionForward& p) {
  p.dtype == DType::f64 ? attention_forward_in<double>(p) : attention_forward_in<float>(p);
}

void attention_backward(const AttentionBackward& p) {
  p.dtype == DType::f64 ? attention_backward_in<double>(p) : attention_backward_in<float>(p);
}

}  // namespace handtuned::HANDTUNED_ISA
