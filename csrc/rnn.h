// Recurrent family: the contract between the skin (rnn.cpp) and the kernels (cpu/rnn*.h).
//
// Of each layer and direction, with x_t its input at a step and h the state (torch's formulas, b both biases apart):
//   LSTM      i, f, o = sigmoid, g = tanh of  W_x x_t + b_x + W_h h + b_h;   c' = f * c + i * g;   h' = o * tanh(c')
//             with a projection  h' = W_r (o * tanh(c'))
//   GRU       r, z = sigmoid(W_x x_t + b_x + W_h h + b_h);   n = tanh(W_nx x_t + b_nx + r * (W_nh h + b_nh));
//             h' = (1 - z) * n + z * h
//   RNN       h' = tanh or relu of  W_x x_t + b_x + W_h h + b_h
// Variants of them:
//   coupled       the LSTM's f = 1 - i, so it has the gates i, g, o
//   peepholes     the LSTM's i, f see p_i * c, p_f * c, and its o sees p_o * c'
//   hard          sigmoid(a) = min(max(a + 3, 0), 6) / 6,  tanh(a) = min(max(a, -1), 1)
//   zoneout       h and c become  w * new + (1 - w) * old,  w drawn from {0, 1} where there is a seed, else 1 - p
//   dropout       of the h that W_h multiplies, by one mask for the whole sequence; of W_h itself
//   layer norm    W_x x_t and W_h h, rows of all gates, become  gain * LN(row),  LN(v) = (v - mean) / sqrt(var + eps);
//                 the LSTM's  h' = o * tanh(gain_c * LN(c') + bias_c)
// A layer's input is the one below's output (both directions side by side), under dropout where asked.
//
// Places. Rows of a batch are worked on in order of falling length, so that those still running at a step are a prefix:
// place p is row order[p] of the caller. Direction 0 takes a row's steps from its first, direction 1 from its own last.
#pragma once
#include "params.h"

