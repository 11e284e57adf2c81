#include "parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace handtuned {

void parallel_range(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= grain) return n > 0 ? fn(0, n, context) : void();
  if (torch_parallel_for(0, n, grain, fn, context) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("handtuned: torch's thread pool failed to run a parallel loop");
}

int thread_count() {
  uint32_t count;
  return torch_get_num_threads(&count) == AOTI_TORCH_SUCCESS ? int(count) : 1;
}

}  // namespace handtuned
