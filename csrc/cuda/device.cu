// What the CUDA library says about itself and the devices it finds. Torch-free: raw numbers and a status; the caller
// turns a status other than 0 into an error. cudart is linked statically, so a machine without CUDA can load this.
#include <cuda_runtime.h>

#include <device/launch.h>

#include "launchers.h"

namespace handtuned::cuda {
namespace {

int capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
  return major * 10 + minor;
}

const char* error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int upload(const Upload& what, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  return cudaMemcpyAsync(what.to, what.from, what.bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
}

const CudaKernels table = {
    HANDTUNED_VERSION,   80,        &capability,  &error,        &norm_forward, &norm_backward, &attention_forward,
    &attention_backward, &rnn_pack, &rnn_forward, &rnn_backward, &upload};

}  // namespace
}  // namespace handtuned::cuda

extern "C" {

const handtuned::CudaKernels* handtuned_cuda_kernels() { return &handtuned::cuda::table; }

// Number of devices, or 0 where there is no driver.
int handtuned_cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Compute capability (90 for sm_90), multiprocessors and bytes of memory of a device. Returns a cudaError_t.
int handtuned_cuda_device(int device, int* capability, int* multiprocessors, long long* memory_bytes) {
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess) return status;
  *capability = properties.major * 10 + properties.minor;
  *multiprocessors = properties.multiProcessorCount;
  *memory_bytes = static_cast<long long>(properties.totalGlobalMem);
  return cudaSuccess;
}

const char* handtuned_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // extern "C"
