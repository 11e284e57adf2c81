// Linear forward with a weight of int8: W[n][k] = scale[n] q[n][k].
//
//   z[r][n] = scale[n] sum_k x[r][k] q[n][k] + b[n]                            x as it is
//   z[r][n] = scale[n] s[r] (sum_k u[r][k] q[n][k] - zero[r] sum_k q[n][k]) + b[n]   x quantised: x[r][k] ~ s (u -
//   zero)
//
// Plan: the product of linear_product.h, but for the few rows where memory is the limit.
// - x as it is, few rows: each panel is read once, in a stream, and its bytes become floats in registers, against all
//   rows of x (multiply_quads).
// - x as it is, more rows: a block of a panel is converted on its way from memory to the multipliers, once for all rows
// of a piece,
//   and multiplied as float or pairs of bf16, in which int8 is exact. The scale waits for the sums.
// - x quantised: a row of x becomes bytes with a scale and a zero point of its own, panels are read in place, and sums
//   are integers. What the zero points add is taken away with the sums of the weight's columns.
#pragma once
#include "linear.h"

namespace handtuned::HANDTUNED_ISA {

inline constexpr int64_t kQuadsAhead = 64 * 1024 / sizeof(quad);  // asked for before they are converted

// Panels of int8 as panels of E.
template <class E>
struct ConvertedPanels {
  static constexpr int64_t kBuffer = kBlockSteps * kLinearPanel;
  static constexpr int kAhead = 0;
  static constexpr int64_t kSteps = 4 / kPack<E>;  // of E in a quad
  const quad* data;
  int64_t quads;  // of a panel, the sums of its columns included

  const quad* address(int64_t panel, int64_t s) const { return data + (panel * quads + s / kSteps) * kLinearPanel; }
  // to [steps rounded up to whole quads][kLinearPanel]
  const E* block(int64_t panel, int64_t s, int64_t steps, E* to) const {
    constexpr int L = kLanes<float>;
    const quad* from = address(panel, s);
    for (int64_t i = 0; i < steps; i += kSteps, from += kLinearPanel, to += kSteps * kLinearPanel) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLinearPanel; c += L) {
        if (c * sizeof(quad) % 64 == 0) __builtin_prefetch(from + c + kQuadsAhead);
        convert(load(from + c), to + c);
      }
    }
    return to - (steps + kSteps - 1) / kSteps * kSteps * kLinearPanel;
  }

  static HT_INLINE void convert(u32 v, float* to) {
    store(to, signed_byte<0>(v));
    store(to + kLinearPanel, signed_byte<1>(v));
    store(to + 2 * kLinearPanel, signed_byte<2>(v));
    store(to + 3 * kLinearPanel, signed_byte<3>(v));
  }
  static HT_INLINE void convert(u32 v, pair* to) {
    // The lower halves of these floats are zeros.
    auto two = [](f32 first, f32 second) HT_LAMBDA { return (u32)first >> 16 | (u32)second; };
    const u32 low = two(signed_byte<0>(v), signed_byte<1>(v)), high = two(signed_byte<2>(v), signed_byte<3>(v));
    __builtin_memcpy(to, &low, sizeof low);
    __builtin_memcpy(to + kLinearPanel, &high, sizeof high);
  }
};

// Products of R rows of x with a panel, its numbers converted in registers:
//   C[r][c] += sum_k x[r][k] A[k][c]     r < R, c < kLinearPanel, k < 4 quads;   x [R][pitch], C's rows kLinearPanel
//   apart
template <int R>
__attribute__((noinline)) void multiply_quads(const quad* a, int64_t quads, const float* x, int64_t pitch, float* c) {
  constexpr int L = kLanes<float>, V = R <= 2 || (R == 4 && kVectorBytes == 64) ? 4 : 2;
  for (int64_t column = 0; column < kLinearPanel; column += V * L) {
    f32 sum[R][V] = {};
    for (int64_t s = 0; s < quads; ++s) {
      const quad* step = a + s * kLinearPanel + column;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const u32 bytes = load(step + v * L);
        if (v * L * sizeof(quad) % 64 == 0) __builtin_prefetch(step + v * L + kQuadsAhead);
        const f32 numbers[4] = {signed_byte<0>(bytes), signed_byte<1>(bytes), signed_byte<2>(bytes),
                                signed_byte<3>(bytes)};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum[r][v] += x[r * pitch + 4 * s + i] * numbers[i];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        float* to = c + r * kLinearPanel + column + v * L;
        store(to, load(to) + sum[r][v]);
      }
    }
  }
}

