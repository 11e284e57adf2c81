#include "tensor.h"

#include <cstring>

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

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

// A second handle of the same tensor, for functions of torch that want one of its own kind.
torch::stable::Tensor shared(const Tensor& tensor) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  return torch::stable::Tensor(handle);
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
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "dtype number " + std::to_string(int(dtype));
  }
}

std::string to_string(Device device) {
  if (device.is_cpu()) return "cpu";
  const bool cuda = device.type == aoti_torch_device_type_cuda();
  return (cuda ? "cuda:" : "device " + std::to_string(device.type) + ":") + std::to_string(device.index);
}

DType dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      fail(op, argument, " is ", to_string(tensor.scalar_type()),
           ", supported are float32, float64, bfloat16 and float16; convert it with .to()");
  }
}

size_t size_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short: return 2;
    default: return 1;
  }
}

bool equal(Shape a, Shape b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(int64_t)) == 0;
}

void check_type(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  HT_CHECK(tensor.is_cpu(), op, name, " is not on the CPU, input is; move it with .to(input.device)");
  HT_CHECK(tensor.scalar_type() == input.scalar_type(), op, name, " is ", to_string(tensor.scalar_type()),
           ", input is ", to_string(input.scalar_type()), "; convert one with .to()");
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Sizes& sizes) {
  HT_CHECK(equal(tensor.sizes(), shape_of(sizes)), op, name, " has shape ", to_string(tensor.sizes()), ", expected ",
           to_string(shape_of(sizes)), "; expand or reshape it first");
}

Tensor empty_strided(Shape sizes, Shape strides, ScalarType dtype, Device device) {
  int64_t n = 1;
  for (size_t d = 0; d < sizes.size(); ++d) n *= sizes[d];
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), int32_t(dtype),
                                                  device.type, device.index, &handle));
  Tensor tensor(handle);
  const size_t bytes = size_t(n) * size_of(dtype);
  if (device.is_cpu() && bytes >= kAskForHugePages) advise_huge_pages(tensor.data_ptr(), bytes);
  return tensor;
}

Tensor empty_like(const Tensor& tensor) {
  AtenTensorHandle made;
  const torch::stable::Tensor result = torch::stable::empty_like(shared(tensor));
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result.get(), &made));
  Tensor owned(made);
  const size_t bytes = size_t(owned.numel()) * size_of(owned.scalar_type());
  if (owned.is_cpu() && bytes >= kAskForHugePages) advise_huge_pages(owned.data_ptr(), bytes);
  return owned;
}

Tensor empty(Shape sizes, ScalarType dtype, Device device) {
  int64_t strides[64], n = 1;
  const int64_t ndim = int64_t(sizes.size());
  HT_CHECK(ndim <= 64, "empty", "a tensor of ", ndim, " dims, the limit is 64");
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = n;
    n *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return empty_strided(sizes, Shape(strides, ndim), dtype, device);
}

void check_rate(const char* op, const char* name, double p) {
  HT_CHECK(p >= 0 && p <= 1, op, name, " is ", p, ", the limits are 0 and 1; pass a probability");
}

Dropout dropout_of(const char* op, double p, const OptionalTensor& seed, Device device, const char* name) {
  check_rate(op, name, p);
  if (p == 0) return {};
  HT_CHECK(bool(seed), op, name, " is ", p, " but seed is None; pass an int64 tensor with one element");
  HT_CHECK(seed->device() == device, op, "seed is on ", to_string(seed->device()), ", input is on ", to_string(device),
           "; move it with .to(input.device)");
  HT_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op, "seed is ",
           to_string(seed->scalar_type()), " of shape ", to_string(seed->sizes()),
           ", expected one int64 element on the device of input; draw it with torch.randint");
  Dropout dropout{p, 0, seed->data_ptr()};
  if (device.is_cpu()) std::memcpy(&dropout.seed, seed->data_ptr(), sizeof dropout.seed);
  return dropout;
}

void fill(const Tensor& tensor, double value) {
  torch::stable::Tensor same = shared(tensor);
  torch::stable::fill_(same, value);
}

Tensor contiguous(const Tensor& tensor) {
  torch::stable::Tensor result = torch::stable::contiguous(shared(tensor));
  AtenTensorHandle copy;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result.get(), &copy));
  return Tensor(copy);
}

StridedRows strided_rows(const Tensor& tensor, int64_t row_ndim, OptionalTensor& holder) {
  const Shape sizes = tensor.sizes();
  const int64_t outer = int64_t(sizes.size()) - row_ndim;
  if (tensor.is_contiguous()) {
    StridedRows rows;
    rows.data = tensor.data_ptr();
    rows.ndim = 1;
    rows.stride[0] = 1;
    for (int64_t d = outer; d < int64_t(sizes.size()); ++d) rows.stride[0] *= sizes[d];
    return rows;
  }
  const Shape strides = tensor.strides();
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
    holder = contiguous(tensor);
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
