// Every CPU kernel, compiled once per instruction set: the build passes the ISA's flags and its namespace as
// HANDTUNED_ISA. Nothing here or below may include a torch or STL header with inline code: the linker could keep an
// AVX-512 copy of a function that the rest of the library shares.
#include "kernels.h"

#include "attention.h"
#include "attention_backward.h"
#include "limits.h"
#include "norm.h"

namespace handtuned::HANDTUNED_ISA {

extern const Kernels table;
const Kernels table = {
    HANDTUNED_ISA_NAME, kVectorBytes,        &norm_forward, &norm_backward,
    &attention_forward, &attention_backward, &copy,         &multiply_add,
};

}  // namespace handtuned::HANDTUNED_ISA
