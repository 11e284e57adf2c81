// Linear family: the contract between the skin (linear.cpp) and the kernels (cpu/linear*.h).
//
// Outputs are freshly allocated by the skin, contiguous, and owned by it, as is all scratch; kernels own nothing.
#pragma once
#include "params.h"

namespace handtuned {

enum class Activation : int8_t { none, relu, gelu, gelu_tanh, silu };  // numbered as in the schema
inline constexpr int64_t kActivations = 5;

// A packed matrix is cut into panels of kLinearPanel columns; a panel holds, step by step along the summed dimension,
// one element of each of its columns (of bf16 two, neighbours along that dimension), zeros past the matrix's ends:
//   packed[panel][step][column][number in step]
// The order is the same for every instruction set, so a packed weight is one tensor for all of them.
inline constexpr int64_t kLinearPanel = 64;
inline int64_t linear_panels(int64_t columns) { return (columns + kLinearPanel - 1) / kLinearPanel; }
inline int64_t linear_step(DType dtype) { return dtype == DType::bf16 ? 2 : 1; }
inline int64_t linear_steps(DType dtype, int64_t depth) {
  return (depth + linear_step(dtype) - 1) / linear_step(dtype);
}
inline int64_t linear_packed_numbers(DType dtype, int64_t columns, int64_t depth) {
  return linear_panels(columns) * kLinearPanel * linear_steps(dtype, depth) * linear_step(dtype);
}

// An int8 weight is packed for its own purpose: four neighbours along the summed dimension of each column, and as a
// last step the sum of each column, an int32 in the place of its four numbers:
//   packed[panel][step][column][4],  steps = linear_quads(depth) + 1
inline int64_t linear_quads(int64_t depth) { return (depth + 3) / 4; }
inline constexpr int64_t kLinearMostQuantized = 65536;  // numbers of 8 bits whose products' sum stays below 2^31

// Up to so many rows of input the weight is read in place, once, and none that is packed is needed.
inline constexpr int64_t kLinearFewRows = 4;

struct LinearPack {
  int64_t out, in;
  DType dtype;
  const void* weight;  // [out, in], rows weight_row elements apart
  int64_t weight_row;
  void* packed;  // [linear_panels(out), linear_steps(in), kLinearPanel, linear_step]
};

// z = x W^T + b,  y = dropout(activation(z)) + r;  every tensor of one dtype
struct Linear {
  int64_t rows, in, out;
  DType dtype;
  Activation activation;
  Dropout dropout;
  StridedRows input;   // [rows, in]
  const void* weight;  // [out, in], rows weight_row elements apart
  int64_t weight_row;
};

struct LinearForward : Linear {
  const void* packed;    // as LinearPack leaves it; nullptr where rows <= kLinearFewRows
  const void* bias;      // [out] or nullptr
  StridedRows residual;  // [rows, out] or absent
  void* output;          // [rows, out]
  void* preactivation;   // [rows, out] z, or nullptr
};

struct LinearInt8Pack {
  int64_t out, in;
  const void* weight;  // [out, in] int8, rows weight_row apart
  int64_t weight_row;
  void* packed;  // [linear_panels(out), linear_quads(in) + 1, kLinearPanel, 4]
};

// z = x (scale q)^T + b with q of int8; y as above. No weight, and packed is LinearInt8Pack's.
struct LinearInt8 : LinearForward {
  const float* scale;  // [out]
  // Where x is quantised too, row by row: scratch, else nullptr.
  void* quantized;   // [rows, quantized_row] of four bytes
  void* row_scales;  // [rows] RowScale
};
struct RowScale {
  float scale;
  int32_t zero;  // what 0 is quantised to
};
inline int64_t linear_quantized_row(int64_t in) { return (linear_quads(in) + 15) / 16 * 16; }

// dz = dropout(dy) activation'(z),  dx = dz W,  dW = dz^T x,  db = sum of dz's rows
struct LinearBackward : Linear {
  StridedRows grad_output;    // [rows, out]
  StridedRows preactivation;  // [rows, out], absent without an activation
  void* grad_input;           // [rows, in], each of the three nullptr if not wanted
  void* grad_weight;          // [out, in]
  void* grad_bias;            // [out]
  // Scratch, of dtype: nullptr where what it is for is not wanted.
  void* grad_preactivation;  // [rows, out] dz; nullptr too where it is grad_output itself
  void* packed_weight;       // linear_packed_numbers(in, out)
  void* packed_input;        // linear_packed_numbers(in, rows)
  void* bias_sums;           // [linear_bias_chunks(rows), out rounded up to kLinearPanel] f32 (f64 for f64)
};

// db is summed in chunks of rows whose borders depend on the shape alone.
inline int64_t linear_bias_chunk_rows(int64_t rows) { return rows > 256 * 32 ? (rows + 255) / 256 : 32; }
inline int64_t linear_bias_chunks(int64_t rows) {
  return (rows + linear_bias_chunk_rows(rows) - 1) / linear_bias_chunk_rows(rows);
}

}  // namespace handtuned
