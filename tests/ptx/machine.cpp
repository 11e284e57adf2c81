#include "machine.h"

#include <algorithm>

namespace ptx {

Config config;
Counts counts;

namespace {
constexpr uint64_t kTurn = 512;             // instructions of a warp before another one goes on
constexpr uint64_t kEndless = 400'000'000;  // instructions of a launch
}  // namespace

// ---- a step --------------------------------------------------------------------------------------------------------

void Step::fail(const std::string& what, int lane) const {
  if (lane < 0)
    for (lane = 0; lane < kWarp - 1 && !active(lane);) ++lane;
  const unsigned* b = warp.block->index;
  throw Error(what + " (block (" + std::to_string(b[0]) + ", " + std::to_string(b[1]) + ", " + std::to_string(b[2]) +
              ") thread " + std::to_string(warp.number * kWarp + lane) + ", line " + std::to_string(instruction.line) +
              ": " + instruction.text + ")");
}

uint32_t Step::predicate(const Operand& o) const {
  uint32_t value = o.number ? ~0u : 0u;
  if (o.is == Operand::Is::reg) {
    if (o.bits != 1) fail("a register that is no predicate");
    std::memcpy(&value, warp.registers.data() + o.at, sizeof value);
  }
  return o.negated ? ~value : value;
}

void Step::set_predicate(const Operand& o, uint32_t value) {
  if (o.is == Operand::Is::none) return;
  if (o.is != Operand::Is::reg || o.bits != 1) fail("a result needs a predicate");
  uint32_t all;
  std::memcpy(&all, warp.registers.data() + o.at, sizeof all);
  all = (all & ~mask) | (value & mask);
  std::memcpy(warp.registers.data() + o.at, &all, sizeof all);
}

void Step::addresses(const Operand& o, uint64_t (&v)[kWarp]) const {
  if (o.is != Operand::Is::memory) fail("not an address");
  if (!o.based) {
    std::fill_n(v, kWarp, o.number);
    return;
  }
  Operand base = o;
  base.is = Operand::Is::reg;
  get(base, v);
  for (uint64_t& at : v) at = o.bits == 32 ? uint32_t(at + o.number) : at + o.number;
}

void Step::special(uint32_t which, uint64_t (&v)[kWarp]) const {
  const unsigned* size = machine.launch.block;
  const uint64_t all = size_t(size[0]) * size[1] * size[2];
  for (int l = 0; l < kWarp; ++l) {
    const uint64_t bit = 1ull << l;
    const unsigned thread = unsigned(warp.number * kWarp + l);
    switch (which) {
      case kTid: v[l] = thread % size[0]; break;
      case kTid + 1: v[l] = thread / size[0] % size[1]; break;
      case kTid + 2: v[l] = thread / size[0] / size[1]; break;
      case kNtid:
      case kNtid + 1:
      case kNtid + 2: v[l] = size[which - kNtid]; break;
      case kCtaid:
      case kCtaid + 1:
      case kCtaid + 2: v[l] = warp.block->index[which - kCtaid]; break;
      case kNctaid:
      case kNctaid + 1:
      case kNctaid + 2: v[l] = machine.launch.grid[which - kNctaid]; break;
      case kLaneid: v[l] = uint64_t(l); break;
      case kWarpid: v[l] = uint64_t(warp.number); break;
      case kNwarpid: v[l] = (all + kWarp - 1) / kWarp; break;
      case kClock: v[l] = machine.clock; break;
      case kMaskEq: v[l] = bit; break;
      case kMaskLt: v[l] = bit - 1; break;
      case kMaskLe: v[l] = 2 * bit - 1; break;
      case kMaskGe: v[l] = ~uint32_t(bit - 1); break;
      case kMaskGt: v[l] = uint32_t(~(2 * bit - 1)); break;
      case kDynamicShared: v[l] = machine.launch.shared_bytes; break;
      case kTotalShared: v[l] = machine.launch.shared_bytes + machine.kernel.static_shared; break;
      default: v[l] = 0;  // %smid, %gridid, %envreg: whatever
    }
  }
}

bool meet(Step& step, const uint32_t (&members)[kWarp]) {
  Warp& warp = step.warp;
  const uint32_t here = warp.pc[__builtin_ctz(step.mask)];
  uint32_t there = step.mask;  // and those that already wait here
  for (int l = 0; l < kWarp; ++l) there |= uint32_t((warp.blocked >> l & 1) && warp.pc[l] == here) << l;
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    if (!(members[l] >> l & 1)) step.fail("the lane is not in its own mask", l);
    if (members[l] & ~warp.alive) step.fail("the mask names lanes that have returned", l);
    if ((members[l] & there) != members[l]) {  // not all are here
      warp.blocked |= step.mask;
      step.next &= ~step.mask;
      return false;
    }
  }
  warp.blocked &= ~there;
  step.mask = there;
  step.next |= there;
  return true;
}

