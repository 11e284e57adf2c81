// Norm family, the skin: check the arguments, allocate the outputs, fill the Params, call the table, the CPU's or the
// CUDA library's.
#include "norm.h"

#include <limits>
#include <tuple>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "cuda/norm_plan.h"
#include "cuda_library.h"
#include "tensor.h"

namespace handtuned {
namespace {

// The view of a tensor as [rows, cols]; sizes only.
struct Shape2d {
  int64_t rows = 1, cols = 1;
  Shape normalized_shape;
};

Shape2d shape_of(const char* op, const Tensor& input, int64_t normalized_ndim) {
  const Shape sizes = input.sizes();
  const int64_t ndim = int64_t(sizes.size());
  HT_CHECK(normalized_ndim >= 1 && normalized_ndim <= ndim, op, "normalized_ndim is ", normalized_ndim,
           ", the limits are 1 and the ", ndim, " dims of input; pass the number of trailing dims to normalise over");
  Shape2d shape;
  for (int64_t d = 0; d < ndim; ++d) (d < ndim - normalized_ndim ? shape.rows : shape.cols) *= sizes[d];
  shape.normalized_shape = Shape(sizes.data() + ndim - normalized_ndim, normalized_ndim);
  return shape;
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  HT_CHECK(tensor.device() == input.device(), op, name, " is on ", to_string(tensor.device()), ", input is on ",
           to_string(input.device()), "; move it with .to(input.device)");
}

// Same shape, dtype and device as input.
void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  check_device(op, name, tensor, input);
  HT_CHECK(equal(tensor.sizes(), input.sizes()), op, name, " has shape ", to_string(tensor.sizes()),
           ", expected the shape of input, ", to_string(input.sizes()), "; expand or reshape it first");
  HT_CHECK(tensor.scalar_type() == input.scalar_type(), op, name, " is ", to_string(tensor.scalar_type()),
           ", input is ", to_string(input.scalar_type()), "; convert one with .to()");
}

// A parameter of shape normalized_shape, of input's dtype or float32 beside 16 bits; contiguous in `holder`.
const void* parameter(const char* op, const char* name, const OptionalTensor& given, const Tensor& input,
                      const Shape2d& shape, OptionalTensor& holder) {
  if (!given) return nullptr;
  const ScalarType own = given->scalar_type(), of_input = input.scalar_type();
  const bool sixteen_bit = of_input == ScalarType::BFloat16 || of_input == ScalarType::Half;
  check_device(op, name, *given, input);
  HT_CHECK(equal(given->sizes(), shape.normalized_shape), op, name, " has shape ", to_string(given->sizes()),
           ", expected normalized_shape ", to_string(shape.normalized_shape), "; pass a ", name, " of that shape");
  HT_CHECK(own == of_input || (sixteen_bit && own == ScalarType::Float), op, name, " is ", to_string(own),
           ", allowed beside a ", to_string(of_input), " input: ", to_string(of_input),
           sixteen_bit ? " and float32" : "", "; convert it with .to()");
  if (given->is_contiguous()) return given->data_ptr();
  holder = contiguous(*given);
  return holder->data_ptr();
}

ScalarType statistics_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// ---- forward ----------------------------------------------------------------------------------------------------

struct ForwardOutputs {
  Tensor output;
  OptionalTensor new_residual;
  OptionalTensor stats;  // [2, rows] with centre, else [rows]
};

enum class Stats { keep, drop };  // dropped in inference: a tensor less to allocate

ForwardOutputs run_forward(const char* op, bool centre, Stats stats, const Tensor& input, const Tensor* residual,
                           int64_t normalized_ndim, const OptionalTensor& weight, const OptionalTensor& bias,
                           double eps, Dropout dropout) {
  NormForward p{};
  p.dtype = dtype_of(op, "input", input);
  p.centre = centre;
  p.eps = eps;
  p.dropout = dropout;
  HT_CHECK(eps > 0, op, "eps is ", eps, ", the limit is eps > 0; torch's default is 1e-5");
  const Shape2d shape = shape_of(op, input, normalized_ndim);
  p.rows = shape.rows;
  p.cols = shape.cols;
  if (residual) check_like_input(op, "residual", *residual, input);
  OptionalTensor weight_holder, bias_holder, input_holder, residual_holder;
  p.weight = parameter(op, "weight", weight, input, shape, weight_holder);
  p.bias = parameter(op, "bias", bias, input, shape, bias_holder);
  HT_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), op,
           "weight and bias differ in dtype; convert one with .to()");
  p.weight_dtype = weight ? dtype_of(op, "weight", *weight) : bias ? dtype_of(op, "bias", *bias) : p.dtype;

  const Place place = place_of(op, input);
  ForwardOutputs out{empty(input.sizes(), input.scalar_type(), place.device), std::nullopt, std::nullopt};
  if (residual) out.new_residual = empty(input.sizes(), input.scalar_type(), place.device);
  if (stats == Stats::keep)
    out.stats = centre ? empty({2, p.rows}, statistics_dtype(input), place.device)
                       : empty({p.rows}, statistics_dtype(input), place.device);
  if (p.rows == 0) return out;
  if (p.cols == 0) {  // no elements, so no statistics either
    if (out.stats) fill(*out.stats, std::numeric_limits<double>::quiet_NaN());
    return out;
  }
  p.input = strided_rows(input, normalized_ndim, input_holder);
  if (residual) p.residual = strided_rows(*residual, normalized_ndim, residual_holder);
  p.output = out.output.data_ptr();
  p.new_residual = residual ? out.new_residual->data_ptr() : nullptr;
  if (out.stats) {
    char* saved = static_cast<char*>(out.stats->data_ptr());
    p.mean = centre ? saved : nullptr;
    p.rstd = centre ? saved + p.rows * size_of(out.stats->scalar_type()) : saved;
  }
  if (place.cuda) {
    launch(op, place, place.cuda->norm_forward, p);
  } else {
    kernels().norm_forward(p);
  }
  return out;
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                                      const OptionalTensor& bias, double eps) {
  auto out = run_forward("layer_norm", true, Stats::keep, input, nullptr, normalized_ndim, weight, bias, eps, {});
  return {std::move(out.output), std::move(*out.stats)};
}

