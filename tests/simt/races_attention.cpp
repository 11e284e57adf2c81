// Attention, forward and backward: on tensor cores and without them, every option, packed rows, keys in chunks.
#include "attention_plan.h"
#include "launchers.h"
#include "races.h"

namespace {

using namespace handtuned;

struct Shape {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  bool options;  // causal from the end, an additive mask, softcap, slopes, sinks, lengths, dropout
  bool packed;   // rows and keys are those of all entries, one after the other
};

// One tile of rows, or two where blocks could meet: a launch of more than some 10000 threads is too many for
// ThreadSanitizer.
const Shape kShapes[] = {
    {DType::bf16, 1, 2, 1, 30, 70, 24, 24, true, false}, {DType::f16, 1, 2, 2, 9, 80, 72, 40, false, false},
    {DType::f32, 1, 1, 1, 20, 70, 20, 12, true, false},  {DType::f64, 1, 1, 1, 10, 20, 8, 8, false, false},
    {DType::bf16, 2, 1, 1, 40, 50, 16, 16, false, true},
};
const Shape kDecoding[] = {
    {DType::bf16, 1, 2, 1, 1, 520, 16, 16, false, false},
    {DType::f32, 1, 1, 1, 1, 520, 8, 8, true, false},
};

// What is read and written; gradients have the sizes of what they belong to.
struct Memory {
  Shape s;
  Buffer query, key, value, output, grad_query, grad_key, grad_value, grad_output;
  Buffer mask, grad_mask, lse, delta, sinks, grad_sinks, slopes;
  std::vector<int64_t> lengths, query_starts, key_starts;
  uint64_t seed = 1234;

  static int64_t bytes(const Shape& s, int64_t heads, int64_t rows, int64_t width) {
    return 8 * s.batch * heads * rows * width;
  }
  explicit Memory(const Shape& s)
      : s(s),
        query(bytes(s, s.heads, s.queries, s.width)),
        key(bytes(s, s.kv_heads, s.keys, s.width)),
        value(bytes(s, s.kv_heads, s.keys, s.value_width)),
        output(bytes(s, s.heads, s.queries, s.value_width)),
        grad_query(query),
        grad_key(key),
        grad_value(value),
        grad_output(output),
        mask(bytes(s, s.heads, s.queries, s.keys)),
        grad_mask(mask),
        lse(bytes(s, s.heads, s.queries, 1)),
        delta(lse),
        sinks(8 * s.heads),
        grad_sinks(sinks),
        slopes(sinks),
        lengths(size_t(s.batch), s.keys - 3) {
    for (int64_t b = 0; b <= s.batch; ++b) {
      query_starts.push_back(b * s.queries / s.batch);
      key_starts.push_back(b * s.keys / s.batch);
    }
  }

  AttentionTensor tensor(Buffer& data, int64_t heads, int64_t rows, int64_t width) const {
    if (s.packed) return {data.data(), 0, width, heads * width};
    return {data.data(), heads * rows * width, rows * width, width};
  }
  AttentionTensor of_query(Buffer& data) const { return tensor(data, s.heads, s.queries, s.width); }
  AttentionTensor of_output(Buffer& data) const { return tensor(data, s.heads, s.queries, s.value_width); }
  AttentionTensor of_key(Buffer& data) const { return tensor(data, s.kv_heads, s.keys, s.width); }
  AttentionTensor of_value(Buffer& data) const { return tensor(data, s.kv_heads, s.keys, s.value_width); }

  void describe(Attention& p) {
    p.dtype = s.dtype, p.batch = s.batch, p.heads = s.heads, p.kv_heads = s.kv_heads;
    p.width = s.width, p.value_width = s.value_width;
    p.query_rows = p.total_rows = s.queries, p.key_rows = s.keys;
    p.query = of_query(query), p.key = of_key(key), p.value = of_value(value);
    p.scale = 0.25, p.window_left = p.window_right = -1;
    if (s.packed) {
      p.device.query_starts = {query_starts.data(), NumberType::i64};
      p.device.key_starts = {key_starts.data(), NumberType::i64};
    }
    if (!s.options) return;
    p.bottom_right = true, p.window_right = 0, p.softcap = 5;
    p.mask.data = mask.data(), p.mask.dtype = s.dtype;
    p.mask.heads = s.heads, p.mask.rows = s.queries, p.mask.keys = s.keys;  // one for the whole batch
    p.mask.head = s.queries * s.keys, p.mask.row = s.keys, p.mask.key = 1;
    p.device.key_lengths = {lengths.data(), NumberType::i64};
    p.device.slopes = {slopes.data(), NumberType::f64}, p.device.sinks = {sinks.data(), NumberType::f64};
    p.dropout = {0.3, 0, &seed};
  }
};

int forward(Memory& memory, bool one_output = false) {
  AttentionForward p{};
  memory.describe(p);
  Buffer partials(8 * cuda::partial_elements(p));
  p.output = memory.of_output(memory.output), p.lse = memory.lse.data(), p.partials = partials.data();
  if (one_output) p.output.head = 0;
  return cuda::attention_forward(p, 0, nullptr);
}

int backward(Memory& memory, bool one_gradient = false) {
  AttentionBackward p{};
  memory.describe(p);
  p.grad_output = memory.of_output(memory.grad_output), p.output = memory.of_output(memory.output);
  p.lse = memory.lse.data(), p.delta = memory.delta.data();
  p.grad_query = memory.of_query(memory.grad_query);
  p.grad_key = memory.of_key(memory.grad_key), p.grad_value = memory.of_value(memory.grad_value);
  if (memory.s.options) p.grad_mask = memory.grad_mask.data(), p.device_grad_sinks = memory.grad_sinks.data();
  if (one_gradient) p.grad_key.head = 0;
  return cuda::attention_backward(p, 0, nullptr);
}

}  // namespace

int attentions() {
  for (const Shape& s : kShapes) {
    Memory memory(s);
    if (int status = forward(memory)) return status;
    if (int status = backward(memory)) return status;
  }
  return 0;
}

int attention_in_chunks() {
  for (const Shape& s : kDecoding) {
    Memory memory(s);
    if (int status = forward(memory)) return status;
  }
  return 0;
}

int attention_with_one_output() {
  Memory memory(kShapes[0]);
  return forward(memory, true);
}

int attention_with_one_gradient() {
  Memory memory(kShapes[1]);
  return backward(memory, true);
}
