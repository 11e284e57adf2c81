// What only nvcc can compile or only a GPU can do: shared memory by the launch, and accesses to memory. Tests put their
// own version of this one header in front of it and compile every kernel with g++ (tests/simt), so kernels touch
// memory through these functions and nowhere else.
#pragma once
#include <cuda_runtime.h>

namespace handtuned::cuda {

// A pointer into shared memory.
template <class T>
using Shared = T*;

// Element 0 of the T's that start `offset` bytes into the block's shared memory.
template <class T>
__device__ inline Shared<T> shared(int offset) {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes + offset);
}

// One access of sizeof(V) bytes to global memory; p is aligned to them.
template <class V>
__device__ inline V load_global(const V* p) {
  return *p;
}
template <class V>
__device__ inline void store_global(V* p, V value) {
  *p = value;
}

}  // namespace handtuned::cuda