bool meet_all(Step& step) {
  uint32_t members[kWarp];
  std::fill_n(members, kWarp, ~0u);
  return meet(step, members);
}

// ---- control -------------------------------------------------------------------------------------------------------

namespace {

void jump(Step& step, uint32_t lanes, uint32_t target) {
  for (int l = 0; l < kWarp; ++l)
    if (lanes >> l & 1) step.warp.pc[l] = target;
  step.next &= ~lanes;
}

void branch(Step& step) { jump(step, step.mask, step.instruction.targets[0]); }

void branch_by_index(Step& step) {
  uint32_t index[kWarp];
  step.get(size_t(0), index);
  for (int l = 0; l < kWarp; ++l) {
    if (!step.active(l)) continue;
    if (index[l] >= step.instruction.targets.size()) step.fail("no such target", l);
    jump(step, 1u << l, step.instruction.targets[index[l]]);
  }
}

void leave(Step& step) {
  for (int l = 0; l < kWarp; ++l)
    if (step.active(l) && !step.warp.open[l].empty()) step.fail("the thread returns with copies under way", l);
  step.warp.alive &= ~step.mask;
  step.warp.block->running -= unsigned(__builtin_popcount(step.mask));
  step.next &= ~step.mask;
}

void trap(Step& step) { step.fail("a trap"); }

void nothing(Step&) {}

// bar.sync a(, threads)   bar.arrive a, threads   bar.red.op d, a(, threads), p
void barrier(Step& step) {
  const auto& operands = step.instruction.operands;
  const size_t first = step.instruction.has("red");
  const unsigned number = unsigned(operands[first].number);
  if (operands[first].is != Operand::Is::number || number >= 16) step.fail("a barrier needs a number below 16");
  unsigned needed = 0;
  if (operands.size() > 1 + 2 * first) {
    uint32_t threads[kWarp];
    step.get(first + 1, threads);
    needed = threads[__builtin_ctz(step.mask)];
    if (needed == 0 || needed % kWarp) step.fail("a barrier of " + std::to_string(needed) + " threads");
  }
  step.machine.arrive(step, number, needed, !step.instruction.has("arrive"));
}

}  // namespace

bool decode_control(Instruction& in) {
  const std::string& name = in.parts[0];
  if (name == "bra") return (in.action = branch);
  if (name == "brx") return (in.action = branch_by_index);
  if (name == "ret" || name == "exit") return (in.action = leave);
  if (name == "trap") return (in.action = trap);
  if (name == "nanosleep" || name == "griddepcontrol") return (in.action = nothing);
  const bool known = in.has("sync") || in.has("arrive") || in.has("red");
  if ((name == "bar" || name == "barrier") && known && !in.has("warp") && !in.has("cluster"))
    return (in.action = barrier);
  return false;
}

