// The norm kernels under ThreadSanitizer: each CUDA thread is a thread of its own, which only __syncthreads, __syncwarp
// and the end of a launch order. So two accesses to one address of global or shared memory, one of them a store, with
// nothing between them, are reported whatever the schedule was, also those of different blocks.
//
//     handtuned_simt_races NAME       a name of kRuns; exit status 66 where a race was found
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <device/intrinsics.h>

#include "launchers.h"
#include "norm_plan.h"

namespace {

using namespace handtuned;
using handtuned::cuda::load_global;
using handtuned::cuda::store_global;

// ---- the kernels ---------------------------------------------------------------------------------------------------

struct Shape {
  int64_t rows, cols;
  DType dtype;
  bool centre, add, dropout;
  bool sums;  // dweight and dbias, which take 256 threads for every 32 columns: ThreadSanitizer cannot have many
};

// Short rows and rows of several warps, in registers and in shared memory; several chunks of rows.
const Shape kShapes[] = {
    {21, 72, DType::f32, true, true, true, true},
    {18, 20, DType::f64, true, false, false, true},
    {3, 1100, DType::bf16, true, true, false, false},
    {2, 7000, DType::f64, false, false, true, false},
};

// Device memory: what is never written stays what it was.
struct Buffer {
  std::vector<double> words;  // aligned to 16 bytes by malloc
  explicit Buffer(int64_t bytes) : words(size_t(bytes / 8 + 1), 0.5) {}
  void* data() { return words.data(); }
};

StridedRows rows_of(Buffer& buffer, const Shape& s) {
  StridedRows rows;
  rows.data = buffer.data();
  rows.ndim = 1;
  rows.size[0] = s.rows;
  rows.stride[0] = s.cols;
  return rows;
}

int norm(const Shape& s) {
  const int64_t tensor = s.rows * s.cols * bytes_of(s.dtype), row = s.cols * 8, column = s.rows * 8;
  const cuda::RowPlan plan = cuda::plan_backward(s.cols, s.dtype, s.dropout);
  Buffer x(tensor), residual(tensor), y(tensor), h(tensor), dy(tensor), dh(tensor), dx(tensor), dropped(tensor);
  Buffer weight(row), bias(row), dweight(row), dbias(row), mean(column), rstd(column);
  Buffer partials(cuda::chunks(s.rows, plan) * 2 * s.cols * 8);
  const uint64_t seed = 1234;
  const Dropout dropout = {s.dropout ? 0.3 : 0.0, 0, s.dropout ? &seed : nullptr};

  NormForward f = {};
  f.rows = s.rows, f.cols = s.cols, f.dtype = f.weight_dtype = s.dtype;
  f.centre = s.centre, f.eps = 1e-5, f.dropout = dropout;
  f.input = rows_of(x, s);
  if (s.add) f.residual = rows_of(residual, s), f.new_residual = h.data();
  f.weight = weight.data(), f.bias = bias.data(), f.output = y.data();
  f.mean = s.centre ? mean.data() : nullptr, f.rstd = rstd.data();
  if (int status = cuda::norm_forward(f, 0, nullptr)) return status;

  NormBackward b = {};
  b.rows = s.rows, b.cols = s.cols, b.dtype = b.weight_dtype = s.dtype;
  b.centre = s.centre, b.dropout = dropout;
  b.grad_output = rows_of(dy, s), b.input = s.add ? rows_of(h, s) : rows_of(x, s);
  if (s.add) b.grad_new_residual = rows_of(dh, s);
  b.weight = weight.data(), b.mean = f.mean, b.rstd = rstd.data();
  b.grad_normalised = dx.data(), b.grad_dropped = s.dropout ? dropped.data() : nullptr;
  if (s.sums) b.grad_weight = dweight.data(), b.grad_bias = dbias.data(), b.partials = partials.data();
  return cuda::norm_backward(b, 0, nullptr);
}

int norms() {
  for (const Shape& s : kShapes)
    if (int status = norm(s)) return status;
  return 0;
}

// ---- the proof that races are found --------------------------------------------------------------------------------

int launch(void (*kernel)(float*), unsigned blocks, unsigned threads) {
  static float words[1024] = {};
  cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), 1024, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, static_cast<float*>(words));
}

// Neighbours exchange through global memory.
template <bool barrier>
void neighbours(float* words) {
  store_global(words + threadIdx.x, float(threadIdx.x));
  if (barrier) __syncthreads();
  const float of_neighbour = load_global(words + (threadIdx.x ^ 1));
  store_global(words + 512 + threadIdx.x, of_neighbour);
}
template <bool barrier>
void neighbours_of_a_warp(float* words) {
  store_global(words + threadIdx.x, float(threadIdx.x));
  if (barrier) __syncwarp();
  store_global(words + 512 + threadIdx.x, float(load_global(words + (threadIdx.x ^ 1))));
}
// A shuffle brings a value along and orders nothing else.
void neighbours_shuffle(float* words) {
  store_global(words + threadIdx.x, float(threadIdx.x));
  const float of_neighbour = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  store_global(words + 512 + threadIdx.x, of_neighbour + load_global(words + (threadIdx.x ^ 1)));
}
void blocks_write_one_word(float* words) {
  if (threadIdx.x == 0) store_global(words, float(blockIdx.x));
}
void blocks_write_their_own(float* words) {
  if (threadIdx.x == 0) store_global(words + blockIdx.x, float(blockIdx.x));
}

struct Run {
  const char* name;
  int (*run)();
};
const Run kRuns[] = {
    {"norms", norms},
    {"barrier", [] { return launch(neighbours<true>, 1, 64); }},
    {"no_barrier", [] { return launch(neighbours<false>, 1, 64); }},
    {"warp_barrier", [] { return launch(neighbours_of_a_warp<true>, 1, 64); }},
    {"no_warp_barrier", [] { return launch(neighbours_of_a_warp<false>, 1, 64); }},
    {"shuffle", [] { return launch(neighbours_shuffle, 1, 64); }},
    {"blocks", [] { return launch(blocks_write_their_own, 9, 32); }},
    {"blocks_one_word", [] { return launch(blocks_write_one_word, 9, 32); }},
    {"two_launches", []() -> int { return launch(blocks_write_their_own, 9, 32) || launch(neighbours<true>, 1, 64); }},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Run& run : kRuns) {
    if (count < 2 || std::string(run.name) != arguments[1]) continue;
    const int status = run.run();
    if (status) std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
    return status ? 1 : 0;
  }
  return 2;
}
