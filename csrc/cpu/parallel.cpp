#include "parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace handtuned {

int thread_count() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("handtuned: torch does not tell its number of threads");
  return int(threads);
}

void parallel_range(int64_t n, int64_t grain, RangeFn fn, void* context) {
  if (n <= grain) return n > 0 ? fn(0, n, context) : void();
  if (torch_parallel_for(0, n, grain, fn, context) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("handtuned: torch's thread pool failed to run a parallel loop");
}

}  // namespace handtuned
