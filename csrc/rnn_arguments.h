// Recurrent family, the skin's first half: arguments are checked and filled into the Params.
#pragma once
#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cuda_library.h"
#include "rnn.h"
#include "tensor.h"

namespace handtuned::rnn_arguments {

using Tensors = std::vector<Tensor>;

// What the Params point to and no argument owns; where all of it is.
struct Holders {
  Place place;
  OptionalTensor input, grad_output, grad_cells, h0, c0, grad_hn, grad_cn;
  Tensors weights;
  std::vector<const void*> weight_data;
  std::vector<int64_t> order, active, first, lengths;
  OptionalTensor uploaded;  // those four, for CUDA

  Device device() const { return place.device; }
};

inline ScalarType wide(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_device(const char* op, const std::string& name, const Tensor& tensor, Device device,
                         const char* main = "input") {
  HT_CHECK(tensor.device() == device, op, name, " is on ", to_string(tensor.device()), ", ", main, " is on ",
           to_string(device), "; move it with .to(", main, ".device)");
}

// A cell's name as torch's, then words for what differs in it.
inline void take_mode(const char* op, Rnn& p, const std::string& mode, Place place) {
  constexpr const char* kNames[] = {"LSTM", "GRU", "RNN_TANH", "RNN_RELU"};
  size_t at = std::min(mode.find(' '), mode.size());
  const auto* name = std::find(kNames, kNames + 4, mode.substr(0, at));
  p.cell = RnnCell(name - kNames);
  auto has = [&](const std::string& word, bool allowed) {
    const bool found = allowed && mode.compare(at, word.size(), word) == 0;
    at += found ? word.size() : 0;
    return found;
  };
  if (at < mode.size()) {
    const bool lstm = p.cell == RnnCell::lstm;
    if (has(" coupled", lstm)) p.cell = RnnCell::coupled;
    p.peepholes = has(" peepholes", lstm);
    p.hard_sigmoid = has(" hardsigmoid", lstm || p.cell == RnnCell::gru);
    p.hard_tanh = has(" hardtanh", p.cell != RnnCell::relu);
    p.layer_norm = has(" layernorm", true);
  }
  HT_CHECK(
      name != kNames + 4 && at == mode.size(), op, "mode is '", mode,
      "', allowed are LSTM, GRU, RNN_TANH and RNN_RELU, and then, after a space each and in this order, coupled and "
      "peepholes (LSTM), hardsigmoid (LSTM and GRU), hardtanh (all but RNN_RELU) and layernorm");
  HT_CHECK(
      !place.cuda || !p.layer_norm, op, "mode is '", mode,
      "', and the CUDA kernels do not normalise gates; use handtuned.backend('reference') or move the input to the "
      "CPU");
}

using Rates = std::optional<std::vector<double>>;

inline void take_rates(const char* op, Rnn& p, const std::string& mode, double dropout_p, const Rates& rates,
                       const OptionalTensor& seed, Device device) {
  p.dropout = dropout_of(op, dropout_p, seed, device);
  if (!rates) return;
  HT_CHECK(rates->size() == 4, op, "rates has ", rates->size(),
           " numbers, expected 4; pass zoneout, cell_zoneout, recurrent_dropout and weight_dropout");
  constexpr const char* kNames[] = {"zoneout", "cell_zoneout", "recurrent_dropout", "weight_dropout"};
  Dropout* const to[] = {&p.zoneout, &p.cell_zoneout, &p.state_dropout, &p.weight_dropout};
  p.samples_zoneout = bool(seed);
  for (int i = 0; i < 4; ++i) {
    const double rate = (*rates)[i];
    if (i < 2 && !seed) {
      check_rate(op, kNames[i], rate);
      to[i]->p = rate;
    } else {
      *to[i] = dropout_of(op, rate, seed, device, kNames[i]);
    }
  }
  HT_CHECK(p.cell_zoneout.p == 0 || has_cell_state(p.cell), op, "cell_zoneout is ", p.cell_zoneout.p, " but mode is ",
           mode, "; only the LSTM has a cell state");
}

// More than anybody has, and far less than what lets a number of bytes overflow.
constexpr int64_t kMostHidden = 1 << 20, kMostLayers = 1 << 12;

inline void take_sizes(const char* op, Rnn& p, int64_t hidden, int64_t proj, int64_t layers) {
  HT_CHECK(1 <= hidden && hidden <= kMostHidden, op, "hidden_size is ", hidden, ", the limits are 1 and ", kMostHidden);
  HT_CHECK(proj == 0 || (has_cell_state(p.cell) && 0 < proj && proj < hidden), op, "proj_size is ", proj,
           ", allowed are 0 and, for the LSTM, less than hidden_size, ", hidden);
  HT_CHECK(1 <= layers && layers <= kMostLayers, op, "num_layers is ", layers, ", the limits are 1 and ", kMostLayers);
  p.hidden = hidden, p.state = proj ? proj : hidden, p.layers = layers;
}

// Sizes from the weights, which are checked against each other. `main` is what their dtype follows.
inline void take_weights(const char* op, Rnn& p, Holders& h, const Tensors& weights, bool bias, const Tensor& main,
                         const char* main_name) {
  const int64_t gates = gates_of(p.cell), count = int64_t(weights.size());
  for (int64_t i = 0; i < std::min<int64_t>(2, count); ++i) {
    const Shape s = weights[i].sizes();
    HT_CHECK(s.size() == 2 && s[0] >= gates && s[0] % gates == 0, op, "weights[", i, "] has shape ", to_string(s),
             ", expected [", gates, " * hidden_size, width]; pass torch's flat weights");
  }
  const Shape w_hh = weights[count > 1 ? 1 : 0].sizes();
  p.hidden = w_hh[0] / gates, p.state = w_hh[1];
  const bool projected = p.state != p.hidden;
  HT_CHECK(!projected || (has_cell_state(p.cell) && 0 < p.state && p.state < p.hidden), op, "weights[1] has shape ",
           to_string(w_hh), ", expected [", w_hh[0], ", ", p.hidden,
           "], or fewer columns for an LSTM with a projection");
  const int64_t each = rnn_weights_each(p, bias), of_layer = each * p.directions;
  HT_CHECK(count % of_layer == 0, op, "weights has ", count, " tensors, expected a multiple of ", of_layer, ": ", each,
           " for each layer and direction; pass torch's flat weights");
  p.layers = count / of_layer, p.input_size = weights[0].sizes()[1];
  for (int64_t i = 0; i < count; ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    const int64_t rows = gates * p.hidden, place = i % each;
    const int64_t gain = place - (each - rnn_gains_each(p, bias));  // of layer norms: of x, of h; of c', bias of c'
    const int64_t vector = gain >= 2                                           ? p.hidden
                           : gain >= 0 || (bias && (place == 2 || place == 3)) ? rows
                           : gain == -1 && p.peepholes                         ? rnn_peepholes(p) * p.hidden
                                                                               : 0;
    const int64_t matrix[2] = {place < 2 ? rows : p.state, place == 0   ? rnn_input_size(p, i / of_layer)
                                                           : place == 1 ? p.state
                                                                        : p.hidden};
    const Shape expected = vector ? Shape(&vector, 1) : Shape(matrix, 2);
    check_device(op, name, weights[i], h.device(), main_name);
    HT_CHECK(equal(weights[i].sizes(), expected), op, name, " has shape ", to_string(weights[i].sizes()), ", expected ",
             to_string(expected), "; pass torch's flat weights");
    HT_CHECK(weights[i].scalar_type() == main.scalar_type(), op, name, " is ", to_string(weights[i].scalar_type()),
             ", ", main_name, " is ", to_string(main.scalar_type()), "; convert one with .to()");
    if (!weights[i].is_contiguous()) h.weights.push_back(contiguous(weights[i]));
    h.weight_data.push_back((weights[i].is_contiguous() ? weights[i] : h.weights.back()).data_ptr());
  }
}

// What lengths say, where CUDA kernels find it.
inline void upload_lengths(const char* op, Rnn& p, Holders& h) {
  std::vector<int64_t> all;
  const int64_t** const to[] = {&p.order, &p.lengths, &p.active, &p.first};
  size_t at[4], i = 0;
  for (const auto* numbers : {&h.order, &h.lengths, &h.active, &h.first}) {
    at[i++] = all.size();
    all.insert(all.end(), numbers->begin(), numbers->end());
  }
  h.uploaded = empty({int64_t(all.size())}, ScalarType::Long, h.device());
  const auto* data = static_cast<const int64_t*>(h.uploaded->data_ptr());
  for (i = 0; i < 4; ++i) *to[i] = data + at[i];
  launch(op, h.place, h.place.cuda->upload, Upload{h.uploaded->data_ptr(), all.data(), all.size() * sizeof(int64_t)});
}

// Lengths as places, longest first, and what runs at each step.
inline void take_lengths(const char* op, Rnn& p, Holders& h, const Tensor& given) {
  HT_CHECK(given.is_cpu(), op, "lengths is on ", to_string(given.device()),
           ", expected on the CPU, where the steps are planned; move it with .cpu()");
  HT_CHECK(given.scalar_type() == ScalarType::Long, op, "lengths is ", to_string(given.scalar_type()),
           ", expected int64; convert it");
  HT_CHECK(given.dim() == 1 && given.numel() == p.batch, op, "lengths has shape ", to_string(given.sizes()),
           ", expected [", p.batch, "]; pass one for each batch entry");
  const Tensor held = contiguous(given);
  const int64_t* lengths = static_cast<const int64_t*>(held.data_ptr());
  int64_t total = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t most = !p.packed ? p.steps : b ? lengths[b - 1] : p.rows;
    HT_CHECK(lengths[b] >= 0 && lengths[b] <= most, op, "lengths[", b, "] is ", lengths[b], ", the limits are 0 and ",
             most, p.packed ? ", falling, beside packed input; sort them" : " steps; clamp it");
    total += lengths[b];
  }
  p.used = total;
  HT_CHECK(!p.packed || total == p.rows, op, "lengths add up to ", total, ", input has ", p.rows,
           " packed rows; they must be equal");
  if (p.packed) p.steps = p.batch ? lengths[0] : 0;
  h.order.resize(p.batch);
  std::iota(h.order.begin(), h.order.end(), 0);
  if (!p.packed)
    std::stable_sort(h.order.begin(), h.order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  h.lengths.resize(p.batch);
  for (int64_t i = 0; i < p.batch; ++i) h.lengths[i] = lengths[h.order[i]];
  h.active.resize(p.steps);
  h.first.assign(p.steps + 1, 0);
  for (int64_t t = 0, n = p.batch; t < p.steps; ++t) {
    while (n && h.lengths[n - 1] <= t) --n;
    h.active[t] = n;
    h.first[t + 1] = h.first[t] + n;
  }
  p.longest = p.batch ? h.lengths[0] : 0;
  p.order = h.order.data(), p.lengths = h.lengths.data(), p.active = h.active.data(), p.first = h.first.data();
  if (h.place.cuda) upload_lengths(op, p, h);
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, Shape shape, ScalarType dtype,
                       const char* remedy, Device device) {
  check_device(op, name, tensor, device);
  HT_CHECK(equal(tensor.sizes(), shape), op, name, " has shape ", to_string(tensor.sizes()), ", expected ",
           to_string(shape), "; pass ", remedy);
  HT_CHECK(tensor.scalar_type() == dtype, op, name, " is ", to_string(tensor.scalar_type()), ", expected ",
           to_string(dtype), "; convert it with .to()");
}

// Contiguous data of an optional tensor of this shape.
const void* state_data(const char* op, const char* name, Shape shape, const OptionalTensor& given, ScalarType dtype,
                       OptionalTensor& holder, const char* remedy, Device device) {
  if (!given) return nullptr;
  check_like(op, name, *given, shape, dtype, remedy, device);
  if (given->is_contiguous()) return given->data_ptr();
  holder = contiguous(*given);
  return holder->data_ptr();
}
// Of one [layers * directions, batch, width].
const void* state_data(const char* op, const char* name, const Rnn& p, const OptionalTensor& given, int64_t width,
                       ScalarType dtype, OptionalTensor& holder, const char* remedy, Device device) {
  const int64_t shape[3] = {p.layers * p.directions, p.batch, width};
  return state_data(op, name, Shape(shape, 3), given, dtype, holder, remedy, device);
}

inline void check_cell_state(const char* op, const Rnn& p, const std::string& mode, const OptionalTensor& c0) {
  HT_CHECK(!c0 || has_cell_state(p.cell), op, "c0 is given but mode is ", mode, "; only the LSTM has a cell state");
}

// [steps, batch, width] or packed [rows, width], last stride 1: the tensor itself or one copy of it.
inline RnnTensor operand(const Tensor& given, OptionalTensor& holder) {
  const int64_t n = given.dim();
  const bool in_place = given.sizes()[n - 1] <= 1 || given.strides()[n - 1] == 1;
  if (!in_place) holder = contiguous(given);
  const Tensor& t = in_place ? given : *holder;
  const Shape s = t.strides();
  return n == 3 ? RnnTensor{t.data_ptr(), s[0], s[1]} : RnnTensor{t.data_ptr(), 0, s[0]};
}

// `width` wide rows beside those of `like`: the rows of a batch entry together in memory where they are so in `like`.
inline Tensor mirror(const Tensor& like, int64_t width) {
  const Shape s = like.sizes();
  if (s.size() == 2) return empty({s[0], width}, like.scalar_type(), like.device());
  const int64_t sizes[3] = {s[0], s[1], width};
  if (like.strides()[0] >= like.strides()[1]) return empty(Shape(sizes, 3), like.scalar_type(), like.device());
  const int64_t row = std::max<int64_t>(width, 1), strides[3] = {row, std::max<int64_t>(s[0], 1) * row, 1};
  return empty_strided(Shape(sizes, 3), Shape(strides, 3), like.scalar_type(), like.device());
}

// Dims, lengths and initial states; input_size is known where the weights are given.
inline void take_input(const char* op, Rnn& p, Holders& h, const std::string& mode, const Tensor& input,
                       const OptionalTensor& lengths, const OptionalTensor& h0, const OptionalTensor& c0) {
  const Shape s = input.sizes();
  HT_CHECK(s.size() == 3 || (s.size() == 2 && lengths), op, "input has shape ", to_string(s),
           ", expected [steps, batch, width], or packed [rows, width] beside lengths; unsqueeze or reshape it");
  const int64_t width = s[s.size() - 1];
  if (!p.input_size) p.input_size = width;
  HT_CHECK(width == p.input_size, op, "input has width ", width, ", weights[0] has ", p.input_size,
           " columns; they must be equal");
  p.packed = s.size() == 2;
  p.batch = p.packed ? lengths->numel() : s[1];
  p.steps = p.packed ? 0 : s[0];
  p.rows = p.used = p.packed ? s[0] : s[0] * s[1];
  p.longest = p.steps;
  if (lengths) take_lengths(op, p, h, *lengths);
  const char* remedy = "one state for each layer and direction";
  p.h0 = state_data(op, "h0", p, h0, p.state, input.scalar_type(), h.h0, remedy, h.device());
  check_cell_state(op, p, mode, c0);
  p.c0 = state_data(op, "c0", p, c0, p.hidden, input.scalar_type(), h.c0, remedy, h.device());
}

inline RnnHeader header_of(const Rnn& p) {
  RnnHeader header{};
  header.vector_bytes = kernels().vector_bytes;
  header.pairs = p.dtype == DType::bf16 && kernels().multiply_add_pairs;
  header.dtype = int32_t(p.dtype), header.cell = int32_t(p.cell);
  header.peepholes = p.peepholes, header.layer_norm = p.layer_norm;
  header.input_size = p.input_size, header.hidden = p.hidden, header.state = p.state;
  header.layers = p.layers, header.directions = p.directions;
  return header;
}

}  // namespace handtuned::rnn_arguments
