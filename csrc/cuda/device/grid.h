// A barrier between blocks of a cooperative launch, in global memory. Unlike cooperative_groups' it is of those blocks
// alone that exchange something, and needs no relocatable device code.
#pragma once
#include <cuda_runtime.h>

#include <device/signal.h>

namespace handtuned::cuda {

// Blocks that wait for each other; each of their threads holds one of these. `word` was 0 at the launch.
struct BlockGroup {
  unsigned* word;
  unsigned blocks;
  unsigned met = 0;

  // What any thread of the group did before is seen by all of them after the caller's next __syncthreads().
  __device__ void meet() {
    ++met;
    __syncthreads();
    if (threadIdx.x == 0) {
      signal(word);
      wait_for(word, met * blocks);
    }
  }
};

}  // namespace handtuned::cuda
