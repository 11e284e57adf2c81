#include "tensor.h"

#include <sys/mman.h>

#include <stdexcept>

namespace handtuned {

namespace {
constexpr size_t kHugePage = 2 << 20;
constexpr size_t kAskForHugePages = 4 << 20;

// Asks for huge pages; a refusal costs nothing but the speed-up.
void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}
}  // namespace

std::string to_string(Shape shape) {
  std::ostringstream s;
  s << "[";
  for (size_t i = 0; i < shape.size(); ++i) s << (i ? ", " : "") << shape[i];
  s << "]";
  return s.str();
}

std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "dtype number " + std::to_string(int(dtype));
  }
}

DType dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      check(false, op, argument, " is ", to_string(tensor.scalar_type()),
            ", supported are float32, float64, bfloat16 and float16; convert it with .to()");
      return DType::f32;
  }
}

Tensor empty(Shape sizes, ScalarType dtype) {
  int64_t strides[64], n = 1;
  const int64_t ndim = int64_t(sizes.size());
  check(ndim <= 64, "empty", "a tensor of ", ndim, " dims, the limit is 64");
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = n;
    n *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes.data(), strides, code, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  Tensor tensor(handle);
  size_t bytes = size_t(n) * tensor.element_size();
  if (bytes >= kAskForHugePages) advise_huge_pages(tensor.data_ptr(), bytes);
  return tensor;
}

StridedRows strided_rows(const Tensor& tensor, int64_t row_ndim, OptionalTensor& holder) {
  const Shape sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t outer = int64_t(sizes.size()) - row_ndim;
  int64_t cols = 1;
  bool contiguous_row = true;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= outer; --d) {
    contiguous_row &= sizes[d] == 1 || strides[d] == cols;
    cols *= sizes[d];
  }
  StridedRows rows;
  for (int64_t d = 0; d < outer && contiguous_row; ++d) {
    if (sizes[d] == 1) continue;
    // Dim d folds into the one before it when that one's stride steps over the whole of d.
    if (rows.ndim > 0 && rows.stride[rows.ndim - 1] == strides[d] * sizes[d]) {
      rows.size[rows.ndim - 1] *= sizes[d];
      rows.stride[rows.ndim - 1] = strides[d];
    } else if (rows.ndim < StridedRows::kMaxDims) {
      rows.size[rows.ndim] = sizes[d];
      rows.stride[rows.ndim++] = strides[d];
    } else {
      contiguous_row = false;
    }
  }
  if (!contiguous_row) {
    holder = torch::stable::contiguous(tensor);
    return strided_rows(*holder, row_ndim, holder);
  }
  if (rows.ndim == 0) {  // a single row
    rows.ndim = 1;
    rows.size[0] = 1;
    rows.stride[0] = 0;
  }
  rows.data = tensor.data_ptr();
  return rows;
}

}  // namespace handtuned
