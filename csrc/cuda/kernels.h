// The function table of the CUDA library: what the skin calls. A launcher puts its kernels on the stream and returns a
// cudaError_t, 0 if all is well; it neither waits nor allocates. Pointers in the Params are device memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace handtuned {

struct NormForward;
struct NormBackward;
struct AttentionForward;
struct AttentionBackward;
struct RnnPack;
struct RnnForward;
struct RnnBackward;

// Bytes of the host into device memory, read before the call returns.
struct Upload {
  void* to;
  const void* from;
  size_t bytes;
};

struct CudaKernels {
  const char* version;            // of handtuned: the skin's and the library's Params are one
  int least_capability;           // 80: sm_80
  int (*capability)(int device);  // 90 for sm_90; 0 if it cannot be asked
  const char* (*error)(int status);
  int (*norm_forward)(const NormForward&, int device, void* stream);
  int (*norm_backward)(const NormBackward&, int device, void* stream);
  int (*attention_forward)(const AttentionForward&, int device, void* stream);
  int (*attention_backward)(const AttentionBackward&, int device, void* stream);
  int (*rnn_pack)(const RnnPack&, int device, void* stream);
  int (*rnn_forward)(const RnnForward&, int device, void* stream);
  int (*rnn_backward)(const RnnBackward&, int device, void* stream);
  int (*upload)(const Upload&, int device, void* stream);
};

}  // namespace handtuned

extern "C" const handtuned::CudaKernels* handtuned_cuda_kernels();
