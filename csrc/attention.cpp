// Attention family, the skin: check the arguments, allocate the outputs, fill the Params, call the table, the CPU's or
// the CUDA library's.
#include "attention.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "attention_arguments.h"
#include "boxing.h"
#include "cpu/dispatch.h"
#include "cuda/attention_plan.h"
#include "cuda_library.h"
#include "tensor.h"

namespace handtuned {
namespace {

using namespace attention_arguments;

ScalarType statistics_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A result that mirrors `like`: of its rows, `width` wide, with the heads inside the rows in memory where they are so
// in `like`. Zeros where asked.
Tensor mirror(const Tensor& like, int64_t width, bool zeros) {
  const Shape s = like.sizes();
  Tensor result = [&] {
    if (s.size() == 3) return empty({s[0], s[1], width}, like.scalar_type(), like.device());
    const int64_t sizes[4] = {s[0], s[1], s[2], width};
    if (like.strides()[1] >= like.strides()[2]) return empty(Shape(sizes, 4), like.scalar_type(), like.device());
    auto one = [](int64_t size) { return std::max<int64_t>(size, 1); };
    const int64_t row = one(s[1]) * one(width), strides[4] = {one(s[2]) * row, one(width), row, 1};
    return empty_strided(Shape(sizes, 4), Shape(strides, 4), like.scalar_type(), like.device());
  }();
  if (zeros) fill(result, 0);
  return result;
}

Tensor empty_lse(const Attention& p, const Tensor& query) {
  return query.dim() == 3 ? empty({p.heads, p.total_rows}, statistics_dtype(query), query.device())
                          : empty({p.batch, p.heads, p.total_rows}, statistics_dtype(query), query.device());
}

// ---- the ops ----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const OptionalTensor& mask, const OptionalTensor& query_starts,
                                     const OptionalTensor& key_starts, const OptionalTensor& key_lengths,
                                     const OptionalTensor& block_table, const OptionalTensor& alibi_slopes,
                                     const OptionalTensor& sinks, double scale, bool bottom_right, int64_t window_left,
                                     int64_t window_right, double softcap, double dropout_p,
                                     const OptionalTensor& seed) {
  const char* op = "attention";
  AttentionForward p{};
  Holders h;
  const Place place = place_of(op, query);
  const bool packed = bool(query_starts), on_device = place.cuda != nullptr;
  fill_queries(op, p, h, on_device, query, query_starts);
  fill_keys(op, p, h, on_device, query, key, value, packed, key_starts, key_lengths, block_table);
  if (mask) fill_mask(op, p, packed, query, *mask);
  fill_options(op, p, h, on_device, query, alibi_slopes, sinks,
               {scale, bottom_right, window_left, window_right, softcap});
  p.dropout = dropout_of(op, dropout_p, seed, place.device);

  const bool gaps = p.query_starts && h.query_starts.back() < p.total_rows;  // packed rows of no sequence
  Tensor output = mirror(query, p.value_width, gaps), lse = empty_lse(p, query);
  if (gaps) fill(lse, -std::numeric_limits<double>::infinity());
  const bool sequences = p.batch > 0 || on_device;  // on the device rows of none are written by the kernel
  if (!sequences || p.heads * p.query_rows * lse.numel() == 0) return {std::move(output), std::move(lse)};
  OptionalTensor unused;
  p.output = operand(output, unused);
  p.lse = lse.data_ptr();
  if (on_device) {
    const Tensor partials = empty({cuda::partial_elements(p)}, statistics_dtype(query), place.device);
    p.partials = partials.data_ptr();
    launch(op, place, place.cuda->attention_forward, p);
  } else {
    kernels().attention_forward(p);
  }
  return {std::move(output), std::move(lse)};
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& query, Shape shape,
                ScalarType dtype) {
  check_device(op, name, tensor, query);
  HT_CHECK(equal(tensor.sizes(), shape), op, name, " has shape ", to_string(tensor.sizes()), ", expected ",
           to_string(shape), "; pass what the forward returned");
  HT_CHECK(tensor.scalar_type() == dtype, op, name, " is ", to_string(tensor.scalar_type()), ", expected ",
           to_string(dtype), "; convert it with .to()");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& output, const Tensor& lse, const OptionalTensor& mask,
    const OptionalTensor& query_starts, const OptionalTensor& key_starts, const OptionalTensor& key_lengths,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, double scale, bool bottom_right,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p, const OptionalTensor& seed,
    bool need_query, bool need_key, bool need_value, bool need_mask, bool need_sinks) {
  const char* op = "attention_backward";
  AttentionBackward p{};
  Holders h;
  const Place place = place_of(op, query);
  const bool packed = bool(query_starts), on_device = place.cuda != nullptr;
  fill_queries(op, p, h, on_device, query, query_starts);
  fill_keys(op, p, h, on_device, query, key, value, packed, key_starts, key_lengths, {});
  if (mask) fill_mask(op, p, packed, query, *mask);
  fill_options(op, p, h, on_device, query, alibi_slopes, sinks,
               {scale, bottom_right, window_left, window_right, softcap});
  p.dropout = dropout_of(op, dropout_p, seed, place.device);
  need_mask &= mask && !p.mask.boolean;
  need_sinks &= bool(sinks);

  int64_t out_sizes[4];
  std::copy_n(query.sizes().data(), query.dim(), out_sizes);
  out_sizes[query.dim() - 1] = p.value_width;
  const Shape out_shape(out_sizes, query.dim());
  check_like(op, "grad_output", grad_output, query, out_shape, query.scalar_type());
  check_like(op, "output", output, query, out_shape, query.scalar_type());
  const int64_t lse_sizes[3] = {p.batch, p.heads, p.total_rows};
  const Shape lse_shape(lse_sizes + (packed ? 1 : 0), packed ? 2 : 3);
  check_like(op, "lse", lse, query, lse_shape, statistics_dtype(query));
  if (grad_lse) check_like(op, "grad_lse", *grad_lse, query, lse_shape, statistics_dtype(query));

  // Rows that belong to no sequence, or lie behind its key_lengths, get 0.
  const bool query_gaps = packed, key_gaps = key_starts || key_lengths;
  const bool none = p.batch * p.heads * p.query_rows == 0;
  auto grad_like = [&](bool wanted, const Tensor& t, int64_t width, bool zeros) {
    return wanted ? mirror(t, width, zeros || none) : empty({0}, t.scalar_type(), place.device);
  };
  Tensor grad_query = grad_like(need_query, query, p.width, query_gaps);
  Tensor grad_key = grad_like(need_key, key, p.width, key_gaps);
  Tensor grad_value = grad_like(need_value, value, p.value_width, key_gaps);
  Tensor grad_mask =
      empty_if(need_mask, mask ? mask->sizes() : Shape(), mask ? mask->scalar_type() : ScalarType::Float, place.device);
  Tensor grad_sinks = empty_if(need_sinks, sinks ? sinks->sizes() : Shape(),
                               sinks ? sinks->scalar_type() : ScalarType::Float, place.device);
  if (need_mask) fill(grad_mask, 0);
  if (need_sinks) fill(grad_sinks, 0);
  if (!none) {
    OptionalTensor unused;
    p.grad_output = operand(grad_output, h.grad_output);
    p.output = operand(output, h.output);
    h.lse = contiguous(lse);
    p.lse = h.lse->data_ptr();
    if (grad_lse) h.grad_lse = contiguous(*grad_lse), p.grad_lse = h.grad_lse->data_ptr();
    if (need_query) p.grad_query = operand(grad_query, unused);
    if (need_key) p.grad_key = operand(grad_key, unused);
    if (need_value) p.grad_value = operand(grad_value, unused);
    p.grad_mask = need_mask ? grad_mask.data_ptr() : nullptr;
    if (on_device) {
      const Tensor delta = empty_lse(p, query);
      p.delta = delta.data_ptr();
      p.device_grad_sinks = need_sinks ? grad_sinks.data_ptr() : nullptr;
      launch(op, place, place.cuda->attention_backward, p);
      return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_mask),
              std::move(grad_sinks)};
    }
    std::vector<double> sums(p.heads);
    p.grad_sinks = need_sinks ? sums.data() : nullptr;
    kernels().attention_backward(p);
    for (int64_t i = 0; need_sinks && i < p.heads; ++i)
      with_element(element(grad_sinks, i), grad_sinks.scalar_type(),
                   [&](auto& one) { one = std::remove_reference_t<decltype(one)>(sums[i]); });
  }
  return {std::move(grad_query), std::move(grad_key), std::move(grad_value), std::move(grad_mask),
          std::move(grad_sinks)};
}

}  // namespace

void register_attention(torch::stable::detail::StableLibrary& m) {
  m.impl("attention", HT_BOX(attention));
  m.impl("attention_backward", HT_BOX(attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) { register_attention(m); }

}  // namespace handtuned
