// LayerNorm and RMSNorm, forward and backward, with optional dropout and residual add.
//
// Forward, one row h[0..cols):
//   h      = x                          or  round(x * keep / (1-p) + residual)      (saved as new_residual)
//   mean   = sum(h) / cols              (0 for RMSNorm)
//   rstd   = 1 / sqrt(sum((h - mean)^2) / cols + eps)
//   y      = (h - mean) * rstd * weight + bias
// Plan: a row is read from memory once and stays in L1 (where new_residual goes past the caches, as a copy in
// `buffer`).
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

#include <type_traits>

#include "parallel.h"
#include "philox.h"
#include "row.h"
#include "scratch.h"

namespace handtuned::HANDTUNED_ISA {

// Outputs of this many bytes and more are written past the caches (below it a consumer still finds them there).
inline constexpr int64_t kStreamBytes = 8 << 20;
// Inputs of this many bytes and more are asked for ahead; smaller ones are likely in a cache already.
inline constexpr int64_t kAheadBytes = 1 << 20;
inline constexpr int64_t kElementsPerTask = 16384;
inline constexpr int64_t kRowBlock = kNormRowBlock;
// Rows, and chunks, whose dweight and dbias are summed before the sum goes into a larger one.
inline constexpr int64_t kFoldRows = 32, kFoldChunks = 8;
// Rows of at most this many bytes (as float or double) go forward in blocks: a block's buffer still fits L1.
inline constexpr int64_t kShortRow = 4 << 10;

// cols rounded up to what dropout_row() writes.
inline int64_t dropout_pitch(int64_t cols) { return (cols + kDropoutBlock - 1) / kDropoutBlock * kDropoutBlock; }

// A [cols] parameter as A*: in place when it has that type already, else converted into `scratch` [norm_pitch], in row
// order; `fill` if absent.
// Beside bf16 rows a float32 parameter is copied all the same, for the sake of its NaNs (see round_bf16).
template <class T>
const Accumulate<T>* parameter(const void* p, DType dtype, int64_t cols, Accumulate<T> fill, Accumulate<T>* scratch) {
  using A = Accumulate<T>;
  auto convert = [&](auto value_at) HT_LAMBDA {
    sweep<T>(cols, [&](int64_t c, auto part, int) HT_LAMBDA { part.store(scratch + c, value_at(c, part)); });
    return scratch;
  };
  if (!p) return convert([&](int64_t, auto) HT_LAMBDA { return Row<T>{} + fill; });
  if constexpr (sizeof(T) == 2) {
    auto of = [&](auto* from) { return convert([&](int64_t c, auto part) HT_LAMBDA { return part.load(from + c); }); };
    if (dtype == DType::bf16) return of(static_cast<const bf16*>(p));
    if (dtype == DType::f16) return of(static_cast<const f16*>(p));
    const float* from = static_cast<const float*>(p);
    return convert([&](int64_t c, auto part) HT_LAMBDA { return clean_nan(part.load_in_order(from + c)); });
  }
  return static_cast<const A*>(p);
}

// Whether outputs a and b (b may be nullptr) are large enough, and aligned, for stores past the caches.
template <class T>
bool streams(int64_t elements, int64_t cols, const void* a, const void* b) {
  const bool aligned = cols * sizeof(T) % 64 == 0 && (uintptr_t(a) | uintptr_t(b)) % 64 == 0;
  return aligned && elements * int64_t(sizeof(T)) >= kStreamBytes;
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T>
struct ForwardRow {
  using A = Accumulate<T>;
  const T* h;
  A sum;  // of h (RMSNorm: of h * h)
  A mean, rstd;
};

// Pass 1.
template <class T, bool Centre, bool Stream>
HT_INLINE ForwardRow<T> gather_row(const NormForward& p, int64_t i, T* buffer, Accumulate<T>* factor) {
  const T* x = row_of<const T>(p.input, i);
  Sum<T> sum;
  auto gather = [&](auto h_at) HT_LAMBDA {
    sweep_segments<T>(
        p.cols,
        [&](int64_t c, auto part, int j) HT_LAMBDA {
          Row<T> h = h_at(c, part);
          sum.add(j, Centre ? h : h * h);
        },
        [&]() HT_LAMBDA { sum.fold(); });
  };
  if (!p.residual.data) {
    gather([=](int64_t c, auto part) HT_LAMBDA { return part.load(x + c); });
    return {x, sum.total(), 0, 0};
  }
  const T* residual = row_of<const T>(p.residual, i);
  T* out = static_cast<T*>(p.new_residual) + i * p.cols;
  auto keep = [=](int64_t c, auto part, Row<T> h) HT_LAMBDA {
    part.template store<Stream>(out + c, h);
    if constexpr (Stream) part.store(buffer + c, h);
    return rounded_to(h, x);
  };
  if (p.dropout.p > 0) {
    dropout_row<kPaired<T>>(factor, p.cols, i, p.dropout);
    gather([=](int64_t c, auto part)
               HT_LAMBDA { return keep(c, part, part.load(x + c) * part.load(factor + c) + part.load(residual + c)); });
  } else {
    gather([=](int64_t c, auto part) HT_LAMBDA { return keep(c, part, part.load(x + c) + part.load(residual + c)); });
  }
  return {Stream ? buffer : out, sum.total(), 0, 0};
}

// Pass 2.
template <class T, bool Centre>
HT_INLINE void find_statistics(ForwardRow<T>& row, int64_t cols, Accumulate<T> eps) {
  using A = Accumulate<T>;
  A variance = row.sum / A(cols);
  row.mean = 0;
  if constexpr (Centre) {
    const A mean = row.sum / A(cols);
    const T* h = row.h;
    Sum<T> sum, square;
    sweep_segments<T>(
        cols,
        [&](int64_t c, auto part, int j) HT_LAMBDA {
          // d = h - mean;  sum += d;  square += d * d
          Row<T> d = part.only(part.load(h + c) - mean);
          sum.add(j, d);
          square.add(j, d * d);
        },
        [&]() HT_LAMBDA {
          sum.fold();
          square.fold();
        });
    const A correction = sum.total() / A(cols), excess = correction * correction;
    row.mean = mean + correction;
    variance = square.total() / A(cols);
    if (excess < variance) variance -= excess;  // not so where both overflowed
  }
  row.rstd = A(1) / square_root(variance + eps);
}

// Pass 3.
template <class T, bool Centre, bool Stream>
HT_INLINE void write_output(T* y, const ForwardRow<T>& row, int64_t cols, const Accumulate<T>* weight,
                            const Accumulate<T>* bias, const T* next) {
  using A = Accumulate<T>;
  const T* h = row.h;
  const A mean = row.mean, rstd = row.rstd;
  sweep<T>(
      cols,
      [&](int64_t c, auto part, int) HT_LAMBDA {
        // y = (h - mean) * rstd * weight + bias
        Row<T> v = (part.load(h + c) - mean) * rstd * part.load(weight + c);
        if constexpr (Centre) v += part.load(bias + c);
        part.template store<Stream>(y + c, v);
      },
      [&](int64_t c) HT_LAMBDA {
        if (next) prefetch(next + c);
      });
}

// Rows [begin, end), kRowBlock at a time and pass by pass, so that the latency of one row's sums hides behind the
// work on the next.
template <class T, bool Centre, bool Stream>
void forward_rows(const NormForward& p, const Accumulate<T>* weight, const Accumulate<T>* bias, int64_t begin,
                  int64_t end) {
  using A = Accumulate<T>;
  const int64_t pitch = dropout_pitch(p.cols), block = p.cols * int64_t(sizeof(A)) <= kShortRow ? kRowBlock : 1;
  Scratch<T> buffer(Stream && p.residual.data ? block * pitch : 0);
  Scratch<A> factor(p.dropout.p > 0 ? pitch : 0);
  // With a residual, four streams keep the memory busy as it is.
  const bool ahead = !p.residual.data && p.rows * p.cols * int64_t(sizeof(T)) >= kAheadBytes;
  ForwardRow<T> row[kRowBlock];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = end - i < block ? end - i : block;
    for (int64_t r = 0; r < n; ++r)
      row[r] = gather_row<T, Centre, Stream>(p, i + r, buffer.data + r * pitch, factor.data);
    for (int64_t r = 0; r < n; ++r) {
      find_statistics<T, Centre>(row[r], p.cols, A(p.eps));
      if (p.mean) static_cast<A*>(p.mean)[i + r] = row[r].mean;
      if (p.rstd) static_cast<A*>(p.rstd)[i + r] = row[r].rstd;
    }
    for (int64_t r = 0; r < n; ++r) {
      const T* next = ahead && i + r + block < end ? row_of<const T>(p.input, i + r + block) : nullptr;
      write_output<T, Centre, Stream>(static_cast<T*>(p.output) + (i + r) * p.cols, row[r], p.cols, weight, bias, next);
    }
  }
  if constexpr (Stream) stream_fence();
}

template <class T, bool Centre>
void forward(const NormForward& p) {
  using A = Accumulate<T>;
  Scratch<A> weight_scratch(norm_pitch(p.cols)), bias_scratch(Centre ? norm_pitch(p.cols) : 0);
  const A* weight = parameter<T>(p.weight, p.weight_dtype, p.cols, A(1), weight_scratch.data);
  const A* bias = Centre ? parameter<T>(p.bias, p.weight_dtype, p.cols, A(0), bias_scratch.data) : nullptr;
  const bool streaming = streams<T>(p.rows * p.cols, p.cols, p.output, p.new_residual);
  parallel_for(p.rows, kElementsPerTask / p.cols + 1, [&](int64_t begin, int64_t end) {
    auto rows = streaming ? forward_rows<T, Centre, true> : forward_rows<T, Centre, false>;
    rows(p, weight, bias, begin, end);
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T>
struct BackwardRow {
  using A = Accumulate<T>;
  const T *grad, *h;
  A mean, rstd;
  A mean_g, mean_gx;  // mean(g), mean(g * xhat)
};

// Pass 1, R rows at once.
template <class T, bool Centre, int R>
HT_INLINE void reduce_rows(BackwardRow<T>* row, const Accumulate<T>* weight, int64_t cols, Accumulate<T>* dweight,
                           Accumulate<T>* dbias) {
  using A = Accumulate<T>;
  vec<A> sum_g[R] = {}, sum_gx[R] = {};
  sweep<T>(cols, [&](int64_t c, auto part, int) HT_LAMBDA {
    Row<T> w = part.load(weight + c), dw = {}, db = {};  // of these R rows, added to the chunk's in one go
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      // xhat = (h - mean) * rstd;  dweight += dy * xhat;  dbias += dy;  g = dy * weight
      Row<T> dy = part.load(row[r].grad + c);
      Row<T> xhat = part.only(part.load(row[r].h + c) - row[r].mean) * row[r].rstd;
      Row<T> g = dy * w;
      dw += dy * xhat;
      add_into(sum_gx[r], g * xhat);
      if constexpr (Centre) {
        db += dy;
        add_into(sum_g[r], g);
      }
    }
    part.store(dweight + c, part.load(dweight + c) + dw);
    if constexpr (Centre) part.store(dbias + c, part.load(dbias + c) + db);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r].mean_g = Centre ? sum_lanes(sum_g[r]) / A(cols) : A(0);
    row[r].mean_gx = sum_lanes(sum_gx[r]) / A(cols);
  }
}

// Pass 2, row i; row `next` is asked for, unless -1.
template <class T, bool Centre, bool Stream>
HT_INLINE void write_grad(const NormBackward& p, int64_t i, const BackwardRow<T>& row, const Accumulate<T>* weight,
                          Accumulate<T>* factor, int64_t next) {
  using A = Accumulate<T>;
  T* out = static_cast<T*>(p.grad_normalised) + i * p.cols;
  const T *grad = row.grad, *h = row.h;
  const A mean = row.mean, rstd = row.rstd, mean_g = row.mean_g, mean_gx = row.mean_gx;
  const T* next_grad = next < 0 ? nullptr : row_of<const T>(p.grad_output, next);
  const T* next_h = next < 0 ? nullptr : row_of<const T>(p.input, next);
  auto write = [&](auto finish) HT_LAMBDA {
    sweep<T>(
        p.cols,
        [&](int64_t c, auto part, int) HT_LAMBDA {
          // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_new_residual
          Row<T> xhat = (part.load(h + c) - mean) * rstd;
          Row<T> g = part.load(grad + c) * part.load(weight + c);
          if constexpr (Centre) g -= mean_g;
          part.template store<Stream>(out + c, finish(c, part, rstd * (g - xhat * mean_gx)));
        },
        [&](int64_t c) HT_LAMBDA {
          if (!next_h) return;
          prefetch(next_grad + c);
          prefetch(next_h + c);
        });
  };
  const T* extra = p.grad_new_residual.data ? row_of<const T>(p.grad_new_residual, i) : nullptr;
  auto add_extra = [=](int64_t c, auto part, Row<T> dx) HT_LAMBDA { return dx + part.load(extra + c); };
  if (p.grad_dropped) {
    T* dropped = static_cast<T*>(p.grad_dropped) + i * p.cols;
    dropout_row<kPaired<T>>(factor, p.cols, i, p.dropout);
    write([=](int64_t c, auto part, Row<T> dx) HT_LAMBDA {
      if (extra) dx = add_extra(c, part, dx);
      part.template store<Stream>(dropped + c, dx * part.load(factor + c));
      return dx;
    });
  } else if (extra) {
    write(add_extra);
  } else {
    write([](int64_t, auto, Row<T> dx) HT_LAMBDA { return dx; });
  }
}

// into[0..n) += from[0..n), and from = 0
template <class T>
void fold_into(Accumulate<T>* into, Accumulate<T>* from, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part, int) HT_LAMBDA {
    part.store(into + c, part.load(into + c) + part.load(from + c));
    part.store(from + c, Row<T>{});
  });
}

// The rows of one chunk. `running` holds dweight and dbias [2, norm_pitch] of the last kFoldRows rows, `partials` those
// of the chunk: sums of sums, whose rounding does not grow with the number of rows.
template <class T, bool Centre, bool Stream>
void backward_rows(const NormBackward& p, const Accumulate<T>* weight, int64_t begin, int64_t end,
                   Accumulate<T>* partials, Accumulate<T>* running, Accumulate<T>* factor) {
  using A = Accumulate<T>;
  A *dweight = running, *dbias = running + norm_pitch(p.cols);
  const bool ahead = p.rows * p.cols * int64_t(sizeof(T)) >= kAheadBytes;
  BackwardRow<T> row[kRowBlock];
  for (int64_t i = begin; i < end; i += kRowBlock) {
    const int64_t n = end - i < kRowBlock ? end - i : kRowBlock;
    for (int64_t r = 0; r < n; ++r) {
      row[r].grad = row_of<const T>(p.grad_output, i + r);
      row[r].h = row_of<const T>(p.input, i + r);
      row[r].mean = Centre ? static_cast<const A*>(p.mean)[i + r] : A(0);
      row[r].rstd = static_cast<const A*>(p.rstd)[i + r];
    }
    if (n == kRowBlock) {
      reduce_rows<T, Centre, kRowBlock>(row, weight, p.cols, dweight, dbias);
    } else {
      for (int64_t r = 0; r < n; ++r) reduce_rows<T, Centre, 1>(row + r, weight, p.cols, dweight, dbias);
    }
    if ((i - begin) % kFoldRows == kFoldRows - kRowBlock) fold_into<T>(partials, running, 2 * norm_pitch(p.cols));
    if (!p.grad_normalised) continue;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t next = ahead && i + r + kRowBlock < end ? i + r + kRowBlock : -1;
      write_grad<T, Centre, Stream>(p, i + r, row[r], weight, factor, next);
    }
  }
  fold_into<T>(partials, running, 2 * norm_pitch(p.cols));
  if constexpr (Stream) stream_fence();
}

