// Attention family, the skin: check the arguments, allocate the outputs, fill the Params, call the table.
#include "attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "tensor.h"

namespace handtuned {
namespace {

constexpr int64_t kMostWidth = 512;

// What the Params point to and no argument owns: contiguous copies, integers and floats in one type.
struct Holders {
  OptionalTensor query, key, value, mask, grad_output, output, lse, grad_lse;
  std::vector<int64_t> query_starts, key_starts, key_lengths;
  std::vector<int32_t> pages;
  std::vector<double> slopes, sinks;
};

void check_device(const char* op, const char* name, const Tensor& tensor) {
  HT_CHECK(tensor.is_cpu(), op, name, " is not on the CPU, query is; move it with .to(query.device)");
}

void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims, const char* meaning) {
  HT_CHECK(tensor.dim() == dims, op, name, " has shape ", to_string(tensor.sizes()), ", expected ", dims, " dims, ",
           meaning, "; unsqueeze or reshape it");
}

// [batch, heads, rows, width] or packed [rows, heads, width], last stride 1: the tensor itself or one copy of it.
AttentionTensor operand(const Tensor& given, OptionalTensor& holder) {
  const int64_t n = given.dim();
  const bool in_place = given.sizes()[n - 1] <= 1 || given.strides()[n - 1] == 1;
  if (!in_place) holder = contiguous(given);
  const Tensor& t = in_place ? given : *holder;
  const Shape s = t.strides();
  return n == 4 ? AttentionTensor{t.data_ptr(), s[0], s[1], s[2]} : AttentionTensor{t.data_ptr(), 0, s[1], s[0]};
}

template <class Int>
std::vector<Int> integers(const char* op, const char* name, const Tensor& given, int64_t count, int64_t dims = 1) {
  check_device(op, name, given);
  const ScalarType dtype = given.scalar_type();
  HT_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, name, " is ", to_string(dtype),
           ", expected int32 or int64; convert it with .to(torch.int32)");
  HT_CHECK(given.numel() == count && given.dim() == dims, op, name, " has shape ", to_string(given.sizes()),
           ", expected ", count, " elements; pass one for each batch entry (starts: and one more)");
  const Tensor t = contiguous(given);
  std::vector<Int> values(count);
  if (dtype == ScalarType::Int)
    std::copy_n(static_cast<const int32_t*>(t.data_ptr()), count, values.begin());
  else
    std::copy_n(static_cast<const int64_t*>(t.data_ptr()), count, values.begin());
  return values;
}

// One element, as a double and back.
template <class Use>
void with_element(void* at, ScalarType dtype, Use use) {
  switch (dtype) {
    case ScalarType::Double: return use(*static_cast<double*>(at));
    case ScalarType::Float: return use(*static_cast<float*>(at));
    case ScalarType::Half: return use(*static_cast<torch::headeronly::Half*>(at));
    default: return use(*static_cast<torch::headeronly::BFloat16*>(at));
  }
}

void* element(const Tensor& t, int64_t i) {
  return static_cast<char*>(t.data_ptr()) + i * int64_t(size_of(t.scalar_type()));
}

std::vector<double> floats(const char* op, const char* name, const Tensor& given, ScalarType beside) {
  check_device(op, name, given);
  const ScalarType dtype = given.scalar_type();
  HT_CHECK(dtype == ScalarType::Float || dtype == beside, op, name, " is ", to_string(dtype), ", allowed are float32",
           " and the dtype of query, ", to_string(beside), "; convert it with .to()");
  const int64_t n = given.numel();
  const Tensor t = contiguous(given);
  std::vector<double> values(n);
  for (int64_t i = 0; i < n; ++i)
    with_element(element(t, i), dtype, [&](auto& one) { values[i] = static_cast<double>(one); });
  return values;
}

