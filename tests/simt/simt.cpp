// Launches: blocks, the order in which threads run, and how a launch ends.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "state.h"

namespace simt {

__thread Thread* current = nullptr;
Config config;
DeviceSize device;
Counts counts;
int planted = -1;
unsigned char passed[kMostMutants];
State state;
std::string error_text;

namespace {

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t

uint64_t draw() {  // xorshift64
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  return state.random ^= state.random << 17;
}

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
  observe(&state.begun);
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

std::string where(const Thread& t) {
  return "block (" + std::to_string(t.block.x) + ", " + std::to_string(t.block.y) + ", " + std::to_string(t.block.z) +
         ") thread " + std::to_string(t.number);
}

void fail(const std::string& what) {
  error_text = what + " (" + where(*current) + ")";
  state.failed = true;
  self()->fiber.suspend();
  std::abort();
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
  publish(&state.begun);
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
  reuse_places();
  return state.failed ? kLaunchFailure : 0;
}

}  // namespace simt
