// Attention backward, the launchers.
#include <device/launch.h>

#include "attention_backward.cuh"
#include "attention_backward_general.cuh"
#include "attention_options.cuh"
#include "launchers.h"

namespace handtuned::cuda {
namespace {

// dQ, dK and dV, whichever are wanted.
template <class T, int W>
cudaError_t on_tensor_cores(const AttentionBackward& p, const AttentionPlan& plan, void* stream) {
  const Scores<float, Units::log2> scores(p);
  const Keep<float> keep(p.dropout);
  const float scale = float(p.scale);
  const bool wide =
      in_whole_chunks(p.query) && in_whole_chunks(p.key) && in_whole_chunks(p.value) && in_whole_chunks(p.grad_output);
  cudaError_t status = cudaSuccess;
  if (p.grad_query.data) {
    status =
        launch(attention_grad_query_kernel<T, W>, dim3(plan.row_tiles, p.kv_heads), dim3(QueryBlock<W>::kThreads),
               QueryBlock<W>::kQueryBytes, stream, p, scores, keep, plan, scale, wide && in_whole_chunks(p.grad_query));
  }
  const int64_t tiles = key_tiles(p);
  if (status == cudaSuccess && tiles > 0 && (p.grad_key.data || p.grad_value.data)) {
    status = launch(attention_grad_key_kernel<T, W>, dim3(tiles, p.kv_heads, KeyBlock<W>::kBoth ? 1 : 2),
                    dim3(KeyBlock<W>::kThreads), KeyBlock<W>::kKeyBytes, stream, p, scores, keep, scale,
                    wide && in_whole_chunks(p.grad_key) && in_whole_chunks(p.grad_value));
  }
  return status;
}

template <class T>
cudaError_t general(const AttentionBackward& p, const AttentionPlan& plan, void* stream) {
  using A = Accumulate<T>;
  const Scores<A> scores(p);
  const Keep<A> keep(p.dropout);
  const dim3 block(kProductThreads);
  constexpr int kBytes = ProductMemory<T>::kBytes;
  cudaError_t status = cudaSuccess;
  if (p.grad_query.data) {
    status =
        launch(attention_grad_query_general_kernel<T>, dim3(plan.row_tiles, p.kv_heads, ceil_div(p.width, kColumns<A>)),
               block, kBytes, stream, p, scores, keep, plan, A(p.scale));
  }
  const int64_t tiles = key_tiles(p), key_chunks = p.grad_key.data ? ceil_div(p.width, kColumns<A>) : 0;
  const int64_t value_chunks = p.grad_value.data ? ceil_div(p.value_width, kColumns<A>) : 0;
  if (status == cudaSuccess && tiles * (key_chunks + value_chunks) > 0) {
    status = launch(attention_grad_key_general_kernel<T>, dim3(tiles, p.kv_heads, key_chunks + value_chunks), block,
                    kBytes, stream, p, scores, keep, A(p.scale), int(key_chunks));
  }
  return status;
}

template <class T>
cudaError_t of_tensors(const AttentionBackward& p, const AttentionPlan& plan, void* stream) {
  if constexpr (sizeof(T) == 2) {
    switch (width_on_tensor_cores(p)) {
      case 64: return on_tensor_cores<T, 64>(p, plan, stream);
      case 128: return on_tensor_cores<T, 128>(p, plan, stream);
      case 256: return on_tensor_cores<T, 256>(p, plan, stream);
    }
  }
  return general<T>(p, plan, stream);
}

template <class T>
cudaError_t of_options(const AttentionBackward& p, void* stream) {
  using A = Accumulate<T>;
  cudaError_t status = cudaSuccess;
  if (p.grad_mask && p.mask.rows * p.mask.keys > 0) {
    const AttentionMask& m = p.mask;
    status = launch(attention_grad_mask_kernel<T>,
                    dim3(m.batches * m.heads, ceil_div(m.rows, kTileRows), ceil_div(m.keys, kTileKeys)),
                    dim3(kProductThreads), ProductMemory<T>::kBytes, stream, p, Scores<A>(p), Keep<A>(p.dropout));
  }
  if (status == cudaSuccess && p.device_grad_sinks) {
    status = launch(attention_grad_sinks_kernel<T>, dim3(p.heads), dim3(kSinkThreads), kReduceBytes<double>, stream, p);
  }
  return status;
}

template <class T>
cudaError_t backward(const AttentionBackward& p, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const AttentionPlan plan = plan_attention(p);
  cudaError_t status = launch(attention_delta_kernel<T>, dim3(plan.row_tiles, p.kv_heads, kTileRows / kDeltaWarps),
                              dim3(kWarp * kDeltaWarps), 0, stream, p, plan);
  if (status == cudaSuccess) status = of_tensors<T>(p, plan, stream);
  return status == cudaSuccess ? of_options<T>(p, stream) : status;
}

}  // namespace

int attention_backward(const AttentionBackward& p, int device, void* stream) {
  switch (p.dtype) {
    case DType::f32: return backward<float>(p, device, stream);
    case DType::f64: return backward<double>(p, device, stream);
    case DType::bf16: return backward<bf16>(p, device, stream);
    case DType::f16: return backward<f16>(p, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace handtuned::cuda
