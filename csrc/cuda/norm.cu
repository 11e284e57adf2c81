// Norm family, the launchers: plan, grid, and the kernel for the element type.
#include <device/launch.h>

#include <type_traits>

#include "launchers.h"
#include "norm_backward.cuh"
#include "norm_forward.cuh"
#include "norm_plan.h"

namespace handtuned::cuda {
namespace {

// Calls run with a null pointer to the element type.
template <class F>
cudaError_t by_type(DType dtype, F run) {
  switch (dtype) {
    case DType::f32: return run(static_cast<float*>(nullptr));
    case DType::f64: return run(static_cast<double*>(nullptr));
    case DType::bf16: return run(static_cast<bf16*>(nullptr));
    case DType::f16: return run(static_cast<f16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether the packs of every row lie at multiples of 16 bytes; absent tensors do.
bool rows_aligned(const StridedRows& rows, int64_t lanes) {
  bool ok = aligned(rows.data);
  for (int d = 0; d < rows.ndim; ++d) ok = ok && rows.stride[d] % lanes == 0;
  return ok;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
cudaError_t forward(const NormForward& p, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const RowPlan plan = plan_forward(p.cols, p.dtype, p.dropout.p > 0);
  const bool wide = p.cols % kLanes<T> == 0 && rows_aligned(p.input, kLanes<T>) &&
                    rows_aligned(p.residual, kLanes<T>) && aligned(p.weight) && aligned(p.bias) && aligned(p.output) &&
                    aligned(p.new_residual);
  auto kernel = plan.home == Home::registers ? norm_forward_kernel<T, true> : norm_forward_kernel<T, false>;
  return launch(kernel, dim3(ceil_div(p.rows, plan.rows)), dim3(plan.threads * plan.rows), plan.shared_bytes, stream, p,
                Keep<Accumulate<T>>(p.dropout), plan, wide);
}

template <class T>
cudaError_t backward(const NormBackward& p, int device, void* stream) {
  using A = Accumulate<T>;
  const OnDevice guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const RowPlan plan = plan_backward(p.cols, p.dtype, p.dropout.p > 0);
  const bool wide = p.cols % kLanes<T> == 0 && rows_aligned(p.grad_output, kLanes<T>) &&
                    rows_aligned(p.input, kLanes<T>) && rows_aligned(p.grad_new_residual, kLanes<T>) &&
                    aligned(p.weight) && aligned(p.grad_normalised) && aligned(p.grad_dropped);
  const bool wants_sums = p.grad_weight != nullptr || p.grad_bias != nullptr;
  const bool sum_columns = wants_sums && plan.sums_columns;
  const int64_t chunk = chunk_rows(p.rows, plan), count = chunks(p.rows, plan);
  cudaError_t status = cudaSuccess;
  if (p.grad_normalised != nullptr || sum_columns) {
    auto kernel =
        plan.home == Home::registers ? norm_backward_rows_kernel<T, true> : norm_backward_rows_kernel<T, false>;
    status = launch(kernel, dim3(count), dim3(plan.threads * plan.rows), plan.shared_bytes, stream, p,
                    Keep<A>(p.dropout), plan, chunk, sum_columns, wide);
  }
  if (status == cudaSuccess && wants_sums && !sum_columns) {
    status =
        launch(norm_backward_columns_kernel<T>, dim3(ceil_div(p.cols, kWarp * kLanes<T>), count),
               dim3(kWarp * kColumnGroups), 2 * kLanes<T> * kColumnGroups * kWarp * sizeof(A), stream, p, chunk, wide);
  }
  if (status == cudaSuccess && wants_sums) {
    status = launch(norm_partials_kernel<T>, dim3(ceil_div(p.cols, kWarp), 2), dim3(kWarp * kPartialGroups),
                    kPartialGroups * kWarp * sizeof(A), stream, p, count);
  }
  return status;
}

}  // namespace

int norm_forward(const NormForward& p, int device, void* stream) {
  return by_type(p.dtype, [&](auto* tag) { return forward<std::remove_pointer_t<decltype(tag)>>(p, device, stream); });
}

int norm_backward(const NormBackward& p, int device, void* stream) {
  return by_type(p.dtype, [&](auto* tag) { return backward<std::remove_pointer_t<decltype(tag)>>(p, device, stream); });
}

}  // namespace handtuned::cuda
