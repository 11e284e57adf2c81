// Recurrent layers, forward. Of a layer, for each stretch of steps:
//   rnn_input_kernel   X = W_x x + b_x of all rows of the stretch: one product
//   rnn_steps_kernel   a block owns units of one direction for all steps (rnn_plan.h):
//       for each step:   S = h * W_h, own units' rows of W_h;  gates of X and S;  h, c of the own units
//                        h goes to the ring that all blocks read in the next step, and to its outputs
//                        all blocks of the direction meet
//     With a projection the blocks exchange what is projected, and a second half of the step does h = that * W_r.
// The ring has two places: whoever writes one has met everybody since it was read. Without a grid that can meet, each
// half of a step is a launch.
#pragma once
#include <device/grid.h>

#include "product.cuh"
#include "rnn_cells.cuh"
#include "rnn_rows.cuh"
#include "rnn_slice.cuh"

namespace handtuned::cuda {

template <class T>
struct ForwardLayer {
  using A = Accumulate<T>;

  RnnForward p;
  Noise<A> noise;
  RnnPlan plan{};
  int64_t layer = 0, width = 0;  // width: of its input
  int gates = 0;
  bool last = false, projects = false;
  MatrixShape wh_shape{}, wr_shape{};
  const T *wx[2]{}, *wh[2]{}, *wr[2]{};
  const A *x_bias[2]{}, *h_bias[2]{}, *peepholes[2]{};
  int ring_pitch = 0, projected_pitch = 0;
  int64_t stretch = 0;
  const A* input = nullptr;  // [rows][width] of the layer below, under dropout; nullptr: the caller's
  A* output = nullptr;       // [rows][directions * state], nullptr: the caller's alone
  A* keep[2]{};              // of each direction, nullptr: nothing to keep
  A* x = nullptr;            // [direction][steps of a stretch][batch][gates][hidden]
  A *ring = nullptr, *projected = nullptr, *h = nullptr, *c = nullptr;
  unsigned* words = nullptr;

  explicit ForwardLayer(const RnnForward& p) : p(p), noise(p) {}

