// Linear family, the skin: check the arguments, allocate the outputs, fill the Params, call the table.
#include "linear.h"

#include <tuple>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "tensor.h"

namespace handtuned {
namespace {

void check_weight(const char* op, const Tensor& weight) {
  HT_CHECK(weight.dim() == 2, op, "weight has shape ", to_string(weight.sizes()),
           ", expected [out_features, in_features]; reshape it");
}

// What the Params point to and no argument owns: contiguous copies.
struct Holders {
  OptionalTensor input, weight, bias, residual, grad_output, preactivation;
};

// Checks input's rows, bias, activation and dropout and fills what all forms share but the weight; p.dtype, p.in and
// p.out are there. Returns output's shape.
Sizes fill_rows(const char* op, Linear& p, Holders& h, const Tensor& input, const OptionalTensor& bias,
                int64_t activation, double dropout_p, const OptionalTensor& seed) {
  const Shape x = input.sizes();
  const int64_t n = int64_t(x.size());
  HT_CHECK(0 <= activation && activation < kActivations, op, "activation is ", activation, ", the limits are 0 and ",
           kActivations - 1, "; pass the number of an activation");
  p.activation = Activation(activation);
  p.dropout = dropout_of(op, dropout_p, seed);
  if (bias) {
    check_type(op, "bias", *bias, input);
    check_shape(op, "bias", *bias, {p.out});
  }
  Sizes output(x.data(), x.data() + n);
  output[n - 1] = p.out;
  p.rows = 1;
  for (int64_t d = 0; d + 1 < n; ++d) p.rows *= x[d];
  if (p.rows > 0) p.input = strided_rows(input, 1, h.input);
  return output;
}

// Checks input and weight and fills what forward and backward share. Returns output's shape.
Sizes fill(const char* op, Linear& p, Holders& h, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
           int64_t activation, double dropout_p, const OptionalTensor& seed) {
  p.dtype = dtype_of(op, "input", input);
  check_type(op, "weight", weight, input);
  check_weight(op, weight);
  const Shape x = input.sizes(), w = weight.sizes();
  p.out = w[0], p.in = w[1];
  HT_CHECK(x.size() >= 1 && x[x.size() - 1] == p.in, op, "input has shape ", to_string(x), ", expected [*, ", p.in,
           "] beside weight of shape ", to_string(w), "; its last dim is in_features");
  const StridedRows rows = strided_rows(weight, 1, h.weight);
  p.weight = rows.data, p.weight_row = rows.stride[0];
  return fill_rows(op, p, h, input, bias, activation, dropout_p, seed);
}

Sizes packed_sizes(DType dtype, int64_t out, int64_t in) {
  return {linear_panels(out), linear_steps(dtype, in), kLinearPanel, linear_step(dtype)};
}

void pack(const Linear& p, const Tensor& packed) {
  kernels().linear_pack({p.out, p.in, p.dtype, p.weight, p.weight_row, packed.data_ptr()});
}

Tensor linear_pack(const Tensor& weight) {
  const char* op = "linear_pack";
  Linear p{};
  p.dtype = dtype_of(op, "weight", weight);
  check_weight(op, weight);
  p.out = weight.sizes()[0], p.in = weight.sizes()[1];
  OptionalTensor holder;
  const StridedRows rows = strided_rows(weight, 1, holder);
  p.weight = rows.data, p.weight_row = rows.stride[0];
  Tensor packed = empty(shape_of(packed_sizes(p.dtype, p.out, p.in)), weight.scalar_type());
  if (packed.numel() > 0) pack(p, packed);
  return packed;
}

struct Outputs {
  Tensor output, preactivation;
};

// Output, preactivation (or [0]) and the arguments that are read where they lie.
Outputs outputs_of(const char* op, LinearForward& p, Holders& h, const Sizes& sizes, bool keep, const Tensor& input,
                   const OptionalTensor& bias, const OptionalTensor& residual) {
  if (residual) {
    check_type(op, "residual", *residual, input);
    check_shape(op, "residual", *residual, sizes);
  }
  const bool saved = keep && p.activation != Activation::none;
  Outputs out{empty(shape_of(sizes), input.scalar_type()), empty_if(saved, shape_of(sizes), input.scalar_type())};
  if (p.rows == 0 || p.out == 0) return out;
  if (bias) {
    if (!bias->is_contiguous()) h.bias = contiguous(*bias);
    p.bias = h.bias ? h.bias->data_ptr() : bias->data_ptr();
  }
  if (residual) p.residual = strided_rows(*residual, 1, h.residual);
  p.output = out.output.data_ptr();
  p.preactivation = saved ? out.preactivation.data_ptr() : nullptr;
  return out;
}

void check_packed(const char* op, const Tensor& packed, const Sizes& sizes, const char* maker) {
  HT_CHECK(equal(packed.sizes(), shape_of(sizes)) && packed.is_contiguous(), op, "packed has shape ",
           to_string(packed.sizes()), ", expected a contiguous ", to_string(shape_of(sizes)), "; pass what ", maker,
           " made of this weight");
}

Outputs run_forward(const char* op, bool keep, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const OptionalTensor& packed, int64_t activation, double dropout_p,
                    const OptionalTensor& seed) {
  LinearForward p{};
  Holders h;
  const Sizes sizes = fill(op, p, h, input, weight, bias, activation, dropout_p, seed);
  const Sizes wanted = packed_sizes(p.dtype, p.out, p.in);
  if (packed) {
    check_type(op, "packed", *packed, input);
    check_packed(op, *packed, wanted, "linear_pack");
  }
  Outputs out = outputs_of(op, p, h, sizes, keep, input, bias, residual);
  if (p.rows == 0 || p.out == 0) return out;
  OptionalTensor scratch;
  if (p.rows > kLinearFewRows && !packed) {
    scratch = empty(shape_of(wanted), input.scalar_type());
    pack(p, *scratch);
  }
  p.packed = packed ? packed->data_ptr() : scratch ? scratch->data_ptr() : nullptr;
  kernels().linear_forward(p);
  return out;
}

std::tuple<Tensor, Tensor> linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, const OptionalTensor& packed, int64_t activation,
                                  double dropout_p, const OptionalTensor& seed) {
  auto out = run_forward("linear", true, input, weight, bias, residual, packed, activation, dropout_p, seed);
  return {std::move(out.output), std::move(out.preactivation)};
}

Tensor linear_inference(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const OptionalTensor& packed, int64_t activation,
                        double dropout_p, const OptionalTensor& seed) {
  return run_forward("linear_inference", false, input, weight, bias, residual, packed, activation, dropout_p, seed)
      .output;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   const OptionalTensor& bias, const Tensor& preactivation,
                                                   int64_t activation, double dropout_p, const OptionalTensor& seed,
                                                   bool need_input, bool need_weight, bool need_bias) {
  const char* op = "linear_backward";
  LinearBackward p{};
  Holders h;
  const Sizes sizes = fill(op, p, h, input, weight, bias, activation, dropout_p, seed);
  check_type(op, "grad_output", grad_output, input);
  check_shape(op, "grad_output", grad_output, sizes);
  check_type(op, "preactivation", preactivation, input);
  check_shape(op, "preactivation", preactivation, activation ? sizes : Sizes{0});

  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty_if(need_input, input.sizes(), dtype);
  Tensor grad_weight = empty_if(need_weight, weight.sizes(), dtype);
  Tensor grad_bias = empty_if(need_bias, {p.out}, dtype);
  if (p.rows == 0 || p.out == 0 || p.in == 0) {  // sums over nothing; the bias alone may have rows to sum
    for (const Tensor* t : {&grad_input, &grad_weight, &grad_bias}) fill(*t, 0);
    if (p.rows == 0 || p.out == 0) return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
  }
  p.grad_output = strided_rows(grad_output, 1, h.grad_output);
  if (activation) p.preactivation = strided_rows(preactivation, 1, h.preactivation);
  const bool makes = (need_input || need_weight) && (activation || p.dropout.p > 0);
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor made = empty_if(makes, {p.rows, p.out}, dtype);
  const Tensor packed_weight = empty_if(need_input, {linear_packed_numbers(p.dtype, p.in, p.out)}, dtype);
  const Tensor packed_input = empty_if(need_weight, {linear_packed_numbers(p.dtype, p.in, p.rows)}, dtype);
  const Tensor sums = empty_if(need_bias, {linear_bias_chunks(p.rows), linear_panels(p.out) * kLinearPanel}, wide);
  auto data = [](bool wanted, const Tensor& t) { return wanted ? t.data_ptr() : nullptr; };
  p.grad_input = data(need_input, grad_input);
  p.grad_weight = data(need_weight, grad_weight);
  p.grad_bias = data(need_bias, grad_bias);
  p.grad_preactivation = data(makes, made);
  p.packed_weight = data(need_input, packed_weight);
  p.packed_input = data(need_weight, packed_input);
  p.bias_sums = data(need_bias, sums);
  kernels().linear_backward(p);
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

void check_is(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, const char* remedy) {
  HT_CHECK(tensor.is_cpu(), op, name, " is not on the CPU, input is; move it with .to(input.device)");
  HT_CHECK(tensor.scalar_type() == dtype, op, name, " is ", to_string(tensor.scalar_type()), ", expected ",
           to_string(dtype), "; ", remedy);
}

Tensor linear_int8_pack(const Tensor& weight) {
  const char* op = "linear_int8_pack";
  HT_CHECK(weight.scalar_type() == ScalarType::Char, op, "weight is ", to_string(weight.scalar_type()),
           ", expected int8; quantize it with quantize_linear_weight");
  check_weight(op, weight);
  LinearInt8Pack p{};
  p.out = weight.sizes()[0], p.in = weight.sizes()[1];
  OptionalTensor holder;
  const StridedRows rows = strided_rows(weight, 1, holder);
  p.weight = rows.data, p.weight_row = rows.stride[0];
  Tensor packed = empty(shape_of({linear_panels(p.out), linear_quads(p.in) + 1, kLinearPanel, 4}), ScalarType::Char);
  p.packed = packed.data_ptr();
  if (p.out > 0) kernels().linear_int8_pack(p);
  return packed;
}

std::tuple<Tensor, Tensor> linear_int8(const Tensor& input, const Tensor& packed, const Tensor& scale,
                                       const OptionalTensor& bias, const OptionalTensor& residual, int64_t activation,
                                       double dropout_p, const OptionalTensor& seed, bool quantize_input,
                                       bool need_preactivation) {
  const char* op = "linear_int8";
  LinearInt8 p{};
  Holders h;
  p.dtype = dtype_of(op, "input", input);
  HT_CHECK(p.dtype != DType::f64, op, "input is float64, supported are float32, bfloat16 and float16; ",
           "convert it with .to()");
  const Shape x = input.sizes();
  HT_CHECK(x.size() >= 1, op, "input has shape [], expected [*, in_features]; its last dim is in_features");
  check_is(op, "scale", scale, ScalarType::Float, "convert it with .float()");
  HT_CHECK(scale.dim() == 1 && scale.is_contiguous(), op, "scale has shape ", to_string(scale.sizes()),
           ", expected a contiguous [out_features]; pass what quantize_linear_weight made");
  p.out = scale.sizes()[0], p.in = x[x.size() - 1];
  check_is(op, "packed", packed, ScalarType::Char, "pass what linear_int8_pack made of the weight");
  check_packed(op, packed, {linear_panels(p.out), linear_quads(p.in) + 1, kLinearPanel, 4}, "linear_int8_pack");
  HT_CHECK(!quantize_input || p.in <= kLinearMostQuantized, op, "input has ", p.in, " features, the limit is ",
           kLinearMostQuantized, " with quantize_input; switch it off");
  const Sizes sizes = fill_rows(op, p, h, input, bias, activation, dropout_p, seed);
  Outputs out = outputs_of(op, p, h, sizes, need_preactivation, input, bias, residual);
  if (p.rows == 0 || p.out == 0) return {std::move(out.output), std::move(out.preactivation)};
  const Tensor quantized = empty_if(quantize_input, {p.rows, linear_quantized_row(p.in), 4}, ScalarType::Byte);
  const Tensor row_scales = empty_if(quantize_input, {p.rows, int64_t(sizeof(RowScale))}, ScalarType::Byte);
  p.packed = packed.data_ptr(), p.scale = static_cast<const float*>(scale.data_ptr());
  if (quantize_input) p.quantized = quantized.data_ptr(), p.row_scales = row_scales.data_ptr();
  kernels().linear_int8(p);
  return {std::move(out.output), std::move(out.preactivation)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) {
  m.impl("linear_pack", HT_BOX(linear_pack));
  m.impl("linear", HT_BOX(linear));
  m.impl("linear_inference", HT_BOX(linear_inference));
  m.impl("linear_backward", HT_BOX(linear_backward));
  m.impl("linear_int8_pack", HT_BOX(linear_int8_pack));
  m.impl("linear_int8", HT_BOX(linear_int8));
}

}  // namespace handtuned
