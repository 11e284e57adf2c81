// Memory, and the instructions of single lanes that touch it: ld, st, atom, red, cp.async, prefetches and fences.
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

// There where the process was started with AddressSanitizer's runtime.
extern "C" void* __asan_region_is_poisoned(void* begin, size_t bytes) __attribute__((weak));

namespace ptx {
namespace {

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

}  // namespace

// ---- shared memory -------------------------------------------------------------------------------------------------

void SharedMemory::check(const Step& step, int lane, uint64_t at, size_t bytes) const {
  if (at + bytes > bytes_ || at + bytes < at)
    step.fail("shared memory at " + std::to_string(int64_t(at)) + ", of " + std::to_string(bytes_) + " bytes", lane);
  if (at % bytes) step.fail("shared memory at " + std::to_string(at) + ", misaligned", lane);
}

void SharedMemory::load(const Step& step, int lane, uint64_t at, size_t bytes, void* to) const {
  check(step, lane, at, bytes);
  for (size_t i = at; i < at + bytes; ++i) {
    if (state_[i] == kWritten) continue;
    step.fail(
        "shared memory at " + std::to_string(i) +
            (state_[i] == kPromised ? " is read before its copy was waited for" : " is read and was never written"),
        lane);
  }
  std::memcpy(to, data_.get() + at, bytes);
}

void SharedMemory::store(const Step& step, int lane, uint64_t at, size_t bytes, const void* from) {
  check(step, lane, at, bytes);
  std::memcpy(data_.get() + at, from, bytes);
  std::fill_n(state_.begin() + long(at), bytes, kWritten);
}

void SharedMemory::promise(const Step& step, int lane, uint64_t at, size_t bytes) {
  check(step, lane, at, bytes);
  std::fill_n(state_.begin() + long(at), bytes, kPromised);
}

// ---- global memory -------------------------------------------------------------------------------------------------

namespace {

std::vector<Region> regions;                           // by address
std::vector<std::pair<uint64_t, uint64_t>> variables;  // of the module that runs: address, bytes

Region* region_of(uint64_t at) {
  static size_t last = 0;
  if (last < regions.size() && at - regions[last].begin < regions[last].bytes) return &regions[last];
  const auto after = std::upper_bound(regions.begin(), regions.end(), at,
                                      [](uint64_t at, const Region& region) { return at < region.begin; });
  if (after == regions.begin()) return nullptr;
  last = size_t(after - regions.begin()) - 1;
  return &regions[last];
}

Region* check_global(const Step& step, int lane, uint64_t at, size_t bytes) {
  if (at < 4096) step.fail("global memory at " + hex(at) + ": a null pointer", lane);
  if (at % bytes) step.fail("global memory at " + hex(at) + ", misaligned", lane);
  for (const auto& [begin, size] : variables)
    if (at >= begin && at + bytes <= begin + size) return nullptr;
  if (!regions.empty()) {
    Region* region = region_of(at);
    if (!region || at + bytes > region->begin + region->bytes) {
      step.fail("global memory outside every tensor, at " + hex(at) +
                    (region ? ": byte " + std::to_string(at - region->begin) + " of " + std::to_string(region->bytes)
                            : std::string()),
                lane);
    }
    return region;
  }
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(reinterpret_cast<void*>(at), bytes))
    step.fail("global memory outside every tensor, at " + hex(at), lane);
  return nullptr;
}

// What torch's allocator fills fresh memory with, when it is told to.
constexpr uint32_t kJunk = 0x7fedbeef;

bool is_junk(uint64_t at, size_t bytes) {
  for (uint64_t word = at & ~uint64_t(3); word < at + bytes; word += 4) {
    uint32_t found;
    std::memcpy(&found, reinterpret_cast<const void*>(word), sizeof found);
    if (found == kJunk) return true;
  }
  return false;
}

}  // namespace

void map_region(uint64_t begin, uint64_t bytes, bool written) {
  Region region{begin, bytes, std::vector<bool>(bytes, written)};
  const auto place = std::lower_bound(regions.begin(), regions.end(), begin,
                                      [](const Region& r, uint64_t at) { return r.begin < at; });
  if (place != regions.end() && place->begin == begin) {
    if (place->bytes < bytes) *place = std::move(region);  // the larger one of two views
  } else {
    regions.insert(place, std::move(region));
  }
}

void unmap_region(uint64_t begin) {
  regions.erase(std::remove_if(regions.begin(), regions.end(), [=](const Region& r) { return r.begin == begin; }),
                regions.end());
}

void forget_regions() { regions.clear(); }

void set_variables(std::vector<std::pair<uint64_t, uint64_t>> of_module) { variables = std::move(of_module); }

