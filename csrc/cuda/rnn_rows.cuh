// Recurrent layers: where rows are, and what is drawn at random for them (cpu/rnn_panel.h and cpu/rnn_noise.h say the
// same for the CPU). Arrays of the Params lie in device memory.
#pragma once
#include <device/philox.h>
#include <device/vector.h>

#include "../rnn.h"

namespace handtuned::cuda {

__device__ inline int64_t length_of(const Rnn& p, int64_t place) {
  return p.lengths != nullptr ? load_global(p.lengths + place) : p.steps;
}
__device__ inline int64_t active_at(const Rnn& p, int64_t step) {
  return p.active != nullptr ? load_global(p.active + step) : p.batch;
}
__device__ inline int64_t first_row(const Rnn& p, int64_t time) {
  return p.first != nullptr ? load_global(p.first + time) : time * p.batch;
}
__device__ inline int64_t caller_of(const Rnn& p, int64_t place) {
  return p.order != nullptr ? load_global(p.order + place) : place;
}
// When a direction takes the time that is its `step`.
__device__ inline int64_t time_of(const Rnn& p, int direction, int64_t step, int64_t place) {
  return direction == 1 ? length_of(p, place) - 1 - step : step;
}
// In tensors of rows: of a time and a place.
__device__ inline int64_t row_of(const Rnn& p, int64_t time, int64_t place) { return first_row(p, time) + place; }
// In initial and final states.
__device__ inline int64_t state_row(const Rnn& p, int64_t layer, int direction, int64_t place) {
  return (layer * p.directions + direction) * p.batch + caller_of(p, place);
}
// Of a tensor of the caller.
template <class T>
__device__ inline T* caller_row(const Rnn& p, const RnnTensor& t, int64_t time, int64_t place) {
  const int64_t at = p.packed ? row_of(p, time, place) * t.batch : time * t.step + caller_of(p, place) * t.batch;
  return static_cast<T*>(t.data) + at;
}
template <class T>
__device__ inline Accumulate<T> load_wide(const T* p) {
  return widen(load_global(p));
}

// Where a unit is at a step.
struct Unit {
  int direction;
  int64_t step, place, time, number;

  __device__ Unit(const Rnn& p, int direction, int64_t step, int64_t place, int64_t number)
      : direction(direction), step(step), place(place), time(time_of(p, direction, step, place)), number(number) {}
};

// ---- at random ------------------------------------------------------------------------------------------------------

__device__ inline int64_t draw_row(RnnDraw kind, int64_t row) { return (int64_t(kind) << 48) + row; }
// Of a time and place, in the caller's order; nth: layer, or layer and direction.
__device__ inline int64_t draw_row(const Rnn& p, RnnDraw kind, int64_t nth, int64_t time, int64_t place) {
  const int64_t row = p.packed ? row_of(p, time, place) : time * p.batch + caller_of(p, place);
  return draw_row(kind, nth * p.rows + row);
}

// One element's verdict: the threads of a warp ask for rows of their own, so each makes its own call of the generator.
template <class A>
__device__ inline bool keeps(const Keep<A>& keep, int64_t row, int64_t column) {
  const uint4 words =
      philox(uint32_t(16 * (column / 128) + column % 16), uint32_t(row), uint32_t(row >> 32), 0, keep.seed());
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  const int number = int(column / 16 % 8);
  uint32_t found = 0;
#pragma unroll
  for (int n = 0; n < 8; ++n)
    if (n == number) found = word[n / 2] >> (n % 2 * 16) & 0xffffu;
  return found >= keep.threshold;
}

// All that a layer draws.
template <class A>
struct Noise {
  Keep<A> input, zoneout, cell_zoneout, state, weight;
  bool drops_input, zones, zones_cell, drops_state, drops_weight, samples;
  A zone_share, cell_share;  // of the new state in the expectation

  explicit Noise(const Rnn& p)
      : input(p.dropout),
        zoneout(p.zoneout),
        cell_zoneout(p.cell_zoneout),
        state(p.state_dropout),
        weight(p.weight_dropout),
        drops_input(p.dropout.p > 0),
        zones(p.zoneout.p > 0),
        zones_cell(p.cell_zoneout.p > 0),
        drops_state(p.state_dropout.p > 0),
        drops_weight(p.weight_dropout.p > 0),
        samples(p.samples_zoneout),
        zone_share(A(1 - p.zoneout.p)),
        cell_share(A(1 - p.cell_zoneout.p)) {}

  // Of a layer's input, layers from 1 on.
  __device__ A input_factor(const Rnn& p, int64_t layer, int64_t time, int64_t place, int64_t column) const {
    return keeps(input, draw_row(p, RnnDraw::input, layer - 1, time, place), column) ? input.scale : A(0);
  }
  // Of h for W_h: one for the whole sequence.
  __device__ A state_factor(const Rnn& p, int64_t layer, int direction, int64_t place, int64_t column) const {
    if (!drops_state) return A(1);
    return keeps(state, draw_row(RnnDraw::state, state_row(p, layer, direction, place)), column) ? state.scale : A(0);
  }
  // w of zoneout,  w * new + (1 - w) * old
  __device__ A share(const Rnn& p, int64_t layer, int direction, int64_t time, int64_t place, int64_t column) const {
    if (!zones) return A(1);
    return samples ? A(keeps(zoneout, draw_row(p, RnnDraw::zoneout, nth(p, layer, direction), time, place), column))
                   : zone_share;
  }
  __device__ A share_of_cell(const Rnn& p, int64_t layer, int direction, int64_t time, int64_t place,
                             int64_t column) const {
    if (!zones_cell) return A(1);
    const int64_t row = draw_row(p, RnnDraw::cell_zoneout, nth(p, layer, direction), time, place);
    return samples ? A(keeps(cell_zoneout, row, column)) : cell_share;
  }

 private:
  __device__ static int64_t nth(const Rnn& p, int64_t layer, int direction) { return layer * p.directions + direction; }
};

}  // namespace handtuned::cuda