// Nondecreasing from 0 to at most `rows`; returns the longest sequence.
int64_t check_starts(const char* op, const char* name, const std::vector<int64_t>& starts, int64_t rows) {
  int64_t longest = 0;
  for (size_t b = 0; b < starts.size(); ++b) {
    const int64_t before = b ? starts[b - 1] : 0;
    HT_CHECK(b || starts[0] == 0, op, name, "[0] is ", starts[0], ", expected 0; pass cumulative lengths");
    HT_CHECK(starts[b] >= before && starts[b] <= rows, op, name, "[", b, "] is ", starts[b], ", the limits are ",
             before, " (the start before it) and the ", rows, " packed rows; pass cumulative lengths");
    longest = std::max(longest, starts[b] - before);
  }
  return longest;
}

void fill_queries(const char* op, Attention& p, Holders& h, const Tensor& query, const OptionalTensor& query_starts) {
  p.dtype = dtype_of(op, "query", query);
  const Shape q = query.sizes();
  if (query_starts) {
    check_dims(op, "query", query, 3, "[rows, heads, width] beside query_starts");
    const int64_t n = query_starts->numel();
    HT_CHECK(n >= 1, op, "query_starts has no elements, the least is 1; pass cumulative lengths from 0");
    h.query_starts = integers<int64_t>(op, "query_starts", *query_starts, n);
    p.batch = n - 1, p.heads = q[1], p.width = q[2], p.total_rows = q[0];
    p.query_rows = check_starts(op, "query_starts", h.query_starts, q[0]);
    p.query_starts = h.query_starts.data();
  } else {
    check_dims(op, "query", query, 4, "[batch, heads, rows, width]");
    p.batch = q[0], p.heads = q[1], p.query_rows = p.total_rows = q[2], p.width = q[3];
  }
  HT_CHECK(p.width >= 1 && p.width <= kMostWidth, op, "query has width ", p.width, ", the limits are 1 and ",
           kMostWidth, "; split the heads");
  p.query = operand(query, h.query);
}

