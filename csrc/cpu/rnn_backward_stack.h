// Recurrent layers, backward: the whole stack, from its last layer to its first.
#pragma once
#include "rnn_gradients.h"

namespace handtuned::HANDTUNED_ISA {

// Of each row: the row of its state before (-1: the initial one) in each direction, its time and place.
inline void find_rows(const RnnBackward& p, int64_t* before, int64_t* time, int64_t* place) {
  for (int64_t t = 0, row = 0; t < p.steps; ++t) {
    for (int64_t i = 0; i < active_at(p, t); ++i, ++row) {
      time[row] = t, place[row] = i;
      before[row] = t ? first_row(p, t - 1) + i : -1;
      if (p.directions == 2) before[p.rows + row] = t + 1 < length_of(p, i) ? first_row(p, t + 1) + i : -1;
    }
  }
}

// A layer's input as the forward took it.
template <class A>
const A* drop_input(const RnnBackward& p, int64_t layer, const A* from, A* to, const int64_t* time,
                    const int64_t* place) {
  const int64_t width = p.directions * p.state, rows = first_row(p, p.steps);
  parallel_for(rows, 1 + (16 << 10) / width, [&](int64_t begin, int64_t end) {
    Scratch<A> factor(round_up(width, kDropoutBlock));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t drawn = draw_row(p, RnnDraw::input, layer - 1, time[row], place[row]);
      dropout_row<false>(factor.data, width, drawn, p.dropout);
      copy_row<A, A>(to + row * width, from + row * width, width, factor.data);
    }
  });
  return to;
}

template <class E, class T>
void rnn_backward_in(const RnnBackward& p) {
  using A = Accumulate<E>;
  using O = Operand<E>;
  const RnnBackwardScratch at = rnn_backward_scratch(p);
  char* scratch = static_cast<char*>(p.scratch);
  auto numbers = [&](int64_t offset) { return reinterpret_cast<A*>(scratch + offset); };
  auto integers = [&](int64_t offset) { return reinterpret_cast<int64_t*>(scratch + offset); };
  Flag* flags = reinterpret_cast<Flag*>(scratch);
  int64_t *before = integers(at.before), *time = integers(at.time), *place = integers(at.place);
  find_rows(p, before, time, place);

  const int64_t each = rnn_weights_each(p, p.bias), output = p.rows * p.directions * p.state;
  LayerBackward<E, T> y(p);
  y.steps = p.longest, y.left = numbers(at.left);
  y.ring = reinterpret_cast<O*>(flags + kMostSlices);
  y.r_ring = y.ring + 2 * p.directions * p.batch * y.slots();
  for (int d = 0; d < 2; ++d) {
    y.gates[d] = reinterpret_cast<O*>(scratch + at.gates) + d * p.rows * y.slots();
    y.grad_r[d] = reinterpret_cast<O*>(scratch + at.projected) + d * p.rows * y.r_pitch();
  }
  for (y.layer = p.layers - 1; y.layer >= 0; --y.layer) {
    const SavedLayer<A> saved = saved_layer<A>(p, p.saved, y.layer);
    y.output = saved.output;
    for (int64_t d = 0; d < p.directions; ++d) {
      const void* const* weights = p.weights + (y.layer * p.directions + d) * each;
      y.keep[d] = saved.keep[d], y.normed[d] = saved.normed[d];
      y.gains[d] = weights + each - rnn_gains_each(p, p.bias);
      y.grads[d] = p.grad_weights ? p.grad_weights + (y.layer * p.directions + d) * each : nullptr;
      y.wx[d] = static_cast<const T*>(weights[0]), y.wh[d] = static_cast<const T*>(weights[1]);
      y.wr[d] = y.projects() ? static_cast<const T*>(weights[2 + 2 * p.bias]) : nullptr;
      y.peepholes[d] = p.peepholes ? static_cast<const T*>(y.gains[d][-1]) : nullptr;
      if (p.weight_dropout.p > 0)
        y.wh[d] = drop_weights<A>(p, y.layer * p.directions + d, y.wh[d],
                                  reinterpret_cast<T*>(scratch + at.weights) + d * rnn_weight_numbers(p));
    }
    y.masks = draw_state_masks(p, y.layer, numbers(at.masks));
    const int64_t panels = p.directions * ((p.hidden + 4 * kLanes<A> - 1) / (4 * kLanes<A>));
    run_slices(slices_for(p, 0, panels, thread_count()), true, flags,
               [&](Team& team) { BackwardTask<E, T>(y, team).run(); });

    const A* input = y.layer ? saved_layer<A>(p, p.saved, y.layer - 1).output : nullptr;
    if (y.layer && p.dropout.p > 0 && p.grad_weights)
      input = drop_input(p, y.layer, input, numbers(at.dropped), time, place);
    A* grad_input = y.layer ? numbers(at.between) + (y.layer & 1) * output : nullptr;
    LayerGradients<E, T>(y, input, grad_input, before, time, place).run();
    y.grad_output = grad_input;
  }
  clear_padding<T>(p, p.grad_input, p.input_size);
}

}  // namespace handtuned::HANDTUNED_ISA
