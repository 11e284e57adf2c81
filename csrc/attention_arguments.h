// Attention family, the skin's first half: arguments are checked and filled into the Params.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "attention.h"
#include "tensor.h"

namespace handtuned::attention_arguments {

constexpr int64_t kMostWidth = 512;

// What the Params point to and no argument owns: contiguous copies, integers and floats in one type.
struct Holders {
  OptionalTensor query, key, value, mask, grad_output, output, lse, grad_lse;
  // On the CPU.
  std::vector<int64_t> query_starts, key_starts, key_lengths;
  std::vector<int32_t> pages;
  std::vector<double> slopes, sinks;
  // In device memory.
  OptionalTensor device_query_starts, device_key_starts, device_key_lengths, device_pages, device_slopes, device_sinks;
};

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  HT_CHECK(tensor.device() == query.device(), op, name, " is on ", to_string(tensor.device()), ", query is on ",
           to_string(query.device()), "; move it with .to(query.device)");
}

inline void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims, const char* meaning) {
  HT_CHECK(tensor.dim() == dims, op, name, " has shape ", to_string(tensor.sizes()), ", expected ", dims, " dims, ",
           meaning, "; unsqueeze or reshape it");
}

// [batch, heads, rows, width] or packed [rows, heads, width], last stride 1: the tensor itself or one copy of it.
inline AttentionTensor operand(const Tensor& given, OptionalTensor& holder) {
  const int64_t n = given.dim();
  const bool in_place = given.sizes()[n - 1] <= 1 || given.strides()[n - 1] == 1;
  if (!in_place) holder = contiguous(given);
  const Tensor& t = in_place ? given : *holder;
  const Shape s = t.strides();
  return n == 4 ? AttentionTensor{t.data_ptr(), s[0], s[1], s[2]} : AttentionTensor{t.data_ptr(), 0, s[1], s[0]};
}

// Numbers as they lie in memory; contiguous in `holder`.
inline Numbers numbers(const Tensor& given, OptionalTensor& holder) {
  if (!given.is_contiguous()) holder = contiguous(given);
  const Tensor& t = holder ? *holder : given;
  switch (t.scalar_type()) {
    case ScalarType::Int: return {t.data_ptr(), NumberType::i32};
    case ScalarType::Long: return {t.data_ptr(), NumberType::i64};
    case ScalarType::Double: return {t.data_ptr(), NumberType::f64};
    case ScalarType::Half: return {t.data_ptr(), NumberType::f16};
    case ScalarType::BFloat16: return {t.data_ptr(), NumberType::bf16};
    default: return {t.data_ptr(), NumberType::f32};
  }
}

inline void check_integers(const char* op, const char* name, const Tensor& given, const Tensor& query, int64_t count,
                           int64_t dims = 1) {
  check_device(op, name, given, query);
  const ScalarType dtype = given.scalar_type();
  HT_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, name, " is ", to_string(dtype),
           ", expected int32 or int64; convert it with .to(torch.int32)");
  HT_CHECK(given.numel() == count && given.dim() == dims, op, name, " has shape ", to_string(given.sizes()),
           ", expected ", count, " elements; pass one for each batch entry (starts: and one more)");
}