// sums [n] of row r, columns from c on, times the scales, to y.
template <class T>
void scale_and_finish(const LinearInt8& p, int64_t r, int64_t c, int64_t n, float* sums) {
  for (int64_t i = 0; i < n; i += kLanes<float>) store(sums + i, load(sums + i) * load_first(p.scale + c + i, n - i));
  finish_row<T>(p, r, c, n, sums);
}

// Few rows for multiply_quads: with more, converting once for all of them is faster, the sooner the faster products
// are.
template <class T>
inline constexpr int64_t kFewRows = std::is_same_v<Factor<T>, pair> ? 4 : 8;

template <class T>
void int8_few_rows(const LinearInt8& p) {
  constexpr int64_t L = kLanes<float>, kBlock = kBlockSteps / 4;
  const int64_t rows = p.rows <= 2 ? p.rows : p.rows <= 4 ? 4 : 8;  // those past p.rows are zeros
  const auto multiply = rows == 1   ? multiply_quads<1>
                        : rows == 2 ? multiply_quads<2>
                        : rows == 4 ? multiply_quads<4>
                                    : multiply_quads<8>;
  const int64_t quads = linear_quads(p.in), pitch = (p.in + L - 1) / L * L;
  Scratch<float> x(rows * pitch);
  __builtin_memset(x.data, 0, rows * pitch * sizeof(float));
  for (int64_t r = 0; r < p.rows; ++r) {
    const T* row = row_of<T>(p.input, r);
    for (int64_t k = 0; k < p.in; k += L) store(x.data + r * pitch + k, load_first(row + k, p.in - k));
  }
  parallel_pieces(linear_panels(p.out), is_small(rows, p.out, p.in), [&](int64_t panel) {
    alignas(64) float sums[8 * kLinearPanel] = {};
    const quad* a = static_cast<const quad*>(p.packed) + panel * (quads + 1) * kLinearPanel;
    for (int64_t s = 0; s < quads; s += kBlock)
      multiply(a + s * kLinearPanel, least(kBlock, quads - s), x.data + 4 * s, pitch, sums);
    const int64_t column = panel * kLinearPanel, n = least(kLinearPanel, p.out - column);
    for (int64_t r = 0; r < p.rows; ++r) scale_and_finish<T>(p, r, column, n, sums + r * kLinearPanel);
  });
}

// ---- x quantised ----------------------------------------------------------------------------------------------------

template <class T>
RowScale quantize_row(const T* x, int64_t n, quad* to) {
  constexpr int L = kLanes<float>;
  f32 least_of = {}, most_of = {};  // the range always holds 0
  i32 odd = {};
  for (int64_t k = 0; k < n; k += L) {
    const f32 v = load_first(x + k, n - k);
    least_of = v < least_of ? v : least_of;
    most_of = v > most_of ? v : most_of;
    odd |= ((i32)v & 0x7f800000) == 0x7f800000;  // not finite
  }
  float low = 0, high = 0;
  for (int i = 0; i < L; ++i) {
    low = least_of[i] < low ? least_of[i] : low;
    high = most_of[i] > high ? most_of[i] : high;
  }
  const float scale = high / 255 - low / 255, inverse = scale >= 0x1p-126f ? 1 / scale : 0;
  const i32 zero = round_to_integer(broadcast(-low) * inverse);
  for (int64_t k = 0; k < n; k += L) {
    // u = clamp(round(x / s) + zero, 0, 255)
    i32 u = round_to_integer(load_first(x + k, n - k) * inverse) + zero;
    u = u < 0 ? i32{} : u > 255 ? i32{} + 255 : u;
    store_bytes(to + k / 4, u);
  }
  return {any(odd) ? __builtin_nanf("") : scale, zero[0]};
}

