// Recurrent layers, backward: the steps in reverse. Weights' and inputs' gradients are products over all steps at once,
// made afterwards (rnn_gradients.cuh).
//
// Plan: a block owns units of one direction for all steps (rnn_plan.h):
//   for each step from the last:  dh += gradient of the output;  d = the cell's back(), own units
//                                 d goes to the ring that all blocks read, and to its row in memory
//                                 all blocks of the direction meet
//                                 dh = what the cell passed on + d * W_h      (own units' columns of W_h)
// What is exchanged is d, not partial sums of dh: so the order of every sum is that of W_h's rows. With a projection a
// first part of the step makes dh of own units of the state, and what they pass on through W_r. Without a grid that can
// meet, each part is a launch.
#pragma once
#include <device/grid.h>

#include "rnn_cells.cuh"
#include "rnn_rows.cuh"
#include "rnn_slice.cuh"

namespace handtuned::cuda {

template <class T>
struct BackwardLayer {
  using A = Accumulate<T>;

  RnnBackward p;
  Noise<A> noise;
  RnnPlan plan{};
  int64_t layer = 0, width = 0;  // width: of its input
  int gates = 0, slots = 0;
  bool last = false, projects = false, in_output = false;  // in_output: what a step kept is the forward's output
  MatrixShape wh_shape{}, wr_shape{};
  const T *wx[2]{}, *peepholes[2]{};
  const T *wh[2]{}, *wr[2]{};      // column by column, wh under its dropout
  const A* grad_output = nullptr;  // [rows][directions * state] of the layer above, nullptr: the caller's
  const A* output = nullptr;       // of the forward, likewise
  const A* keep[2]{};
  int ring_pitch = 0, r_pitch = 0;
  A *ring = nullptr, *r_ring = nullptr;  // [direction][2][batch][gates * hidden]; [direction][batch][state]
  A *d[2]{}, *grad_r[2]{};               // [rows][slots][hidden]; [rows][state]
  A *dh = nullptr, *dc = nullptr;        // [direction][batch][state]; [..][hidden]
  unsigned* words = nullptr;

  explicit BackwardLayer(const RnnBackward& p) : p(p), noise(p) {}

  __device__ A* ring_row(int direction, int64_t step, int64_t place) const {
    return ring + ((direction * 2 + (step & 1)) * p.batch + place) * ring_pitch;
  }
  __device__ A* r_row(int direction, int64_t place) const { return r_ring + (direction * p.batch + place) * r_pitch; }
  __device__ A* dh_of(int direction, int64_t place) const { return dh + (direction * p.batch + place) * p.state; }
  __device__ A* dc_of(int direction, int64_t place) const { return dc + (direction * p.batch + place) * p.hidden; }
};

// Which part of a step a launch does.
enum class BackPhase : int8_t { all, output, cell, state };

// The gradient of a state after a step, in two: of the new state, and of the old one that zoneout kept.
template <class A>
struct Parted {
  A of_new, of_old;
  __device__ Parted(bool zones, A share, A gradient)
      : of_new(zones ? share * gradient : gradient), of_old(zones ? (1 - share) * gradient : A(0)) {}
};

// ---- a step ---------------------------------------------------------------------------------------------------------

// dh with the gradient of the output of this step.
template <class T>
__device__ inline Parted<Accumulate<T>> take_gradient(const BackwardLayer<T>& y, const Unit& u) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int64_t column = u.direction * p.state + u.number;
  A gradient = load_global(y.dh_of(u.direction, u.place) + u.number);
  if (y.grad_output != nullptr) {
    gradient += load_global(y.grad_output + row_of(p, u.time, u.place) * p.directions * p.state + column);
  } else if (p.grad_output.data != nullptr) {
    gradient += load_wide(caller_row<const T>(p, p.grad_output, u.time, u.place) + column);
  }
  return {y.noise.zones, y.noise.share(p, y.layer, u.direction, u.time, u.place, u.number), gradient};
}

// With a projection: its gradient, to all who read it.
template <class T>
__device__ inline void give_projection(const BackwardLayer<T>& y, const Unit& u) {
  const RnnBackward& p = y.p;
  const auto gradient = take_gradient(y, u);
  store_global(y.dh_of(u.direction, u.place) + u.number, gradient.of_old);
  store_global(y.r_row(u.direction, u.place) + u.number, gradient.of_new);
  store_global(y.grad_r[u.direction] + row_of(p, u.time, u.place) * p.state + u.number, gradient.of_new);
}