template <class Int>
std::vector<Int> integers(const Tensor& given) {
  const int64_t count = given.numel();
  const Tensor t = contiguous(given);
  std::vector<Int> values(count);
  if (t.scalar_type() == ScalarType::Int)
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

inline void* element(const Tensor& t, int64_t i) {
  return static_cast<char*>(t.data_ptr()) + i * int64_t(size_of(t.scalar_type()));
}

inline void check_floats(const char* op, const char* name, const Tensor& given, const Tensor& query) {
  check_device(op, name, given, query);
  const ScalarType dtype = given.scalar_type(), own = query.scalar_type();
  HT_CHECK(dtype == ScalarType::Float || dtype == own, op, name, " is ", to_string(dtype), ", allowed are float32",
           " and the dtype of query, ", to_string(own), "; convert it with .to()");
}

inline std::vector<double> floats(const Tensor& given) {
  const int64_t n = given.numel();
  const Tensor t = contiguous(given);
  std::vector<double> values(n);
  for (int64_t i = 0; i < n; ++i)
    with_element(element(t, i), t.scalar_type(), [&](auto& one) { values[i] = static_cast<double>(one); });
  return values;
}

// Nondecreasing from 0 to at most `rows`; returns the longest sequence.
inline int64_t check_starts(const char* op, const char* name, const std::vector<int64_t>& starts, int64_t rows) {
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

// on_device: a CUDA kernel is served. It reads what lies in device memory itself, and keeps it within its limits.
inline void fill_queries(const char* op, Attention& p, Holders& h, bool on_device, const Tensor& query,
                         const OptionalTensor& query_starts) {
  p.dtype = dtype_of(op, "query", query);
  const Shape q = query.sizes();
  if (query_starts) {
    check_dims(op, "query", query, 3, "[rows, heads, width] beside query_starts");
    const int64_t n = query_starts->numel();
    HT_CHECK(n >= 1, op, "query_starts has no elements, the least is 1; pass cumulative lengths from 0");
    check_integers(op, "query_starts", *query_starts, query, n);
    p.batch = n - 1, p.heads = q[1], p.width = q[2], p.query_rows = p.total_rows = q[0];
    if (on_device) {
      p.device.query_starts = numbers(*query_starts, h.device_query_starts);
    } else {
      h.query_starts = integers<int64_t>(*query_starts);
      p.query_rows = check_starts(op, "query_starts", h.query_starts, q[0]);
      p.query_starts = h.query_starts.data();
    }
  } else {
    check_dims(op, "query", query, 4, "[batch, heads, rows, width]");
    p.batch = q[0], p.heads = q[1], p.query_rows = p.total_rows = q[2], p.width = q[3];
  }
  HT_CHECK(p.width >= 1 && p.width <= kMostWidth, op, "query has width ", p.width, ", the limits are 1 and ",
           kMostWidth, "; split the heads");
  p.query = operand(query, h.query);
}

inline void fill_keys(const char* op, Attention& p, Holders& h, bool on_device, const Tensor& query, const Tensor& key,
                      const Tensor& value, bool packed, const OptionalTensor& key_starts,
                      const OptionalTensor& key_lengths, const OptionalTensor& block_table) {
  HT_CHECK(packed == bool(key_starts) || block_table, op, "query is ", packed ? "packed" : "not packed", " and key is ",
           key_starts ? "packed" : "not packed", "; pass both query_starts and key_starts, or neither");
  HT_CHECK(!(key_starts && block_table), op, "both key_starts and block_table are given; keys are packed or paged");
  for (auto [name, t] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    check_device(op, name, *t, query);
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
    check_integers(op, "key_starts", *key_starts, query, p.batch + 1);
    if (on_device) {
      p.device.key_starts = numbers(*key_starts, h.device_key_starts);
    } else {
      h.key_starts = integers<int64_t>(*key_starts);
      p.key_rows = check_starts(op, "key_starts", h.key_starts, k[0]);
      p.key_starts = h.key_starts.data();
    }
  } else if (block_table) {
    const Shape t = block_table->sizes();
    HT_CHECK(t.size() == 2 && t[0] == p.batch, op, "block_table has shape ", to_string(t), ", expected [", p.batch,
             ", pages]; pass a row of page numbers for each batch entry");
    HT_CHECK(bool(key_lengths), op, "block_table is given but key_lengths is None; pass the keys in use");
    HT_CHECK(k[2] >= 1, op, "pages have ", k[2], " slots, the least is 1; pass pages with room for a key");
    check_integers(op, "block_table", *block_table, query, t[0] * t[1], 2);
    p.max_pages = t[1], p.page_size = k[2], p.page_count = k[0], p.key_rows = t[1] * k[2];
    if (on_device)
      p.device.pages = numbers(*block_table, h.device_pages);
    else
      h.pages = integers<int32_t>(*block_table), p.pages = h.pages.data();
  }
  HT_CHECK(p.key_rows < std::numeric_limits<int32_t>::max() && p.query_rows < std::numeric_limits<int32_t>::max(), op,
           "a sequence is ", std::max(p.key_rows, p.query_rows), " rows long, the limit is 2^31 - 2; split it");
  if (key_lengths) check_integers(op, "key_lengths", *key_lengths, query, p.batch);
  if (key_lengths && on_device) {
    p.device.key_lengths = numbers(*key_lengths, h.device_key_lengths);
  } else if (key_lengths) {
    h.key_lengths = integers<int64_t>(*key_lengths);
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

inline void fill_mask(const char* op, Attention& p, bool packed, const Tensor& query, const Tensor& mask) {
  check_device(op, "mask", mask, query);
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
    const bool known = !p.device.query_starts.data;  // else how long sequences are is known on the device alone
    const bool longer = packed && d >= 2 && (!known || sizes[d] >= wanted[d]);
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

inline void fill_options(const char* op, Attention& p, Holders& h, bool on_device, const Tensor& query,
                         const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const Options& options) {
  if (alibi_slopes) {
    check_floats(op, "alibi_slopes", *alibi_slopes, query);
    const int64_t n = alibi_slopes->numel();
    const bool shared = alibi_slopes->dim() == 1 && n == p.heads;
    HT_CHECK(shared || (alibi_slopes->dim() == 2 && alibi_slopes->sizes()[0] == p.batch &&
                        alibi_slopes->sizes()[1] == p.heads),
             op, "alibi_slopes has shape ", to_string(alibi_slopes->sizes()), ", expected [", p.heads, "] or [",
             p.batch, ", ", p.heads, "]; pass one for each head of query");
    if (on_device) {
      p.device.slopes = numbers(*alibi_slopes, h.device_slopes);
      p.device.slopes_of_batch = !shared;
    } else {
      h.slopes = floats(*alibi_slopes);
      if (shared) h.slopes.resize(p.batch * p.heads);
      for (int64_t i = p.heads; shared && i < p.batch * p.heads; ++i) h.slopes[i] = h.slopes[i - p.heads];
      p.slopes = h.slopes.data();
    }
  }
  if (sinks) {
    check_floats(op, "sinks", *sinks, query);
    HT_CHECK(sinks->dim() == 1 && sinks->numel() == p.heads, op, "sinks has shape ", to_string(sinks->sizes()),
             ", expected [", p.heads, "]; pass one for each head of query");
    if (on_device)
      p.device.sinks = numbers(*sinks, h.device_sinks);
    else
      h.sinks = floats(*sinks), p.sinks = h.sinks.data();
  }
  HT_CHECK(options.softcap >= 0, op, "softcap is ", options.softcap, ", the limit is softcap >= 0; pass 0 for none");
  p.scale = options.scale, p.softcap = options.softcap, p.bottom_right = options.bottom_right;
  p.window_left = std::max<int64_t>(options.window_left, -1);
  p.window_right = std::max<int64_t>(options.window_right, -1);
}

}  // namespace handtuned::attention_arguments
