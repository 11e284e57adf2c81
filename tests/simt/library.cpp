// The rest of the runtime API, and what tests set and read through ctypes.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>

#include "simt.h"

namespace {
std::map<const void*, size_t>& granted() {
  static std::map<const void*, size_t> bytes;
  return bytes;
}
}  // namespace

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (size_t(value) > simt::kMostShared) return simt::refuse(std::to_string(value) + " bytes of shared memory");
  granted()[kernel] = size_t(value);
  return cudaSuccess;
}

simt::Elsewhere simt::elsewhere = nullptr;

size_t simt::shared_granted(const void* kernel) {
  const auto found = granted().find(kernel);
  return found == granted().end() ? kSharedWithoutAsking : std::max(kSharedWithoutAsking, found->second);
}

extern "C" {

void simt_configure(int schedule, unsigned long long seed) { simt::config = {simt::Schedule(schedule), seed}; }

void simt_execute_elsewhere(simt::Elsewhere by) { simt::elsewhere = by; }

// Of what launchers see: 0 for what it was at first.
void simt_device(int multiprocessors, int shared_bytes) {
  simt::device = {};
  if (multiprocessors) simt::device.multiprocessors = multiprocessors;
  if (shared_bytes) simt::device.shared_bytes = shared_bytes;
}

void simt_plant(int mutant) { simt::planted = mutant; }

// Returns how many mutation points there can be; with `to`, fills in which were passed since the last time, a byte
// each.
int simt_take_passed(unsigned char* to) {
  if (to != nullptr) {
    std::copy(std::begin(simt::passed), std::end(simt::passed), to);
    std::fill(std::begin(simt::passed), std::end(simt::passed), 0);
  }
  return simt::kMostMutants;
}

simt::Counts simt_counts() { return simt::counts; }

void simt_reset_counts() { simt::counts = {}; }
}
