// Recurrent family on CUDA: how a layer's units are dealt to blocks and where the weights of a block stay, and the
// layouts of scratch. Host code, read by the skin (scratch) and the launchers (grids); what results are made of follows
// from shapes alone, so they do not depend on the device.
//
// The rule. A direction of a layer may have its share of the multiprocessors, a block each. Where the blocks' slices of
// W_h (and of the projection) fit registers, or shared memory beside the sums, one cooperative launch serves all steps
// of a stretch and reads each weight once; elsewhere each step is a launch, whose weights come from the L2 cache.
#pragma once
#include "../rnn.h"

namespace handtuned::cuda {

constexpr int kRnnThreads = 256, kRnnWarps = kRnnThreads / 32;
constexpr int kChunksHeld = 8;         // at most, of a part of a matrix's depth: 32 lanes, 16 bytes of states each
constexpr int kChunksInRegisters = 5;  // of those; the others are in shared memory, so that nothing is spilled
constexpr int kChunksBeside = kChunksHeld - kChunksInRegisters;
constexpr int64_t kCommonBlocks = 128;       // of a direction on a large GPU: a depth is cut into parts for those
constexpr int64_t kStretchBytes = 64 << 20;  // of the input's products that are made ahead of the steps
constexpr int64_t kMostStretch = 128;        // steps; reading the weights once more takes as long as two
constexpr int64_t kSumsBytes = 16 << 10;     // of shared memory, unless eight rows take more
constexpr int kRowsOfTurn = 64;              // at most, between barriers of a block
constexpr int64_t kChunkBytes = 32 * 16;

struct DeviceLimits {
  int multiprocessors, shared_bytes;  // of a block
};

// How the rows of a matrix are dealt: units of a block, `groups` rows each, a quad of rows and a part of the depth to a
// warp at once.
struct SlicePlan {
  int units, blocks;
  int groups, quads, chunks, parts, chunks_of_part;
  int64_t bytes;  // of a block's rows in shared memory