  __device__ A* ring_row(int direction, int64_t step, int64_t place) const {  // h after `step`
    return ring + ((direction * 2 + (step & 1)) * p.batch + place) * ring_pitch;
  }
  __device__ A* projected_row(int direction, int64_t place) const {
    return projected + (direction * p.batch + place) * projected_pitch;
  }
  __device__ A* h_of(int direction, int64_t place) const { return h + (direction * p.batch + place) * p.state; }
  __device__ A* c_of(int direction, int64_t place) const { return c + (direction * p.batch + place) * p.hidden; }
};

// Which part of a step a launch does.
enum class Phase : int8_t { all, gates, projection };

template <class A>
__device__ inline A zone(A share, A next, A old) {
  return share * next + (1 - share) * old;
}

// ---- a step ---------------------------------------------------------------------------------------------------------

// h after the step, to all who read it.
template <class T>
__device__ inline void give_state(const ForwardLayer<T>& y, const Unit& u, Accumulate<T> next) {
  using A = Accumulate<T>;
  const RnnForward& p = y.p;
  A* h = y.h_of(u.direction, u.place) + u.number;
  if (y.noise.zones)
    next = zone(y.noise.share(p, y.layer, u.direction, u.time, u.place, u.number), next, load_global(h));
  store_global(h, next);
  const A factor = y.noise.state_factor(p, y.layer, u.direction, u.place, u.number);
  store_global(y.ring_row(u.direction, u.step, u.place) + u.number, next * factor);
  const int64_t column = u.direction * p.state + u.number;
  if (y.output != nullptr) store_global(y.output + row_of(p, u.time, u.place) * p.directions * p.state + column, next);
  if (y.last && p.output.data != nullptr)
    store_global(caller_row<T>(p, p.output, u.time, u.place) + column, narrow<T>(next));
  if (u.step + 1 == length_of(p, u.place)) {
    const int64_t row = state_row(p, y.layer, u.direction, u.place);
    store_global(static_cast<T*>(p.hn) + row * p.state + u.number, narrow<T>(next));
  }
}

template <class T>
__device__ inline void give_cell(const ForwardLayer<T>& y, const Unit& u, Accumulate<T> next) {
  const RnnForward& p = y.p;
  store_global(y.c_of(u.direction, u.place) + u.number, next);
  if (y.last && p.cells.data != nullptr)
    store_global(caller_row<T>(p, p.cells, u.time, u.place) + u.direction * p.hidden + u.number, narrow<T>(next));
  if (u.step + 1 == length_of(p, u.place)) {
    const int64_t row = state_row(p, y.layer, u.direction, u.place);
    store_global(static_cast<T*>(p.cn) + row * p.hidden + u.number, narrow<T>(next));
  }
}

// The cell of one unit. x: its product of the input, `hidden` from gate to gate; sum(g) that of the state.
template <class T, class Cell, class Sum>
__device__ inline void step_cell(const ForwardLayer<T>& y, const Unit& u, const Accumulate<T>* x, Sum sum, Cell) {
  using A = Accumulate<T>;
  const RnnForward& p = y.p;
  A xs[Cell::kGates], ss[Cell::kGates], kept[Cell::kKept];
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g) {
    xs[g] = load_global(x + g * p.hidden);
    ss[g] = sum(g) + load_global(y.h_bias[u.direction] + g * p.hidden + u.number);
  }
  Variant<A> gates{p.hard_sigmoid, p.hard_tanh, p.peepholes, {}};
  if (p.peepholes) {
#pragma unroll
    for (int k = 0; k < Cell::kPeepholes; ++k)
      gates.peephole[k] = load_global(y.peepholes[u.direction] + k * p.hidden + u.number);
  }
  A old = 0, cell = 0;
  if (Cell::kCell) {
    old = cell = load_global(y.c_of(u.direction, u.place) + u.number);
  } else {
    old = load_global(y.h_of(u.direction, u.place) + u.number);
  }
  const A next = Cell::step(gates, xs, ss, old, cell, kept);
  if (Cell::kCell) {
    if (y.noise.zones_cell)
      cell = zone(y.noise.share_of_cell(p, y.layer, u.direction, u.time, u.place, u.number), cell, old);
    kept[Cell::kKept - 1] = cell;
    give_cell(y, u, cell);
  }
  if (y.keep[u.direction] != nullptr) {
    A* keep = y.keep[u.direction] + row_of(p, u.time, u.place) * Cell::kKept * p.hidden + u.number;
#pragma unroll
    for (int k = 0; k < Cell::kKept; ++k) store_global(keep + k * p.hidden, kept[k]);
  }
  if (y.projects) {
    store_global(y.projected_row(u.direction, u.place) + u.number, next);
  } else {
    give_state(y, u, next);
  }
}

// Steps [from, to), of a stretch that began at `begin`.
template <class T, bool InRegisters>
__global__ void __launch_bounds__(kRnnThreads, 1)
    rnn_steps_kernel(ForwardLayer<T> y, int64_t begin, int64_t from, int64_t to, Phase phase) {
  using A = Accumulate<T>;
  const RnnForward& p = y.p;
  const int d = int(blockIdx.y);
  const Slice<T> own(y.wh[d], y.wh_shape, y.plan.main), own_state(y.wr[d], y.wr_shape, y.plan.second);
  const Kept<T, InRegisters> weights(own, y.plan.main_at, y.plan.persistent);
  const Kept<T, false> projection(own_state, y.plan.second_at, y.plan.persistent && y.projects);
  BlockGroup blocks{y.words + d * (kWordsBytes / 2 / sizeof(unsigned)), gridDim.x};

  for (int64_t s = from; s < to; ++s) {
    const int places = int(active_at(p, s));
    if (phase != Phase::projection) {
      const A* x = y.x + ((d * y.stretch + s - begin) * p.batch * y.gates) * p.hidden;
      multiply_states(own, weights, y.plan, y.ring_row(d, s + 1, 0), y.ring_pitch, places,
                      [&](int64_t place, int i, Shared<A> sums) {
                        const Unit u(p, d, s, place, own.first + i);
                        auto sum = [&](int g) { return sum_of(own, sums, g * own.units + i); };
                        with_cell<A>(p.cell, [&](auto cell) {
                          step_cell(y, u, x + place * y.gates * p.hidden + u.number, sum, cell);
                        });
                      });
    }
    if (phase == Phase::all && y.projects) blocks.meet();
    if (phase != Phase::gates && y.projects) {
      multiply_states(own_state, projection, y.plan, y.projected_row(d, 0), y.projected_pitch, places,
                      [&](int64_t place, int i, Shared<A> sums) {
                        give_state(y, Unit(p, d, s, place, own_state.first + i), sum_of(own_state, sums, i));
                      });
    }
    if (phase == Phase::all && s + 1 < to) blocks.meet();
  }
}