Tensor layer_norm_inference(const Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                            const OptionalTensor& bias, double eps) {
  return run_forward("layer_norm_inference", true, Stats::drop, input, nullptr, normalized_ndim, weight, bias, eps, {})
      .output;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight,
                                    double eps) {
  auto out = run_forward("rms_norm", false, Stats::keep, input, nullptr, normalized_ndim, weight, {}, eps, {});
  return {std::move(out.output), std::move(*out.stats)};
}

Tensor rms_norm_inference(const Tensor& input, int64_t normalized_ndim, const OptionalTensor& weight, double eps) {
  return run_forward("rms_norm_inference", false, Stats::drop, input, nullptr, normalized_ndim, weight, {}, eps, {})
      .output;
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual, int64_t normalized_ndim,
                                                  const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                  double dropout_p, const OptionalTensor& seed) {
  const char* op = "add_layer_norm";
  auto out = run_forward(op, true, Stats::keep, input, &residual, normalized_ndim, weight, bias, eps,
                         dropout_of(op, dropout_p, seed, input.device()));
  return {std::move(out.output), std::move(*out.new_residual), std::move(*out.stats)};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& residual, int64_t normalized_ndim,
                                                const OptionalTensor& weight, double eps, double dropout_p,
                                                const OptionalTensor& seed) {
  const char* op = "add_rms_norm";
  auto out = run_forward(op, false, Stats::keep, input, &residual, normalized_ndim, weight, {}, eps,
                         dropout_of(op, dropout_p, seed, input.device()));
  return {std::move(out.output), std::move(*out.new_residual), std::move(*out.stats)};
}

// ---- backward ---------------------------------------------------------------------------------------------------

// Which gradients are wanted; one that is not comes back with shape [0].
struct Needs {
  bool normalised, dropped, weight, bias;
};

struct BackwardOutputs {
  Tensor normalised, dropped, weight, bias;
};

