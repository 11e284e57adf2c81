// Rotary family, the skin: check the arguments, allocate the outputs, fill the Params, call the table.
#include "rotary.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "boxing.h"
#include "cpu/dispatch.h"
#include "tensor.h"

namespace handtuned {
namespace {

void check_device(const char* op, const char* name, const Tensor& tensor, const char* main) {
  HT_CHECK(tensor.is_cpu(), op, name, " is not on the CPU, ", main, " is; move it with .to(", main, ".device)");
}

// cos and sin: of one shape and dtype, which is that of `main` or float32 beside 16 bits.
void fill_turn(const char* op, Turn& p, const Tensor& main, const char* name, const Tensor& cos, const Tensor& sin) {
  p.dtype = dtype_of(op, name, main);
  check_device(op, "cos", cos, name), check_device(op, "sin", sin, name);
  const ScalarType own = main.scalar_type(), table = cos.scalar_type();
  HT_CHECK(table == own || (is_narrow(p.dtype) && table == ScalarType::Float), op, "cos is ", to_string(table),
           ", allowed beside a ", to_string(own), " ", name, ": ", to_string(own),
           is_narrow(p.dtype) ? " and float32" : "", "; convert it with .to()");
  HT_CHECK(sin.scalar_type() == table && equal(sin.sizes(), cos.sizes()), op, "cos is ", to_string(table), " ",
           to_string(cos.sizes()), ", sin is ", to_string(sin.scalar_type()), " ", to_string(sin.sizes()),
           "; pass a pair");
  p.table = dtype_of(op, "cos", cos);
  const Shape x = main.sizes(), c = cos.sizes();
  HT_CHECK(x.size() >= 1 && c.size() >= 1 && 2 * c[c.size() - 1] <= x[x.size() - 1], op, "cos has shape ", to_string(c),
           ", expected at most half of ", name, "'s width, ", to_string(x), "; make the tables for at most that width");
  p.width = x[x.size() - 1], p.angles = c[c.size() - 1];
}

// The rows of a table, one for each row of a tensor of these sizes: broadcast along dims of size 1 and missing ones.
StridedRows broadcast_rows(const char* op, const Tensor& table, Shape sizes, OptionalTensor& holder) {
  const Shape own = table.sizes();
  const int64_t outer = int64_t(sizes.size()) - 1, missing = int64_t(sizes.size() - own.size());
  const bool in_place = own[own.size() - 1] <= 1 || table.strides()[own.size() - 1] == 1;
  if (!in_place) holder = contiguous(table);
  const Shape strides = (in_place ? table : *holder).strides();
  StridedRows rows;
  rows.data = (in_place ? table : *holder).data_ptr();
  for (int64_t d = 0; d < outer; ++d) {
    if (sizes[d] == 1) continue;
    const int64_t stride = d < missing || own[d - missing] == 1 ? 0 : strides[d - missing];
    if (rows.ndim > 0 && rows.stride[rows.ndim - 1] == stride * sizes[d]) {
      rows.size[rows.ndim - 1] *= sizes[d];
    } else {
      HT_CHECK(rows.ndim < StridedRows::kMaxDims, op, "cos varies along more than ", StridedRows::kMaxDims,
               " dims; reshape it");
      rows.size[rows.ndim++] = sizes[d];
    }
    rows.stride[rows.ndim - 1] = stride;
  }
  if (rows.ndim == 0) rows.ndim = 1, rows.size[0] = 1;
  return rows;
}

Tensor rotary(const Tensor& input, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const char* op = "rotary";
  Rotary p{};
  fill_turn(op, p, input, "input", cos, sin);
  p.interleaved = interleaved, p.inverse = inverse;
  const Shape x = input.sizes(), c = cos.sizes();
  bool broadcasts = c.size() <= x.size();
  for (size_t d = 1; broadcasts && d < c.size(); ++d)
    broadcasts = c[c.size() - 1 - d] == 1 || c[c.size() - 1 - d] == x[x.size() - 1 - d];
  HT_CHECK(broadcasts, op, "cos has shape ", to_string(c), ", expected one that broadcasts to the rows of input, ",
           to_string(x), "; make or slice the tables for its positions");
  OptionalTensor input_copy, cos_copy, sin_copy, none;
  p.input = strided_rows(input, 1, input_copy);
  Tensor output = empty_like(input_copy ? *input_copy : input);
  if (input.numel() == 0) return output;
  p.rows = input.numel() / p.width;
  p.output = strided_rows(output, 1, none);
  p.cos = broadcast_rows(op, cos, x, cos_copy);
  p.sin = broadcast_rows(op, sin, x, sin_copy);
  kernels().rotary(p);
  return output;
}

// ---- append_kv ------------------------------------------------------------------------------------------------------

std::vector<int64_t> integers(const char* op, const char* name, const Tensor& given, const Sizes& sizes) {
  check_device(op, name, given, "query");
  const ScalarType dtype = given.scalar_type();
  HT_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, name, " is ", to_string(dtype),
           ", expected int32 or int64; convert it with .to(torch.int32)");
  HT_CHECK(equal(given.sizes(), shape_of(sizes)), op, name, " has shape ", to_string(given.sizes()), ", expected ",
           to_string(shape_of(sizes)), "; pass a number for each sequence of the batch");
  OptionalTensor copy;
  if (!given.is_contiguous()) copy = contiguous(given);
  const void* data = (copy ? *copy : given).data_ptr();
  std::vector<int64_t> values(given.numel());
  if (dtype == ScalarType::Int)
    std::copy_n(static_cast<const int32_t*>(data), values.size(), values.begin());
  else
    std::copy_n(static_cast<const int64_t*>(data), values.size(), values.begin());
  return values;
}

// [batch, heads, rows, width], read in place or from one copy.
HeadRows rows_of(const Tensor& given, OptionalTensor& holder) {
  const bool in_place = given.sizes()[3] <= 1 || given.strides()[3] == 1;
  if (!in_place) holder = contiguous(given);
  const Tensor& t = in_place ? given : *holder;
  const Shape s = t.strides();
  return {t.data_ptr(), s[0], s[1], s[2]};
}

void check_like_query(const char* op, const char* name, const Tensor& tensor, const Tensor& query) {
  check_device(op, name, tensor, "query");
  HT_CHECK(tensor.scalar_type() == query.scalar_type(), op, name, " is ", to_string(tensor.scalar_type()),
           ", query is ", to_string(query.scalar_type()), "; convert one with .to()");
  HT_CHECK(tensor.dim() == 4, op, name, " has shape ", to_string(tensor.sizes()), ", expected 4 dims; unsqueeze it");
}

HeadRows cache_of(const char* op, const char* name, const Tensor& cache, const Tensor& query,
                  const OptionalTensor& table, OptionalTensor& none) {
  check_like_query(op, name, cache, query);
  const Shape s = cache.sizes();
  HT_CHECK(s[3] <= 1 || cache.strides()[3] == 1, op, name, " has the last stride ", cache.strides()[3],
           ", expected 1; it is written in place");
  HT_CHECK(table || s[0] == query.sizes()[0], op, name, " has batch size ", s[0], ", query has ", query.sizes()[0],
           "; pass a row for each sequence, or a block_table");
  return rows_of(cache, none);
}

void check_new(const char* op, const char* name, const Tensor& given, const Tensor& cache, const Tensor& query,
               int64_t rows) {
  check_like_query(op, name, given, query);
  const Sizes expected{query.sizes()[0], cache.sizes()[1], rows, cache.sizes()[3]};
  HT_CHECK(equal(given.sizes(), shape_of(expected)), op, name, " has shape ", to_string(given.sizes()), ", expected ",
           to_string(shape_of(expected)), " beside a ", name, "_cache of shape ", to_string(cache.sizes()),
           "; pass the new keys and values as (B, Hk, Lnew, D)");
}

// Every place that is written, and every position that is looked up, exists.
void check_places(const char* op, const AppendKv& p, int64_t capacity, int64_t entries, const OptionalTensor& cos) {
  for (int64_t b = 0; b < p.batch; ++b) {
    HT_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= capacity - p.new_rows, op, "cache_lengths[", b, "] is ", p.lengths[b],
             ", the limits are 0 and ", capacity - p.new_rows, " (", p.new_rows, " new keys in a cache of ", capacity,
             "); allocate a longer cache");
    const int64_t asked = std::max(p.new_rows, p.in_order ? p.query_rows : 1), known = cos ? cos->sizes()[0] : 0;
    HT_CHECK(!cos || p.lengths[b] + asked <= known, op, "cos has ", known, " positions, sequence ", b, " needs ",
             p.lengths[b] + asked, "; make longer tables");
    for (int64_t t = p.lengths[b]; p.pages && t < p.lengths[b] + p.new_rows; ++t) {
      const int64_t page = p.pages[b * p.max_pages + t / p.page_size];
      HT_CHECK(page >= 0 && page < entries, op, "block_table[", b, "][", t / p.page_size, "] is ", page,
               ", the limits are 0 and ", entries - 1, "; give each sequence pages for its new keys");
    }
  }
}

