#include "linear.h"

#include "kernels.h"
#include "cross_entropy.h"
#include "linear_backward.h"
#include "linear_int8.h"

namespace handtuned::HANDTUNED_ISA {

// Calls use(T()) with the tensors' type.
template <class Use>
static void with_tensors(DType dtype, Use use) {
  switch (dtype) {
    case DType::f32: return use(float());
    case DType::f64: return use(double());
    case DType::bf16: return use(bf16());
    case DType::f16: return use(f16());
  }
}

void linear_pack(const LinearPack& p) {
  with_tensors(p.dtype, [&](auto t) { linear_pack_in<decltype(t)>(p); });
}

void linear_forward(const LinearForward& p) {
  with_tensors(p.dtype, [&](auto t) { linear_forward_in<decltype(t)>(p); });
}

void linear_backward(const LinearBackward& p) {
  with_tensors(p.dtype, [&](auto t) { linear_backward_in<decltype(t)>(p); });
}

void cross_entropy_forward(const CrossEntropyForward& p) {
  with_tensors(p.dtype, [&](auto t) { cross_entropy_forward_in<decltype(t)>(p); });
}

void cross_entropy_backward(const CrossEntropyBackward& p) {
  with_tensors(p.dtype, [&](auto t) { cross_entropy_backward_in<decltype(t)>(p); });
}

void linear_int8_pack(const LinearInt8Pack& p) { linear_int8_pack_in(p); }

void linear_int8(const LinearInt8& p) {
  switch (p.dtype) {
    case DType::f32: return linear_int8_in<float>(p);
    case DType::bf16: return linear_int8_in<bf16>(p);
    case DType::f16: return linear_int8_in<f16>(p);
    case DType::f64: return;  // refused by the skin
  }
}

}  // namespace handtuned::HANDTUNED_ISA
