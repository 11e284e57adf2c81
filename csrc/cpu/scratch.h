// Scratch memory of a kernel, 64-byte aligned.
#pragma once
#include <stdlib.h>  // the C header: <cstdlib> brings inline functions into an ISA file

#include <cstddef>
#include <cstdint>

namespace handtuned::HANDTUNED_ISA {

// For one task: on the stack for ordinary rows.
template <class A>
struct Scratch {
  static constexpr int64_t kInline = 16384 / sizeof(A);
  alignas(64) A small[kInline];
  A* data;
  explicit Scratch(int64_t n) {
    data = n <= kInline ? small : static_cast<A*>(aligned_alloc(64, (n * sizeof(A) + 63) / 64 * 64));
    if (!data) abort();
  }
  ~Scratch() {
    if (data != small) free(data);
  }
  Scratch(const Scratch&) = delete;
};

// For the pieces that a thread works through: one block that it keeps from call to call and that grows to the largest
// piece seen, so that no piece pays for page faults. take() hands it out in slices; a new Arena takes all back.
class Arena {
 public:
  explicit Arena(size_t bytes) {
    thread_local struct Block {
      char* data = nullptr;
      size_t bytes = 0;
      ~Block() { free(data); }
    } block;
    if (bytes > block.bytes) {
      free(block.data);
      block.bytes = (bytes + (bytes >> 2) + 4095) & ~size_t(4095);
      block.data = static_cast<char*>(aligned_alloc(64, block.bytes));
      if (!block.data) abort();
    }
    next_ = block.data;
  }
  template <class A>
  A* take(int64_t n) {
    A* slice = reinterpret_cast<A*>(next_);
    next_ += bytes_of<A>(n);
    return slice;
  }
  template <class A>
  static size_t bytes_of(int64_t n) {
    return (size_t(n) * sizeof(A) + 63) & ~size_t(63);
  }

 private:
  char* next_;
};

}  // namespace handtuned::HANDTUNED_ISA
