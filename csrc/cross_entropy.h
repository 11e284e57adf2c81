// Linear layer and cross-entropy in one: the contract between the skin (cross_entropy.cpp) and the kernels
// (cpu/cross_entropy.h).
//
// Kernels see the rows that count: those whose target is not ignore_index. Outputs and all scratch are owned by the
// skin; nothing is of the size rows x classes but the probabilities that the caller asks to keep.
#pragma once
#include "linear.h"

namespace handtuned {

enum class Reduction : int8_t { none, mean, sum };  // numbered as in the schema
inline constexpr int64_t kReductions = 3;

// Classes and rows are gone through in chunks of so many, whatever the number of threads.
inline constexpr int64_t kEntropyRows = 1024;
inline int64_t entropy_classes(int64_t in, int64_t classes) {
  const int64_t wanted = (int64_t(1) << 22) / (in > 0 ? in : 1) / 256 * 256;
  const int64_t chunk = wanted < 1024 ? 1024 : wanted > 8192 ? 8192 : wanted;
  const int64_t all = linear_panels(classes) * kLinearPanel;
  return chunk < all ? chunk : all;
}

struct CrossEntropy {
  int64_t rows, classes, in;
  DType dtype;
  Reduction reduction;
  double label_smoothing, softcap, z_loss;  // softcap 0: none
  StridedRows input;                        // [all rows, in]
  const int64_t* chosen;                    // [rows] which of input's rows count, rising
  const int64_t* target;                    // [rows] 0 <= target < classes
  const void* weight;                       // [classes, in], rows weight_row elements apart
  int64_t weight_row;
  const void* bias;          // [classes] or nullptr
  const void* class_weight;  // [classes] or nullptr for ones
  int64_t chunk;             // entropy_classes(in, classes)
  int64_t keep;              // of how many classes, the first, probabilities are kept
  // Scratch, of dtype
  void* gathered;        // [rows, in] input's rows that count
  void* packed_classes;  // linear_packed_numbers(chunk, in)
};

// Of f32 (f64 for f64): all but what CrossEntropy says.
struct CrossEntropyForward : CrossEntropy {
  void* loss;      // [all rows] zeroed by the skin, or one number
  void* top;       // [all rows] zeroed by the skin, the largest logit
  void* sum;       // [all rows] zeroed by the skin, the sum of e^(logit - top)
  void* running;   // scratch [4, rows]
  void* partials;  // scratch [3, linear_panels(chunk), rows]
  void* kept;      // [all rows, keep] of dtype, zeroed by the skin in rows that do not count: softmax of the logits
  void* tops;      // scratch [chunks of keep, linear_panels(chunk), rows], with keep
};

struct CrossEntropyBackward : CrossEntropy {
  const void* grad_loss;  // [all rows], or one number
  const void* top;        // [all rows] as the forward leaves them
  const void* sum;        // [all rows]
  const void* kept;       // [all rows, keep] of dtype
  void* grad_input;       // [all rows, in] of dtype, 0 in the other rows; each of the three nullptr if not wanted
  void* grad_weight;      // [classes, in] of dtype
  void* grad_bias;        // [classes] of dtype
  // Scratch
  void* factors;        // [rows, 5] f32 (f64 for f64)
  void* grad_logits;    // [kEntropyRows or rows, chunk] of grad_logits_dtype
  void* packed_weight;  // linear_packed_numbers(in, chunk) of dtype, with grad_input
  void* packed_input;   // entropy_packed_input of dtype, with grad_weight
  void* input_sums;     // [rows, in] f32 (f64 for f64), with grad_input
  void* weight_sums;    // [chunk, in] f32 (f64 for f64), with grad_weight where rows > kEntropyRows
  void* bias_sums;      // [chunk] f32 (f64 for f64), with grad_bias
};

// float16 could not hold the gradients of unlikely classes.
inline DType grad_logits_dtype(DType dtype) { return dtype == DType::f16 ? DType::f32 : dtype; }

// Rows chunk by chunk, each packed on its own.
inline int64_t entropy_packed_input(DType dtype, int64_t in, int64_t rows) {
  const int64_t chunks = (rows + kEntropyRows - 1) / kEntropyRows;
  return chunks * linear_packed_numbers(dtype, in, rows < kEntropyRows ? rows : kEntropyRows);
}

}  // namespace handtuned