void fill_keys(const char* op, Attention& p, Holders& h, const Tensor& query, const Tensor& key, const Tensor& value,
               const OptionalTensor& key_starts, const OptionalTensor& key_lengths, const OptionalTensor& block_table) {
  HT_CHECK(bool(p.query_starts) == bool(key_starts) || block_table, op, "query is ",
           p.query_starts ? "packed" : "not packed", " and key is ", key_starts ? "packed" : "not packed",
           "; pass both query_starts and key_starts, or neither");
  HT_CHECK(!(key_starts && block_table), op, "both key_starts and block_table are given; keys are packed or paged");
  for (auto [name, t] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_device(op, name, *t);
    HT_CHECK(t->scalar_type() == query.scalar_type(), op, name, " is ", to_string(t->scalar_type()), ", query is ",
             to_string(query.scalar_type()), "; convert one with .to()");
    check_dims(op, name, *t, key_starts ? 3 : 4,
               key_starts ? "[rows, heads, width] beside key_starts" : "[batch, heads, rows, width]");
  }
  const Shape k = key.sizes(), v = value.sizes();
  const int64_t n = key.dim(), rows_dim = key_starts ? 0 : 2;
  p.kv_heads = k[1], p.value_width = v[n - 1];
  HT_CHECK(k[n - 1] == p.width, op, "key has width ", k[n - 1], ", query has ", p.width, "; they must be equal");
  HT_CHECK(key_starts || block_table || k[0] == p.batch, op, "key has batch size ", k[0], ", query has ", p.batch,
           "; expand one of them");
  HT_CHECK(std::equal(k.data(), k.data() + n - 1, v.data()), op, "value has shape ", to_string(v), ", key has ",
           to_string(k), "; all but the last dim must be equal");
  HT_CHECK(p.value_width >= 1 && p.value_width <= kMostWidth, op, "value has width ", p.value_width,
           ", the limits are 1 and ", kMostWidth, "; split the heads");
  HT_CHECK(p.kv_heads >= 1 ? p.heads % p.kv_heads == 0 : p.heads == 0, op, "query has ", p.heads, " heads and key ",
           p.kv_heads, "; the heads of query must be a multiple of those of key");
  p.key_rows = k[rows_dim];
  if (key_starts) {
    h.key_starts = integers<int64_t>(op, "key_starts", *key_starts, p.batch + 1);
    p.key_rows = check_starts(op, "key_starts", h.key_starts, k[0]);
    p.key_starts = h.key_starts.data();
  } else if (block_table) {
    const Shape t = block_table->sizes();
    HT_CHECK(t.size() == 2 && t[0] == p.batch, op, "block_table has shape ", to_string(t), ", expected [", p.batch,
             ", pages]; pass a row of page numbers for each batch entry");
    HT_CHECK(bool(key_lengths), op, "block_table is given but key_lengths is None; pass the keys in use");
    HT_CHECK(k[2] >= 1, op, "pages have ", k[2], " slots, the least is 1; pass pages with room for a key");
    h.pages = integers<int32_t>(op, "block_table", *block_table, t[0] * t[1], 2);
    p.pages = h.pages.data(), p.max_pages = t[1], p.page_size = k[2], p.key_rows = t[1] * k[2];
  }
  HT_CHECK(p.key_rows < std::numeric_limits<int32_t>::max() && p.query_rows < std::numeric_limits<int32_t>::max(), op,
           "a sequence is ", std::max(p.key_rows, p.query_rows), " rows long, the limit is 2^31 - 2; split it");
  if (key_lengths) {
    h.key_lengths = integers<int64_t>(op, "key_lengths", *key_lengths, p.batch);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t most = key_starts ? h.key_starts[b + 1] - h.key_starts[b] : p.key_rows;
      HT_CHECK(h.key_lengths[b] >= 0 && h.key_lengths[b] <= most, op, "key_lengths[", b, "] is ", h.key_lengths[b],
               ", the limits are 0 and ", most, " keys; clamp it");
      for (int64_t i = 0; p.pages && i * p.page_size < h.key_lengths[b]; ++i)
        HT_CHECK(p.pages[b * p.max_pages + i] >= 0 && p.pages[b * p.max_pages + i] < k[0], op, "block_table[", b, "][",
                 i, "] is ", p.pages[b * p.max_pages + i], ", the limits are 0 and ", k[0] - 1, "; pass page numbers");
    }
    p.key_lengths = h.key_lengths.data();
  }
  p.key = operand(key, h.key);
  p.value = operand(value, h.value);
}

void fill_mask(const char* op, Attention& p, const Tensor& query, const Tensor& mask) {
  check_device(op, "mask", mask);
  const ScalarType dtype = mask.scalar_type(), own = query.scalar_type();
  p.mask.boolean = dtype == ScalarType::Bool;
  const bool wider = dtype == ScalarType::Float && own != ScalarType::Double;
  HT_CHECK(p.mask.boolean || dtype == own || wider, op, "mask is ", to_string(dtype), ", allowed are bool, ",
           to_string(own), own == ScalarType::Double ? "" : " and float32", "; convert it with .to()");
  if (!p.mask.boolean) p.mask.dtype = dtype_of(op, "mask", mask);
  HT_CHECK(mask.dim() <= 4, op, "mask has ", mask.dim(),
           " dims, the limit is 4: [batch, heads, queries, keys]; reshape it");
  int64_t sizes[4] = {1, 1, 1, 1}, strides[4] = {};
  for (int64_t d = 0, n = mask.dim(); d < n; ++d) {
    sizes[4 - n + d] = mask.sizes()[d];
    if (mask.sizes()[d] != 1) strides[4 - n + d] = mask.strides()[d];
  }
  const int64_t wanted[4] = {p.batch, p.heads, p.query_rows, p.key_rows};
  for (int d = 0; d < 4; ++d) {
    const bool longer = p.query_starts && d >= 2 && sizes[d] >= wanted[d];  // sequences differ in length
    HT_CHECK(sizes[d] == wanted[d] || sizes[d] == 1 || longer, op, "mask has shape ", to_string(mask.sizes()),
             ", expected one that broadcasts to ", to_string(Shape(wanted, 4)), "; reshape it");
  }
  AttentionMask& m = p.mask;
  m.data = mask.data_ptr();
  m.batches = sizes[0], m.heads = sizes[1], m.rows = sizes[2], m.keys = sizes[3];
  m.batch = strides[0], m.head = strides[1], m.row = strides[2], m.key = strides[3];
}

