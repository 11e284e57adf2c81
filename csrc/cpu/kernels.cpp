// The function table of one instruction set. This file and those of the families (norm.cpp, attention.cpp, linear.cpp,
// rotary.cpp, rnn.cpp) are compiled once for each: the build passes the ISA's flags and its namespace as HANDTUNED_ISA.
// Nothing in them or below may include a torch or STL header with inline code: the linker could keep an AVX-512 copy of
// a function that the rest of the library shares.
#include "kernels.h"

#include "limits.h"

namespace handtuned::HANDTUNED_ISA {

extern const Kernels table;
const Kernels table = {
    HANDTUNED_ISA_NAME,
    kVectorBytes,
    &norm_forward,
    &norm_backward,
    &attention_forward,
    &attention_backward,
    &linear_pack,
    &linear_forward,
    &linear_backward,
    &linear_int8_pack,
    &linear_int8,
    &cross_entropy_forward,
    &cross_entropy_backward,
    &rotary,
    &append_kv,
    &rnn_pack,
    &rnn_forward,
    &rnn_backward,
    &copy,
    &multiply_add<float>,
    kMultipliesPairs ? &multiply_add<pair> : nullptr,
};

}  // namespace handtuned::HANDTUNED_ISA
