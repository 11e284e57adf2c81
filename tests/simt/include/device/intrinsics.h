// The emulator's version of csrc/cuda/device/intrinsics.h: the same functions, every access checked.
#pragma once
#include <cuda_runtime.h>

#include "memory.h"

namespace handtuned::cuda {

template <class T>
using Shared = simt::Shared<T>;

template <class T>
inline Shared<T> shared(int offset) {
  return Shared<T>(size_t(offset));
}

template <class V>
inline V load_global(const V* p) {
  simt::note_load(p, sizeof(V));
  return *p;
}
template <class V>
inline void store_global(V* p, V value) {
  simt::note_store(p, sizeof(V));
  *p = value;
}

}  // namespace handtuned::cuda
