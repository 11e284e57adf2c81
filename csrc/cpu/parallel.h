// Parallel loops run on torch's own thread pool, so torch.set_num_threads() rules and nothing oversubscribes.
#pragma once
#include <cstdint>

namespace handtuned {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, n) into contiguous ranges of at least `grain`; serial when one range is enough. fn must not throw.
void parallel_range(int64_t n, int64_t grain, RangeFn fn, void* context);

#ifdef HANDTUNED_ISA
namespace HANDTUNED_ISA {

template <class F>
void parallel_for(int64_t n, int64_t grain, F f) {
  parallel_range(n, grain, [](int64_t begin, int64_t end, void* self) { (*static_cast<F*>(self))(begin, end); }, &f);
}

}  // namespace HANDTUNED_ISA
#endif

}  // namespace handtuned