// ---- before the steps -----------------------------------------------------------------------------------------------

// X of the steps from `begin` on. blockIdx.z: direction.
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2)
    rnn_input_kernel(ForwardLayer<T> y, int64_t begin, int64_t steps) {
  using A = Accumulate<T>;
  const RnnForward& p = y.p;
  const int d = int(blockIdx.z);
  const int64_t columns = y.gates * p.hidden;
  A* x = y.x + d * y.stretch * p.batch * columns;
  auto row = [&](int64_t m, int64_t k) {
    const int64_t step = begin + m / p.batch, place = m % p.batch;
    if (place >= active_at(p, step)) return A(0);
    const int64_t time = time_of(p, d, step, place);
    return y.input != nullptr ? load_global(y.input + row_of(p, time, place) * y.width + k)
                              : load_wide(caller_row<const T>(p, p.input, time, place) + k);
  };
  auto weight = [&](int64_t n, int64_t k) { return load_wide(y.wx[d] + n * y.width + k); };
  product_tile<A, true, true>(steps * p.batch, columns, y.width, row, weight, [&](int64_t m, int64_t n, A sum) {
    store_global(x + m * columns + n, sum + load_global(y.x_bias[d] + n));
  });
}

// Initial states, a thread a number of a place; the final ones of places without a step. What fills up rows of states
// is 0. Weights that the CPU packed (they have a header) make every result NaN: an error would have to wait for the
// device. blockIdx.x: direction and place.
template <class T>
__global__ void rnn_begin_kernel(ForwardLayer<T> y) {
  using A = Accumulate<T>;
  const RnnForward& p = y.p;
  const int d = int(blockIdx.x / p.batch);
  const int64_t place = blockIdx.x % p.batch, i = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  const int64_t row = state_row(p, y.layer, d, place);
  const bool over = length_of(p, place) == 0;
  auto initial = [&](const void* from, int64_t width) {
    return from != nullptr ? load_wide(static_cast<const T*>(from) + row * width + i) : A(0);
  };
  if (i < y.ring_pitch) {
    A h = 0;
    if (i < p.state) {
      const bool foreign = load_global(static_cast<const int32_t*>(p.packed_weights)) != 0;
      h = foreign ? A(NAN) : initial(p.h0, p.state);
      store_global(y.h_of(d, place) + i, h);
      if (over) store_global(static_cast<T*>(p.hn) + row * p.state + i, narrow<T>(h));
      h *= y.noise.state_factor(p, y.layer, d, place, i);
    }
    store_global(y.ring_row(d, 0, place) + i, A(0));
    store_global(y.ring_row(d, 1, place) + i, h);  // after step -1
  }
  if (y.c != nullptr && i < p.hidden) {
    const A c = initial(p.c0, p.hidden);
    store_global(y.c_of(d, place) + i, c);
    if (over) store_global(static_cast<T*>(p.cn) + row * p.hidden + i, narrow<T>(c));
  }
  if (y.projects && i >= p.hidden && i < y.projected_pitch) store_global(y.projected_row(d, place) + i, A(0));
}

}  // namespace handtuned::cuda
