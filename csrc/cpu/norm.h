// LayerNorm and RMSNorm, forward and backward, with optional dropout and residual add.
//
// Forward, one row h[0..cols):
//   h      = x                          or  round(x * keep / (1-p) + residual)      (saved as new_residual)
//   mean   = sum(h) / cols              (0 for RMSNorm)
//   rstd   = 1 / sqrt(sum((h - mean)^2) / cols + eps)
//   y      = (h - mean) * rstd * weight + bias
// Plan: a row is read from memory once and stays in L1 (as float in `buffer` where it was converted or summed).
//   pass 1  gather h, store new_residual, sum(h)
//   pass 2  d = h - mean: sum(d^2), and sum(d), which repairs the rounding of the mean (corrected two-pass, Chan et
//           al. 1983). RMSNorm sums h^2 in pass 1 and needs no pass 2.
//   pass 3  y
//
// Backward, xhat = (h - mean) * rstd, g = dy * weight:
//   dx      = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_new_residual      (no mean(g) for RMSNorm)
//   dweight = sum_rows dy * xhat,   dbias = sum_rows dy
// Plan: four rows at a time, so that each dweight/dbias partial is read and written once for four rows.
//   pass 1  sum(g), sum(g * xhat) of each row; dweight and dbias partials of the chunk
//   pass 2  dx; the rows are still in L1
// Rows are cut into chunks by shape alone (norm_backward_chunk_rows); the partials of the chunks are added in order.
#pragma once
#include "../norm.h"

#include <stdlib.h>  // the C header: <cstdlib> brings inline functions into an ISA file

#include <type_traits>

#include "parallel.h"
#include "philox.h"
#include "simd.h"

