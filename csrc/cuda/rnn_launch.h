// What the launchers of the recurrent family share: element types, grids, the device's limits, where weights lie.
#pragma once
#include <device/launch.h>

#include "rnn_elements.cuh"
#include "rnn_plan.h"

namespace handtuned::cuda {

// The work of one call, started kernel by kernel on one stream; nothing is started after an error.
class Starter {
 public:
  Starter(int device, void* stream) : guard_(device), stream_(stream), status_(guard_.status()) {
    ask(limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    ask(limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }

  DeviceLimits limits{};
  cudaError_t status() const { return status_; }

  template <class... Params, class... Args>
  void start(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
    if (status_ == cudaSuccess) status_ = launch(kernel, grid, dim3(threads), shared_bytes, stream_, args...);
  }
  template <class... Params, class... Args>
  void start_together(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, Args... args) {
    if (status_ == cudaSuccess) status_ = launch_together(kernel, grid, dim3(threads), shared_bytes, stream_, args...);
  }
  // A kernel with a thread for each of `count`.
  template <class... Params, class... Args>
  void start_each(void (*kernel)(Params...), int64_t count, Args... args) {
    constexpr int kThreads = 256;
    if (count > 0) start(kernel, dim3((count + kThreads - 1) / kThreads), kThreads, 0, count, args...);
  }
  void zero(void* to, size_t bytes) {
    if (status_ == cudaSuccess && bytes > 0)
      status_ = cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream_));
  }

 private:
  void ask(int& value, cudaDeviceAttr attribute, int device) {
    if (status_ == cudaSuccess) status_ = cudaDeviceGetAttribute(&value, attribute, device);
  }

  OnDevice guard_;
  void* stream_;
  cudaError_t status_;
};

// Calls run with a null pointer to the element type.
template <class F>
cudaError_t rnn_by_type(DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(static_cast<float*>(nullptr));
    case DType::f64: return run(static_cast<double*>(nullptr));
    case DType::bf16: return run(static_cast<bf16*>(nullptr));
    case DType::f16: return run(static_cast<f16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// Whether a warp's weights may stay in registers: float64 would take all of them.
template <class T>
inline constexpr bool kMayHold = sizeof(Accumulate<T>) == 4;

// A layer's input: what the layer below gave, under dropout in `dropped`; nullptr: the caller's.
template <class A>
const A* input_of(Starter& starter, const Rnn& p, const Noise<A>& noise, int64_t layer, const A* below, A* dropped) {
  if (layer == 0 || !noise.drops_input) return layer == 0 ? nullptr : below;
  const int64_t width = p.directions * p.state;
  starter.start_each(rnn_drop_input_kernel<A>, p.longest * p.batch * width, p, noise, layer, below, dropped, width);
  return dropped;
}

// Zeros where lengths leave a tensor of the caller over.
template <class T>
void clear_padding(Starter& starter, const Rnn& p, const RnnTensor& tensor, int64_t width) {
  if (p.lengths && !p.packed && tensor.data)
    starter.start_each(rnn_clear_kernel<T>, p.batch * p.steps * width, p, tensor, width);
}

// What rnn_pack makes of a layer and direction: as the CPU's in size (rnn.h), but matrices stand row by row as the
// caller has them, and biases and peepholes without gaps, at the places where the CPU's begin.
template <class T>
struct PackedDirection {
  T *x, *h, *r;
  Accumulate<T>*x_bias, *h_bias, *peepholes;
};

// The place of the next direction's weights; `packed` moves on.
template <class T>
PackedDirection<T> next_direction(const Rnn& p, int64_t layer, char*& packed) {
  const int64_t gates = gates_of(p.cell);
  auto next = [&](int64_t bytes) { return packed += bytes, packed - bytes; };
  auto matrix = [&](int64_t gates, int64_t out, int64_t in) {
    return reinterpret_cast<T*>(next(rnn_matrix_bytes(p.dtype, gates, out, in)));
  };
  PackedDirection<T> at{};
  at.x = matrix(gates, p.hidden, rnn_input_size(p, layer));
  at.h = matrix(gates, p.hidden, p.state);
  if (p.state != p.hidden) at.r = matrix(1, p.state, p.hidden);
  at.x_bias = reinterpret_cast<Accumulate<T>*>(next(rnn_bias_bytes(p)));
  at.h_bias = at.x_bias + rnn_bias_numbers(p);
  at.peepholes = reinterpret_cast<Accumulate<T>*>(next(rnn_peephole_bytes(p)));
  return at;
}

}  // namespace handtuned::cuda
