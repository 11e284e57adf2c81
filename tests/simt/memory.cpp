#include "memory.h"

#include <string>

namespace simt {

void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("an access of " + std::to_string(bytes) + " bytes is misaligned");
}

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes), data_(new unsigned char[bytes]), words_((bytes + 3) / 4) {
  std::memset(data_.get(), 0xff, bytes);  // NaN in every format of floating point
}

void* SharedMemory::check(size_t offset, size_t bytes, const char* what) const {
  if (offset + bytes > bytes_ || offset + bytes < offset)
    fail(std::string(what) + " shared memory at " + std::to_string(offset) + ", of " + std::to_string(bytes_) +
         " bytes");
  if (offset % bytes) fail(std::string(what) + " shared memory, misaligned");
  return data_.get() + offset;
}

SharedMemory::Touch SharedMemory::now() { return {current->number, current->number / kWarp, epoch()}; }

bool SharedMemory::Touch::conflicts() const {
  if (thread == kNobody || thread == current->number) return false;
  const Epoch present = epoch();
  if (when.of_block != present.of_block) return false;
  return warp != current->number / kWarp || when.of_warp == present.of_warp;
}

std::string SharedMemory::Touch::by() const {
  return thread == kSeveral ? "several threads" : "thread " + std::to_string(thread);
}

void* SharedMemory::read(size_t offset, size_t bytes) {
  void* place = check(offset, bytes, "read of");
  const Touch me = now();
  for (size_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words_[w];
    if (word.write.conflicts())
      fail("race on shared memory at " + std::to_string(4 * w) + ": read, and written by " + word.write.by() +
           ", no barrier between");
    Touch& read = word.read;
    const bool same_time =
        read.when.of_block == me.when.of_block && (read.warp != me.warp || read.when.of_warp == me.when.of_warp);
    if (read.thread == Touch::kNobody || read.thread == me.thread || !same_time) {
      read = me;
    } else {
      read = {Touch::kSeveral, read.warp == me.warp ? me.warp : Touch::kSeveral, me.when};
    }
  }
  return place;
}

void* SharedMemory::write(size_t offset, size_t bytes) {
  void* place = check(offset, bytes, "write to");
  const Touch me = now();
  for (size_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words_[w];
    const bool written = word.write.conflicts();
    if (written || word.read.conflicts())
      fail("race on shared memory at " + std::to_string(4 * w) + ": written, and " +
           (written ? "written by " + word.write.by() : "read by " + word.read.by()) + ", no barrier between");
    word.write = me;
  }
  return place;
}

void note_load(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  counts.bytes_loaded += bytes;
}

void note_store(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  counts.bytes_stored += bytes;
}

}  // namespace simt
