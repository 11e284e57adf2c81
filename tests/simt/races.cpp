// The kernels under ThreadSanitizer: each CUDA thread is a thread of its own, which only
// __syncthreads, __syncwarp, signals between blocks and the end of a launch order. So two accesses to one address of
// global or shared memory, one of them a store, with nothing between them, are reported whatever the schedule was, also
// those of different blocks.
//
//     handtuned_simt_races NAME       a name of kRuns; exit status 66 where a race was found
#include <cstdio>
#include <string>

#include <cuda_runtime.h>

#include <device/grid.h>
#include <device/intrinsics.h>

#include "races.h"

namespace {

using namespace handtuned;
using handtuned::cuda::load_global;
using handtuned::cuda::store_global;

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
    {"attentions", attentions},
    {"attention_in_chunks", attention_in_chunks},
    {"attention_with_one_output", attention_with_one_output},
    {"attention_with_one_gradient", attention_with_one_gradient},
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
