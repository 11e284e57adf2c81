// Recurrent family, the launcher of the backward.
#include <type_traits>

#include "launchers.h"
#include "rnn_gradients.cuh"
#include "rnn_launch.h"

namespace handtuned::cuda {
namespace {

template <class T>
struct Stack {
  using A = Accumulate<T>;
  const RnnBackward& p;
  Starter& starter;
  BackwardScratch at;

  template <class N>
  N* scratch(int64_t offset) const {
    return reinterpret_cast<N*>(static_cast<char*>(p.scratch) + offset);
  }
};

// What all layers of a call have in common.
template <class T>
BackwardLayer<T> layer_of(const Stack<T>& stack) {
  using A = Accumulate<T>;
  const RnnBackward& p = stack.p;
  const BackwardScratch& at = stack.at;
  const int64_t gates = gates_of(p.cell), slots = slots_of(p);
  BackwardLayer<T> y(p);
  y.gates = int(gates), y.slots = int(slots);
  y.projects = p.state != p.hidden;
  y.in_output = rnn_kept(p) == 0;
  y.wh_shape = {p.state, 1, gates * p.hidden};
  y.wr_shape = {y.projects ? p.hidden : 0, 1, p.state};
  y.plan = plan_rnn(y.wh_shape, y.wr_shape, p, stack.starter.limits);
  y.ring_pitch = states_pitch(gates * p.hidden), y.r_pitch = states_pitch(p.state);
  y.words = stack.template scratch<unsigned>(at.words);
  y.ring = stack.template scratch<A>(at.ring), y.r_ring = stack.template scratch<A>(at.r_ring);
  y.dh = stack.template scratch<A>(at.dh);
  y.dc = has_cell_state(p.cell) ? stack.template scratch<A>(at.dc) : nullptr;
  for (int64_t d = 0; d < p.directions; ++d) {
    y.d[d] = stack.template scratch<A>(at.d) + d * p.rows * slots * p.hidden;
    y.grad_r[d] = stack.template scratch<A>(at.grad_r) + d * p.rows * p.state;
  }
  return y;
}

// A layer's weights, and what its forward left.
template <class T>
void take_layer(const Stack<T>& stack, BackwardLayer<T>& y) {
  using A = Accumulate<T>;
  const RnnBackward& p = stack.p;
  const int64_t each = rnn_weights_each(p, p.bias), rows = y.gates * p.hidden;
  const A* saved = static_cast<const A*>(p.saved) + y.layer * rnn_saved_of_layer(p);
  y.last = y.layer + 1 == p.layers;
  y.width = rnn_input_size(p, y.layer);
  y.output = saved;
  for (int64_t d = 0; d < p.directions; ++d) {
    const int64_t cell = y.layer * p.directions + d;
    const void* const* weights = p.weights + cell * each;
    y.keep[d] = saved + p.rows * p.directions * p.state + d * p.rows * rnn_kept(p) * p.hidden;
    y.wx[d] = static_cast<const T*>(weights[0]);
    y.peepholes[d] = p.peepholes ? static_cast<const T*>(weights[each - 1]) : nullptr;
    T *wh = stack.template scratch<T>(stack.at.wh) + d * rnn_weight_numbers(p),
      *wr = stack.template scratch<T>(stack.at.wr) + d * p.state * p.hidden;
    stack.starter.start_each(rnn_transpose_kernel<T>, rows * p.state, static_cast<const T*>(weights[1]), wh, rows,
                             p.state, y.noise.weight, y.noise.drops_weight, cell * rows);
    if (y.projects)
      stack.starter.start_each(rnn_transpose_kernel<T>, p.state * p.hidden,
                               static_cast<const T*>(weights[2 + 2 * p.bias]), wr, p.state, p.hidden, y.noise.weight,
                               false, int64_t(0));
    y.wh[d] = wh, y.wr[d] = wr;
  }
}

// dh and dc through all steps; d of all rows.
template <class T>
void run_steps(Starter& starter, const BackwardLayer<T>& y) {
  const RnnBackward& p = y.p;
  const int64_t numbers = y.ring_pitch > p.hidden ? y.ring_pitch : p.hidden;
  const dim3 places(p.directions * p.batch, (numbers + 127) / 128), grid(y.plan.blocks, unsigned(p.directions));
  auto* kernel = rnn_steps_back_kernel<T, false>;
  if constexpr (kMayHold<T>)
    if (y.plan.in_registers) kernel = rnn_steps_back_kernel<T, true>;
  const size_t bytes = y.plan.shared_bytes;
  starter.start(rnn_begin_back_kernel<T>, places, 128, 0, y);
  if (y.plan.persistent) {
    starter.zero(y.words, kWordsBytes);
    starter.start_together(kernel, grid, kRnnThreads, bytes, y, p.longest, int64_t(0), BackPhase::all);
  }
  for (int64_t s = p.longest; !y.plan.persistent && s > 0; --s) {
    if (y.projects) starter.start(kernel, grid, kRnnThreads, bytes, y, s, s - 1, BackPhase::output);
    starter.start(kernel, grid, kRnnThreads, bytes, y, s, s - 1, BackPhase::cell);
    starter.start(kernel, grid, kRnnThreads, bytes, y, s, s - 1, BackPhase::state);
  }
  starter.start(rnn_end_back_kernel<T>, places, 128, 0, y);
}

// The gradients that are products over all rows.
template <class T>
void run_products(Starter& starter, const BackwardLayer<T>& y, const LayerGradients<T>& g) {
  const RnnBackward& p = y.p;
  const int64_t columns = y.gates * p.hidden;
  auto product = [&](auto* kernel, int64_t rows, int64_t columns, int64_t directions) {
    const dim3 tiles((rows + kTile - 1) / kTile, (columns + kTile - 1) / kTile, directions);
    if (rows > 0 && columns > 0) starter.start(kernel, tiles, kProductThreads, kProductBytes<Accumulate<T>>, y, g);
  };
  if (g.input != nullptr || p.grad_input.data != nullptr) product(rnn_grad_input_kernel<T>, p.used, y.width, 1);
  if (p.grad_weights == nullptr) return;
  product(rnn_grad_wx_kernel<T>, columns, y.width, p.directions);
  product(rnn_grad_wh_kernel<T>, columns, p.state, p.directions);
  if (y.projects) product(rnn_grad_wr_kernel<T>, p.state, p.hidden, p.directions);
  auto sums = [&](auto* kernel, int64_t columns, int64_t kinds) {
    starter.start(kernel, dim3((columns + kWarp - 1) / kWarp, kinds, p.directions), kSumWarps * kWarp,
                  kSumWarps * kWarp * sizeof(Accumulate<T>), y, g);
  };
  if (p.bias) sums(rnn_grad_bias_kernel<T>, columns, 2);
  if (p.peepholes) sums(rnn_grad_peepholes_kernel<T>, p.hidden, rnn_peepholes(p));
}

template <class T>
cudaError_t backward(const RnnBackward& p, int device, void* stream) {
  using A = Accumulate<T>;
  Starter starter(device, stream);
  const Stack<T> stack{p, starter, backward_scratch(p)};
  BackwardLayer<T> y = layer_of(stack);
  LayerGradients<T> g;
  g.before = stack.template scratch<int64_t>(stack.at.before);
  g.time = stack.template scratch<int64_t>(stack.at.time);
  g.place = stack.template scratch<int64_t>(stack.at.place);
  starter.start_each(rnn_find_rows_kernel<int64_t>, p.longest * p.batch, p, g.before, g.time, g.place);
  const int64_t each = rnn_weights_each(p, p.bias), output = p.rows * p.directions * p.state;
  for (y.layer = p.layers - 1; y.layer >= 0; --y.layer) {
    take_layer(stack, y);
    run_steps(starter, y);
    for (int64_t d = 0; d < p.directions && p.grad_weights; ++d) {
      T* const* grads = reinterpret_cast<T* const*>(p.grad_weights + (y.layer * p.directions + d) * each);
      g.wx[d] = grads[0], g.wh[d] = grads[1];
      if (p.bias) g.bx[d] = grads[2], g.bh[d] = grads[3];
      if (y.projects) g.wr[d] = grads[2 + 2 * p.bias];
      if (p.peepholes) g.peepholes[d] = grads[each - 1];
    }
    const A* below = static_cast<const A*>(p.saved) + (y.layer - 1) * rnn_saved_of_layer(p);
    A* dropped = stack.template scratch<A>(stack.at.dropped);
    if (p.grad_weights) g.from = input_of(starter, p, y.noise, y.layer, below, dropped);
    g.input = y.layer ? stack.template scratch<A>(stack.at.between) + (y.layer & 1) * output : nullptr;
    run_products(starter, y, g);
    y.grad_output = g.input;
  }
  clear_padding<T>(starter, p, p.grad_input, p.input_size);
  return starter.status();
}

}  // namespace

int rnn_backward(const RnnBackward& p, int device, void* stream) {
  return rnn_by_type(p.dtype,
                     [&](auto* tag) { return backward<std::remove_pointer_t<decltype(tag)>>(p, device, stream); });
}

}  // namespace handtuned::cuda
