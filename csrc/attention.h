// Attention family: the contract between the skin (attention.cpp) and the kernels (cpu/attention*.h).
//
// Of batch b and query head h, with query rows i and keys j:
//   s     = scale * q_i . k_j;  s = softcap * tanh(s / softcap);  s += mask_ij;  s -= slope_h * |i + offset - j|
//   lse_i = log(sum_j exp(s_ij) + exp(sink_h)),   p_ij = exp(s_ij - lse_i)
//   out_i = sum_j p_ij * keep_ij / (1 - dropout.p) * v_j
// over the visible keys alone (visible_keys below, and the mask). Query head h reads kv head h / (heads / kv_heads).
//
// Queries, keys and values are read in place at any strides but the last, which is 1. Outputs are freshly allocated by
// the skin and never alias an input; scratch belongs to the kernels and is as large as shapes, not threads, say.
#pragma once
#include "params.h"

namespace handtuned {

// A tensor [batch, heads, rows, width], or packed [rows, heads, width], where `batch` is 0 and row counts from the
// first row of the sequence.
struct AttentionTensor {
  void* data;
  int64_t batch, head, row;  // strides in elements
};

struct AttentionMask {
  const void* data = nullptr;  // nullptr: none
  bool boolean = false;        // true where a key may be seen; else of `dtype`, added to the score
  DType dtype{};
  int64_t batch = 0, head = 0, row = 0, key = 0;       // strides in elements, 0 along a broadcast dim
  int64_t batches = 1, heads = 1, rows = 1, keys = 1;  // sizes
};

// Numbers in device memory as the caller stored them: CUDA kernels read them in place, so that no launch waits.
enum class NumberType : int8_t { i32, i64, f32, f64, bf16, f16 };
struct Numbers {
  const void* data = nullptr;  // nullptr: not given
  NumberType type{};
};

struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, width, value_width;
  int64_t query_rows, key_rows;  // the longest of any batch entry
  int64_t total_rows;            // rows of the lse of one head: query_rows, or all packed rows
  AttentionTensor query, key, value;
  AttentionMask mask;
  const int64_t* query_starts;  // [batch + 1] or nullptr (dense)
  const int64_t* key_starts;    // [batch + 1] or nullptr
  const int64_t* key_lengths;   // [batch] or nullptr
  const int32_t* pages;         // [batch, max_pages] or nullptr: key.batch is then the stride of a page
  int64_t max_pages, page_size, page_count;
  const double* slopes;  // [batch, heads] or nullptr
  const double* sinks;   // [heads] or nullptr
  double scale, softcap;
  bool bottom_right;
  int64_t window_left, window_right;  // -1: unbounded
  Dropout dropout;
  // CUDA: instead of the pointers of the same names above. Then query_rows and key_rows of packed tensors are all rows.
  struct {
    Numbers query_starts, key_starts, key_lengths, pages, slopes, sinks;
    bool slopes_of_batch;  // [batch, heads], else [heads]
  } device;
};

struct AttentionForward : Attention {
  AttentionTensor output;  // dtype [batch, heads, query_rows, value_width]
  void* lse;               // f32 (f64 for f64) [batch, heads, query_rows], packed [heads, total_rows]
  void* partials;          // CUDA: scratch of cuda/attention_plan.h, like lse, or nullptr
};

struct AttentionBackward : Attention {
  AttentionTensor grad_output, output;
  const void* lse;
  const void* grad_lse;                              // like lse, or nullptr
  AttentionTensor grad_query, grad_key, grad_value;  // like query, key, value; data nullptr: not wanted
  void* grad_mask;                                   // contiguous, mask's dtype, or nullptr
  double* grad_sinks;                                // [heads] or nullptr
  void* device_grad_sinks;                           // CUDA: of the type of device.sinks
  void* delta;                                       // CUDA: scratch like lse
};

// ---- where things are -------------------------------------------------------------------------------------------

// What one batch entry is: its lengths and the offset of its first rows.
struct AttentionEntry {
  int64_t query_rows, key_rows;
  int64_t first_query, first_key;  // in packed rows
  int64_t offset;                  // added to a query's index to align it with keys
};

inline AttentionEntry attention_entry(const Attention& p, int64_t b) {
  AttentionEntry e{p.query_rows, p.key_rows, 0, 0, 0};
  if (p.query_starts) e.first_query = p.query_starts[b], e.query_rows = p.query_starts[b + 1] - e.first_query;
  if (p.key_starts) e.first_key = p.key_starts[b], e.key_rows = p.key_starts[b + 1] - e.first_key;
  if (p.key_lengths) e.key_rows = p.key_lengths[b];
  if (p.bottom_right) e.offset = e.key_rows - e.query_rows;
  return e;
}

// Keys [begin, end), none where begin >= end.
struct KeyRange {
  int64_t begin, end;
};

// The keys that window and length leave visible to query row i. The mask may hide more of them.
inline KeyRange visible_keys(const Attention& p, const AttentionEntry& e, int64_t i) {
  const int64_t centre = i + e.offset;
  int64_t begin = p.window_left < 0 ? 0 : centre - p.window_left;
  int64_t end = p.window_right < 0 ? e.key_rows : centre + p.window_right + 1;
  return {begin < 0 ? 0 : begin, end > e.key_rows ? e.key_rows : end};
}

// Flat index of (b, h, i) in the lse, which is also the row of the dropout mask.
inline int64_t lse_index(const Attention& p, const AttentionEntry& e, int64_t b, int64_t h, int64_t i) {
  return p.query_starts ? h * p.total_rows + e.first_query + i : (b * p.heads + h) * p.total_rows + i;
}

// ---- how the work is cut: by shapes alone, so that results do not depend on the number of threads ----------------

constexpr int64_t kAttentionTile = 64;  // query rows worked on together
constexpr int64_t kPieces = 64;         // of work wanted at least, for as many threads

}  // namespace handtuned
