// What every family's Params share: element types and rows of a strided tensor. No torch header, no code that
// touches data: included by the skin (compiled without ISA flags) and by the kernels (compiled once per ISA).
#pragma once
#include <cstdint>

namespace handtuned {

enum class DType : int8_t { f32, f64, bf16, f16 };
inline bool is_narrow(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }
inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Storage-only 16-bit floats; arithmetic happens after conversion to float (simd.h).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Rows of a tensor: each row is contiguous, the outer dims have any strides (0 for an expanded dim, negative never).
// Outer dims that fold into one stride are folded by the skin, so ndim is 1 for all but permuted tensors.
struct StridedRows {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;  // nullptr: the tensor was not given
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
};

// Philox4x32-10 dropout (see cpu/philox.h for the counter layout). p == 0 means none.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;
  const void* seed_address = nullptr;  // CUDA: where the seed lies in device memory; `seed` is not set
};

}  // namespace handtuned
