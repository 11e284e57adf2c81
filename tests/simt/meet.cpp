// What fibers call: barriers, signals between blocks, meetings of a warp's lanes, copies that nobody waits for.
#include <algorithm>
#include <cstring>
#include <utility>

#include "state.h"

namespace simt {

void learn(Clocks& clocks, const Clocks& others) {
  for (size_t i = 0; i < clocks.size(); ++i) clocks[i] = std::max(clocks[i], others[i]);
}

void wait_at(const char* place) {
  Lane* lane = self();
  lane->waits_at = place;
  lane->fiber.suspend();
  lane->waits_at = nullptr;
}

void pass_barrier(Block& block) {
  Barrier& barrier = block.barrier;
  ++barrier.passed;
  learn(block.known, block.learned);
  state.ready.insert(state.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

void block_barrier() {
  const Ignored ours;
  Block& block = *self()->of;
  if (block.barrier.waiting.size() + 1 == block.running)
    for (Warp& warp : block.warps) settle_banks(warp);
  Barrier& barrier = block.barrier;
  void* const place = &barrier.places[barrier.passed % 2];
  publish(place);
  barrier.waiting.push_back(self());
  if (barrier.waiting.size() == block.running) pass_barrier(block);
  wait_at("__syncthreads");
  observe(place);
}

bool block_any(bool vote) {
  const Ignored ours;
  Block& block = *self()->of;
  block.vote |= vote;
  if (block.barrier.waiting.size() + 1 == block.running) block.voted = std::exchange(block.vote, false);
  block_barrier();
  return block.voted;
}

void signal(unsigned* word) {
  const Ignored ours;
  if (!state.cooperative) fail("a signal between blocks in a launch that is not cooperative");
  Block& block = *self()->of;
  Signal& signal = state.signals[word];
  if (signal.known.empty()) signal.known.resize(block.known.size());
  learn(signal.known, block.known);
  signal.known[block.number] = std::max(signal.known[block.number], block.barrier.passed);
  publish(word);
  ++*word;
  auto& waiting = signal.waiting;
  for (size_t i = 0; i < waiting.size();) {
    if (*word < waiting[i].least) {
      ++i;
      continue;
    }
    state.ready.push_back(waiting[i].lane);
    waiting[i] = waiting.back();
    waiting.pop_back();
  }
}

void wait_for(const unsigned* word, unsigned least) {
  const Ignored ours;
  if (!state.cooperative) fail("a wait for other blocks in a launch that is not cooperative");
  Block& block = *self()->of;
  if (*word < least) {
    state.signals[word].waiting.push_back({self(), least});
    wait_at("a wait for other blocks");
  }
  observe(const_cast<unsigned*>(word));
  const auto found = state.signals.find(word);
  if (found != state.signals.end() && !found->second.known.empty()) learn(block.learned, found->second.known);
}

void warp_meet(const char* name, unsigned mask, void* value, Combine combine) {
  const Ignored ours;
  Lane* lane = self();
  Warp& warp = *lane->warp;
  if (!(mask >> lane->lane & 1)) fail(std::string(name) + ": the calling lane is not in the mask");
  auto found = std::find_if(warp.meetings.begin(), warp.meetings.end(), [=](Meeting& m) { return m.mask == mask; });
  if (found == warp.meetings.end()) {
    warp.meetings.emplace_back().mask = mask;
    found = warp.meetings.end() - 1;
  }
  Meeting& meeting = *found;
  void* const place = &warp.places[warp.syncs % 2];
  if (name == kSyncWarp) publish(place);
  if (!meeting.arrived) {
    meeting.name = name;
  } else if (meeting.name != name) {
    fail("lanes of one warp meet in " + std::string(meeting.name) + " and in " + name + ": they diverged");
  }
  meeting.values[lane->lane] = value;
  meeting.waiting[lane->lane] = lane;
  meeting.arrived |= 1u << lane->lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    combine(meeting.values, mask);
    settle_banks(warp);
    if (std::strcmp(name, kSyncWarp) == 0) ++warp.syncs;  // sanitizers leave a literal in each file
    for (int l = 0; l < kWarp; ++l)
      if (mask >> l & 1) state.ready.push_back(meeting.waiting[l]);
  }
  wait_at(name);
  if (name == kSyncWarp) observe(place);
}

// Target and source are the CUDA thread's accesses: memset and memcpy show them to ThreadSanitizer.
void async_copy(size_t offset, const void* from, size_t read, size_t bytes) {
  void* to;
  {
    const Ignored ours;
    if (read > bytes)
      fail("an asynchronous copy of " + std::to_string(read) + " bytes, at most " + std::to_string(bytes));
    check_aligned(from, bytes);
    counts.bytes_loaded += read;
    to = self()->shared->write(offset, bytes);
    self()->copies.push_back({offset, read, bytes, from, self()->group});
  }
  std::memset(to, 0xff, bytes);
}

void async_commit() { ++self()->group; }

void async_wait(size_t pending) {
  auto& copies = self()->copies;
  size_t arrived = 0;
  for (; arrived < copies.size() && copies[arrived].group + pending < self()->group; ++arrived) {
    const Copy& copy = copies[arrived];
    auto* to = static_cast<unsigned char*>(self()->shared->arrive(copy.offset, copy.bytes));
    if (copy.read) std::memcpy(to, copy.from, copy.read);
    std::memset(to + copy.read, 0, copy.bytes - copy.read);
  }
  const Ignored ours;
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(arrived));
}

bool blocks_meet() { return state.cooperative; }
bool knows(size_t block, uint32_t barriers) { return barriers < self()->of->known[block]; }

}  // namespace simt