  int pairs() const { return quads * parts; }
};

struct RnnPlan {
  SlicePlan main, second;  // second.blocks is 0 without a projection
  bool persistent;         // else a launch a step
  bool in_registers;       // main's weights, but for chunks beside; second's are in shared memory where persistent
  int blocks;              // of a direction
  int pitch, turn;         // of a row of sums; rows between barriers of a block
  int main_at, second_at;  // in shared memory, in bytes; sums are at 0
  int shared_bytes;
};

struct MatrixShape {
  int64_t height, groups, depth;  // [groups * height, depth]; height 0: not there
};

// blocks: how many there may be.
inline SlicePlan plan_slice(const MatrixShape& m, DType dtype, int64_t blocks) {
  const int64_t wide = dtype == DType::f64 ? 8 : 4, numbers = kChunkBytes / wide;
  SlicePlan plan = {};
  if (m.height == 0) return plan;
  plan.groups = int(m.groups);
  plan.chunks = int((m.depth + numbers - 1) / numbers);
  // Parts are there to give each warp of a block something to do where a block has few quads.
  const int64_t common_rows = (m.height + kCommonBlocks - 1) / kCommonBlocks * m.groups;
  const int64_t wanted = kRnnWarps / ((common_rows + 3) / 4);
  plan.chunks_of_part = int(wanted > 1 ? (plan.chunks + wanted - 1) / wanted : plan.chunks);
  if (plan.chunks_of_part > kChunksHeld) plan.chunks_of_part = kChunksHeld;
  plan.parts = (plan.chunks + plan.chunks_of_part - 1) / plan.chunks_of_part;
  // Each warp has a pair of quad and part, and there are no more blocks than may be.
  const int64_t quads = (kRnnWarps + plan.parts - 1) / plan.parts, least_units = (4 * quads + m.groups - 1) / m.groups;
  const int64_t share = (m.height + blocks - 1) / blocks;
  int64_t units = share > least_units ? share : least_units;
  if (units > m.height) units = m.height;
  plan.units = int(units);
  plan.blocks = int((m.height + units - 1) / units);
  plan.quads = int((units * m.groups + 3) / 4);
  plan.bytes = units * m.groups * plan.chunks * numbers * bytes_of(dtype);
  return plan;
}

inline RnnPlan plan_rnn(const MatrixShape& main, const MatrixShape& second, const Rnn& p, DeviceLimits device) {
  const int64_t wide = rnn_wide_bytes(p);
  RnnPlan plan = {};
  auto deal = [&](int64_t blocks) {
    plan.main = plan_slice(main, p.dtype, blocks);
    plan.second = plan_slice(second, p.dtype, blocks);
    plan.blocks = plan.main.blocks > plan.second.blocks ? plan.main.blocks : plan.second.blocks;
    const int quads = plan.main.pairs() > plan.second.pairs() ? plan.main.pairs() : plan.second.pairs();
    plan.pitch = 4 * (quads | 1);  // an odd count of quads keeps eight rows in different banks
    int64_t turn = kSumsBytes / (plan.pitch * wide) / 8 * 8;
    if (turn > kRowsOfTurn) turn = kRowsOfTurn;
    plan.turn = int(turn < 8 ? 8 : turn);
    plan.main_at = int(plan.turn * plan.pitch * wide);
  };
  const int64_t share = device.multiprocessors / p.directions;
  deal(share > 1 ? share : 1);
  plan.in_registers = wide == 4 && plan.main.pairs() <= kRnnWarps;
  const bool beside = plan.main.chunks_of_part > kChunksInRegisters;
  const int64_t bytes_beside = beside ? kRnnWarps * kChunksBeside * 4 * kChunkBytes * bytes_of(p.dtype) / wide : 0;
  plan.second_at = plan.main_at + int(plan.in_registers ? bytes_beside : plan.main.bytes);
  const int64_t held = plan.second_at + plan.second.bytes;
  plan.persistent = held <= device.shared_bytes;
  if (!plan.persistent) {
    deal(main.height + second.height);
    plan.in_registers = false;
  }
  plan.shared_bytes = plan.persistent ? int(held) : plan.main_at;
  return plan;
}

// ---- scratch --------------------------------------------------------------------------------------------------------

constexpr int64_t kWordsBytes = 256;  // of the directions' barriers, lines apart

inline int64_t states_pitch(int64_t width) { return round_up(width, 4); }  // whole spans

// Steps whose products of the input are made at once.
inline int64_t stretch_of(const Rnn& p) {
  const int64_t bytes = p.directions * p.batch * gates_of(p.cell) * p.hidden * rnn_wide_bytes(p);
  int64_t steps = kStretchBytes / bytes;
  if (steps > kMostStretch) steps = kMostStretch;
  if (steps > p.longest) steps = p.longest;
  return steps < 1 ? 1 : steps;
}

// Bytes of a layer's input under dropout.
inline int64_t dropped_bytes(const Rnn& p) {
  const bool drops = p.layers > 1 && p.dropout.p > 0;
  return drops ? p.rows * p.directions * p.state * rnn_wide_bytes(p) : 0;
}

// Of the forward, in this order: words of barriers; the states that W_h multiplies, of two steps; what is projected; h
// and c; the input's products; two layers' outputs; a layer's input under dropout.
struct ForwardScratch {
  int64_t words, ring, projected, h, c, x, between, dropped, bytes;
};
inline ForwardScratch forward_scratch(const Rnn& p, bool saves) {
  const int64_t wide = rnn_wide_bytes(p), places = p.directions * p.batch;
  ForwardScratch at{};
  auto next = [&](int64_t& offset, int64_t bytes) { offset = at.bytes, at.bytes += round_up(bytes, 256); };
  next(at.words, kWordsBytes);
  next(at.ring, 2 * places * states_pitch(p.state) * wide);
  next(at.projected, p.state != p.hidden ? places * states_pitch(p.hidden) * wide : 0);
  next(at.h, places * p.state * wide);
  next(at.c, has_cell_state(p.cell) ? places * p.hidden * wide : 0);
  next(at.x, stretch_of(p) * places * gates_of(p.cell) * p.hidden * wide);
  next(at.between, p.layers > 1 && !saves ? 2 * p.rows * p.directions * p.state * wide : 0);
  next(at.dropped, dropped_bytes(p));
  return at;
}

// Of the backward, in this order: words of barriers; gradients of pre-activations that a step exchanges, of two steps,
// and of the projection; those of all rows; gradients of h and c; of two layers' outputs; a layer's input under
// dropout; W_h (and W_r) column by column, under its dropout; and where each row's state comes from (-1: the initial
// one) in each direction, its time and its place.
struct BackwardScratch {
  int64_t words, ring, r_ring, d, grad_r, dh, dc, between, dropped, wh, wr, before, time, place, bytes;
};
inline BackwardScratch backward_scratch(const Rnn& p) {
  const int64_t wide = rnn_wide_bytes(p), places = p.directions * p.batch, projects = p.state != p.hidden;
  BackwardScratch at{};
  auto next = [&](int64_t& offset, int64_t bytes) { offset = at.bytes, at.bytes += round_up(bytes, 256); };
  next(at.words, kWordsBytes);
  next(at.ring, 2 * places * states_pitch(gates_of(p.cell) * p.hidden) * wide);
  next(at.r_ring, projects * places * states_pitch(p.state) * wide);
  next(at.d, p.directions * p.rows * slots_of(p) * p.hidden * wide);
  next(at.grad_r, projects * p.directions * p.rows * p.state * wide);
  next(at.dh, places * p.state * wide);
  next(at.dc, has_cell_state(p.cell) ? places * p.hidden * wide : 0);
  next(at.between, p.layers > 1 ? 2 * p.rows * p.directions * p.state * wide : 0);
  next(at.dropped, dropped_bytes(p));
  next(at.wh, p.directions * rnn_weight_numbers(p) * bytes_of(p.dtype));
  next(at.wr, projects * p.directions * p.state * p.hidden * bytes_of(p.dtype));
  next(at.before, p.directions * p.rows * 8);
  next(at.time, p.rows * 8);
  next(at.place, p.rows * 8);
  return at;
}

}  // namespace handtuned::cuda
