// Recurrent layers, forward and backward, wherever the weights stay.
#include "launchers.h"
#include "races.h"
#include "rnn_plan.h"
#include "simt.h"

namespace {

using namespace handtuned;

// Weights in registers, in shared memory, and nowhere: multiprocessors and bytes of shared memory of a block.
struct RnnShape {
  RnnCell cell;
  DType dtype;
  int64_t steps, batch, input, hidden, state, directions;
  simt::DeviceSize device;
};
const RnnShape kRnnShapes[] = {
    {RnnCell::lstm, DType::f32, 3, 3, 5, 21, 21, 1, {16, 227 << 10}},
    {RnnCell::coupled, DType::f32, 2, 3, 5, 11, 6, 2, {16, 227 << 10}},
    {RnnCell::gru, DType::bf16, 3, 9, 5, 21, 21, 1, {2, 227 << 10}},
    {RnnCell::lstm, DType::f64, 2, 2, 3, 11, 6, 1, {2, 18 << 10}},
};

template <class Call>
void describe(Call& call, const RnnShape& s, const void* states) {
  call = {};
  call.dtype = s.dtype, call.cell = s.cell, call.peepholes = has_cell_state(s.cell);
  call.steps = call.longest = s.steps, call.batch = s.batch, call.rows = call.used = s.steps * s.batch;
  call.input_size = s.input, call.hidden = s.hidden, call.state = s.state;
  call.layers = 1, call.directions = s.directions;
  call.h0 = states, call.c0 = has_cell_state(s.cell) ? states : nullptr;
}

int rnn(const RnnShape& s) {
  simt::device = s.device;
  const int64_t size = 8, gates = gates_of(s.cell), widest = s.hidden > s.input ? s.hidden : s.input;
  const int64_t output = s.batch * s.directions * s.state, tensor = size * s.steps * output;
  const int64_t input = size * s.steps * s.batch * s.input, states = size * s.directions * s.batch * s.hidden;
  Buffer x(input), dx(input), y(tensor), dy(tensor), initial(states), h(states), c(states), dh(states), dc(states);

  RnnPack pack;
  describe(pack, s, nullptr);
  pack.bias = true;
  std::vector<Buffer> weights, gradients;
  std::vector<void*> from, to;
  for (int64_t i = 0; i < s.directions * rnn_weights_each(pack, true); ++i) {
    weights.emplace_back(size * gates * s.hidden * widest), gradients.emplace_back(size * gates * s.hidden * widest);
    from.push_back(weights.back().data()), to.push_back(gradients.back().data());
  }
  Buffer packed(rnn_packed_bytes(pack));
  pack.weights = from.data(), pack.packed_weights = packed.data();
  if (int status = cuda::rnn_pack(pack, 0, nullptr)) return status;

  RnnForward f;
  describe(f, s, initial.data());
  Buffer saved(rnn_saved_of_layer(f) * size), scratch(cuda::forward_scratch(f, true).bytes);
  f.input = {x.data(), s.batch * s.input, s.input};
  f.output = {y.data(), output, s.directions * s.state};
  f.packed_weights = packed.data(), f.hn = h.data(), f.cn = c.data();
  f.saved = saved.data(), f.scratch = scratch.data();
  if (int status = cuda::rnn_forward(f, 0, nullptr)) return status;

  RnnBackward b;
  describe(b, s, initial.data());
  Buffer room(cuda::backward_scratch(b).bytes);
  b.grad_output = {dy.data(), output, s.directions * s.state};
  b.input = f.input, b.grad_input = {dx.data(), s.batch * s.input, s.input};
  b.weights = from.data(), b.grad_weights = to.data(), b.bias = true;
  b.saved = saved.data(), b.scratch = room.data();
  b.grad_h0 = dh.data(), b.grad_c0 = has_cell_state(s.cell) ? dc.data() : nullptr;
  return cuda::rnn_backward(b, 0, nullptr);
}

}  // namespace

int rnns() {
  for (const RnnShape& s : kRnnShapes)
    if (int status = rnn(s)) return status;
  return 0;
}