struct Options {
  double scale;
  bool bottom_right;
  int64_t window_left, window_right;
  double softcap;
};

void fill_options(const char* op, Attention& p, Holders& h, const Tensor& query, const OptionalTensor& alibi_slopes,
                  const OptionalTensor& sinks, const Options& options) {
  if (alibi_slopes) {
    h.slopes = floats(op, "alibi_slopes", *alibi_slopes, query.scalar_type());
    const int64_t n = int64_t(h.slopes.size());
    const bool shared = alibi_slopes->dim() == 1 && n == p.heads;
    HT_CHECK(shared || (alibi_slopes->dim() == 2 && alibi_slopes->sizes()[0] == p.batch &&
                        alibi_slopes->sizes()[1] == p.heads),
             op, "alibi_slopes has shape ", to_string(alibi_slopes->sizes()), ", expected [", p.heads, "] or [",
             p.batch, ", ", p.heads, "]; pass one for each head of query");
    if (shared) {
      h.slopes.resize(p.batch * p.heads);
      for (int64_t i = p.heads; i < p.batch * p.heads; ++i) h.slopes[i] = h.slopes[i - p.heads];
    }
    p.slopes = h.slopes.data();
  }
  if (sinks) {
    h.sinks = floats(op, "sinks", *sinks, query.scalar_type());
    HT_CHECK(sinks->dim() == 1 && int64_t(h.sinks.size()) == p.heads, op, "sinks has shape ", to_string(sinks->sizes()),
             ", expected [", p.heads, "]; pass one for each head of query");
    p.sinks = h.sinks.data();
  }
  HT_CHECK(options.softcap >= 0, op, "softcap is ", options.softcap, ", the limit is softcap >= 0; pass 0 for none");
  p.scale = options.scale, p.softcap = options.softcap, p.bottom_right = options.bottom_right;
  p.window_left = std::max<int64_t>(options.window_left, -1);
  p.window_right = std::max<int64_t>(options.window_right, -1);
}

ScalarType statistics_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A result that mirrors `like`: of its rows, `width` wide, with the heads inside the rows in memory where they are so
// in `like`. Zeros where asked.
Tensor mirror(const Tensor& like, int64_t width, bool zeros) {
  const Shape s = like.sizes();
  Tensor result = [&] {
    if (s.size() == 3) return empty({s[0], s[1], width}, like.scalar_type());
    const int64_t sizes[4] = {s[0], s[1], s[2], width};
    if (like.strides()[1] >= like.strides()[2]) return empty(Shape(sizes, 4), like.scalar_type());
    auto one = [](int64_t size) { return std::max<int64_t>(size, 1); };
    const int64_t row = one(s[1]) * one(width), strides[4] = {one(s[2]) * row, one(width), row, 1};
    return empty_strided(Shape(sizes, 4), Shape(strides, 4), like.scalar_type());
  }();
  if (zeros) zero(result);
  return result;
}

Tensor empty_lse(const Attention& p, const Tensor& query) {
  return p.query_starts ? empty({p.heads, p.total_rows}, statistics_dtype(query))
                        : empty({p.batch, p.heads, p.total_rows}, statistics_dtype(query));
}

