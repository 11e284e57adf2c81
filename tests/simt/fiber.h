// A stack and a switch between stacks (x86-64). AddressSanitizer is told, so that it knows which stack it is on; to
// ThreadSanitizer every fiber is a thread, whose switches order nothing.
#pragma once
#include <cstddef>

namespace simt {

class Fiber {
 public:
  // entry runs on the fiber's own stack at the first resume() and must never return: it ends in a suspend().
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();         // from the host's stack; returns when the fiber suspends
  void suspend();        // from this fiber's stack
  void started() const;  // the first thing on a fiber's stack

  // What a fiber takes from one that is done, for making it takes longer than most kernels.
  struct Place {
    char* stack;
    void* thread = nullptr;  // ThreadSanitizer's
  };

 private:
  Place place_;
  void* sp_;
};

// What orders memory, for ThreadSanitizer: all that was done before publish(place) comes before what follows an
// observe(place). Nothing without it.
extern const bool thread_sanitizer;  // there is one: it finds races on global memory
void publish(void* place);
void observe(void* place);

// For a scope, what the running fiber or the host does is the emulator's doing, not a CUDA thread's.
void ignore_accesses(bool begin);
struct Ignored {
  Ignored() { ignore_accesses(true); }
  ~Ignored() { ignore_accesses(false); }
};

// Launches are ordered: places of finished fibers may be used again.
void reuse_places();

}  // namespace simt