void decode(Kernel& kernel) {
  if (kernel.decoded) return;
  static const std::map<std::string, Type> types = {
      {"pred", {'p', 1, 1}},    {"b8", {'b', 8, 1}},    {"b16", {'b', 16, 1}},   {"b32", {'b', 32, 1}},
      {"b64", {'b', 64, 1}},    {"u8", {'u', 8, 1}},    {"u16", {'u', 16, 1}},   {"u32", {'u', 32, 1}},
      {"u64", {'u', 64, 1}},    {"s8", {'s', 8, 1}},    {"s16", {'s', 16, 1}},   {"s32", {'s', 32, 1}},
      {"s64", {'s', 64, 1}},    {"f16", {'f', 16, 1}},  {"f16x2", {'f', 16, 2}}, {"bf16", {'h', 16, 1}},
      {"bf16x2", {'h', 16, 2}}, {"tf32", {'t', 32, 1}}, {"f32", {'f', 32, 1}},   {"f64", {'f', 64, 1}}};
  static const std::map<std::string, char> spaces = {{"global", 'g'},      {"const", 'g'}, {"shared", 's'},
                                                     {"shared__cta", 's'}, {"local", 'l'}, {"param", 'p'},
                                                     {"param__entry", 'p'}};
  for (Instruction& in : kernel.code) {
    for (const std::string& part : in.parts) {
      if (const auto type = types.find(part); type != types.end()) {
        in.second = in.type;
        in.type = type->second;
      }
      if (const auto space = spaces.find(part); space != spaces.end() && !in.space) in.space = space->second;
      if (part == "v2" || part == "v4" || part == "v8") in.width = part[1] - '0';
      in.ftz |= part == "ftz";
      in.sat |= part == "sat";
    }
    if (!decode_arithmetic(in) && !decode_integer(in) && !decode_move(in) && !decode_convert(in) &&
        !decode_memory(in) && !decode_warp(in) && !decode_control(in))
      throw Error("the PTX simulator does not know this instruction (line " + std::to_string(in.line) + " of " +
                  kernel.name + "): " + in.text);
  }
  kernel.decoded = true;
  static const char* const moves[] = {"mov", "selp", "setp", "neg", "abs", "cvt"};
  for (Instruction& in : kernel.code) {
    const bool moved = std::find(std::begin(moves), std::end(moves), in.parts[0]) != std::end(moves);
    const bool real = in.type.kind == 'f' || in.type.kind == 'h';
    if (in.parts[0] == "ld" || in.parts[0] == "st" || in.parts[0] == "atom" || in.parts[0] == "red") {
      if (in.space != 'p') in.counted = 'm';
    } else if (in.parts[0] == "shfl" || in.parts[0] == "vote" || in.parts[0] == "ldmatrix" || in.parts[0] == "mma") {
      in.counted = 'w';
    } else if (real && !moved) {
      in.counted = 'a';
    }
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

Machine::Machine(const Kernel& kernel, const Launch& launch, const void* const* arguments)
    : kernel(kernel), launch(launch), parameters(kernel.parameter_bytes), random_(config.seed * 2 + 1) {
  for (size_t i = 0; i < kernel.parameters.size(); ++i)
    std::memcpy(parameters.data() + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].bytes);
}

uint64_t Machine::draw() {  // xorshift64
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  return random_ ^= random_ << 17;
}

void Machine::add_block(unsigned x, unsigned y, unsigned z) {
  blocks_.push_back(std::make_unique<Block>(kernel.static_shared + launch.shared_bytes));
  Block& block = *blocks_.back();
  block.index[0] = x;
  block.index[1] = y;
  block.index[2] = z;
  block.running = launch.block[0] * launch.block[1] * launch.block[2];
  block.warps.resize((block.running + kWarp - 1) / kWarp);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.number = int(w);
    const unsigned lanes = std::min(unsigned(kWarp), block.running - unsigned(w) * kWarp);
    warp.alive = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    warp.registers.assign(kernel.register_bytes, 0);
    warp.local.assign(kernel.local_bytes * kWarp, 0xff);
  }
}

void Machine::run() {
  ++counts.launches;
  counts.blocks += uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  for (unsigned z = 0; z < launch.grid[2]; ++z)
    for (unsigned y = 0; y < launch.grid[1]; ++y)
      for (unsigned x = 0; x < launch.grid[0]; ++x) {
        add_block(x, y, z);
        if (launch.cooperative) continue;
        run_blocks();
        blocks_.clear();
      }
  if (launch.cooperative) run_blocks();
}

