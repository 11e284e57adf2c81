// Memory as a kernel sees it: every access is checked, and every byte of shared memory knows whether it was written.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

struct Step;

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes), data_(new unsigned char[bytes + 1]), state_(bytes, kUnwritten) {}

  // Fails where the access is outside, misaligned, or reads what nobody wrote or a copy has not brought yet.
  void load(const Step& step, int lane, uint64_t at, size_t bytes, void* to) const;
  void store(const Step& step, int lane, uint64_t at, size_t bytes, const void* from);
  void promise(const Step& step, int lane, uint64_t at, size_t bytes);  // a copy is on its way
  size_t bytes() const { return bytes_; }

 private:
  enum State : uint8_t { kUnwritten, kPromised, kWritten };
  void check(const Step& step, int lane, uint64_t at, size_t bytes) const;

  size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
  std::vector<State> state_;
};

// A tensor that launches may touch. Where any is known, nothing else of global memory may be.
struct Region {
  uint64_t begin, bytes;
  std::vector<bool> written;  // by the host or a kernel
};
void map_region(uint64_t begin, uint64_t bytes, bool written);
void unmap_region(uint64_t begin);
void forget_regions();
void set_variables(std::vector<std::pair<uint64_t, uint64_t>> of_module);  // address, bytes: may be touched as well

// Global memory is the host's. With the runtime of AddressSanitizer in the process, what it has poisoned is outside.
void load_global(const Step& step, int lane, uint64_t at, size_t bytes, void* to);
void store_global(const Step& step, int lane, uint64_t at, size_t bytes, const void* from);

}  // namespace ptx