// The state that the cell's back() asks for: c before the step, or h.
template <class T, class Cell>
__device__ inline Accumulate<T> state_before(const BackwardLayer<T>& y, const Unit& u, Cell) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  if (u.step == 0) {
    const void* initial = Cell::kCell ? p.c0 : p.h0;
    const int64_t row = state_row(p, y.layer, u.direction, u.place);
    return initial != nullptr ? load_wide(static_cast<const T*>(initial) + row * p.hidden + u.number) : A(0);
  }
  const int64_t row = row_of(p, time_of(p, u.direction, u.step - 1, u.place), u.place);
  return Cell::kCell ? load_global(y.keep[u.direction] + ((row + 1) * Cell::kKept - 1) * p.hidden + u.number)
                     : load_global(y.output + (row * p.directions + u.direction) * p.state + u.number);
}

// d of one unit from the gradient of the cell's h; returns the part of h's before that does not go through W_h.
template <class T, class Cell>
__device__ inline Accumulate<T> step_back(const BackwardLayer<T>& y, const Unit& u, Accumulate<T> dh, Cell cell) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int64_t row = row_of(p, u.time, u.place);
  A kept[Cell::kKept], d[Cell::kSlots];
  const A* keep = y.in_output ? y.output + (row * p.directions + u.direction) * p.state + u.number
                              : y.keep[u.direction] + row * Cell::kKept * p.hidden + u.number;
#pragma unroll
  for (int k = 0; k < Cell::kKept; ++k) kept[k] = load_global(keep + k * p.hidden);
  Variant<A> gates{p.hard_sigmoid, p.hard_tanh, p.peepholes, {}};
  if (p.peepholes) {
#pragma unroll
    for (int k = 0; k < Cell::kPeepholes; ++k)
      gates.peephole[k] = load_wide(y.peepholes[u.direction] + k * p.hidden + u.number);
  }
  A before = 0, dc = 0, dc_around = 0;
  if (Cell::kKept > 1) before = state_before(y, u, cell);
  if (Cell::kCell) {
    dc = load_global(y.dc_of(u.direction, u.place) + u.number);
    if (y.last && p.grad_cells.data != nullptr)
      dc += load_wide(caller_row<const T>(p, p.grad_cells, u.time, u.place) + u.direction * p.hidden + u.number);
    const Parted<A> parted(y.noise.zones_cell,
                           y.noise.share_of_cell(p, y.layer, u.direction, u.time, u.place, u.number), dc);
    dc = parted.of_new, dc_around = parted.of_old;
  }
  const A around = Cell::back(gates, kept, before, dh, dc, d);
  if (Cell::kCell) store_global(y.dc_of(u.direction, u.place) + u.number, dc + dc_around);
  A *to = y.d[u.direction] + row * Cell::kSlots * p.hidden + u.number,
    *ring = y.ring_row(u.direction, u.step, u.place) + u.number;
#pragma unroll
  for (int k = 0; k < Cell::kSlots; ++k) store_global(to + k * p.hidden, d[k]);
  // Of a GRU's last gate what goes through W_h is in a slot of its own.
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g)
    store_global(ring + g * p.hidden, g + 1 == Cell::kGates ? d[Cell::kSlots - 1] : d[g]);
  return around;
}

// Without a projection: the cells of own units, whose dh is of the same units.
template <class T>
__device__ inline void step_units(const BackwardLayer<T>& y, int direction, int64_t step, int places, int64_t first,
                                  int units) {
  for (int i = threadIdx.x; i < places * units; i += blockDim.x) {
    const Unit u(y.p, direction, step, i / units, first + i % units);
    const auto gradient = take_gradient(y, u);
    with_cell<Accumulate<T>>(y.p.cell, [&](auto cell) {
      const auto around = step_back(y, u, gradient.of_new, cell);
      store_global(y.dh_of(direction, u.place) + u.number, around + gradient.of_old);
    });
  }
}

