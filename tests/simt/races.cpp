// The norm and recurrent kernels under ThreadSanitizer: each CUDA thread is a thread of its own, which only
// __syncthreads, __syncwarp, signals between blocks and the end of a launch order. So two accesses to one address of
// global or shared memory, one of them a store, with nothing between them, are reported whatever the schedule was, also
// those of different blocks.
//
//     handtuned_simt_races NAME       a name of kRuns; exit status 66 where a race was found
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include <device/grid.h>
#include <device/intrinsics.h>

#include "launchers.h"
#include "norm_plan.h"
#include "rnn_plan.h"
#include "simt.h"

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

// Weights in registers, in shared memory, and nowhere: multiprocessors and bytes of shared memory of a block.
struct RnnShape {
  RnnCell cell;
  DType dtype;
  int64_t steps, batch, input, hidden, state, directions;
  simt::DeviceSize device;
};
const RnnShape kRnnShapes[] = {
    {RnnCell::lstm, DType::f32, 3, 3, 5, 21, 21, 1, {16, 227 << 10}},
    {RnnCell::coupled, DType::f32, 2, 3, 5, 11, 6, 2, {16, 227 << 10}},
    {RnnCell::gru, DType::bf16, 3, 9, 5, 21, 21, 1, {2, 227 << 10}},
    {RnnCell::lstm, DType::f64, 2, 2, 3, 11, 6, 1, {2, 18 << 10}},
};

template <class Call>
void describe(Call& call, const RnnShape& s, const void* states) {
  call = {};
  call.dtype = s.dtype, call.cell = s.cell, call.peepholes = has_cell_state(s.cell);
  call.steps = call.longest = s.steps, call.batch = s.batch, call.rows = call.used = s.steps * s.batch;
  call.input_size = s.input, call.hidden = s.hidden, call.state = s.state;
  call.layers = 1, call.directions = s.directions;
  call.h0 = states, call.c0 = has_cell_state(s.cell) ? states : nullptr;
}

int rnn(const RnnShape& s) {
  simt::device = s.device;
  const int64_t size = 8, gates = gates_of(s.cell), widest = s.hidden > s.input ? s.hidden : s.input;
  const int64_t output = s.batch * s.directions * s.state, tensor = size * s.steps * output;
  const int64_t input = size * s.steps * s.batch * s.input, states = size * s.directions * s.batch * s.hidden;
  Buffer x(input), dx(input), y(tensor), dy(tensor), initial(states), h(states), c(states), dh(states), dc(states);

  RnnPack pack;
  describe(pack, s, nullptr);
  pack.bias = true;
  std::vector<Buffer> weights, gradients;
  std::vector<void*> from, to;
  for (int64_t i = 0; i < s.directions * rnn_weights_each(pack, true); ++i) {
    weights.emplace_back(size * gates * s.hidden * widest), gradients.emplace_back(size * gates * s.hidden * widest);
    from.push_back(weights.back().data()), to.push_back(gradients.back().data());
  }
  Buffer packed(rnn_packed_bytes(pack));
  pack.weights = from.data(), pack.packed_weights = packed.data();
  if (int status = cuda::rnn_pack(pack, 0, nullptr)) return status;

  RnnForward f;
  describe(f, s, initial.data());
  Buffer saved(rnn_saved_of_layer(f) * size), scratch(cuda::forward_scratch(f, true).bytes);
  f.input = {x.data(), s.batch * s.input, s.input};
  f.output = {y.data(), output, s.directions * s.state};
  f.packed_weights = packed.data(), f.hn = h.data(), f.cn = c.data();
  f.saved = saved.data(), f.scratch = scratch.data();
  if (int status = cuda::rnn_forward(f, 0, nullptr)) return status;

  RnnBackward b;
  describe(b, s, initial.data());
  Buffer room(cuda::backward_scratch(b).bytes);
  b.grad_output = {dy.data(), output, s.directions * s.state};
  b.input = f.input, b.grad_input = {dx.data(), s.batch * s.input, s.input};
  b.weights = from.data(), b.grad_weights = to.data(), b.bias = true;
  b.saved = saved.data(), b.scratch = room.data();
  b.grad_h0 = dh.data(), b.grad_c0 = has_cell_state(s.cell) ? dc.data() : nullptr;
  return cuda::rnn_backward(b, 0, nullptr);
}

int rnns() {
  for (const RnnShape& s : kRnnShapes)
    if (int status = rnn(s)) return status;
  return 0;
}

// ---- the proof that races are found --------------------------------------------------------------------------------

int launch(void (*kernel)(float*), unsigned blocks, unsigned threads, bool together = false) {
  static float words[1024] = {};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), 1024, nullptr, &attribute, together};
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

// Blocks exchange through global memory.
template <bool barrier>
void blocks_exchange(float* words) {
  cuda::BlockGroup blocks{reinterpret_cast<unsigned*>(words + 1023), gridDim.x};
  if (threadIdx.x == 1) store_global(words + blockIdx.x, float(blockIdx.x));
  if (barrier) blocks.meet();
  __syncthreads();
  if (threadIdx.x == 2) store_global(words + 512 + blockIdx.x, float(load_global(words + (blockIdx.x ^ 1))));
}

struct Run {
  const char* name;
  int (*run)();
};
const Run kRuns[] = {
    {"norms", norms},
    {"rnns", rnns},
    {"barrier", [] { return launch(neighbours<true>, 1, 64); }},
    {"no_barrier", [] { return launch(neighbours<false>, 1, 64); }},
    {"warp_barrier", [] { return launch(neighbours_of_a_warp<true>, 1, 64); }},
    {"no_warp_barrier", [] { return launch(neighbours_of_a_warp<false>, 1, 64); }},
    {"shuffle", [] { return launch(neighbours_shuffle, 1, 64); }},
    {"blocks", [] { return launch(blocks_write_their_own, 9, 32); }},
    {"blocks_one_word", [] { return launch(blocks_write_one_word, 9, 32); }},
    {"blocks_meet", [] { return launch(blocks_exchange<true>, 4, 64, true); }},
    {"blocks_do_not_meet", [] { return launch(blocks_exchange<false>, 4, 64, true); }},
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
