#include "memory.h"

#include "fiber.h"

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

Touch now() {
  const Thread& me = *current;
  return {int16_t(me.number), int16_t(me.number / kWarp), *me.barriers, *me.meetings, me.block_number};
}

// Words of two bytes, the least that kernels store, by eighths of 16 bytes.
struct Line {
  Word words[8];
};
std::unordered_map<uintptr_t, Line> global_lines;

using Note = bool (Word::*)(const Touch&);
using Race = std::string (Word::*)(const Touch&) const;

void note_global(const void* p, size_t bytes, Note note, Race race) {
  if (thread_sanitizer) return;
  const Touch me = now();
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) / 2;
  for (uintptr_t w = first; w < first + (bytes + 1) / 2; ++w) {
    Word& word = global_lines[w / 8].words[w % 8];
    if (!(word.*note)(me)) fail("race on global memory: " + (word.*race)(me));
  }
}

}  // namespace

inline bool Touch::conflicts(const Touch& me) const {
  if (thread == kNobody) return false;
  if (block != me.block) return !knows(block, barriers);
  return thread != me.thread && barriers == me.barriers && (warp != me.warp || meetings == me.meetings);
}

std::string Touch::by(const Touch& me) const {
  return (thread == kSeveral ? "several threads" : "thread " + std::to_string(thread)) +
         (block == me.block ? "" : " of block " + std::to_string(block));
}

inline bool Word::note_read(const Touch& me) {
  if (write.conflicts(me)) return false;
  const bool same_time =
      read.block == me.block && read.barriers == me.barriers && (read.warp != me.warp || read.meetings == me.meetings);
  if (read.thread == Touch::kNobody || (read.thread == me.thread && read.block == me.block) || !same_time) {
    // Of readers in several blocks the last is remembered, and of those that are not ordered one of another block.
    if (read.block == me.block || !read.conflicts(me)) read = me;
  } else {
    const int16_t warp = read.warp == me.warp ? me.warp : Touch::kSeveral;
    read = {Touch::kSeveral, warp, me.barriers, me.meetings, me.block};
  }
  return true;
}

inline bool Word::note_write(const Touch& me) {
  if (write.conflicts(me) || read.conflicts(me)) return false;
  write = me;
  return true;
}

std::string Word::race_of_read(const Touch& me) const {
  return "read, and written by " + write.by(me) + ", no barrier between";
}

std::string Word::race_of_write(const Touch& me) const {
  const bool written = write.conflicts(me);
  return "written, and " + (written ? "written by " + write.by(me) : "read by " + read.by(me)) + ", no barrier between";
}

void* SharedMemory::read(size_t offset, size_t bytes) {
  void* place = check(offset, bytes, "read of");
  note_bank_access(offset, bytes);
  const Touch me = now();
  for (size_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w)
    if (!words_[w].note_read(me))
      fail("race on shared memory at " + std::to_string(4 * w) + ": " + words_[w].race_of_read(me));
  return place;
}

void* SharedMemory::write(size_t offset, size_t bytes) {
  note_bank_access(offset, bytes);
  return arrive(offset, bytes);
}

void* SharedMemory::arrive(size_t offset, size_t bytes) {
  void* place = check(offset, bytes, "write to");
  const Touch me = now();
  for (size_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w)
    if (!words_[w].note_write(me))
      fail("race on shared memory at " + std::to_string(4 * w) + ": " + words_[w].race_of_write(me));
  return place;
}

void note_load(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  counts.bytes_loaded += bytes;
  if (blocks_meet()) note_global(p, bytes, &Word::note_read, &Word::race_of_read);
}

void note_store(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  counts.bytes_stored += bytes;
  if (blocks_meet()) note_global(p, bytes, &Word::note_write, &Word::race_of_write);
}

void forget_global() { global_lines.clear(); }

}  // namespace simt
