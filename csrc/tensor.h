// Helpers of the skin: what every op does with tensors before and after the kernel. Stable ABI only.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "params.h"

namespace handtuned {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

std::string to_string(Shape shape);        // "[2, 3]"
std::string to_string(ScalarType dtype);   // "bfloat16"

// Throws "handtuned.<op>: <message>", which Python sees as a RuntimeError.
template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  message << "handtuned." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The kernels' element type; an error that lists the supported ones for any other.
DType dtype_of(const char* op, const char* argument, const Tensor& tensor);

// Uninitialised contiguous CPU tensor. Large ones are given huge pages: the page faults of a fresh 32 MB output take
// several times as long as a norm needs to fill it.
Tensor empty(Shape sizes, ScalarType dtype);

inline void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// The tensor as rows of its last `row_ndim` dims. Where a row is not contiguous in memory (or more than
// StridedRows::kMaxDims outer strides remain), `holder` takes one contiguous copy and the rows point into that.
StridedRows strided_rows(const Tensor& tensor, int64_t row_ndim, OptionalTensor& holder);

}  // namespace handtuned
