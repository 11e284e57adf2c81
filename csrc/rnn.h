// Recurrent family: the contract between the skin (rnn.cpp) and the kernels (cpu/rnn*.h).
//
// Of each layer and direction, with x_t its input at a step and h the state (torch's formulas, b both biases apart):
//   LSTM      i, f, o = sigmoid, g = tanh of  W_x x_t + b_x + W_h h + b_h;   c' = f * c + i * g;   h' = o * tanh(c')
//             with a projection  h' = W_r (o * tanh(c'))
//   GRU       r, z = sigmoid(W_x x_t + b_x + W_h h + b_h);   n = tanh(W_nx x_t + b_nx + r * (W_nh h + b_nh));
//             h' = (1 - z) * n + z * h
//   RNN       h' = tanh or relu of  W_x x_t + b_x + W_h h + b_h
// A layer's input is the one below's output (both directions side by side), under dropout where asked.
//
// Places. Rows of a batch are worked on in order of falling length, so that those still running at a step are a prefix:
// place p is row order[p] of the caller. Direction 0 takes a row's steps from its first, direction 1 from its own last.
#pragma once
#include "params.h"

namespace handtuned {

enum class RnnCell : int8_t { lstm, gru, tanh, relu };
inline int64_t gates_of(RnnCell cell) { return cell == RnnCell::lstm ? 4 : cell == RnnCell::gru ? 3 : 1; }
// Rows of `hidden` numbers that a step leaves for the backward: i f g o c; r z n and W_nh h + b_nh; the others leave
// their state alone.
inline int64_t saved_of(RnnCell cell) { return cell == RnnCell::lstm ? 5 : cell == RnnCell::gru ? 4 : 0; }
// Rows of `hidden` gradients of pre-activations: the GRU's r z n and, of n, that of W_nh h + b_nh.
inline int64_t slots_of(RnnCell cell) { return cell == RnnCell::lstm || cell == RnnCell::gru ? 4 : 1; }

// A tensor [steps, batch, width], or packed [rows, width] step by step, where `batch` is the stride of a row and `step`
// unused. Strides in elements, the last is 1. data nullptr: not given.
struct RnnTensor {
  void* data = nullptr;
  int64_t step = 0, batch = 0;
};

struct Rnn {
  DType dtype;
  RnnCell cell;
  int64_t steps, batch, input_size, hidden, state;  // state: width of h, which is proj_size or hidden
  int64_t layers, directions;
  bool packed;             // input and output are packed rows
  int64_t rows;            // of a layer: steps * batch, or all packed rows; saved has room for as many
  const int64_t* order;    // [batch], nullptr: as given
  const int64_t* active;   // [steps] places longer than a step's number, nullptr: all
  const int64_t* first;    // [steps + 1] running sum of active: the row of place 0 at a time; nullptr: time * batch
  const int64_t* lengths;  // [batch] by place, nullptr: steps
  Dropout dropout;         // of the inputs of layers above the first
  const void *h0, *c0;     // dtype [layers * directions, batch, state] and [.., hidden], contiguous, or nullptr: zeros
};

struct RnnPack : Rnn {
  const void* const* weights;  // of each layer and direction W_x, W_h, (b_x, b_h), (W_r), contiguous
  bool bias;
  void* packed_weights;  // rnn_packed_bytes, the header is the skin's
};

struct RnnForward : Rnn {
  RnnTensor input, output;  // output [steps, batch, directions * state], padding too is written (0); may be nullptr
  const void* packed_weights;
  void *hn, *cn;  // like h0, c0; cn of the LSTM alone
  void* saved;    // accumulate type, layout below, or nullptr
  void* scratch;  // rnn_scratch_bytes, 64-byte aligned
};

struct RnnBackward : Rnn {
  RnnTensor grad_output, input, grad_input;  // grad_output.data nullptr: zeros; grad_input.data nullptr: not wanted
  const void *grad_hn, *grad_cn;             // like h0, c0, or nullptr: zeros
  const void* const* weights;                // as rnn_pack takes them, each contiguous
  bool bias;
  const void* saved;
  void *grad_h0, *grad_c0;    // or nullptr
  void* const* grad_weights;  // one beside each of weights, or nullptr
  void* scratch;              // rnn_backward_scratch, 64-byte aligned
};

// ---- layouts ----------------------------------------------------------------------------------------------------

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Packed weights: a header, then of each layer and direction the matrices W_x, W_h, (W_r) and the biases b_x, b_h.
// A matrix [gates * out, in] is cut into panels of as many output columns as the kernel works on at once; within a
// panel, step k of `in` holds that column's numbers of all gates side by side. How wide a panel is depends on the
// instruction set; the bytes do not: columns are padded to 16 a gate (64 where there
// is one gate), `in` to an even number.
struct RnnHeader {
  int32_t vector_bytes, pairs;  // the instruction set's vectors; whether bf16 stands in pairs along `in`
  int32_t dtype, cell;
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
  return 2 * rnn_bias_numbers(p) * (p.dtype == DType::f64 ? 8 : 4);
}
inline int64_t rnn_input_size(const Rnn& p, int64_t layer) { return layer ? p.directions * p.state : p.input_size; }

inline int64_t rnn_direction_bytes(const Rnn& p, int64_t layer) {
  const int64_t gates = gates_of(p.cell);
  return rnn_matrix_bytes(p.dtype, gates, p.hidden, rnn_input_size(p, layer)) +
         rnn_matrix_bytes(p.dtype, gates, p.hidden, p.state) +
         (p.state != p.hidden ? rnn_matrix_bytes(p.dtype, 1, p.state, p.hidden) : 0) + rnn_bias_bytes(p);
}
inline int64_t rnn_packed_bytes(const Rnn& p) {
  int64_t bytes = kRnnHeaderBytes;
  for (int64_t l = 0; l < p.layers; ++l) bytes += p.directions * rnn_direction_bytes(p, l);
  return bytes;
}

// saved, in numbers: of each layer the output [rows, directions * state], then of each direction of it what a step
// leaves, [rows, saved_of(cell), hidden]. A row is of a time and a place, in that order, in both directions.
inline int64_t rnn_saved_of_layer(const Rnn& p) {
  return p.rows * p.directions * (p.state + saved_of(p.cell) * p.hidden);
}

// Scratch of the forward: flags and the states that slices exchange, then two layers' outputs.
inline int64_t rnn_wide_bytes(const Rnn& p) { return p.dtype == DType::f64 ? 8 : 4; }
inline int64_t rnn_ring_bytes(const Rnn& p) {
  constexpr int64_t kFlags = 64 * 128;
  const int64_t numbers = p.directions * p.batch * (2 * round_up(p.state, 2) + round_up(p.hidden, 2));
  return kFlags + round_up(numbers * rnn_wide_bytes(p), 64);
}
inline int64_t rnn_scratch_bytes(const Rnn& p, bool saves) {
  const bool between = p.layers > 1 && !saves;
  return rnn_ring_bytes(p) + (between ? 2 * p.rows * p.directions * p.state * rnn_wide_bytes(p) : 0);
}

// Scratch of the backward, in this order: flags and what slices exchange; gradients of pre-activations, and of what is
// projected; of two layers' outputs; a layer's input under dropout; where each row's state comes from, its time and its
// place.
struct RnnBackwardScratch {
  int64_t gates, projected, between, masked, before, time, place, bytes;
};
inline RnnBackwardScratch rnn_backward_scratch(const Rnn& p) {
  const int64_t wide = rnn_wide_bytes(p), slots = slots_of(p.cell) * round_up(p.hidden, 2);
  const int64_t output = p.directions * p.state, projected = p.directions * round_up(p.state, 2);
  RnnBackwardScratch at{};
  auto next = [&](int64_t& offset, int64_t bytes) { offset = at.bytes, at.bytes += round_up(bytes, 64); };
  int64_t exchange;
  next(exchange, 64 * 128 + p.batch * (2 * p.directions * slots + projected) * wide);
  next(at.gates, p.directions * p.rows * slots * wide);
  next(at.projected, p.state != p.hidden ? p.rows * projected * wide : 0);
  next(at.between, p.layers > 1 ? 2 * p.rows * output * wide : 0);
  next(at.masked, p.layers > 1 && p.dropout.p > 0 ? p.rows * output * wide : 0);
  next(at.before, p.directions * p.rows * 8);
  next(at.time, p.rows * 8);
  next(at.place, p.rows * 8);
  return at;
}

}  // namespace handtuned
