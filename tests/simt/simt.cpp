#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace simt {

__thread Thread* current = nullptr;
Config config;
DeviceSize device;
Counts counts;
int planted = -1;
unsigned char passed[kMostMutants];

namespace {

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t

struct Block;
struct Lane;

// The lanes of one mask that wait for the rest of it.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  void* values[kWarp];
  struct Lane* waiting[kWarp];
};

// One access of a warp to shared memory: the n-th of each of its lanes since they last met.
struct BankAccess {
  unsigned lanes = 0;
  uint32_t bytes = 0;
  uint32_t offset[kWarp];
};

struct Warp {
  std::vector<Meeting> meetings;  // one a mask in use
  std::vector<BankAccess> accesses;
  std::vector<struct Lane*> lanes;
  uint32_t syncs = 0;
  char places[2];  // as a Barrier's
};

// A copy to shared memory under way.
struct Copy {
  size_t offset, read, bytes;
  const void* from;
  size_t group;
};

// A CUDA thread.
struct Lane : Thread {
  Block* of;
  Warp* warp;
  const char* waits_at = nullptr;
  size_t accesses = 0;  // to shared memory since its warp last met
  bool done = false;
  std::vector<Copy> copies;  // under way
  size_t group = 0;          // of copies, the open one
  Fiber fiber;
  explicit Lane(void (*entry)()) : fiber(entry) {}
};

// Threads that wait at a barrier for all that have not returned.
struct Barrier {
  std::vector<Lane*> waiting;
  uint32_t passed = 0;
  char places[2];  // to publish(): in turns, or who is early would already be seen
};

// How many barriers each block of a launch had passed, as far as somebody knows: what threads did before is ordered.
using Clocks = std::vector<uint32_t>;

void learn(Clocks& clocks, const Clocks& others) {
  for (size_t i = 0; i < clocks.size(); ++i) clocks[i] = std::max(clocks[i], others[i]);
}

// A word that blocks signal through.
struct Signal {
  struct Waiting {
    Lane* lane;
    unsigned least;
  };
  Clocks known;
  std::vector<Waiting> waiting;
};

struct Block {
  SharedMemory shared;
  size_t number;          // in the launch
  Clocks known, learned;  // by all of its threads; by one of them since the last barrier
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Lane>> lanes;
  Barrier barrier;
  bool vote = false, voted = false;  // so far; at the last barrier
  size_t running = 0;                // lanes that have not returned
  Block(size_t shared_bytes, size_t number, size_t blocks)
      : shared(shared_bytes), number(number), known(blocks), learned(blocks) {}
};

// The launch in progress.
struct State {
  const std::function<void()>* body = nullptr;
  bool cooperative = false;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Lane*> ready;
  std::map<const unsigned*, Signal> signals;
  size_t running = 0;
  uint64_t random = 1;
  bool failed = false;
};
State state;
std::string error_text;

Lane* self() { return static_cast<Lane*>(current); }

