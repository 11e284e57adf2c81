// Memory as the emulated kernels see it.
//
// Shared memory starts as NaN. Each of its words remembers its last writer and its readers since the last barrier, so
// two threads that touch a word without a barrier between them (one of them writing) are a reported race whatever the
// schedule was. Bank conflicts: the n-th access of each lane since the warp last met counts as one access of the warp.
//
// Accesses to global memory are counted and must be aligned to their size. In a cooperative launch, whose blocks
// exchange data, they are remembered in the same way; what another block did is ordered if a signal said so.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

// Who touched a word last in one way, and after how many synchronisations of the block, and of the warp. Several:
// threads of one warp, or of more than one.
struct Touch {
  static constexpr int16_t kNobody = -1, kSeveral = -2;
  int16_t thread = kNobody, warp = kNobody;
  uint32_t barriers = 0, meetings = 0, block = 0;
  bool conflicts(const Touch& me) const;  // with an access by the running thread, now
  std::string by(const Touch& me) const;
};
struct Word {
  Touch write, read;
  // Whether nothing races with an access by the running thread; race_of_* says what does.
  bool note_read(const Touch& me);
  bool note_write(const Touch& me);
  std::string race_of_read(const Touch& me) const;
  std::string race_of_write(const Touch& me) const;
};

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);

  // The place of an access of the running fiber; fails where it is outside, misaligned or races.
  void* read(size_t offset, size_t bytes);
  void* write(size_t offset, size_t bytes);
  void* arrive(size_t offset, size_t bytes);  // a write that was begun before, and took its cycles then

  size_t bytes() const { return bytes_; }

 private:
  void* check(size_t offset, size_t bytes, const char* what) const;

  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
  std::vector<Word> words_;
};

void note_bank_access(size_t offset, size_t bytes);  // of the running fiber's warp

// Of the launch: whether its blocks meet; whether the running fiber's block knows that another had passed more barriers
// than so many.
bool blocks_meet();
bool knows(size_t block, uint32_t barriers);

// A pointer into shared memory whose every access goes through SharedMemory.
template <class T>
class Shared {
 public:
  explicit Shared(size_t offset) : offset_(offset) {}

  class Reference {
   public:
    explicit Reference(size_t offset) : offset_(offset) {}
    operator T() const {
      T value;
      std::memcpy(&value, current->shared->read(offset_, sizeof(T)), sizeof(T));
      return value;
    }
    const Reference& operator=(const T& value) const {
      std::memcpy(current->shared->write(offset_, sizeof(T)), &value, sizeof(T));
      return *this;
    }
    const Reference& operator=(const Reference& other) const { return *this = T(other); }
    const Reference& operator+=(const T& value) const { return *this = T(*this) + value; }

   private:
    size_t offset_;
  };

  template <class I>
  Reference operator[](I i) const {
    return Reference(offset_ + size_t(i) * sizeof(T));
  }
  Reference operator*() const { return Reference(offset_); }
  template <class I>
  Shared operator+(I i) const {
    return Shared(offset_ + size_t(i) * sizeof(T));
  }
  size_t offset() const { return offset_; }

 private:
  size_t offset_;
};

// Checks an access to global memory and counts it.
void check_aligned(const void* p, size_t bytes);
void note_load(const void* p, size_t bytes);
void note_store(const void* p, size_t bytes);
void forget_global();  // at the end of a launch

}  // namespace simt
