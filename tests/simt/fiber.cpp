#include "fiber.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// ThreadSanitizer, in a build whose kernels are instrumented. The emulator itself is not.
#ifdef SIMT_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

// Saves what the ABI says a call preserves, on the stack, and goes on where `to` was saved.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

namespace simt {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGuard = 4096;

void* host_sp;
std::vector<Fiber::Place> pool;  // of finished fibers
#ifdef SIMT_THREAD_SANITIZER
// Of this launch: another fiber's accesses to the stack would look like races, and the thread knows what was done on
// it.
std::vector<Fiber::Place> retired;
void* host_thread;
#endif

Fiber::Place new_place() {
  if (!pool.empty()) {
    const Fiber::Place place = pool.back();
    pool.pop_back();
#ifdef __SANITIZE_ADDRESS__
    // Frames that were left leave red zones behind.
    __asan_unpoison_memory_region(place.stack + kGuard, kStack - kGuard);
#endif
    return place;
  }
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE) != 0) {
    std::perror("simt: a stack");
    std::abort();
  }
#ifdef SIMT_THREAD_SANITIZER
  return {static_cast<char*>(stack), __tsan_create_fiber(0)};
#else
  return {static_cast<char*>(stack)};
#endif
}

#ifdef __SANITIZE_ADDRESS__
const void* host_stack;
size_t host_stack_bytes;
#endif

}  // namespace

Fiber::Fiber(void (*entry)()) : place_(new_place()) {
  void** sp = reinterpret_cast<void**>(place_.stack + kStack);
  *--sp = nullptr;  // where entry would return to; it also aligns the stack as a call does
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  sp_ = sp;
}

Fiber::~Fiber() {
#ifdef SIMT_THREAD_SANITIZER
  retired.push_back(place_);
#else
  pool.push_back(place_);
#endif
}

void Fiber::resume() {
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  __sanitizer_start_switch_fiber(&fake, place_.stack, kStack);
#endif
#ifdef SIMT_THREAD_SANITIZER
  host_thread = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(place_.thread, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&host_sp, sp_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#ifdef __SANITIZE_ADDRESS__
  void* fake;
  __sanitizer_start_switch_fiber(&fake, host_stack, host_stack_bytes);
#endif
#ifdef SIMT_THREAD_SANITIZER
  __tsan_switch_to_fiber(host_thread, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&sp_, host_sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::started() const {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
}

#ifdef SIMT_THREAD_SANITIZER
const bool thread_sanitizer = true;
void publish(void* place) { __tsan_release(place); }
void observe(void* place) { __tsan_acquire(place); }
void ignore_accesses(bool begin) {
  (begin ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)(__FILE__, __LINE__);
  (begin ? AnnotateIgnoreWritesBegin : AnnotateIgnoreWritesEnd)(__FILE__, __LINE__);
}
void reuse_places() {
  pool.insert(pool.end(), retired.begin(), retired.end());
  retired.clear();
}
#else
const bool thread_sanitizer = false;
void publish(void*) {}
void observe(void*) {}
void ignore_accesses(bool) {}
void reuse_places() {}
#endif

}  // namespace simt