namespace handtuned::HANDTUNED_ISA {

// Outputs of this many bytes and more are written past the caches (below it a consumer still finds them there).
inline constexpr int64_t kStreamBytes = 8 << 20;
inline constexpr int64_t kElementsPerTask = 16384;

// Scratch that lives for one task: on the stack for ordinary rows, 64-byte aligned.
template <class A>
struct Scratch {
  static constexpr int64_t kInline = 16384 / sizeof(A);
  alignas(64) A small[kInline];
  A* data;
  explicit Scratch(int64_t n) {
    data = n <= kInline ? small : static_cast<A*>(aligned_alloc(64, (n * sizeof(A) + 63) / 64 * 64));
    if (!data) abort();
  }
  ~Scratch() {
    if (data != small) free(data);
  }
  Scratch(const Scratch&) = delete;
};

template <class T>
HT_INLINE T* row_of(const StridedRows& rows, int64_t i) {
  T* p = static_cast<T*>(rows.data);
  if (rows.ndim == 1) return p + i * rows.stride[0];
  for (int d = rows.ndim - 1; d >= 0; --d) {
    p += i % rows.size[d] * rows.stride[d];
    i /= rows.size[d];
  }
  return p;
}

// A [cols] parameter as A*: in place when it has that type, else converted into `scratch`; `fill` when absent.
template <class A>
const A* parameter(const void* p, DType dtype, int64_t cols, A fill, A* scratch) {
  auto convert = [&](auto* from) {
    sweep<A>(cols, [&](int64_t c, auto part, int) HT_LAMBDA { part.store(scratch + c, part.load(from + c)); });
    return scratch;
  };
  if (!p) {
    sweep<A>(cols, [&](int64_t c, auto part, int) HT_LAMBDA { part.store(scratch + c, broadcast(fill)); });
    return scratch;
  }
  if constexpr (sizeof(A) == sizeof(float)) {
    if (dtype == DType::bf16) return convert(static_cast<const bf16*>(p));
    if (dtype == DType::f16) return convert(static_cast<const f16*>(p));
  }
  return static_cast<const A*>(p);
}

template <class T>
bool streams(const NormForward& p) {
  bool aligned = p.cols * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(p.output) % 64 == 0 &&
                 reinterpret_cast<uintptr_t>(p.new_residual) % 64 == 0;
  return aligned && p.rows * p.cols * int64_t(sizeof(T)) >= kStreamBytes;
}

template <class T>
bool streams(const NormBackward& p) {
  bool aligned = p.cols * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(p.grad_normalised) % 64 == 0 &&
                 reinterpret_cast<uintptr_t>(p.grad_dropped) % 64 == 0;
  return aligned && p.rows * p.cols * int64_t(sizeof(T)) >= kStreamBytes;
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class A>
struct GatheredRow {
  const A* h;
  A sum;  // of h with Centre, else of h^2
};

// Pass 1.
template <class T, bool Centre>
HT_INLINE GatheredRow<Accumulate<T>> gather_row(const NormForward& p, int64_t i, Accumulate<T>* factor,
                                                Accumulate<T>* buffer, bool streaming) {
  using A = Accumulate<T>;
  vec<A> sum[4] = {};
  auto add = [&](vec<A> h, int j) HT_LAMBDA { sum[j] += Centre ? h : h * h; };

  const T* x = row_of<const T>(p.input, i);
  if (p.residual.data) {
    const T* residual = row_of<const T>(p.residual, i);
    T* out = static_cast<T*>(p.new_residual) + i * p.cols;
    const bool drop = p.dropout.p > 0;
    if (drop) dropout_row(factor, p.cols, i, p.dropout);
    sweep<A>(p.cols, [&](int64_t c, auto part, int j) HT_LAMBDA {
      // h = round(x * factor + residual)
      vec<A> h = part.load(x + c);
      if (drop) h *= part.load(factor + c);
      h = rounded_to(h + part.load(residual + c), x);
      part.store(out + c, h, streaming);
      part.store(buffer + c, h);
      add(h, j);
    });
    return {buffer, sum_four(sum)};
  }
  if constexpr (sizeof(T) == sizeof(A)) {
    sweep<A>(p.cols, [&](int64_t c, auto part, int j) HT_LAMBDA { add(part.load(x + c), j); });
    return {x, sum_four(sum)};
  } else {
    sweep<A>(p.cols, [&](int64_t c, auto part, int j) HT_LAMBDA {
      vec<A> h = part.load(x + c);
      part.store(buffer + c, h);
      add(h, j);
    });
    return {buffer, sum_four(sum)};
  }
}

template <class A>
struct Moments {
  A mean, variance;
};

// Pass 2.
template <class A>
HT_INLINE Moments<A> corrected_moments(const A* h, int64_t cols, A sum) {
  const A mean = sum / A(cols);
  vec<A> d1[4] = {}, d2[4] = {};
  sweep<A>(cols, [&](int64_t c, auto part, int j) HT_LAMBDA {
    // d = h - mean;  d1 += d;  d2 += d * d
    vec<A> d = part.only(part.load(h + c) - mean);
    d1[j] += d;
    d2[j] += d * d;
  });
  const A correction = sum_four(d1) / A(cols);
  return {mean + correction, sum_four(d2) / A(cols) - correction * correction};
}

template <class T, bool Centre>
void forward_rows(const NormForward& p, const Accumulate<T>* weight, const Accumulate<T>* bias, int64_t begin,
                  int64_t end) {
  using A = Accumulate<T>;
  Scratch<A> buffer(p.cols), factor(p.dropout.p > 0 ? (p.cols + 63) / 64 * 64 : 0);
  const bool streaming = streams<T>(p);

  for (int64_t i = begin; i < end; ++i) {
    auto [h, sum] = gather_row<T, Centre>(p, i, factor.data, buffer.data, streaming);
    A mean = 0, variance = sum / A(p.cols);
    if constexpr (Centre) {
      Moments<A> m = corrected_moments(h, p.cols, sum);
      mean = m.mean;
      variance = m.variance;
    }
    const A rstd = A(1) / square_root(variance + A(p.eps));
    if constexpr (Centre) static_cast<A*>(p.mean)[i] = mean;
    static_cast<A*>(p.rstd)[i] = rstd;

    // Pass 3.  y = (h - mean) * rstd * weight + bias
    T* y = static_cast<T*>(p.output) + i * p.cols;
    sweep<A>(p.cols, [&](int64_t c, auto part, int) HT_LAMBDA {
      vec<A> v = (part.load(h + c) - mean) * rstd * part.load(weight + c);
      if constexpr (Centre) v += part.load(bias + c);
      part.store(y + c, v, streaming);
    });
  }
  if (streaming) stream_fence();
}

template <class T, bool Centre>
void forward(const NormForward& p) {
  using A = Accumulate<T>;
  Scratch<A> weight_scratch(p.cols), bias_scratch(Centre ? p.cols : 0);
  const A* weight = parameter(p.weight, p.weight_dtype, p.cols, A(1), weight_scratch.data);
  const A* bias = Centre ? parameter(p.bias, p.weight_dtype, p.cols, A(0), bias_scratch.data) : nullptr;
  const int64_t grain = kElementsPerTask / p.cols + 1;
  parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) { forward_rows<T, Centre>(p, weight, bias, begin, end); });
}