void load_global(const Step& step, int lane, uint64_t at, size_t bytes, void* to) {
  const Region* region = check_global(step, lane, at, bytes);
  if (region) {
    const auto first = region->written.begin() + long(at - region->begin);
    if (std::find(first, first + long(bytes), false) != first + long(bytes))
      step.fail("global memory is read and was never written: byte " + std::to_string(at - region->begin) + " of " +
                    std::to_string(region->bytes),
                lane);
  }
  if (config.junk && is_junk(at, bytes))
    step.fail("global memory at " + hex(at) + " is read and was never written", lane);
  std::memcpy(to, reinterpret_cast<const void*>(at), bytes);
  counts.bytes_loaded += bytes;
}

void store_global(const Step& step, int lane, uint64_t at, size_t bytes, const void* from) {
  Region* region = check_global(step, lane, at, bytes);
  if (region) std::fill_n(region->written.begin() + long(at - region->begin), bytes, true);
  std::memcpy(reinterpret_cast<void*>(at), from, bytes);
  counts.bytes_stored += bytes;
}

// ---- instructions --------------------------------------------------------------------------------------------------

namespace {

void access_local(Step& step, int lane, uint64_t at, size_t bytes, void* value, bool store) {
  const size_t each = step.machine.kernel.local_bytes;
  if (at + bytes > each || at % bytes) step.fail("local memory at " + std::to_string(at), lane);
  unsigned char* place = step.warp.local.data() + size_t(lane) * each + at;
  store ? std::memcpy(place, value, bytes) : std::memcpy(value, place, bytes);
}

void access(Step& step, int lane, uint64_t at, size_t bytes, void* value, bool store) {
  char space = step.instruction.space;
  if (space == 0) {
    space = at >= kLocalWindow ? 'l' : at >= kSharedWindow ? 's' : 'g';
    if (space != 'g') at -= space == 'l' ? kLocalWindow : kSharedWindow;
  }
  switch (space) {
    case 'g': return store ? store_global(step, lane, at, bytes, value) : load_global(step, lane, at, bytes, value);
    case 's': {
      SharedMemory& shared = step.warp.block->shared;
      return store ? shared.store(step, lane, at, bytes, value) : shared.load(step, lane, at, bytes, value);
    }
    case 'l': return access_local(step, lane, at, bytes, value, store);
    default:
      if (store || at + bytes > step.machine.parameters.size()) step.fail("parameters at " + std::to_string(at), lane);
      std::memcpy(value, step.machine.parameters.data() + at, bytes);
  }
}

// The registers of {a, b, c, d}, or the one.
const Operand& part(const Operand& o, int i) { return o.is == Operand::Is::list ? o.list[size_t(i)] : o; }

template <class T>
void load(Step& step) {
  uint64_t at[kWarp];
  step.addresses(step.operand(1), at);
  const int width = step.instruction.width;
  T values[8][kWarp] = {};
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    T row[8];
    access(step, l, at[l], sizeof(T) * size_t(width), row, false);
    for (int i = 0; i < width; ++i) values[i][l] = row[i];
  }
  for (int i = 0; i < width; ++i) step.put(part(step.operand(0), i), values[i]);
}

template <class T>
void store(Step& step) {
  uint64_t at[kWarp];
  step.addresses(step.operand(0), at);
  const int width = step.instruction.width;
  T values[8][kWarp];
  for (int i = 0; i < width; ++i) step.get(part(step.operand(1), i), values[i]);
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    T row[8];
    for (int i = 0; i < width; ++i) row[i] = values[i][l];
    access(step, l, at[l], sizeof(T) * size_t(width), row, true);
  }
}

enum Atom : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kSwapIfEqual, kIncrement, kDecrement };
const char* const kAtoms[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};

template <class T>
T combined(Step& step, T old, T b, T c) {
  switch (step.instruction.detail) {
    case kAdd: return T(old + b);
    case kMin: return std::min(old, b);
    case kMax: return std::max(old, b);
    case kExchange: return b;
    case kSwapIfEqual: return old == b ? c : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (step.instruction.detail) {
      case kAnd: return old & b;
      case kOr: return old | b;
      case kXor: return old ^ b;
      case kIncrement: return old >= b ? T(0) : T(old + 1);
      case kDecrement: return old == 0 || old > b ? b : T(old - 1);
      default: break;
    }
  }
  step.fail("not for this type");
}