namespace handtuned {

enum class RnnCell : int8_t { lstm, gru, tanh, relu, coupled };
inline bool has_cell_state(RnnCell cell) { return cell == RnnCell::lstm || cell == RnnCell::coupled; }
inline int64_t gates_of(RnnCell cell) {
  return cell == RnnCell::lstm ? 4 : cell == RnnCell::gru || cell == RnnCell::coupled ? 3 : 1;
}
constexpr double kRnnEpsilon = 1e-5;  // of the layer norms

// A tensor [steps, batch, width], or packed [rows, width] step by step, where `batch` is the stride of a row and `step`
// unused. Strides in elements, the last is 1. data nullptr: not given.
struct RnnTensor {
  void* data = nullptr;
  int64_t step = 0, batch = 0;
};

// What random numbers are for: masks of different kinds are drawn for rows that no other kind has (cpu/rnn_noise.h).
enum class RnnDraw : int8_t { input, zoneout, cell_zoneout, state, weight };

struct Rnn {
  DType dtype;
  RnnCell cell;
  bool hard_sigmoid, hard_tanh, peepholes, layer_norm;
  int64_t steps, batch, input_size, hidden, state;  // state: width of h, which is proj_size or hidden
  int64_t layers, directions;
  bool packed;             // input and output are packed rows
  int64_t rows;            // of a layer: steps * batch, or all packed rows; saved has room for as many
  int64_t longest, used;   // steps in which some row runs, and rows that exist
  const int64_t* order;    // [batch], nullptr: as given
  const int64_t* active;   // [steps] places longer than a step's number, nullptr: all
  const int64_t* first;    // [steps + 1] running sum of active: the row of place 0 at a time; nullptr: time * batch
  const int64_t* lengths;  // [batch] by place, nullptr: steps
  Dropout dropout;         // of the inputs of layers above the first
  Dropout zoneout, cell_zoneout, state_dropout, weight_dropout;
  bool samples_zoneout;  // else its expectation
  const void *h0, *c0;   // dtype [layers * directions, batch, state] and [.., hidden], contiguous, or nullptr: zeros
};

struct RnnPack : Rnn {
  const void* const* weights;  // of each layer and direction as ops.cpp has them, contiguous
  bool bias;
  void* packed_weights;  // rnn_packed_bytes, the header is the skin's
};

struct RnnForward : Rnn {
  RnnTensor input, output;  // output [steps, batch, directions * state], padding too is written (0); may be nullptr
  RnnTensor cells;          // like output, of the last layer's c after each step; data nullptr: not wanted
  const void* packed_weights;
  void *hn, *cn;  // like h0, c0; cn of the LSTM alone
  void* saved;    // accumulate type, layout below, or nullptr
  void* scratch;  // rnn_scratch_bytes, 64-byte aligned
};

struct RnnBackward : Rnn {
  RnnTensor grad_output, grad_cells;  // data nullptr: zeros
  RnnTensor input, grad_input;        // grad_input.data nullptr: not wanted
  const void *grad_hn, *grad_cn;      // like h0, c0, or nullptr: zeros
  const void* const* weights;         // as rnn_pack takes them, each contiguous
  bool bias;
  const void* saved;
  void *grad_h0, *grad_c0;    // or nullptr
  void* const* grad_weights;  // one beside each of weights, or nullptr
  void* scratch;              // rnn_backward_scratch, 64-byte aligned
};

// ---- layouts ----------------------------------------------------------------------------------------------------

inline int64_t rnn_wide_bytes(const Rnn& p) { return p.dtype == DType::f64 ? 8 : 4; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Packed weights: a header, then of each layer and direction the matrices W_x, W_h, (W_r), the biases b_x, b_h, the
// peepholes, and of layer norms the gains of x, h, then gain_c, bias_c, and b_x, b_h, beside which the biases before
// are zeros. A matrix [gates * out, in] is cut into panels of as many output columns as the kernel works on at once;
// within a panel, step k of `in` holds that column's numbers of all gates side by side. How wide a panel is depends on
// the instruction set; the bytes do not: columns are padded to 16 a gate (64 where there is one gate), `in` to an even
// number.
struct RnnHeader {
  int32_t vector_bytes, pairs;  // the instruction set's vectors; whether bf16 stands in pairs along `in`
  int32_t dtype, cell, peepholes, layer_norm;
  int64_t input_size, hidden, state, layers, directions;
};
constexpr int64_t kRnnHeaderBytes = 64;
static_assert(sizeof(RnnHeader) <= kRnnHeaderBytes);

inline int64_t rnn_columns(int64_t gates, int64_t out) { return gates * round_up(out, gates == 1 ? 64 : 16); }
inline int64_t rnn_matrix_bytes(DType dtype, int64_t gates, int64_t out, int64_t in) {
  return round_up(in, 2) * rnn_columns(gates, out) * bytes_of(dtype);
}
inline int64_t rnn_bias_numbers(const Rnn& p) { return rnn_columns(gates_of(p.cell), p.hidden); }
inline int64_t rnn_bias_bytes(const Rnn& p) {  // of b_x and b_h together
  return 2 * rnn_bias_numbers(p) * rnn_wide_bytes(p);
}
// Peepholes [rnn_peepholes][rnn_peephole_pitch] as the accumulate type, of the gates i, f, o (coupled: i, o).
inline int64_t rnn_peepholes(const Rnn& p) { return p.peepholes ? gates_of(p.cell) - 1 : 0; }
inline int64_t rnn_peephole_pitch(const Rnn& p) { return round_up(p.hidden, 64); }
inline int64_t rnn_peephole_bytes(const Rnn& p) { return rnn_peepholes(p) * rnn_peephole_pitch(p) * rnn_wide_bytes(p); }
inline int64_t rnn_norm_bytes(const Rnn& p) {
  if (!p.layer_norm) return 0;
  return 2 * rnn_bias_bytes(p) + has_cell_state(p.cell) * 2 * rnn_peephole_pitch(p) * rnn_wide_bytes(p);
}
inline int64_t rnn_weight_numbers(const Rnn& p) { return gates_of(p.cell) * p.hidden * p.state; }  // of W_h
// Tensors of weights of a layer and direction.
inline int64_t rnn_gains_each(const Rnn& p, bool bias) {
  return p.layer_norm ? 2 + has_cell_state(p.cell) * (1 + bias) : 0;
}
inline int64_t rnn_weights_each(const Rnn& p, bool bias) {
  return 2 + 2 * bias + (p.state != p.hidden) + p.peepholes + rnn_gains_each(p, bias);
}
inline int64_t rnn_input_size(const Rnn& p, int64_t layer) { return layer ? p.directions * p.state : p.input_size; }

inline int64_t rnn_direction_bytes(const Rnn& p, int64_t layer) {
  const int64_t gates = gates_of(p.cell);
  return rnn_matrix_bytes(p.dtype, gates, p.hidden, rnn_input_size(p, layer)) +
         rnn_matrix_bytes(p.dtype, gates, p.hidden, p.state) +
         (p.state != p.hidden ? rnn_matrix_bytes(p.dtype, 1, p.state, p.hidden) : 0) + rnn_bias_bytes(p) +
         rnn_peephole_bytes(p) + rnn_norm_bytes(p);
}
inline int64_t rnn_packed_bytes(const Rnn& p) {
  int64_t bytes = kRnnHeaderBytes;
  for (int64_t l = 0; l < p.layers; ++l) bytes += p.directions * rnn_direction_bytes(p, l);
  return bytes;
}

// Rows of `hidden` numbers that a step leaves for the backward: i f g o c; coupled i g o c; GRU r z n and W_nh h +
// b_nh; the others leave their output alone, and h' where zoneout parts the two.
inline int64_t rnn_kept(const Rnn& p) {
  if (has_cell_state(p.cell)) return gates_of(p.cell) + 1;
  return p.cell == RnnCell::gru ? 4 : p.zoneout.p > 0;
}
// And of layer norms the rows of x and of h normalised, [2, gates, hidden]; then 1 / sqrt(var + eps) of either, and the
// mean and that of c'.
inline int64_t rnn_normed_numbers(const Rnn& p) { return p.layer_norm ? 2 * gates_of(p.cell) * p.hidden : 0; }
inline int64_t rnn_moments(const Rnn& p) { return p.layer_norm ? 2 + 2 * has_cell_state(p.cell) : 0; }
inline int64_t rnn_normed(const Rnn& p) { return rnn_normed_numbers(p) + rnn_moments(p); }
// saved, in numbers: of each layer the output [rows, directions * state], then of each direction of it what a step
// leaves, [rows, rnn_kept, hidden], then of each [rows, rnn_normed_numbers] and [rows, rnn_moments]. A row is of a time
// and a place, in that order, in both directions.
inline int64_t rnn_saved_of_layer(const Rnn& p) {
  return p.rows * p.directions * (p.state + rnn_kept(p) * p.hidden + rnn_normed(p));
}

// The masks of a layer's states, wide [directions][batch][rnn_mask_pitch], if there are any.
inline int64_t rnn_mask_pitch(const Rnn& p) { return round_up(p.state, 128); }
inline int64_t rnn_mask_bytes(const Rnn& p) {
  return p.state_dropout.p > 0 ? p.directions * p.batch * rnn_mask_pitch(p) * rnn_wide_bytes(p) : 0;
}

// Steps whose W_x x are made ahead: they fill a part of an L2, and their rows are enough for a product to be efficient.
inline int64_t rnn_stretch(const Rnn& p, int64_t steps) {
  const int64_t fit = (int64_t(512) << 10) / rnn_wide_bytes(p) / (gates_of(p.cell) * p.hidden);
  const int64_t stretch = (fit > 24 ? fit : 24) / p.batch, fitting = stretch < steps ? stretch : steps;
  return fitting > 1 ? fitting : 1;
}

// What panels of units leave of layer norms' rows for each other: [directions][panels][numbers of a row][row pitch],
// the rows' in whole cache lines. A panel has at least `units` of them.
inline int64_t rnn_row_pitch(int64_t rows) { return round_up(rows, 32); }
inline int64_t rnn_left_bytes(const Rnn& p, int64_t units, int64_t numbers_times_pitch) {
  return p.layer_norm ? p.directions * ((p.hidden + units - 1) / units) * numbers_times_pitch * rnn_wide_bytes(p) : 0;
}

// Scratch of the forward: flags and the states that slices exchange, two layers' outputs, masks of states, what layer
// norms exchange: two numbers of each row of a stretch's x, of h and of c'.
inline int64_t rnn_ring_bytes(const Rnn& p) {
  constexpr int64_t kFlags = 64 * 128;
  const int64_t numbers = p.directions * p.batch * (2 * round_up(p.state, 2) + round_up(p.hidden, 2));
  return kFlags + round_up(numbers * rnn_wide_bytes(p), 64);
}
inline int64_t rnn_between_bytes(const Rnn& p, bool saves) {
  const bool between = p.layers > 1 && !saves;
  return between ? round_up(2 * p.rows * p.directions * p.state * rnn_wide_bytes(p), 64) : 0;
}
inline int64_t rnn_scratch_bytes(const Rnn& p, bool saves) {
  const int64_t rows = rnn_row_pitch(rnn_stretch(p, p.steps) * p.batch) + 2 * rnn_row_pitch(p.batch);
  return rnn_ring_bytes(p) + rnn_between_bytes(p, saves) + round_up(rnn_mask_bytes(p), 64) +
         rnn_left_bytes(p, 16 / rnn_wide_bytes(p), 2 * rows);
}

// Scratch of the backward, in this order: flags and what slices exchange; gradients of pre-activations, and of what is
// projected; of two layers' outputs; a layer's input under dropout; masks of its states; its W_h of each direction
// under dropout; where each row's state comes from, its time and its place; what layer norms exchange.
struct RnnBackwardScratch {
  int64_t gates, projected, between, dropped, masks, weights, before, time, place, left, bytes;
};
// Rows of `hidden` gradients of pre-activations: the GRU's r z n and, of n, that of W_nh h + b_nh; with layer norms
// those of W_x x and then those of W_h h.
inline int64_t slots_of(const Rnn& p) {
  return p.layer_norm ? 2 * gates_of(p.cell) : p.cell == RnnCell::gru ? 4 : gates_of(p.cell);
}
inline RnnBackwardScratch rnn_backward_scratch(const Rnn& p) {
  const int64_t wide = rnn_wide_bytes(p), slots = slots_of(p) * round_up(p.hidden, 2);
  const int64_t output = p.directions * p.state, projected = p.directions * round_up(p.state, 2);
  RnnBackwardScratch at{};
  auto next = [&](int64_t& offset, int64_t bytes) { offset = at.bytes, at.bytes += round_up(bytes, 64); };
  int64_t exchange;
  next(exchange, 64 * 128 + p.batch * (2 * p.directions * slots + projected) * wide);
  next(at.gates, p.directions * p.rows * slots * wide);
  next(at.projected, p.state != p.hidden ? p.rows * projected * wide : 0);
  next(at.between, p.layers > 1 ? 2 * p.rows * output * wide : 0);
  next(at.dropped, p.layers > 1 && p.dropout.p > 0 ? p.rows * output * wide : 0);
  next(at.masks, rnn_mask_bytes(p));
  next(at.weights, p.weight_dropout.p > 0 ? p.directions * rnn_weight_numbers(p) * bytes_of(p.dtype) : 0);
  next(at.before, p.directions * p.rows * 8);
  next(at.time, p.rows * 8);
  next(at.place, p.rows * 8);
  next(at.left, rnn_left_bytes(p, 64 / rnn_wide_bytes(p), 6 * rnn_row_pitch(p.batch)));
  return at;
}

}  // namespace handtuned
