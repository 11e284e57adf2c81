// Recurrent family, the skin: check the arguments (rnn_arguments.h), allocate the outputs, fill the Params, call the
// table, the CPU's or the CUDA library's.
#include "rnn.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "cuda/rnn_plan.h"
#include "cuda_library.h"
#include "rnn_arguments.h"
#include "tensor.h"

namespace handtuned {
namespace {

using namespace rnn_arguments;

// ---- the ops ----------------------------------------------------------------------------------------------------

Tensor rnn_pack(const Tensors& weights, const std::string& mode, bool bidirectional, bool bias, double weight_dropout,
                const OptionalTensor& seed) {
  const char* op = "rnn_pack";
  HT_CHECK(!weights.empty(), op, "weights is empty, the least is one layer; pass torch's flat weights");
  RnnPack p{};
  Holders h;
  p.dtype = dtype_of(op, "weights[0]", weights[0]);
  p.directions = 1 + bidirectional;
  h.place = place_of(op, weights[0]);
  take_mode(op, p, mode, h.place);
  take_weights(op, p, h, weights, bias, weights[0], "weights[0]");
  p.weight_dropout = dropout_of(op, weight_dropout, seed, h.device(), "weight_dropout");
  Tensor packed = empty({rnn_packed_bytes(p)}, ScalarType::Byte, h.device());
  p.weights = h.weight_data.data(), p.bias = bias, p.packed_weights = packed.data_ptr();
  if (h.place.cuda) {
    launch(op, h.place, h.place.cuda->rnn_pack, p);
    return packed;
  }
  const RnnHeader header = header_of(p);
  // What fills up columns is 0, so that equal calls give equal bytes.
  const bool fills_up = p.hidden % 64 || p.state % 64;
  std::memset(packed.data_ptr(), 0, fills_up ? packed.numel() : kRnnHeaderBytes);
  std::memcpy(packed.data_ptr(), &header, sizeof header);
  kernels().rnn_pack(p);
  return packed;
}

// CUDA's packed weights have no header: to read it would be to wait for the device.
void take_packed(const char* op, RnnForward& p, const Tensor& packed, Place place) {
  check_device(op, "packed", packed, place.device);
  const int64_t bytes = rnn_packed_bytes(p);
  HT_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.numel() == bytes &&
               packed.is_contiguous(),
           op, "packed is ", to_string(packed.scalar_type()), " of shape ", to_string(packed.sizes()),
           ", expected uint8 of shape [", bytes, "]; pass what rnn_pack made of this stack's weights");
  const RnnHeader header = header_of(p);
  HT_CHECK(place.cuda || std::memcmp(packed.data_ptr(), &header, sizeof header) == 0, op,
           "packed was made for another layer or another instruction set than ", kernels().isa,
           "; pass what rnn_pack makes of this stack's weights now");
  p.packed_weights = packed.data_ptr();
}

// Sizes and inputs of a forward.
void take_forward(const char* op, RnnForward& p, Holders& h, const Tensor& input, const OptionalTensor& lengths,
                  const OptionalTensor& h0, const OptionalTensor& c0, const Tensor& packed, const std::string& mode,
                  int64_t hidden_size, int64_t proj_size, int64_t num_layers, bool bidirectional) {
  p.dtype = dtype_of(op, "input", input);
  p.directions = 1 + bidirectional;
  h.place = place_of(op, input);
  take_mode(op, p, mode, h.place);
  take_sizes(op, p, hidden_size, proj_size, num_layers);
  take_input(op, p, h, mode, input, lengths, h0, c0);
  take_packed(op, p, packed, h.place);
  p.input = operand(input, h.input);
}

// hn, and cn if there is a cell state, of these shapes.
std::tuple<Tensor, Tensor> final_states(RnnForward& p, Shape h, Shape c, const Tensor& like) {
  const ScalarType dtype = like.scalar_type();
  const Device device = like.device();
  Tensor hn = empty(h, dtype, device), cn = empty_if(has_cell_state(p.cell), c, dtype, device);
  p.hn = hn.data_ptr(), p.cn = cn.data_ptr();
  return {std::move(hn), std::move(cn)};
}

// Rows of saved that lengths leave over are 0, so that equal calls give equal results.
void clear_rest_of_saved(const RnnForward& p) {
  const int64_t used = p.first ? p.first[p.steps] : p.rows, rest = p.rows - used;
  char* at = static_cast<char*>(p.saved);
  auto next = [&](int64_t width) {
    std::memset(at + used * width * rnn_wide_bytes(p), 0, rest * width * rnn_wide_bytes(p));
    at += p.rows * width * rnn_wide_bytes(p);
  };
  for (int64_t l = 0; l < p.layers && at && rest; ++l) {
    next(p.directions * p.state);
    for (int64_t d = 0; d < p.directions; ++d) next(rnn_kept(p) * p.hidden);
    for (int64_t d = 0; d < p.directions; ++d) next(rnn_normed_numbers(p)), next(rnn_moments(p));
  }
}

// The scratch of a small step lies on the stack.
void run(const char* op, RnnForward& p, Place place) {
  if (p.batch == 0) return;
  if (place.cuda) {
    const Tensor scratch = empty({cuda::forward_scratch(p, p.saved).bytes}, ScalarType::Byte, place.device);
    p.scratch = scratch.data_ptr();
    return launch(op, place, place.cuda->rnn_forward, p);
  }
  clear_rest_of_saved(p);
  constexpr int64_t kSmall = 16384;
  alignas(64) char small[kSmall];
  const int64_t bytes = rnn_scratch_bytes(p, p.saved);
  OptionalTensor large;
  if (bytes > kSmall) large = empty({bytes}, ScalarType::Byte);
  p.scratch = large ? large->data_ptr() : small;
  kernels().rnn_forward(p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& lengths,
                                                       const OptionalTensor& h0, const OptionalTensor& c0,
                                                       const Tensor& packed, const std::string& mode,
                                                       int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                                                       bool bidirectional, double dropout_p, const Rates& rates,
                                                       const OptionalTensor& seed, bool need_saved, bool need_cells) {
  const char* op = "rnn";
  RnnForward p{};
  Holders h;
  take_forward(op, p, h, input, lengths, h0, c0, packed, mode, hidden_size, proj_size, num_layers, bidirectional);
  take_rates(op, p, mode, dropout_p, rates, seed, h.device());
  HT_CHECK(has_cell_state(p.cell) || !need_cells, op, "need_cells is given but mode is ", mode,
           "; only the LSTM has a cell state");
  const ScalarType dtype = input.scalar_type();
  const int64_t cells = p.layers * p.directions, saved_numbers = need_saved ? p.layers * rnn_saved_of_layer(p) : 0;
  Tensor output = mirror(input, p.directions * p.state), saved = empty({saved_numbers}, wide(input), h.device());
  Tensor cell_states = need_cells ? mirror(input, p.directions * p.hidden) : empty({0}, dtype, h.device());
  auto [hn, cn] = final_states(p, {cells, p.batch, p.state}, {cells, p.batch, p.hidden}, input);
  OptionalTensor unused;
  p.output = operand(output, unused);
  if (need_cells) p.cells = operand(cell_states, unused);
  p.saved = saved_numbers ? saved.data_ptr() : nullptr;
  run(op, p, h.place);
  return {std::move(output), std::move(hn), std::move(cn), std::move(cell_states), std::move(saved)};
}

std::tuple<Tensor, Tensor, Tensor> rnn_inference(const Tensor& input, const OptionalTensor& lengths,
                                                 const OptionalTensor& h0, const OptionalTensor& c0,
                                                 const Tensor& packed, const std::string& mode, int64_t hidden_size,
                                                 int64_t proj_size, int64_t num_layers, bool bidirectional) {
  const char* op = "rnn_inference";
  RnnForward p{};
  Holders h;
  take_forward(op, p, h, input, lengths, h0, c0, packed, mode, hidden_size, proj_size, num_layers, bidirectional);
  Tensor output = mirror(input, p.directions * p.state);
  const int64_t cells = p.layers * p.directions;
  auto [hn, cn] = final_states(p, {cells, p.batch, p.state}, {cells, p.batch, p.hidden}, input);
  OptionalTensor unused;
  p.output = operand(output, unused);
  run(op, p, h.place);
  return {std::move(output), std::move(hn), std::move(cn)};
}

std::tuple<Tensor, Tensor> rnn_cell(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                    const Tensor& packed, const std::string& mode, int64_t hidden_size) {
  const char* op = "rnn_cell";
  RnnForward p{};
  Holders h;
  p.dtype = dtype_of(op, "input", input);
  p.directions = p.steps = p.longest = 1;
  h.place = place_of(op, input);
  take_mode(op, p, mode, h.place);
  take_sizes(op, p, hidden_size, 0, 1);
  const Shape s = input.sizes();
  HT_CHECK(s.size() == 2, op, "input has shape ", to_string(s), ", expected [batch, width]; unsqueeze or reshape it");
  p.batch = p.rows = p.used = s[0], p.input_size = s[1];
  const int64_t sizes[2] = {p.batch, p.hidden};
  const Shape state(sizes, 2);
  const char* remedy = "the state of each row";
  p.h0 = state_data(op, "h0", state, h0, input.scalar_type(), h.h0, remedy, h.device());
  check_cell_state(op, p, mode, c0);
  p.c0 = state_data(op, "c0", state, c0, input.scalar_type(), h.c0, remedy, h.device());
  take_packed(op, p, packed, h.place);
  p.input = operand(input, h.input);
  auto states = final_states(p, state, state, input);
  run(op, p, h.place);
  return states;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rnn_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_hn, const OptionalTensor& grad_cn,
    const OptionalTensor& grad_cells, const Tensor& input, const OptionalTensor& lengths, const OptionalTensor& h0,
    const OptionalTensor& c0, const Tensors& weights, const Tensor& saved, const std::string& mode, bool bidirectional,
    bool bias, double dropout_p, const Rates& rates, const OptionalTensor& seed, bool need_input, bool need_h0,
    bool need_c0, bool need_weights) {
  const char* op = "rnn_backward";
  RnnBackward p{};
  Holders h;
  p.dtype = dtype_of(op, "input", input);
  p.directions = 1 + bidirectional;
  h.place = place_of(op, input);
  take_mode(op, p, mode, h.place);
  HT_CHECK(!weights.empty(), op, "weights is empty, the least is one layer; pass torch's flat weights");
  take_weights(op, p, h, weights, bias, input, "input");
  take_input(op, p, h, mode, input, lengths, h0, c0);
  take_rates(op, p, mode, dropout_p, rates, seed, h.device());
  const char* remedy = "what the forward returned, with need_saved";
  const ScalarType dtype = input.scalar_type();
  auto take_rows = [&](const char* name, const OptionalTensor& given, int64_t width, OptionalTensor& holder) {
    if (!given) return RnnTensor{};
    int64_t sizes[3];
    std::copy_n(input.sizes().data(), input.dim(), sizes);
    sizes[input.dim() - 1] = p.directions * width;
    check_like(op, name, *given, Shape(sizes, input.dim()), dtype, remedy, h.device());
    return operand(*given, holder);
  };
  p.grad_output = take_rows("grad_output", grad_output, p.state, h.grad_output);
  p.grad_cells = take_rows("grad_cells", grad_cells, p.hidden, h.grad_cells);
  p.grad_hn = state_data(op, "grad_hn", p, grad_hn, p.state, dtype, h.grad_hn, remedy, h.device());
  p.grad_cn = state_data(op, "grad_cn", p, grad_cn, p.hidden, dtype, h.grad_cn, remedy, h.device());
  const int64_t saved_numbers = p.layers * rnn_saved_of_layer(p);
  check_like(op, "saved", saved, Shape(&saved_numbers, 1), wide(input), remedy, h.device());
  HT_CHECK(saved.is_contiguous(), op, "saved is not contiguous; pass ", remedy);

  const int64_t cells = p.layers * p.directions;
  int64_t numbers = 0;
  for (const Tensor& weight : weights) numbers += weight.numel();
  Tensor grad_input = need_input ? mirror(input, p.input_size) : empty({0}, dtype, h.device());
  Tensor grad_h0 = empty_if(need_h0, {cells, p.batch, p.state}, dtype, h.device());
  Tensor grad_c0 = empty_if(need_c0, {cells, p.batch, p.hidden}, dtype, h.device());
  Tensor grad_weights = empty_if(need_weights, {numbers}, dtype, h.device());
  if (p.batch == 0) {
    fill(grad_weights, 0);
    return {std::move(grad_input), std::move(grad_h0), std::move(grad_c0), std::move(grad_weights)};
  }
  OptionalTensor unused;
  const int64_t scratch_bytes = h.place.cuda ? cuda::backward_scratch(p).bytes : rnn_backward_scratch(p).bytes;
  const Tensor scratch = empty({scratch_bytes}, ScalarType::Byte, h.device());
  std::vector<void*> grads;
  char* next = static_cast<char*>(grad_weights.data_ptr());
  for (size_t i = 0; need_weights && i < weights.size(); ++i) {
    grads.push_back(next);
    next += weights[i].numel() * int64_t(size_of(dtype));
  }
  p.input = operand(input, h.input);
  if (need_input) p.grad_input = operand(grad_input, unused);
  p.weights = h.weight_data.data(), p.bias = bias;
  p.saved = saved.data_ptr();
  p.grad_h0 = need_h0 ? grad_h0.data_ptr() : nullptr;
  p.grad_c0 = need_c0 ? grad_c0.data_ptr() : nullptr;
  p.grad_weights = need_weights ? grads.data() : nullptr;
  p.scratch = scratch.data_ptr();
  if (h.place.cuda) {
    launch(op, h.place, h.place.cuda->rnn_backward, p);
  } else {
    kernels().rnn_backward(p);
  }
  return {std::move(grad_input), std::move(grad_h0), std::move(grad_c0), std::move(grad_weights)};
}

}  // namespace

void register_rnn(torch::stable::detail::StableLibrary& m) {
  m.impl("rnn_pack", HT_BOX(rnn_pack));
  m.impl("rnn", HT_BOX(rnn));
  m.impl("rnn_inference", HT_BOX(rnn_inference));
  m.impl("rnn_cell", HT_BOX(rnn_cell));
  m.impl("rnn_backward", HT_BOX(rnn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) { register_rnn(m); }

}  // namespace handtuned