// atom d, [a], b(, c)   red [a], b: lanes one after the other.
template <class T>
void atomic(Step& step) {
  const size_t first = step.instruction.parts[0] == "atom";
  uint64_t at[kWarp];
  T b[kWarp], c[kWarp] = {}, before[kWarp] = {};
  step.addresses(step.operand(first), at);
  step.get(first + 1, b);
  if (step.instruction.detail == kSwapIfEqual) step.get(first + 2, c);
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    access(step, l, at[l], sizeof(T), &before[l], false);
    T after = combined(step, before[l], b[l], c[l]);
    access(step, l, at[l], sizeof(T), &after, true);
  }
  if (first) step.put(size_t(0), before);
}

// cp.async.cg.shared.global [to], [from], 16(, bytes to read: zeros behind)
void copy_async(Step& step) {
  uint64_t to[kWarp], from[kWarp];
  step.addresses(step.operand(0), to);
  step.addresses(step.operand(1), from);
  const size_t bytes = step.operand(2).number;
  uint32_t read[kWarp];
  std::fill_n(read, kWarp, uint32_t(bytes));
  if (step.instruction.operands.size() > 3) step.get(3, read);
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    if (read[l] > bytes) step.fail("more bytes are read than copied", l);
    if (from[l] % bytes) step.fail("global memory at " + hex(from[l]) + ", misaligned", l);
    Copy copy{l, to[l], bytes, {}};
    for (uint32_t i = 0; i < read[l]; ++i) load_global(step, l, from[l] + i, 1, copy.data + i);
    step.warp.block->shared.promise(step, l, to[l], bytes);
    step.warp.open[l].push_back(copy);
  }
}

void commit(Step& step) {
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    step.warp.groups[l].push_back(std::move(step.warp.open[l]));
    step.warp.open[l].clear();
  }
}

// Until at most `pending` groups of the lane are under way. wait_all: also what no group has taken yet.
void wait_copies(Step& step) {
  const bool all = step.instruction.has("wait_all");
  if (all) commit(step);
  const size_t pending = all ? 0 : step.operand(0).number;
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    auto& groups = step.warp.groups[l];
    for (; groups.size() > pending; groups.pop_front())
      for (const Copy& copy : groups.front()) step.warp.block->shared.store(step, l, copy.to, copy.bytes, copy.data);
  }
}

void nothing(Step&) {}

template <template <class> class Of>
Action by_bytes(int bytes) {
  switch (bytes) {
    case 1: return Of<uint8_t>::action;
    case 2: return Of<uint16_t>::action;
    case 4: return Of<uint32_t>::action;
    case 8: return Of<uint64_t>::action;
    default: return nullptr;
  }
}
template <class T>
struct Load {
  static constexpr Action action = load<T>;
};
template <class T>
struct Store {
  static constexpr Action action = store<T>;
};

Action atomic_of(Type type) {
  const bool whole = type.kind == 'u' || type.kind == 'b';
  if (type.packed != 1) return nullptr;
  if (type.kind == 'f') return type.bits == 32 ? atomic<float> : type.bits == 64 ? atomic<double> : nullptr;
  if (type.bits == 16) return whole ? atomic<uint16_t> : nullptr;
  if (type.bits == 32) return whole ? atomic<uint32_t> : atomic<int32_t>;
  return type.bits == 64 ? (whole ? atomic<uint64_t> : atomic<int64_t>) : nullptr;
}

}  // namespace

bool decode_memory(Instruction& in) {
  const std::string& name = in.parts[0];
  const int bytes = in.type.bytes();
  if (name == "ld" || name == "ldu") {
    // A signed byte or half takes its sign into a wider register.
    if (in.type.kind == 's' && bytes == 1) return (in.action = load<int8_t>);
    if (in.type.kind == 's' && bytes == 2) return (in.action = load<int16_t>);
    if (in.type.kind == 's' && bytes == 4) return (in.action = load<int32_t>);
    return (in.action = by_bytes<Load>(bytes));
  }
  if (name == "st") return (in.action = by_bytes<Store>(bytes));
  if (name == "atom" || name == "red") {
    if (in.has("async")) return false;
    for (uint32_t i = 0; i < sizeof kAtoms / sizeof *kAtoms; ++i) {
      if (!in.has(kAtoms[i])) continue;
      in.detail = i;
      return (in.action = atomic_of(in.type));
    }
    return false;
  }
  if (name == "cp" && in.has("async") && !in.has("bulk") && !in.has("mbarrier")) {
    if (in.has("commit_group")) return (in.action = commit);
    if (in.has("wait_group") || in.has("wait_all")) return (in.action = wait_copies);
    return (in.action = copy_async);
  }
  if (name == "prefetch" || name == "prefetchu" || name == "fence" || name == "membar" || name == "createpolicy" ||
      name == "applypriority")
    return (in.action = nothing);
  return false;
}

}  // namespace ptx
