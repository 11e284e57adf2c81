// A stack and a switch between stacks (x86-64). AddressSanitizer is told, so that it knows which stack it is on.
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

 private:
  char* stack_;
  void* sp_;
};

}  // namespace simt