uint64_t draw() {  // xorshift64
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
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

std::string where(const Thread& t) {
  return "block (" + std::to_string(t.block.x) + ", " + std::to_string(t.block.y) + ", " + std::to_string(t.block.z) +
         ") thread " + std::to_string(t.number);
}

// ---- bank conflicts ----------------------------------------------------------------------------------------------

// Cycles beyond the first that an access takes. Of 4 bytes the whole warp is served at once, of 8 halves, of 16
// quarters; each takes as many cycles as there are different words in the fullest bank.
uint64_t conflicts(const BankAccess& access) {
  const int at_once = access.bytes <= 4 ? kWarp : access.bytes == 8 ? kWarp / 2 : kWarp / 4;
  uint64_t total = 0;
  for (int first = 0; first < kWarp; first += at_once) {
    uint32_t words[kWarp], last[32], used = 0;
    bool clean = true;  // as most accesses are: no bank has two words
    int n = 0;
    for (int lane = first; lane < first + at_once; ++lane)
      if (access.lanes >> lane & 1)
        for (uint32_t w = 0; w < (access.bytes + 3) / 4; ++w) {
          const uint32_t word = access.offset[lane] / 4 + w, bank = word % 32;
          clean = clean && (!(used >> bank & 1) || last[bank] == word);
          used |= 1u << bank;
          last[bank] = word;
          words[n++] = word;
        }
    if (clean) continue;
    std::sort(words, words + n);
    const int different = int(std::unique(words, words + n) - words);
    int of_bank[32] = {}, most = 0;
    for (int i = 0; i < different; ++i) most = std::max(most, ++of_bank[words[i] % 32]);
    total += most > 1 ? most - 1 : 0;
  }
  return total;
}

void settle_banks(Warp& warp) {
  if (warp.accesses.empty()) return;
  for (const BankAccess& access : warp.accesses) {
    ++counts.shared_accesses;
    counts.bank_conflicts += conflicts(access);
  }
  warp.accesses.clear();
  for (Lane* lane : warp.lanes) lane->accesses = 0;
}

// ---- running -----------------------------------------------------------------------------------------------------

void end_of_thread(Lane& lane) {
  const Ignored ours;
  if (!lane.copies.empty()) fail("a thread returned while copies to shared memory were under way");
  lane.done = true;
  Block& block = *lane.of;
  --state.running;
  --block.running;
  if (block.running && block.barrier.waiting.size() == block.running) pass_barrier(block);
}

void thread_main() {
  Lane* lane = self();
  lane->fiber.started();
  (*state.body)();
  publish(&state);
  end_of_thread(*lane);
  lane->fiber.suspend();
}

void add_block(const Launch& what, Index index) {
  const size_t number = index.x + what.grid.x * (index.y + size_t(what.grid.y) * index.z);
  const size_t blocks = what.cooperative ? size_t(what.grid.x) * what.grid.y * what.grid.z : 0;
  state.blocks.push_back(std::make_unique<Block>(what.shared_bytes, number, blocks));
  Block& block = *state.blocks.back();
  const int threads = int(what.block.x * what.block.y * what.block.z);
  block.warps.resize((threads + kWarp - 1) / kWarp);
  for (int t = 0; t < threads; ++t) {
    auto lane = std::make_unique<Lane>(&thread_main);
    const unsigned u = unsigned(t), x = what.block.x, y = what.block.y;
    lane->thread = {u % x, u / x % y, u / x / y};
    lane->block = index;
    lane->block_size = what.block;
    lane->grid_size = what.grid;
    lane->lane = t % kWarp;
    lane->number = t;
    lane->of = &block;
    lane->warp = &block.warps[t / kWarp];
    lane->shared = &block.shared;
    lane->block_number = unsigned(number);
    lane->barriers = &block.barrier.passed;
    lane->meetings = &lane->warp->syncs;
    lane->warp->lanes.push_back(lane.get());
    state.ready.push_back(lane.get());
    block.lanes.push_back(std::move(lane));
  }
  block.running += threads;
  state.running += threads;
  ++counts.blocks;
  counts.threads += threads;
}

// Takes the next lane to run out of those that can.
Lane* choose(const Lane* last) {
  auto& ready = state.ready;
  size_t i = 0;
  switch (config.schedule) {
    case Schedule::forward: break;
    case Schedule::backward: i = ready.size() - 1; break;
    case Schedule::random: i = draw() % ready.size(); break;
    case Schedule::warp_greedy:
      i = draw() % ready.size();
      for (size_t k = 0; last && k < ready.size(); ++k)
        if (ready[k]->warp == last->warp) i = k;
      break;
  }
  Lane* lane = ready[i];
  if (config.schedule == Schedule::forward) {
    ready.erase(ready.begin());
  } else {
    ready[i] = ready.back();
    ready.pop_back();
  }
  return lane;
}

// Until nobody can go on.
void run() {
  Lane* last = nullptr;
  while (!state.ready.empty() && !state.failed) {
    Lane* lane = choose(last);
    current = lane;
    ++counts.switches;
    lane->fiber.resume();
    current = nullptr;
    last = lane->done ? nullptr : lane;
  }
  if (!state.failed && state.running) {
    error_text = "deadlock: " + std::to_string(state.running) + " threads wait for others that never come";
    int shown = 0;
    for (auto& block : state.blocks)
      for (auto& lane : block->lanes)
        if (!lane->done && shown++ < 3) error_text += "; " + where(*lane) + " at " + lane->waits_at;
    state.failed = true;
  }
  for (auto& block : state.blocks) {
    for (Warp& warp : block->warps) settle_banks(warp);
    counts.most_shared_bytes = std::max<uint64_t>(counts.most_shared_bytes, block->shared.bytes());
  }
  state.blocks.clear();  // after a failure the other fibers are left where they are: kernels own nothing
  state.ready.clear();
  state.running = 0;
  state.signals.clear();
  forget_global();
}

}  // namespace