// Steps from `from` - 1 down to `to`. own: columns of W_h, whose sums are over d; projection: of W_r, over its
// gradient.
template <class T, bool InRegisters>
__global__ void __launch_bounds__(kRnnThreads, 1)
    rnn_steps_back_kernel(BackwardLayer<T> y, int64_t from, int64_t to, BackPhase phase) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.y);
  const Slice<T> own(y.wh[d], y.wh_shape, y.plan.main), own_units(y.wr[d], y.wr_shape, y.plan.second);
  const Kept<T, InRegisters> weights(own, y.plan.main_at, y.plan.persistent);
  const Kept<T, false> projection(own_units, y.plan.second_at, y.plan.persistent && y.projects);
  BlockGroup blocks{y.words + d * (kWordsBytes / 2 / sizeof(unsigned)), gridDim.x};

  for (int64_t s = from - 1; s > to - 1; --s) {
    const int places = int(active_at(p, s));
    if (y.projects && (phase == BackPhase::all || phase == BackPhase::output)) {
      for (int i = threadIdx.x; i < places * own.units; i += blockDim.x)
        give_projection(y, Unit(p, d, s, i / own.units, own.first + i % own.units));
    }
    if (y.projects && phase == BackPhase::all) blocks.meet();
    if (phase == BackPhase::all || phase == BackPhase::cell) {
      if (y.projects) {
        // gradient of what is projected = dh * W_r
        multiply_states(own_units, projection, y.plan, y.r_row(d, 0), y.r_pitch, places,
                        [&](int64_t place, int i, Shared<A> sums) {
                          const Unit u(p, d, s, place, own_units.first + i);
                          const A dm = sum_of(own_units, sums, i);
                          with_cell<A>(p.cell, [&](auto cell) { step_back(y, u, dm, cell); });
                        });
      } else {
        step_units(y, d, s, places, own.first, own.units);
      }
    }
    if (phase == BackPhase::all) blocks.meet();
    if (phase == BackPhase::all || phase == BackPhase::state) {
      multiply_states(own, weights, y.plan, y.ring_row(d, s, 0), y.ring_pitch, places,
                      [&](int64_t place, int i, Shared<A> sums) {
                        const int64_t number = own.first + i;
                        A* dh = y.dh_of(d, place) + number;
                        const A sum = sum_of(own, sums, i);
                        store_global(dh, load_global(dh) + sum * y.noise.state_factor(p, y.layer, d, place, number));
                      });
      __syncthreads();  // the next step's threads have other units
    }
  }
}

// ---- around the steps -----------------------------------------------------------------------------------------------

// Gradients of the final states, or zeros. What fills up rows of states is 0. blockIdx.x: direction and place.
template <class T>
__global__ void rnn_begin_back_kernel(BackwardLayer<T> y) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.x / p.batch);
  const int64_t place = blockIdx.x % p.batch, i = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t row = state_row(p, y.layer, d, place);
  auto final = [&](const void* from, int64_t width) {
    return from != nullptr ? load_wide(static_cast<const T*>(from) + row * width + i) : A(0);
  };
  if (i < p.state) store_global(y.dh_of(d, place) + i, final(p.grad_hn, p.state));
  if (y.dc != nullptr && i < p.hidden) store_global(y.dc_of(d, place) + i, final(p.grad_cn, p.hidden));
  for (int step = 0; step < 2; ++step)
    if (i >= y.gates * p.hidden && i < y.ring_pitch) store_global(y.ring_row(d, step, place) + i, A(0));
  if (y.projects && i >= p.state && i < y.r_pitch) store_global(y.r_row(d, place) + i, A(0));
}

// Gradients of the initial states. blockIdx.x: direction and place.
template <class T>
__global__ void rnn_end_back_kernel(BackwardLayer<T> y) {
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.x / p.batch);
  const int64_t place = blockIdx.x % p.batch, i = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t row = state_row(p, y.layer, d, place);
  if (p.grad_h0 != nullptr && i < p.state)
    store_global(static_cast<T*>(p.grad_h0) + row * p.state + i, narrow<T>(load_global(y.dh_of(d, place) + i)));
  if (p.grad_c0 != nullptr && i < p.hidden)
    store_global(static_cast<T*>(p.grad_c0) + row * p.hidden + i, narrow<T>(load_global(y.dc_of(d, place) + i)));
}

}  // namespace handtuned::cuda
