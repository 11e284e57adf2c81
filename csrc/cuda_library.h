// Which kernels serve a call: the CPU's function table, or that of the CUDA library. The library is a file of its own
// beside the extension, opened at run time, so that the extension is one whether or not nvcc was there.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/kernels.h"
#include "tensor.h"

namespace handtuned {

// Opens the CUDA library and registers its kernels for CUDA tensors. No device is touched, and none needs to be there.
// Throws std::runtime_error if it cannot be opened or was built from another release.
void load_cuda(const std::string& path);

// For tests: CPU tensors go to the table of this library, the same sources compiled for an emulator; "" ends that.
void emulate_cuda(const std::string& path);

// Where a call runs: its main tensor's device, and the CUDA table that serves it there, nullptr for the CPU's.
struct Place {
  Device device;
  const CudaKernels* cuda = nullptr;
};
Place place_of(const char* op, const Tensor& main);

// Calls a launcher on torch's current stream; an error becomes an exception.
template <class Params>
void launch(const char* op, const Place& place, int (*launcher)(const Params&, int, void*), const Params& params);

// The pieces of launch().
void* current_stream(const char* op, const Place& place);
void check_launch(const char* op, const Place& place, int status);

template <class Params>
void launch(const char* op, const Place& place, int (*launcher)(const Params&, int, void*), const Params& params) {
  check_launch(op, place, launcher(params, place.device.index, current_stream(op, place)));
}

// Register a family's ops for one dispatch key's library (norm.cpp, attention.cpp, rnn.cpp).
void register_norm(torch::stable::detail::StableLibrary& library);
void register_attention(torch::stable::detail::StableLibrary& library);
void register_rnn(torch::stable::detail::StableLibrary& library);

}  // namespace handtuned
