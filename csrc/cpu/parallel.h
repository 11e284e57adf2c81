// Parallel loops run on torch's own thread pool, so torch.set_num_threads() rules and nothing oversubscribes.
#pragma once
#include <cstdint>

namespace handtuned {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, n) into contiguous ranges of at least `grain`; serial when one range is enough. fn must not throw.
void parallel_range(int64_t n, int64_t grain, RangeFn fn, void* context);

int thread_count();  // of torch's pool

#ifdef HANDTUNED_ISA
namespace HANDTUNED_ISA {

template <class F>
void parallel_for(int64_t n, int64_t grain, F f) {
  parallel_range(n, grain, [](int64_t begin, int64_t end, void* self) { (*static_cast<F*>(self))(begin, end); }, &f);
}

// f(i) once for each i in [0, n), in the order of a common counter, so that pieces of unlike cost fill all threads. A
// thread takes `run` pieces at a time. What f(i) computes may depend on i alone.
template <class F>
void parallel_pieces(int64_t n, int64_t run, F f) {
  int64_t next = 0;
  parallel_for(n, run, [&](int64_t, int64_t) {
    for (int64_t i; (i = __atomic_fetch_add(&next, run, __ATOMIC_RELAXED)) < n;)
      for (const int64_t end = i + run < n ? i + run : n; i < end; ++i) f(i);
  });
}

// The same one piece at a time, or all of them on the calling thread.
template <class F>
void parallel_pieces(int64_t n, bool serial, F f) {
  parallel_pieces(n, serial ? n : int64_t(1), f);
}

}  // namespace HANDTUNED_ISA
#endif

}  // namespace handtuned
