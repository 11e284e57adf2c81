// A word of global memory through which blocks of a cooperative launch tell each other that something is done. Tests
// put their own version of this header in front of it (tests/simt).
#pragma once
#include <cuda_runtime.h>

namespace handtuned::cuda {

// Adds one. What this thread did before, and what others did before a barrier with it, is seen by whoever sees that.
__device__ inline void signal(unsigned* word) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(word) : "memory");
}

// Until the word is at least `least`.
__device__ inline void wait_for(const unsigned* word, unsigned least) {
  unsigned found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
  } while (found < least);
}

}  // namespace handtuned::cuda