// out[c] = sum over chunks of partials[chunk][which][c], in order
template <class T>
void add_partials(const NormBackward& p, int64_t chunks, int which, void* out) {
  using A = Accumulate<T>;
  if (!out) return;
  const A* partials = static_cast<const A*>(p.partials) + which * norm_pitch(p.cols);
  const int64_t stride = 2 * norm_pitch(p.cols), block = 256;
  auto add_into = [&](auto* typed) {
    parallel_for((p.cols + block - 1) / block, kElementsPerTask / block / chunks + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * block, last = end * block < p.cols ? end * block : p.cols;
      sweep<T>(last - first, [&](int64_t c, auto part, int) HT_LAMBDA {
        Row<T> sum = {};
        for (int64_t group = 0; group < chunks; group += kFoldChunks) {
          Row<T> of_group = {};
          for (int64_t k = group; k < chunks && k < group + kFoldChunks; ++k)
            of_group += part.load(partials + k * stride + first + c);
          sum += of_group;
        }
        part.store_in_order(typed + first + c, sum);
      });
    });
  };
  if (p.weight_dtype == p.dtype) return add_into(static_cast<T*>(out));
  add_into(static_cast<A*>(out));
}

template <class T, bool Centre>
void backward(const NormBackward& p) {
  using A = Accumulate<T>;
  Scratch<A> weight_scratch(norm_pitch(p.cols));
  const A* weight = parameter<T>(p.weight, p.weight_dtype, p.cols, A(1), weight_scratch.data);
  const int64_t chunk_rows = norm_backward_chunk_rows(p.rows, p.cols), chunks = norm_backward_chunks(p.rows, p.cols);
  const int64_t sums = 2 * norm_pitch(p.cols);  // of dweight and dbias
  const bool streaming = streams<T>(p.rows * p.cols, p.cols, p.grad_normalised, p.grad_dropped);

  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    auto rows = streaming ? backward_rows<T, Centre, true> : backward_rows<T, Centre, false>;
    Scratch<A> factor(p.grad_dropped ? dropout_pitch(p.cols) : 0), running(sums);
    __builtin_memset(running.data, 0, sums * sizeof(A));
    for (int64_t k = begin; k < end; ++k) {
      A* partials = static_cast<A*>(p.partials) + k * sums;
      __builtin_memset(partials, 0, sums * sizeof(A));
      const int64_t last = (k + 1) * chunk_rows < p.rows ? (k + 1) * chunk_rows : p.rows;
      rows(p, weight, k * chunk_rows, last, partials, running.data, factor.data);
    }
  });
  add_partials<T>(p, chunks, 0, p.grad_weight);
  if (Centre) add_partials<T>(p, chunks, 1, p.grad_bias);
}

// ---- by type, for the entries of the function table (norm.cpp) -----------------------------------------------------

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

}  // namespace handtuned::HANDTUNED_ISA
