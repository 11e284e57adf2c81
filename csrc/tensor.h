// What the skin needs of a tensor, on the stable ABI: a handle, its sizes, an allocation, an error.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

namespace handtuned {

using torch::headeronly::ScalarType;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

struct Device {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// Owns one handle and moves it. torch::stable::Tensor shares its handle through a shared_ptr, whose allocations and
// counts are a tenth of a small op's whole time.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  Shape sizes() const { return Shape(ask<int64_t*>(aoti_torch_get_sizes), dim()); }
  Shape strides() const { return Shape(ask<int64_t*>(aoti_torch_get_strides), dim()); }
  void* data_ptr() const { return ask<void*>(aoti_torch_get_data_ptr); }
  ScalarType scalar_type() const { return ScalarType(ask<int32_t>(aoti_torch_get_dtype)); }
  bool is_cpu() const { return ask<int32_t>(aoti_torch_get_device_type) == aoti_torch_device_type_cpu(); }
  Device device() const {
    const auto type = ask<int32_t>(aoti_torch_get_device_type);
    return {type, type == aoti_torch_device_type_cpu() ? 0 : ask<int32_t>(aoti_torch_get_device_index)};
  }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }

 private:
  template <class Result, class Getter>
  Result ask(Getter getter) const {
    Result result;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &result));
    return result;
  }

  AtenTensorHandle handle_;
};

using OptionalTensor = std::optional<Tensor>;

std::string to_string(Shape shape);       // "[2, 3]"
std::string to_string(ScalarType dtype);  // "bfloat16"
std::string to_string(Device device);     // "cuda:0"

// Throws "handtuned.<op>: <message>", which Python sees as a RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "handtuned." << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The message is put together only when the check fails.
#define HT_CHECK(ok, ...) \
  if (!(ok)) fail(__VA_ARGS__)

// The kernels' element type; an error that lists the supported ones for any other.
DType dtype_of(const char* op, const char* argument, const Tensor& tensor);

bool equal(Shape a, Shape b);

using Sizes = std::vector<int64_t>;
inline Shape shape_of(const Sizes& sizes) { return Shape(sizes.data(), sizes.size()); }

// That a CPU tensor has the dtype of input, or the shape.
void check_type(const char* op, const char* name, const Tensor& tensor, const Tensor& input);
void check_shape(const char* op, const char* name, const Tensor& tensor, const Sizes& sizes);

// Uninitialised contiguous tensor. Large ones on the CPU are given huge pages: the page faults of a fresh 32 MB output
// take several times as long as a norm needs to fill it.
Tensor empty(Shape sizes, ScalarType dtype, Device device = {});
Tensor empty_strided(Shape sizes, Shape strides, ScalarType dtype, Device device = {});  // strides that leave no gaps
Tensor empty_like(const Tensor& tensor);  // its dims in the same order in memory, without gaps
inline Tensor empty_if(bool wanted, Shape sizes, ScalarType dtype, Device device = {}) {
  return wanted ? empty(sizes, dtype, device) : empty({0}, dtype, device);
}

void fill(const Tensor& tensor, double value);  // on any device

Tensor contiguous(const Tensor& tensor);

size_t size_of(ScalarType dtype);  // in bytes

// The key of the dropout's generator; checks p and, where p > 0, the seed, which lies on `device`.
Dropout dropout_of(const char* op, double p, const OptionalTensor& seed, Device device = {},
                   const char* name = "dropout_p");
void check_rate(const char* op, const char* name, double p);

// The tensor as rows of its last `row_ndim` dims. Where a row is not contiguous in memory (or more than
// StridedRows::kMaxDims outer strides remain), `holder` takes one contiguous copy and the rows point into that.
StridedRows strided_rows(const Tensor& tensor, int64_t row_ndim, OptionalTensor& holder);

}  // namespace handtuned
