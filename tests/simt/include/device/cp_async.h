// The emulator's version of csrc/cuda/device/cp_async.h. A copy makes its target NaN when it is started and is carried
// out by the wait that has to see it, so that whoever looks earlier finds NaN, or is reported as a race.
#pragma once
#include <device/intrinsics.h>

namespace handtuned::cuda {

inline void cp_async(Shared<uint4> to, const void* from, int bytes) {
  simt::async_copy(to.offset(), from, size_t(bytes), 16);
}

inline void cp_async_commit() { simt::async_commit(); }

template <int Pending>
inline void cp_async_wait() {
  simt::async_wait(Pending);
}

}  // namespace handtuned::cuda
