// Attention forward, the launchers: plan, grid, and the kernel for the element type and the width.
#include <device/launch.h>

#include "attention_forward.cuh"
#include "attention_general.cuh"
#include "attention_merge.cuh"
#include "launchers.h"

namespace handtuned::cuda {
namespace {

template <class T, int W>
cudaError_t on_tensor_cores(const AttentionForward& p, const AttentionPlan& plan, void* stream) {
  const bool wide =
      in_whole_chunks(p.query) && in_whole_chunks(p.key) && in_whole_chunks(p.value) && in_whole_chunks(p.output);
  return launch(attention_forward_kernel<T, W>, dim3(plan.row_tiles, p.kv_heads, plan.chunks),
                dim3(ForwardTile<W>::kThreads), ForwardTile<W>::kSharedBytes, stream, p, Scores<float, Units::log2>(p),
                Keep<float>(p.dropout), plan, wide);
}

template <class T>
cudaError_t general(const AttentionForward& p, const AttentionPlan& plan, void* stream) {
  using A = Accumulate<T>;
  return launch(attention_forward_general_kernel<T>,
                dim3(plan.row_tiles, p.kv_heads, plan.chunks * ceil_div(p.value_width, kColumns<A>)),
                dim3(kProductThreads), ProductMemory<T>::kBytes, stream, p, Scores<A>(p), Keep<A>(p.dropout), plan);
}

template <class T, Units U>
cudaError_t merge(const AttentionForward& p, const AttentionPlan& plan, void* stream) {
  if (plan.chunks == 1) return cudaSuccess;
  return launch(attention_merge_kernel<T, U>, dim3(plan.row_tiles, p.kv_heads, kTileRows / kMergeWarps),
                dim3(kWarp * kMergeWarps), 0, stream, p, Scores<Accumulate<T>, U>(p), plan);
}

template <class T>
cudaError_t forward(const AttentionForward& p, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const AttentionPlan plan = plan_attention(p);
  if constexpr (sizeof(T) == 2) {
    if (const int width = width_on_tensor_cores(p)) {
      const cudaError_t status = width == 64    ? on_tensor_cores<T, 64>(p, plan, stream)
                                 : width == 128 ? on_tensor_cores<T, 128>(p, plan, stream)
                                                : on_tensor_cores<T, 256>(p, plan, stream);
      return status == cudaSuccess ? merge<T, Units::log2>(p, plan, stream) : status;
    }
  }
  const cudaError_t status = general<T>(p, plan, stream);
  return status == cudaSuccess ? merge<T, Units::natural>(p, plan, stream) : status;
}

}  // namespace

int attention_forward(const AttentionForward& p, int device, void* stream) {
  switch (p.dtype) {
    case DType::f32: return forward<float>(p, device, stream);
    case DType::f64: return forward<double>(p, device, stream);
    case DType::bf16: return forward<bf16>(p, device, stream);
    case DType::f16: return forward<f16>(p, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace handtuned::cuda