BackwardOutputs run_backward(const char* op, bool centre, const Tensor& grad_output,
                             const OptionalTensor& grad_new_residual, const Tensor& input, int64_t normalized_ndim,
                             const Tensor& stats, const OptionalTensor& weight, Dropout dropout, Needs needs) {
  NormBackward p{};
  p.dtype = dtype_of(op, "input", input);
  p.centre = centre;
  p.dropout = dropout;
  const Shape2d shape = shape_of(op, input, normalized_ndim);
  p.rows = shape.rows;
  p.cols = shape.cols;
  check_like_input(op, "grad_output", grad_output, input);
  if (grad_new_residual) check_like_input(op, "grad_new_residual", *grad_new_residual, input);
  OptionalTensor weight_holder, grad_holder, input_holder, extra_holder;
  p.weight = parameter(op, "weight", weight, input, shape, weight_holder);
  p.weight_dtype = weight ? dtype_of(op, "weight", *weight) : p.dtype;
  check_device(op, "saved statistics", stats, input);
  HT_CHECK(stats.is_contiguous() && stats.scalar_type() == statistics_dtype(input) &&
               stats.numel() == p.rows * (centre ? 2 : 1),
           op, "the saved statistics are ", to_string(stats.scalar_type()), " of shape ", to_string(stats.sizes()),
           ", expected ", to_string(statistics_dtype(input)), " with ", centre ? 2 : 1, " x ", p.rows,
           " elements; pass what the forward returned");

  const ScalarType weight_type = weight ? weight->scalar_type() : input.scalar_type();
  const bool any_input = needs.normalised || needs.dropped;
  const Place place = place_of(op, input);
  BackwardOutputs out{empty_if(any_input, input.sizes(), input.scalar_type(), place.device),
                      empty_if(needs.dropped, input.sizes(), input.scalar_type(), place.device),
                      empty_if(needs.weight, shape.normalized_shape, weight_type, place.device),
                      empty_if(needs.bias, shape.normalized_shape, weight_type, place.device)};
  if (p.rows == 0 || p.cols == 0) {  // a sum over no rows is zero
    if (needs.weight) fill(out.weight, 0);
    if (needs.bias) fill(out.bias, 0);
    return out;
  }
  p.grad_output = strided_rows(grad_output, normalized_ndim, grad_holder);
  p.input = strided_rows(input, normalized_ndim, input_holder);
  if (grad_new_residual) p.grad_new_residual = strided_rows(*grad_new_residual, normalized_ndim, extra_holder);
  const char* saved = static_cast<const char*>(stats.data_ptr());
  p.mean = centre ? saved : nullptr;
  p.rstd = centre ? saved + p.rows * size_of(stats.scalar_type()) : saved;
  p.grad_normalised = any_input ? out.normalised.data_ptr() : nullptr;
  p.grad_dropped = needs.dropped ? out.dropped.data_ptr() : nullptr;
  p.grad_weight = needs.weight ? out.weight.data_ptr() : nullptr;
  p.grad_bias = needs.bias ? out.bias.data_ptr() : nullptr;
  if (place.cuda) {
    const int64_t chunks = cuda::chunks(p.rows, cuda::plan_backward(p.cols, p.dtype, dropout.p > 0));
    Tensor partials = empty({chunks, 2, p.cols}, statistics_dtype(input), place.device);
    p.partials = partials.data_ptr();
    launch(op, place, place.cuda->norm_backward, p);
  } else {
    Tensor partials = empty({norm_backward_chunks(p.rows, p.cols), 2, norm_pitch(p.cols)}, statistics_dtype(input));
    p.partials = partials.data_ptr();
    kernels().norm_backward(p);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       int64_t normalized_ndim, const Tensor& stats,
                                                       const OptionalTensor& weight, bool need_input, bool need_weight,
                                                       bool need_bias) {
  auto out = run_backward("layer_norm_backward", true, grad_output, {}, input, normalized_ndim, stats, weight, {},
                          {need_input, false, need_weight, need_bias});
  return {std::move(out.normalised), std::move(out.weight), std::move(out.bias)};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t normalized_ndim,
                                             const Tensor& rstd, const OptionalTensor& weight, bool need_input,
                                             bool need_weight) {
  auto out = run_backward("rms_norm_backward", false, grad_output, {}, input, normalized_ndim, rstd, weight, {},
                          {need_input, false, need_weight, false});
  return {std::move(out.normalised), std::move(out.weight)};
}

// Without dropout the gradients of input and residual are the same values: grad_residual carries them for both.
Needs add_needs(Dropout dropout, bool need_input, bool need_residual, bool need_weight, bool need_bias) {
  const bool drop = dropout.p > 0;
  return {need_residual || need_input, need_input && drop, need_weight, need_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_new_residual, const Tensor& new_residual,
    int64_t normalized_ndim, const Tensor& stats, const OptionalTensor& weight, double dropout_p,
    const OptionalTensor& seed, bool need_input, bool need_residual, bool need_weight, bool need_bias) {
  const char* op = "add_layer_norm_backward";
  const Dropout dropout = dropout_of(op, dropout_p, seed, new_residual.device());
  auto out = run_backward(op, true, grad_output, grad_new_residual, new_residual, normalized_ndim, stats, weight,
                          dropout, add_needs(dropout, need_input, need_residual, need_weight, need_bias));
  return {std::move(out.dropped), std::move(out.normalised), std::move(out.weight), std::move(out.bias)};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(const Tensor& grad_output,
                                                         const OptionalTensor& grad_new_residual,
                                                         const Tensor& new_residual, int64_t normalized_ndim,
                                                         const Tensor& rstd, const OptionalTensor& weight,
                                                         double dropout_p, const OptionalTensor& seed, bool need_input,
                                                         bool need_residual, bool need_weight) {
  const char* op = "add_rms_norm_backward";
  const Dropout dropout = dropout_of(op, dropout_p, seed, new_residual.device());
  auto out = run_backward(op, false, grad_output, grad_new_residual, new_residual, normalized_ndim, rstd, weight,
                          dropout, add_needs(dropout, need_input, need_residual, need_weight, false));
  return {std::move(out.dropped), std::move(out.normalised), std::move(out.weight)};
}

}  // namespace

void register_norm(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_norm", HT_BOX(layer_norm));
  m.impl("layer_norm_inference", HT_BOX(layer_norm_inference));
  m.impl("layer_norm_backward", HT_BOX(layer_norm_backward));
  m.impl("rms_norm", HT_BOX(rms_norm));
  m.impl("rms_norm_inference", HT_BOX(rms_norm_inference));
  m.impl("rms_norm_backward", HT_BOX(rms_norm_backward));
  m.impl("add_layer_norm", HT_BOX(add_layer_norm));
  m.impl("add_layer_norm_backward", HT_BOX(add_layer_norm_backward));
  m.impl("add_rms_norm", HT_BOX(add_rms_norm));
  m.impl("add_rms_norm_backward", HT_BOX(add_rms_norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) { register_norm(m); }

}  // namespace handtuned