void fail(const std::string& what) {
  error_text = what + " (" + where(*current) + ")";
  state.failed = true;
  self()->fiber.suspend();
  std::abort();
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

void async_copy(size_t offset, const void* from, size_t read, size_t bytes) {
  const Ignored ours;
  if (read > bytes)
    fail("an asynchronous copy of " + std::to_string(read) + " bytes, at most " + std::to_string(bytes));
  std::memset(self()->shared->write(offset, bytes), 0xff, bytes);
  self()->copies.push_back({offset, read, bytes, from, self()->group});
}

void async_commit() { ++self()->group; }

void async_wait(size_t pending) {
  const Ignored ours;
  auto& copies = self()->copies;
  size_t arrived = 0;
  for (; arrived < copies.size() && copies[arrived].group + pending < self()->group; ++arrived) {
    const Copy& copy = copies[arrived];
    auto* to = static_cast<unsigned char*>(self()->shared->arrive(copy.offset, copy.bytes));
    if (copy.read) std::memcpy(to, copy.from, copy.read);
    std::memset(to + copy.read, 0, copy.bytes - copy.read);
  }
  copies.erase(copies.begin(), copies.begin() + ptrdiff_t(arrived));
}

bool blocks_meet() { return state.cooperative; }
bool knows(size_t block, uint32_t barriers) { return barriers < self()->of->known[block]; }

void note_bank_access(size_t offset, size_t bytes) {
  const Ignored ours;
  Lane* lane = self();
  auto& accesses = lane->warp->accesses;
  const size_t number = lane->accesses++;
  if (number >= accesses.size()) accesses.resize(number + 1);
  BankAccess& access = accesses[number];
  access.lanes |= 1u << lane->lane;
  access.bytes = std::max(access.bytes, uint32_t(bytes));
  access.offset[lane->lane] = uint32_t(offset);
}

const std::string& last_error() { return error_text; }

int refuse(const std::string& why) {
  error_text = why;
  return kInvalidValue;
}

int launch(const Launch& what, const std::function<void()>& body) {
  const Ignored ours;
  const auto size = [](Index i) { return uint64_t(i.x) * i.y * i.z; };
  error_text.clear();
  if (size(what.grid) == 0 || size(what.block) == 0 || size(what.block) > kMostThreads) {
    error_text =
        "a grid of " + std::to_string(size(what.grid)) + " blocks of " + std::to_string(size(what.block)) + " threads";
    return kInvalidConfiguration;
  }
  ++counts.launches;
  state.body = &body;
  state.cooperative = what.cooperative;
  state.failed = false;
  state.random = (config.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  std::vector<Index> order;
  for (unsigned z = 0; z < what.grid.z; ++z)
    for (unsigned y = 0; y < what.grid.y; ++y)
      for (unsigned x = 0; x < what.grid.x; ++x) order.push_back({x, y, z});
  if (config.schedule == Schedule::backward) std::reverse(order.begin(), order.end());
  if (config.schedule == Schedule::random)
    for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[draw() % (i + 1)]);
  for (size_t i = 0; i < order.size() && !state.failed; ++i) {
    add_block(what, order[i]);
    if (!what.cooperative || i + 1 == order.size()) run();
  }
  observe(&state);
  reuse_stacks();
  return state.failed ? kLaunchFailure : 0;
}

}  // namespace simt