std::tuple<Tensor, Tensor> append_kv(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_lengths,
                                     const OptionalTensor& block_table, const OptionalTensor& cos,
                                     const OptionalTensor& sin, bool interleaved, bool in_order) {
  const char* op = "append_kv";
  AppendKv p{};
  OptionalTensor query_copy, key_copy, value_copy, none;
  p.dtype = p.table = dtype_of(op, "query", query);
  check_like_query(op, "query", query, query);
  const Shape q = query.sizes();
  p.key_cache = cache_of(op, "key_cache", key_cache, query, block_table, none);
  p.value_cache = cache_of(op, "value_cache", value_cache, query, block_table, none);
  const Shape k = key_cache.sizes(), v = value_cache.sizes();
  HT_CHECK(k[0] == v[0] && k[1] == v[1] && k[2] == v[2] && k[3] == q[3], op, "key_cache has shape ", to_string(k),
           ", value_cache has ", to_string(v), ", query has ", to_string(q),
           "; the caches differ in their widths alone, and key_cache is as wide as query");
  p.batch = q[0], p.heads = q[1], p.query_rows = q[2], p.width = q[3], p.kv_heads = k[1], p.value_width = v[3];
  HT_CHECK(key.dim() == 4, op, "key has shape ", to_string(key.sizes()), ", expected 4 dims; unsqueeze it");
  p.new_rows = key.sizes()[2];
  check_new(op, "key", key, key_cache, query, p.new_rows);
  check_new(op, "value", value, value_cache, query, p.new_rows);
  HT_CHECK(bool(cos) == bool(sin), op, "of cos and sin one is None; pass both, or neither");
  OptionalTensor cos_copy, sin_copy;
  if (cos) {
    HT_CHECK(cos->dim() == 2, op, "cos has shape ", to_string(cos->sizes()),
             ", expected [positions, angles]; reshape it");
    fill_turn(op, p, query, "query", *cos, *sin);
    if (!cos->is_contiguous()) cos_copy = contiguous(*cos);
    if (!sin->is_contiguous()) sin_copy = contiguous(*sin);
    p.cos = (cos_copy ? *cos_copy : *cos).data_ptr(), p.sin = (sin_copy ? *sin_copy : *sin).data_ptr();
  }
  p.interleaved = interleaved, p.in_order = in_order;
  const std::vector<int64_t> lengths = integers(op, "cache_lengths", cache_lengths, {p.batch});
  std::vector<int64_t> pages;
  p.page_size = k[2], p.lengths = lengths.data();
  if (block_table) {
    HT_CHECK(block_table->dim() == 2, op, "block_table has shape ", to_string(block_table->sizes()),
             ", expected [batch, pages]; reshape it");
    p.max_pages = block_table->sizes()[1];
    pages = integers(op, "block_table", *block_table, {p.batch, p.max_pages});
    p.pages = pages.data();
  }
  check_places(op, p, block_table ? p.max_pages * p.page_size : k[2], k[0], cos);

  p.query = rows_of(query, query_copy);
  p.key = rows_of(key, key_copy), p.value = rows_of(value, value_copy);
  Tensor output = p.angles ? empty_like(query_copy ? *query_copy : query) : empty({0}, query.scalar_type());
  if (p.angles) p.output = rows_of(output, none);
  Tensor after = empty({p.batch}, ScalarType::Long);
  for (int64_t b = 0; b < p.batch; ++b) static_cast<int64_t*>(after.data_ptr())[b] = lengths[b] + p.new_rows;
  if (p.width > 0) kernels().append_kv(p);
  return {std::move(output), std::move(after)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(handtuned, CPU, m) {
  m.impl("rotary", HT_BOX(rotary));
  m.impl("append_kv", HT_BOX(append_kv));
}

}  // namespace handtuned
