// Starting a kernel: on the device and stream of the caller, no synchronisation, the error as a value.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace handtuned::cuda {

// Makes a device current for a scope. The context is the one torch uses: both take the device's primary context.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status_ = cudaGetDevice(&before_);
    if (status_ == cudaSuccess && before_ != device) status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

constexpr size_t kSharedWithoutAsking = 48 << 10;

template <class... Params, class... Args>
cudaError_t launch_as(bool cooperative, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                      void* stream, Args... args) {
  if (shared_bytes > kSharedWithoutAsking) {
    cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args... args) {
  return launch_as(false, kernel, grid, block, shared_bytes, stream, args...);
}

// Starts blocks that may wait for each other (grid.h): all are there at once, or none starts.
template <class... Params, class... Args>
cudaError_t launch_together(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                            Args... args) {
  return launch_as(true, kernel, grid, block, shared_bytes, stream, args...);
}

}  // namespace handtuned::cuda