template <class Float>
void fill_lowest(const Tensor& lse) {
  std::fill_n(static_cast<Float*>(lse.data_ptr()), lse.numel(), -std::numeric_limits<Float>::infinity());
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
  fill_queries(op, p, h, query, query_starts);
  fill_keys(op, p, h, query, key, value, key_starts, key_lengths, block_table);
  if (mask) fill_mask(op, p, query, *mask);
  fill_options(op, p, h, query, alibi_slopes, sinks, {scale, bottom_right, window_left, window_right, softcap});
  p.dropout = dropout_of(op, dropout_p, seed);

  const bool gaps = p.query_starts && h.query_starts.back() < p.total_rows;  // packed rows of no sequence
  Tensor output = mirror(query, p.value_width, gaps), lse = empty_lse(p, query);
  if (gaps) p.dtype == DType::f64 ? fill_lowest<double>(lse) : fill_lowest<float>(lse);
  if (p.batch * p.heads * p.query_rows == 0) return {std::move(output), std::move(lse)};
  OptionalTensor unused;
  p.output = operand(output, unused);
  p.lse = lse.data_ptr();
  kernels().attention_forward(p);
  return {std::move(output), std::move(lse)};
}

void check_like(const char* op, const char* name, const Tensor& tensor, Shape shape, ScalarType dtype) {
  check_device(op, name, tensor);
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
  fill_queries(op, p, h, query, query_starts);
  fill_keys(op, p, h, query, key, value, key_starts, key_lengths, {});
  if (mask) fill_mask(op, p, query, *mask);
  fill_options(op, p, h, query, alibi_slopes, sinks, {scale, bottom_right, window_left, window_right, softcap});
  p.dropout = dropout_of(op, dropout_p, seed);
  need_mask &= mask && !p.mask.boolean;
  need_sinks &= bool(sinks);

  int64_t out_sizes[4];
  std::copy_n(query.sizes().data(), query.dim(), out_sizes);
  out_sizes[query.dim() - 1] = p.value_width;
  const Shape out_shape(out_sizes, query.dim());
  check_like(op, "grad_output", grad_output, out_shape, query.scalar_type());
  check_like(op, "output", output, out_shape, query.scalar_type());
  const int64_t lse_sizes[3] = {p.batch, p.heads, p.total_rows};
  const Shape lse_shape(lse_sizes + (p.query_starts ? 1 : 0), p.query_starts ? 2 : 3);
  check_like(op, "lse", lse, lse_shape, statistics_dtype(query));
  if (grad_lse) check_like(op, "grad_lse", *grad_lse, lse_shape, statistics_dtype(query));

  // Rows that belong to no sequence, or lie behind its key_lengths, get 0.
  const bool query_gaps = bool(p.query_starts), key_gaps = p.key_starts || p.key_lengths;
  const bool none = p.batch * p.heads * p.query_rows == 0;
  auto grad_like = [&](bool wanted, const Tensor& t, int64_t width, bool zeros) {
    return wanted ? mirror(t, width, zeros || none) : empty({0}, t.scalar_type());
  };
  Tensor grad_query = grad_like(need_query, query, p.width, query_gaps);
  Tensor grad_key = grad_like(need_key, key, p.width, key_gaps);
  Tensor grad_value = grad_like(need_value, value, p.value_width, key_gaps);
  Tensor grad_mask =
      empty_if(need_mask, mask ? mask->sizes() : Shape(), mask ? mask->scalar_type() : ScalarType::Float);
  Tensor grad_sinks =
      empty_if(need_sinks, sinks ? sinks->sizes() : Shape(), sinks ? sinks->scalar_type() : ScalarType::Float);
  if (need_mask) zero(grad_mask);
  if (need_sinks) zero(grad_sinks);
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

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) {
  m.impl("attention", HT_BOX(attention));
  m.impl("attention_backward", HT_BOX(attention_backward));
}

}  // namespace handtuned
