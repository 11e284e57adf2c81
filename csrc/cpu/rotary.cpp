#include "rotary.h"

#include "kernels.h"

namespace handtuned::HANDTUNED_ISA {

// Calls use(T(), C()) with the types of tensors and tables.
template <class Use>
static void with_types(const Turn& p, Use use) {
  const bool same = p.table == p.dtype;
  switch (p.dtype) {
    case DType::f32: return use(float(), float());
    case DType::f64: return use(double(), double());
    case DType::bf16: return same ? use(bf16(), bf16()) : use(bf16(), float());
    case DType::f16: return same ? use(f16(), f16()) : use(f16(), float());
  }
}

void rotary(const Rotary& p) {
  with_types(p, [&](auto t, auto c) { rotary_in<decltype(t), decltype(c)>(p); });
}

void append_kv(const AppendKv& p) {
  with_types(p, [&](auto t, auto c) { append_kv_in<decltype(t), decltype(c)>(p); });
}

}  // namespace handtuned::HANDTUNED_ISA
