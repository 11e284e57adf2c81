#include "memory.h"

#include <string>
#include <unordered_map>

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

namespace {

Touch now() { return {current->number, current->number / kWarp, epoch(), block_number()}; }

// Words of two bytes, the least that kernels store, by eighths of 16 bytes.
struct Line {
  Word words[8];
};
std::unordered_map<uintptr_t, Line> global_lines;

template <class Note>
void note_global(const void* p, size_t bytes, Note note) {
  const Touch me = now();
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / 2;
  for (uintptr_t w = first; w < first + (bytes + 1) / 2; ++w) {
    const std::string race = note(global_lines[w / 8].words[w % 8], me);
    if (!race.empty()) fail("race on global memory: " + race);
  }
}

}  // namespace

bool Touch::conflicts() const {
  if (thread == kNobody) return false;
  if (block != block_number()) return !knows(block, when.of_block);
  if (thread == current->number) return false;
  const Epoch present = epoch();
  if (when.of_block != present.of_block) return false;
  return warp != current->number / kWarp || when.of_warp == present.of_warp;
}

std::string Touch::by() const {
  return (thread == kSeveral ? "several threads" : "thread " + std::to_string(thread)) +
         (block == block_number() ? "" : " of block " + std::to_string(block));
}

std::string Word::note_read(const Touch& me) {
  if (write.conflicts()) return "read, and written by " + write.by() + ", no barrier between";
  const bool same_time = read.block == me.block && read.when.of_block == me.when.of_block &&
                         (read.warp != me.warp || read.when.of_warp == me.when.of_warp);
  if (read.thread == Touch::kNobody || (read.thread == me.thread && read.block == me.block) || !same_time) {
    // Of readers in several blocks the last is remembered, and of those that are not ordered one of another block.
    if (read.block == me.block || !read.conflicts()) read = me;
  } else {
    read = {Touch::kSeveral, read.warp == me.warp ? me.warp : Touch::kSeveral, me.when, me.block};
  }
  return "";
}

std::string Word::note_write(const Touch& me) {
  const bool written = write.conflicts();
  if (written || read.conflicts())
    return "written, and " + (written ? "written by " + write.by() : "read by " + read.by()) + ", no barrier between";
  write = me;
  return "";
}

void* SharedMemory::read(size_t offset, size_t bytes) {
  void* place = check(offset, bytes, "read of");
  const Touch me = now();
  for (size_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    const std::string race = words_[w].note_read(me);
    if (!race.empty()) fail("race on shared memory at " + std::to_string(4 * w) + ": " + race);
  }
  return place;
}

void* SharedMemory::write(size_t offset, size_t bytes) {
  void* place = check(offset, bytes, "write to");
  const Touch me = now();
  for (size_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    const std::string race = words_[w].note_write(me);
    if (!race.empty()) fail("race on shared memory at " + std::to_string(4 * w) + ": " + race);
  }
  return place;
}

void note_load(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  counts.bytes_loaded += bytes;
  if (blocks_meet()) note_global(p, bytes, [](Word& word, const Touch& me) { return word.note_read(me); });
}

void note_store(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  counts.bytes_stored += bytes;
  if (blocks_meet()) note_global(p, bytes, [](Word& word, const Touch& me) { return word.note_write(me); });
}

void forget_global() { global_lines.clear(); }

}  // namespace simt