template <class T>
void quantize_rows(const LinearInt8& p) {
  const int64_t pitch = linear_quantized_row(p.in);
  parallel_for(p.rows, most(1, (1 << 15) / most(1, p.in)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      static_cast<RowScale*>(p.row_scales)[r] =
          quantize_row(row_of<T>(p.input, r), p.in, static_cast<quad*>(p.quantized) + r * pitch);
  });
}

struct QuantizedRows {
  const quad* data;
  int64_t pitch;

  Broadcast<quad> block(int64_t r, int64_t, int64_t s, int64_t, quad*) const {
    return {data + r * pitch + s, pitch, 1};
  }
};

// sums [n] of row r, columns from c on, which begin a panel, to values.
inline void dequantize_row(const LinearInt8& p, int64_t r, int64_t c, int64_t n, const int32_t* sums, float* values) {
  constexpr int L = kLanes<float>;
  const int64_t quads = linear_quads(p.in) + 1;
  const RowScale row = static_cast<const RowScale*>(p.row_scales)[r];
  for (int64_t i = 0; i < n; i += L) {
    const int64_t panel = (c + i) / kLinearPanel, column = (c + i) % kLinearPanel;
    const quad* last = static_cast<const quad*>(p.packed) + ((panel + 1) * quads - 1) * kLinearPanel;
    // s scale (sum - zero column_sum), which wraps where a packed weight from elsewhere has other sums than its own
    const u32 exact = (u32)load(sums + i) - uint32_t(row.zero) * load(last + column);
    store(values + i, __builtin_convertvector((i32)exact, f32) * (row.scale * load_first(p.scale + c + i, n - i)));
  }
}

// ---- the op ---------------------------------------------------------------------------------------------------------

template <class T>
void linear_int8_in(const LinearInt8& p) {
  const quad* packed = static_cast<const quad*>(p.packed);
  const int64_t quads = linear_quads(p.in);
  if (p.quantized) {
    quantize_rows<T>(p);
    const QuantizedRows rows{static_cast<const quad*>(p.quantized), linear_quantized_row(p.in)};
    product<quad>(p.rows, p.out, quads, PackedPanels<quad>{packed, quads + 1}, rows, rows_to<T>(p.output, p.out),
                  [&](int64_t r, int64_t c, int64_t n, int32_t* sums) {
                    alignas(64) float values[kMostColumns];
                    dequantize_row(p, r, c, n, sums, values);
                    finish_row<T>(p, r, c, n, values);
                  });
    return;
  }
  if (p.rows <= kFewRows<T>) return int8_few_rows<T>(p);
  using E = Factor<T>;
  product<E>(p.rows, p.out, steps_of<T>(p.in), ConvertedPanels<E>{packed, quads + 1}, LeftRows<T>{p.input, p.in},
             rows_to<T>(p.output, p.out),
             [&](int64_t r, int64_t c, int64_t n, float* sums) { scale_and_finish<T>(p, r, c, n, sums); });
}

// packed[panel][step][c][i] = q[64 panel + c][4 step + i]
inline void linear_int8_pack_in(const LinearInt8Pack& p) {
  const int64_t quads = linear_quads(p.in);
  parallel_pieces(linear_panels(p.out), p.out * p.in < 1 << 16, [&](int64_t panel) {
    quad* to = static_cast<quad*>(p.packed) + panel * (quads + 1) * kLinearPanel;
    for (int64_t c = 0; c < kLinearPanel; ++c) {
      const int64_t column = panel * kLinearPanel + c;
      const int8_t* row = static_cast<const int8_t*>(p.weight) + column * p.weight_row;
      int32_t sum = 0;
      for (int64_t s = 0; s < quads; ++s) {
        const int64_t n = column < p.out ? least(4, p.in - 4 * s) : 0;
        quad q = {};
        for (int64_t i = 0; i < n; ++i) q.bytes[i] = uint8_t(row[4 * s + i]), sum += row[4 * s + i];
        to[s * kLinearPanel + c] = q;
      }
      __builtin_memcpy(to + quads * kLinearPanel + c, &sum, sizeof sum);
    }
  });
}

}  // namespace handtuned::HANDTUNED_ISA
