// Copies from global to shared memory that go on while the thread does. They are complete for the thread that started
// them after cp_async_wait(), and for others after a barrier that follows it.
#pragma once
#include <cstdint>

#include <device/intrinsics.h>

namespace handtuned::cuda {

// The first `bytes` (0 to 16) from `from`, which is aligned to 16 also where nothing is read; zeros up to 16.
__device__ inline void cp_async(Shared<uint4> to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from),
               "r"(bytes)
               : "memory");
}

// Ends a group: what was started since the last one, perhaps nothing.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the last `Pending` groups are under way.
template <int Pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace handtuned::cuda
