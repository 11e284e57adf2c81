// Linear cross-entropy, the skin: check the arguments, choose the rows that count, allocate, call the table.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "tensor.h"

namespace handtuned {
namespace {

// What the Params point to and no argument owns.
struct Holders {
  OptionalTensor input, linear_weight, linear_bias, target, weight, gathered, packed;
  std::vector<int64_t> chosen, targets;
};

struct Arguments {
  const Tensor &input, &linear_weight;
  const OptionalTensor& linear_bias;
  const Tensor& target;
  const OptionalTensor& weight;
  int64_t reduction, ignore_index;
  double label_smoothing, softcap, z_loss;
  int64_t keep;
};

ScalarType wide_type(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The shape of rows: input's without its last dim.
Sizes check(const char* op, const Arguments& a) {
  dtype_of(op, "input", a.input);
  check_type(op, "linear_weight", a.linear_weight, a.input);
  const Shape x = a.input.sizes(), w = a.linear_weight.sizes();
  HT_CHECK(w.size() == 2 && w[0] > 0, op, "linear_weight has shape ", to_string(w),
           ", expected [classes, in_features] with a class at least; reshape it");
  HT_CHECK(x.size() >= 1 && x[x.size() - 1] == w[1], op, "input has shape ", to_string(x), ", expected [*, ", w[1],
           "] beside linear_weight of shape ", to_string(w), "; its last dim is in_features");
  Sizes rows(x.data(), x.data() + x.size() - 1);
  for (auto [name, tensor] : {std::pair{"linear_bias", &a.linear_bias}, {"weight", &a.weight}}) {
    if (!*tensor) continue;
    check_type(op, name, **tensor, a.input);
    check_shape(op, name, **tensor, {w[0]});
  }
  HT_CHECK(a.target.is_cpu(), op, "target is not on the CPU, input is; move it with .to(input.device)");
  HT_CHECK(a.target.scalar_type() == ScalarType::Long, op, "target is ", to_string(a.target.scalar_type()),
           ", expected int64, the number of each row's class; convert it with .to()");
  check_shape(op, "target", a.target, rows);
  HT_CHECK(0 <= a.reduction && a.reduction < kReductions, op, "reduction is ", a.reduction, ", the limits are 0 and ",
           kReductions - 1, "; pass the number of a reduction");
  HT_CHECK(a.label_smoothing >= 0 && a.label_smoothing <= 1, op, "label_smoothing is ", a.label_smoothing,
           ", the limits are 0 and 1; pass a share of the target");
  HT_CHECK(a.softcap >= 0 && std::isfinite(a.softcap), op, "softcap is ", a.softcap,
           ", it must be finite and at least 0; 0 switches it off");
  HT_CHECK(a.z_loss >= 0 && std::isfinite(a.z_loss), op, "z_loss is ", a.z_loss,
           ", it must be finite and at least 0; 0 switches it off");
  HT_CHECK(0 <= a.keep && a.keep <= (a.softcap > 0 ? 0 : w[0]), op, "keep is ", a.keep, ", the limits are 0 and ",
           a.softcap > 0 ? 0 : w[0], " for ", w[0], " classes", a.softcap > 0 ? " with softcap" : "",
           "; pass 0 to keep no probabilities");
  return rows;
}

// The rows whose target is not ignore_index.
void choose_rows(const char* op, const Arguments& a, Holders& h) {
  if (!a.target.is_contiguous()) h.target = contiguous(a.target);
  const auto* target = static_cast<const int64_t*>((h.target ? *h.target : a.target).data_ptr());
  const int64_t classes = a.linear_weight.sizes()[0], rows = a.target.numel();
  for (int64_t r = 0; r < rows; ++r) {
    if (target[r] == a.ignore_index) continue;
    HT_CHECK(0 <= target[r] && target[r] < classes, op, "target ", target[r], " of row ", r,
             " is out of bounds, the limits are 0 and ", classes - 1, "; rows of class ", a.ignore_index,
             " (ignore_index) are left out");
    h.chosen.push_back(r), h.targets.push_back(target[r]);
  }
}

const void* contiguous_data(const OptionalTensor& tensor, OptionalTensor& holder) {
  if (!tensor) return nullptr;
  if (!tensor->is_contiguous()) holder = contiguous(*tensor);
  return (holder ? *holder : *tensor).data_ptr();
}

// Everything that forward and backward share; p.rows is 0 where no row counts, and then nothing is allocated.
void fill(const char* op, CrossEntropy& p, Holders& h, const Arguments& a) {
  choose_rows(op, a, h);
  const Shape w = a.linear_weight.sizes();
  p.rows = int64_t(h.chosen.size()), p.classes = w[0], p.in = w[1];
  p.dtype = dtype_of(op, "input", a.input);
  p.reduction = Reduction(a.reduction);
  p.label_smoothing = a.label_smoothing, p.softcap = a.softcap, p.z_loss = a.z_loss;
  p.chosen = h.chosen.data(), p.target = h.targets.data();
  p.chunk = entropy_classes(p.in, p.classes), p.keep = a.keep;
  if (p.rows == 0) return;
  p.input = strided_rows(a.input, 1, h.input);
  const StridedRows rows = strided_rows(a.linear_weight, 1, h.linear_weight);
  p.weight = rows.data, p.weight_row = rows.stride[0];
  p.bias = contiguous_data(a.linear_bias, h.linear_bias);
  p.class_weight = contiguous_data(a.weight, h.weight);
  h.gathered = empty({p.rows, p.in}, a.input.scalar_type());
  h.packed = empty({linear_packed_numbers(p.dtype, p.chunk, p.in)}, a.input.scalar_type());
  p.gathered = h.gathered->data_ptr();
  p.packed_classes = h.packed->data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& input, const Tensor& linear_weight,
                                                        const OptionalTensor& linear_bias, const Tensor& target,
                                                        const OptionalTensor& weight, int64_t reduction,
                                                        int64_t ignore_index, double label_smoothing, double softcap,
                                                        double z_loss, int64_t keep) {
  const char* op = "linear_cross_entropy";
  const Arguments a{input,        linear_weight,   linear_bias, target, weight, reduction,
                    ignore_index, label_smoothing, softcap,     z_loss, keep};
  const Sizes sizes = check(op, a);
  CrossEntropyForward p{};
  Holders h;
  fill(op, p, h, a);
  const ScalarType wide = wide_type(input);
  Tensor loss = empty(shape_of(p.reduction == Reduction::none ? sizes : Sizes{}), wide);
  Tensor stats = empty({2, target.numel()}, wide);
  Tensor kept = empty({target.numel(), keep}, input.scalar_type());
  fill(loss, 0), fill(stats, 0);
  if (p.rows < target.numel()) fill(kept, 0);
  const Tensor running = empty({4, p.rows}, wide);
  const Tensor partials = empty({3, p.rows > 0 ? linear_panels(p.chunk) : 0, p.rows}, wide);
  p.loss = loss.data_ptr(), p.top = stats.data_ptr();
  p.sum = static_cast<char*>(p.top) + target.numel() * size_of(wide);
  p.running = running.data_ptr(), p.partials = partials.data_ptr();
  const int64_t chunks_kept = p.rows > 0 ? (keep + p.chunk - 1) / p.chunk : 0;
  const Tensor tops = empty({chunks_kept, linear_panels(p.chunk), p.rows}, wide);
  p.kept = kept.data_ptr(), p.tops = tops.data_ptr();
  kernels().cross_entropy_forward(p);
  return {std::move(loss), std::move(stats), std::move(kept)};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
    const Tensor& target, const OptionalTensor& weight, const Tensor& stats, const Tensor& kept, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double softcap, double z_loss, bool need_input,
    bool need_linear_weight, bool need_linear_bias) {
  const char* op = "linear_cross_entropy_backward";
  const Shape of_kept = kept.sizes();
  HT_CHECK(of_kept.size() == 2, op, "kept has shape ", to_string(of_kept),
           ", expected [rows, classes kept]; pass what the forward returned");
  const Arguments a{input,        linear_weight,   linear_bias, target, weight,    reduction,
                    ignore_index, label_smoothing, softcap,     z_loss, of_kept[1]};
  const Sizes sizes = check(op, a);
  const ScalarType dtype = input.scalar_type(), wide = wide_type(input);
  for (auto [name, tensor] : {std::pair{"grad_loss", &grad_loss}, {"stats", &stats}}) {
    HT_CHECK(tensor->is_cpu(), op, name, " is not on the CPU, input is; move it with .to(input.device)");
    HT_CHECK(tensor->scalar_type() == wide, op, name, " is ", to_string(tensor->scalar_type()), ", expected ",
             to_string(wide), " beside ", to_string(dtype), " input; convert it with .to()");
  }
  const bool none = Reduction(reduction) == Reduction::none;
  check_shape(op, "grad_loss", grad_loss, none ? sizes : Sizes{});
  check_shape(op, "stats", stats, {2, target.numel()});
  check_type(op, "kept", kept, input);
  check_shape(op, "kept", kept, {target.numel(), of_kept[1]});

  CrossEntropyBackward p{};
  Holders h;
  fill(op, p, h, a);
  Tensor grad_input = empty_if(need_input, input.sizes(), dtype);
  Tensor grad_weight = empty_if(need_linear_weight, linear_weight.sizes(), dtype);
  Tensor grad_bias = empty_if(need_linear_bias, {p.classes}, dtype);
  if (p.rows < target.numel()) fill(grad_input, 0);
  if (p.rows == 0) {
    fill(grad_weight, 0), fill(grad_bias, 0);
    return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
  }
  OptionalTensor grad_copy, stats_copy, kept_copy;
  if (!grad_loss.is_contiguous()) grad_copy = contiguous(grad_loss);
  if (!stats.is_contiguous()) stats_copy = contiguous(stats);
  if (!kept.is_contiguous()) kept_copy = contiguous(kept);
  const int64_t rows = std::min(p.rows, kEntropyRows);
  const ScalarType of_logits = dtype == ScalarType::Half ? ScalarType::Float : dtype;
  const Tensor factors = empty({p.rows, 5}, wide);
  const Tensor grad_logits = empty({rows, p.chunk}, of_logits);
  const Tensor packed_weight = empty_if(need_input, {linear_packed_numbers(p.dtype, p.in, p.chunk)}, dtype);
  const Tensor packed_input = empty_if(need_linear_weight, {entropy_packed_input(p.dtype, p.in, p.rows)}, dtype);
  const Tensor input_sums = empty_if(need_input, {p.rows, p.in}, wide);
  const Tensor weight_sums = empty_if(need_linear_weight && p.rows > rows, {p.chunk, p.in}, wide);
  const Tensor bias_sums = empty_if(need_linear_bias, {p.chunk}, wide);
  auto data = [](bool wanted, const Tensor& t) { return wanted ? t.data_ptr() : nullptr; };
  p.grad_loss = (grad_copy ? *grad_copy : grad_loss).data_ptr();
  p.top = (stats_copy ? *stats_copy : stats).data_ptr();
  p.sum = static_cast<const char*>(p.top) + target.numel() * size_of(wide);
  p.kept = (kept_copy ? *kept_copy : kept).data_ptr();
  p.grad_input = data(need_input, grad_input);
  p.grad_weight = data(need_linear_weight, grad_weight);
  p.grad_bias = data(need_linear_bias, grad_bias);
  p.factors = factors.data_ptr(), p.grad_logits = grad_logits.data_ptr();
  p.packed_weight = data(need_input, packed_weight);
  p.packed_input = data(need_linear_weight, packed_input);
  p.input_sums = data(need_input, input_sums);
  p.weight_sums = data(need_linear_weight, weight_sums);
  p.bias_sums = data(need_linear_bias, bias_sums);
  kernels().cross_entropy_backward(p);
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) {
  m.impl("linear_cross_entropy", HT_BOX(linear_cross_entropy));
  m.impl("linear_cross_entropy_backward", HT_BOX(linear_cross_entropy_backward));
}

}  // namespace handtuned
