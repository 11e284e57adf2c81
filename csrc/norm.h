// Norm family: the contract between the skin (norm.cpp) and the kernels (cpu/norm.h, cuda/norm.cu).
//
// A tensor is seen as [rows, cols]: cols are the elements that share one set of statistics. Pointers never alias:
// every output is freshly allocated by the skin, contiguous, and owned by it; kernels own nothing.
#pragma once
#include "params.h"

namespace handtuned {

// y = (h - mean) * rstd * weight + bias,  h = x  or  round(dropout(x) + residual)
struct NormForward {
  int64_t rows, cols;
  DType dtype;         // of input, residual, output, new_residual
  DType weight_dtype;  // of weight and bias: dtype, or f32 beside a 16-bit dtype
  bool centre;         // LayerNorm subtracts the mean, RMSNorm does not
  double eps;
  Dropout dropout;
  StridedRows input;     // [rows, cols]
  StridedRows residual;  // [rows, cols] or absent
  const void* weight;    // [cols] or nullptr (ones)
  const void* bias;      // [cols] or nullptr (zeros)
  void* output;          // [rows, cols] contiguous
  void* new_residual;    // [rows, cols] contiguous, nullptr without residual
  void* mean;            // [rows] f32 (f64 for f64), nullptr without centre
  void* rstd;            // [rows] likewise
};

// dxhat = dy * weight, dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) + grad_new_residual
struct NormBackward {
  int64_t rows, cols;
  DType dtype, weight_dtype;
  bool centre;
  Dropout dropout;
  StridedRows grad_output;        // [rows, cols]
  StridedRows input;              // [rows, cols] what was normalised: x, or new_residual of the add forms
  StridedRows grad_new_residual;  // [rows, cols] or absent
  const void* weight;             // [cols] or nullptr
  const void *mean, *rstd;        // [rows] as saved by the forward
  void* grad_normalised;          // [rows, cols] contiguous: dx above
  void* grad_dropped;             // [rows, cols] dx through the dropout; nullptr without dropout
  void* grad_weight;              // [cols] weight_dtype, nullptr if not wanted
  void* grad_bias;                // [cols] weight_dtype, nullptr if not wanted
  void* partials;                 // [norm_backward_chunks, 2, norm_pitch] f32 (f64 for f64), scratch; on CUDA
                                  // [cuda::chunks, 2, cols]
};

// The backward sums dweight and dbias over rows in chunks whose borders depend on the shape alone, so the bits of
// the result do not depend on the number of threads. At most 64 chunks, each of at least ~16k elements.
constexpr int64_t kNormRowBlock = 4;

// Scratch beside a row has room for its last vector, at the widest.
inline int64_t norm_pitch(int64_t cols) { return (cols + 15) / 16 * 16; }

inline int64_t norm_backward_chunk_rows(int64_t rows, int64_t cols) {
  int64_t for_64_chunks = (rows + 63) / 64;
  int64_t for_16k_elements = (16384 + cols - 1) / cols;
  int64_t n = for_64_chunks > for_16k_elements ? for_64_chunks : for_16k_elements;
  return (n + kNormRowBlock - 1) / kNormRowBlock * kNormRowBlock;
}

inline int64_t norm_backward_chunks(int64_t rows, int64_t cols) {
  int64_t n = norm_backward_chunk_rows(rows, cols);
  return (rows + n - 1) / n;
}

}  // namespace handtuned