void Machine::run_blocks() {
  std::vector<Warp*> warps;
  for (auto& block : blocks_)
    for (Warp& warp : block->warps) warps.push_back(&warp);
  while (!warps.empty()) {
    bool moved = false;
    if (config.seed)
      for (size_t i = warps.size(); i-- > 1;) std::swap(warps[i], warps[draw() % (i + 1)]);
    for (Warp* warp : warps) {
      if (!warp->runnable()) continue;
      run_warp(*warp, config.seed ? 1 + draw() % kTurn : kTurn);
      moved = true;
      if (!warp->alive) check_barriers(*warp->block);
    }
    if (!moved) deadlock();
    warps.erase(std::remove_if(warps.begin(), warps.end(), [](Warp* w) { return !w->alive; }), warps.end());
  }
}

void Machine::run_warp(Warp& warp, uint64_t instructions) {
  for (uint64_t i = 0; i < instructions && warp.runnable(); ++i) {
    const uint32_t ready = warp.runnable();
    uint32_t pc = ~0u, group = 0;
    for (int l = 0; l < kWarp; ++l)
      if (ready >> l & 1) pc = std::min(pc, warp.pc[l]);
    for (int l = 0; l < kWarp; ++l) group |= uint32_t(warp.pc[l] == pc) << l;
    group &= ready;
    const Instruction& instruction = kernel.code[pc];
    Step step{*this, warp, instruction, group, group};
    if (instruction.guarded) step.mask &= step.predicate(instruction.guard);
    if (step.mask) {
      ++counts.instructions;
      counts.arithmetic += instruction.counted == 'a';
      counts.memory += instruction.counted == 'm';
      counts.exchanges += instruction.counted == 'w';
      instruction.action(step);
    }
    for (int l = 0; l < kWarp; ++l) warp.pc[l] += step.next >> l & 1;
    if (++clock > kEndless) step.fail("an endless loop: " + std::to_string(kEndless) + " instructions");
  }
}

void Machine::arrive(Step& step, unsigned number, unsigned needed, bool waits) {
  Block& block = *step.warp.block;
  Barrier& barrier = block.barriers[number];
  if (barrier.arrived && barrier.needed != needed) step.fail("threads give a barrier different numbers of threads");
  barrier.needed = needed;
  barrier.arrived += unsigned(__builtin_popcount(step.mask));
  if (step.instruction.has("red"))
    barrier.yes += unsigned(__builtin_popcount(step.mask & step.predicate(step.instruction.operands.back())));
  if (waits) {
    barrier.waiting.emplace_back(&step.warp, step.mask);
    step.warp.blocked |= step.mask;
    step.next &= ~step.mask;
  }
  if (needed && barrier.arrived > needed) step.fail("more threads than the barrier counts");
  check_barriers(block);
}

void Machine::check_barriers(Block& block) {
  for (Barrier& barrier : block.barriers)
    if (barrier.arrived && barrier.arrived == (barrier.needed ? barrier.needed : block.running)) release(barrier);
}

void Machine::release(Barrier& barrier) {
  for (auto& [warp, lanes] : barrier.waiting) {
    const Instruction& in = kernel.code[warp->pc[__builtin_ctz(lanes)]];
    if (in.has("red")) {
      Step step{*this, *warp, in, lanes, 0};
      uint32_t count[kWarp];
      std::fill_n(count, kWarp, barrier.yes);
      const bool holds = in.has("or") ? barrier.yes > 0 : barrier.yes == barrier.arrived;
      in.has("popc") ? step.put(size_t(0), count) : step.set_predicate(in.operands[0], holds ? ~0u : 0u);
    }
    warp->blocked &= ~lanes;
    for (int l = 0; l < kWarp; ++l) warp->pc[l] += lanes >> l & 1;
  }
  barrier = {};
}

void Machine::deadlock() const {
  std::string text = "deadlock: threads wait for others that never come";
  int shown = 0;
  for (auto& block : blocks_)
    for (const Warp& warp : block->warps)
      for (int l = 0; l < kWarp; ++l) {
        if (!(warp.alive >> l & 1) || ++shown > 3) continue;
        text += "; block (" + std::to_string(block->index[0]) + ", " + std::to_string(block->index[1]) + ", " +
                std::to_string(block->index[2]) + ") thread " + std::to_string(warp.number * kWarp + l) + " at " +
                kernel.code[warp.pc[l]].text;
      }
  throw Error(text);
}

}  // namespace ptx