// ---- backward ---------------------------------------------------------------------------------------------------

// R rows that are worked on together.
template <class T, int R>
struct RowBlock {
  using A = Accumulate<T>;
  const T *grad[R], *h[R];
  A mean[R], rstd[R];
  A mean_g[R], mean_gx[R];  // mean(g), mean(g * xhat)
};

// Pass 1.
template <class T, bool Centre, int R>
HT_INLINE void reduce_block(RowBlock<T, R>& b, const Accumulate<T>* weight, int64_t cols, Accumulate<T>* dweight,
                            Accumulate<T>* dbias) {
  using A = Accumulate<T>;
  vec<A> sum_g[R] = {}, sum_gx[R] = {};
  sweep<A>(cols, [&](int64_t c, auto part, int) HT_LAMBDA {
    vec<A> w = part.load(weight + c), dw = part.load(dweight + c), db = {};
    if constexpr (Centre) db = part.load(dbias + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      // xhat = (h - mean) * rstd;  dweight += dy * xhat;  dbias += dy;  g = dy * weight
      vec<A> dy = part.load(b.grad[r] + c);
      vec<A> xhat = part.only(part.load(b.h[r] + c) - b.mean[r]) * b.rstd[r];
      vec<A> g = dy * w;
      dw += dy * xhat;
      sum_gx[r] += g * xhat;
      if constexpr (Centre) {
        db += dy;
        sum_g[r] += g;
      }
    }
    part.store(dweight + c, dw);
    if constexpr (Centre) part.store(dbias + c, db);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    b.mean_g[r] = sum_lanes(sum_g[r]) / A(cols);
    b.mean_gx[r] = sum_lanes(sum_gx[r]) / A(cols);
  }
}

// Pass 2, row i = row r of the block.
template <class T, bool Centre, int R>
HT_INLINE void write_grad(const NormBackward& p, const RowBlock<T, R>& b, int r, int64_t i,
                          const Accumulate<T>* weight, Accumulate<T>* factor, bool streaming) {
  using A = Accumulate<T>;
  T* out = static_cast<T*>(p.grad_normalised) + i * p.cols;
  T* dropped = p.grad_dropped ? static_cast<T*>(p.grad_dropped) + i * p.cols : nullptr;
  const T* extra = p.grad_new_residual.data ? row_of<const T>(p.grad_new_residual, i) : nullptr;
  if (dropped) dropout_row(factor, p.cols, i, p.dropout);
  const A mean = b.mean[r], rstd = b.rstd[r], mean_g = b.mean_g[r], mean_gx = b.mean_gx[r];
  const T *grad = b.grad[r], *h = b.h[r];
  sweep<A>(p.cols, [&](int64_t c, auto part, int) HT_LAMBDA {
    // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + extra
    vec<A> xhat = (part.load(h + c) - mean) * rstd;
    vec<A> g = part.load(grad + c) * part.load(weight + c);
    if constexpr (Centre) g -= mean_g;
    vec<A> dx = rstd * (g - xhat * mean_gx);
    if (extra) dx += part.load(extra + c);
    part.store(out + c, dx, streaming);
    if (dropped) part.store(dropped + c, dx * part.load(factor + c), streaming);
  });
}

template <class T, bool Centre, int R>
void backward_block(const NormBackward& p, const Accumulate<T>* weight, int64_t i, Accumulate<T>* dweight,
                    Accumulate<T>* dbias, Accumulate<T>* factor, bool streaming) {
  using A = Accumulate<T>;
  RowBlock<T, R> b;
  for (int r = 0; r < R; ++r) {
    b.grad[r] = row_of<const T>(p.grad_output, i + r);
    b.h[r] = row_of<const T>(p.input, i + r);
    b.mean[r] = Centre ? static_cast<const A*>(p.mean)[i + r] : A(0);
    b.rstd[r] = static_cast<const A*>(p.rstd)[i + r];
  }
  reduce_block<T, Centre, R>(b, weight, p.cols, dweight, dbias);
  if (!p.grad_normalised) return;
  for (int r = 0; r < R; ++r) write_grad<T, Centre, R>(p, b, r, i + r, weight, factor, streaming);
}

// out[c] = sum over chunks of partials[chunk][which][c], in order
template <class A>
void add_partials(const NormBackward& p, int64_t chunks, int which, void* out) {
  if (!out) return;
  const A* partials = static_cast<const A*>(p.partials) + which * p.cols;
  const int64_t stride = 2 * p.cols, block = 256;
  parallel_for((p.cols + block - 1) / block, kElementsPerTask / block / chunks + 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * block, last = end * block < p.cols ? end * block : p.cols;
    sweep<A>(last - first, [&](int64_t c, auto part, int) HT_LAMBDA {
      vec<A> sum = part.load(partials + first + c);
      for (int64_t k = 1; k < chunks; ++k) sum += part.load(partials + k * stride + first + c);
      if (p.weight_dtype == DType::bf16) {
        if constexpr (sizeof(A) == sizeof(float)) part.store(static_cast<bf16*>(out) + first + c, sum);
      } else if (p.weight_dtype == DType::f16) {
        if constexpr (sizeof(A) == sizeof(float)) part.store(static_cast<f16*>(out) + first + c, sum);
      } else {
        part.store(static_cast<A*>(out) + first + c, sum);
      }
    });
  });
}

