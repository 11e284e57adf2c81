#include "norm.h"

#include "kernels.h"

namespace handtuned::HANDTUNED_ISA {

void norm_forward(const NormForward& p) { by_type<Forward>(p); }
void norm_backward(const NormBackward& p) { by_type<Backward>(p); }

}  // namespace handtuned::HANDTUNED_ISA
