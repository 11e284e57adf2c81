// Attention backward, the launchers.
#include <device/launch.h>

#include "attention_backward.cuh"
#include "launchers.h"

namespace handtuned::cuda {
namespace {

template <class T>
cudaError_t backward(const AttentionBackward& p, int device, void* stream) {
  using A = Accumulate<T>;
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const AttentionPlan plan = plan_attention(p);
  const Scores<A> scores(p);
  const Keep<A> keep(p.dropout);
  const dim3 block(kProductThreads);
  constexpr int kBytes = ProductMemory<T>::kBytes;
  cudaError_t status = launch(attention_delta_kernel<T>, dim3(plan.row_tiles, p.kv_heads, kTileRows / kDeltaWarps),
                              dim3(kWarp * kDeltaWarps), 0, stream, p, plan);
  if (status == cudaSuccess && p.grad_query.data) {
    status = launch(attention_grad_query_kernel<T>, dim3(plan.row_tiles, p.kv_heads, ceil_div(p.width, kColumns<A>)),
                    block, kBytes, stream, p, scores, keep, plan, A(p.scale));
  }
  const int64_t tiles = key_tiles(p), key_chunks = p.grad_key.data ? ceil_div(p.width, kColumns<A>) : 0;
  const int64_t value_chunks = p.grad_value.data ? ceil_div(p.value_width, kColumns<A>) : 0;
  if (status == cudaSuccess && tiles * (key_chunks + value_chunks) > 0) {
    status = launch(attention_grad_key_kernel<T>, dim3(tiles, p.kv_heads, key_chunks + value_chunks), block, kBytes,
                    stream, p, scores, keep, A(p.scale), int(key_chunks));
  }
  if (status == cudaSuccess && p.grad_mask && p.mask.rows * p.mask.keys > 0) {
    const AttentionMask& m = p.mask;
    status = launch(attention_grad_mask_kernel<T>,
                    dim3(m.batches * m.heads, ceil_div(m.rows, kTileRows), ceil_div(m.keys, kTileKeys)), block, kBytes,
                    stream, p, scores, keep);
  }
  if (status == cudaSuccess && p.device_grad_sinks) {
    status = launch(attention_grad_sinks_kernel<T>, dim3(p.heads), dim3(kSinkThreads), kReduceBytes<double>, stream, p);
  }
  return status;
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