template <class T, bool Centre>
void backward(const NormBackward& p) {
  using A = Accumulate<T>;
  Scratch<A> weight_scratch(p.cols);
  const A* weight = parameter(p.weight, p.weight_dtype, p.cols, A(1), weight_scratch.data);
  const int64_t chunk_rows = norm_backward_chunk_rows(p.rows, p.cols), chunks = norm_backward_chunks(p.rows, p.cols);
  const bool streaming = streams<T>(p);

  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> factor(p.grad_dropped ? (p.cols + 63) / 64 * 64 : 0);
    for (int64_t k = begin; k < end; ++k) {
      A* dweight = static_cast<A*>(p.partials) + k * 2 * p.cols;
      A* dbias = dweight + p.cols;
      __builtin_memset(dweight, 0, 2 * p.cols * sizeof(A));
      const int64_t last = (k + 1) * chunk_rows < p.rows ? (k + 1) * chunk_rows : p.rows;
      int64_t i = k * chunk_rows;
      for (; i + kNormRowBlock <= last; i += kNormRowBlock)
        backward_block<T, Centre, kNormRowBlock>(p, weight, i, dweight, dbias, factor.data, streaming);
      for (; i < last; ++i) backward_block<T, Centre, 1>(p, weight, i, dweight, dbias, factor.data, streaming);
    }
    if (streaming) stream_fence();
  });
  add_partials<A>(p, chunks, 0, p.grad_weight);
  if (Centre) add_partials<A>(p, chunks, 1, p.grad_bias);
}

// ---- entries of the function table ------------------------------------------------------------------------------

template <template <class, bool> class Op, class Params>
void by_type(const Params& p) {
  auto run = [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    p.centre ? Op<T, true>::run(p) : Op<T, false>::run(p);
  };
  switch (p.dtype) {
    case DType::f32: return run(static_cast<float*>(nullptr));
    case DType::f64: return run(static_cast<double*>(nullptr));
    case DType::bf16: return run(static_cast<bf16*>(nullptr));
    case DType::f16: return run(static_cast<f16*>(nullptr));
  }
}

template <class T, bool Centre>
struct Forward {
  static void run(const NormForward& p) { forward<T, Centre>(p); }
};
template <class T, bool Centre>
struct Backward {
  static void run(const NormBackward& p) { backward<T, Centre>(p); }
};

inline void norm_forward(const NormForward& p) { by_type<Forward>(p); }
inline void norm_backward(const NormBackward& p) { by_type<Backward>(p); }

}  // namespace handtuned::HANDTUNED_ISA
