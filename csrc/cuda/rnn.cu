// Recurrent family, the launchers of packing and of the forward.
#include <type_traits>

#include "launchers.h"
#include "rnn_forward.cuh"
#include "rnn_launch.h"

namespace handtuned::cuda {
namespace {

template <class T>
cudaError_t pack(const RnnPack& p, int device, void* stream) {
  Starter starter(device, stream);
  const Keep<Accumulate<T>> keep(p.weight_dropout);
  const int64_t gates = gates_of(p.cell), each = rnn_weights_each(p, p.bias);
  starter.zero(p.packed_weights, rnn_packed_bytes(p));
  char* packed = static_cast<char*>(p.packed_weights) + kRnnHeaderBytes;
  for (int64_t i = 0; i < p.layers * p.directions; ++i) {
    const void* const* weight = p.weights + i * each;
    const int64_t width = rnn_input_size(p, i / p.directions), rows = gates * p.hidden;
    const PackedDirection<T> to = next_direction<T>(p, i / p.directions, packed);
    auto copy = [&](T* matrix, const void* from, int64_t rows, int64_t width, bool drops) {
      starter.start_each(rnn_copy_weights_kernel<T>, rows * width, static_cast<const T*>(from), matrix, width, keep,
                         drops, i * rows);
    };
    copy(to.x, weight[0], rows, width, false);
    copy(to.h, weight[1], rows, p.state, p.weight_dropout.p > 0);
    if (to.r != nullptr) copy(to.r, weight[2 + 2 * p.bias], p.state, p.hidden, false);
    auto wide = [&](Accumulate<T>* numbers, const void* from, int64_t count) {
      starter.start_each(rnn_widen_kernel<T>, count, static_cast<const T*>(from), numbers);
    };
    if (p.bias) wide(to.x_bias, weight[2], rows), wide(to.h_bias, weight[3], rows);
    if (p.peepholes) wide(to.peepholes, weight[each - 1], rnn_peepholes(p) * p.hidden);
  }
  return starter.status();
}

// What all layers of a call have in common.
template <class T>
ForwardLayer<T> layer_of(const RnnForward& p, DeviceLimits limits) {
  using A = Accumulate<T>;
  const ForwardScratch at = forward_scratch(p, p.saved);
  auto numbers = [&](int64_t offset) { return reinterpret_cast<A*>(static_cast<char*>(p.scratch) + offset); };
  const int64_t gates = gates_of(p.cell);
  ForwardLayer<T> y(p);
  y.gates = int(gates);
  y.projects = p.state != p.hidden;
  y.wh_shape = {p.hidden, gates, p.state};
  y.wr_shape = {y.projects ? p.state : 0, 1, p.hidden};
  y.plan = plan_rnn(y.wh_shape, y.wr_shape, p, limits);
  y.ring_pitch = states_pitch(p.state), y.projected_pitch = states_pitch(p.hidden);
  y.stretch = stretch_of(p);
  y.words = reinterpret_cast<unsigned*>(numbers(at.words));
  y.ring = numbers(at.ring), y.projected = numbers(at.projected), y.h = numbers(at.h), y.x = numbers(at.x);
  y.c = has_cell_state(p.cell) ? numbers(at.c) : nullptr;
  return y;
}

// Steps [begin, end), whose X is there.
template <class T>
void run_steps(Starter& starter, const ForwardLayer<T>& y, int64_t begin, int64_t end) {
  const dim3 grid(y.plan.blocks, unsigned(y.p.directions));
  auto* kernel = rnn_steps_kernel<T, false>;
  if constexpr (kMayHold<T>)
    if (y.plan.in_registers) kernel = rnn_steps_kernel<T, true>;
  const size_t bytes = y.plan.shared_bytes;
  if (y.plan.persistent) {
    starter.zero(y.words, kWordsBytes);
    return starter.start_together(kernel, grid, kRnnThreads, bytes, y, begin, begin, end, Phase::all);
  }
  for (int64_t s = begin; s < end; ++s) {
    starter.start(kernel, grid, kRnnThreads, bytes, y, begin, s, s + 1, Phase::gates);
    if (y.projects) starter.start(kernel, grid, kRnnThreads, bytes, y, begin, s, s + 1, Phase::projection);
  }
}

template <class T>
cudaError_t forward(const RnnForward& p, int device, void* stream) {
  using A = Accumulate<T>;
  Starter starter(device, stream);
  ForwardLayer<T> y = layer_of<T>(p, starter.limits);
  char* packed = static_cast<char*>(const_cast<void*>(p.packed_weights)) + kRnnHeaderBytes;
  const ForwardScratch at = forward_scratch(p, p.saved);
  A* between = reinterpret_cast<A*>(static_cast<char*>(p.scratch) + at.between);
  A* dropped = reinterpret_cast<A*>(static_cast<char*>(p.scratch) + at.dropped);
  A* saved = static_cast<A*>(p.saved);
  const int64_t output = p.rows * p.directions * p.state, columns = gates_of(p.cell) * p.hidden;
  if (p.used < p.rows) starter.zero(saved, saved ? p.layers * rnn_saved_of_layer(p) * sizeof(A) : 0);
  for (y.layer = 0; y.layer < p.layers; ++y.layer) {
    y.last = y.layer + 1 == p.layers;
    y.width = rnn_input_size(p, y.layer);
    for (int64_t d = 0; d < p.directions; ++d) {
      const PackedDirection<T> w = next_direction<T>(p, y.layer, packed);
      y.wx[d] = w.x, y.wh[d] = w.h, y.wr[d] = w.r;
      y.x_bias[d] = w.x_bias, y.h_bias[d] = w.h_bias, y.peepholes[d] = w.peepholes;
    }
    y.input = input_of(starter, p, y.noise, y.layer, y.output, dropped);
    y.output = saved ? saved : y.last ? nullptr : between + (y.layer & 1) * output;
    for (int64_t d = 0; d < p.directions && saved && rnn_kept(p) > 0; ++d)
      y.keep[d] = saved + output + d * p.rows * rnn_kept(p) * p.hidden;
    if (saved) saved += rnn_saved_of_layer(p);
    const int64_t numbers = y.projected_pitch > y.ring_pitch ? y.projected_pitch : y.ring_pitch;
    starter.start(rnn_begin_kernel<T>, dim3(p.directions * p.batch, (numbers + 127) / 128), 128, 0, y);
    for (int64_t s = 0; s < p.longest; s += y.stretch) {
      const int64_t end = s + y.stretch < p.longest ? s + y.stretch : p.longest;
      const dim3 tiles(((end - s) * p.batch + kTile - 1) / kTile, (columns + kTile - 1) / kTile, p.directions);
      starter.start(rnn_input_kernel<T>, tiles, kProductThreads, kProductBytes<A>, y, s, end - s);
      run_steps(starter, y, s, end);
    }
  }
  clear_padding<T>(starter, p, p.output, p.directions * p.state);
  clear_padding<T>(starter, p, p.cells, p.directions * p.hidden);
  return starter.status();
}

}  // namespace

int rnn_pack(const RnnPack& p, int device, void* stream) {
  return rnn_by_type(p.dtype, [&](auto* tag) { return pack<std::remove_pointer_t<decltype(tag)>>(p, device, stream); });
}

int rnn_forward(const RnnForward& p, int device, void* stream) {
  return rnn_by_type(p.dtype,
                     [&](auto* tag) { return forward<std::remove_pointer_t<decltype(tag)>>(p, device, stream); });
}

}  // namespace handtuned::cuda
