// Recurrent layers, backward: what is left when all steps are done. With the gradients d of all pre-activations, of all
// rows (times and places), and the rows' inputs x, states before h and what was projected m:
//   grad W_x = d^T x,   grad W_h = d^T h,   grad W_r = (gradient of the projection)^T m,   grad b = sum of d
//   grad x   = d W_x
// Each is a product (product.cuh) or a sum over rows whose terms are found where they are; nothing is gathered first.
#pragma once
#include "product.cuh"
#include "rnn_backward.cuh"
#include "rnn_elements.cuh"

namespace handtuned::cuda {

// Of one layer, each beside the weights of its kind; nullptr: not wanted.
template <class T>
struct LayerGradients {
  T *wx[2]{}, *wh[2]{}, *wr[2]{}, *bx[2]{}, *bh[2]{}, *peepholes[2]{};
  Accumulate<T>* input = nullptr;                                // [rows][width], nullptr: the caller's
  const Accumulate<T>* from = nullptr;                           // the layer's input, likewise
  int64_t *before = nullptr, *time = nullptr, *place = nullptr;  // before: [direction][rows]
};

// Where each row's state comes from, its time and its place; a thread for each of `count` steps and places.
template <class Number>
__global__ void rnn_find_rows_kernel(int64_t count, Rnn p, Number* before, Number* time, Number* place) {
  const int64_t i = thread_number(), t = i / p.batch, at = i % p.batch;
  if (i >= count || at >= active_at(p, t)) return;
  const int64_t row = row_of(p, t, at);
  store_global(time + row, t);
  store_global(place + row, at);
  store_global(before + row, t > 0 ? row_of(p, t - 1, at) : Number(-1));
  if (p.directions > 1)
    store_global(before + p.rows + row, t + 1 < length_of(p, at) ? row_of(p, t + 1, at) : Number(-1));
}

// ---- what a weight's gradient is made with --------------------------------------------------------------------------

// In the order of the steps' gradients, so that the initial state, which is often larger than all others, comes last:
// what is added to it is rounded as coarsely as it is.
__device__ inline int64_t nth_row(const Rnn& p, int direction, int64_t i) {
  return direction == 0 ? p.used - 1 - i : i;
}

// Column `n` of what multiplied W_h at a row.
template <class T>
__device__ inline Accumulate<T> state_of_row(const BackwardLayer<T>& y, const LayerGradients<T>& g, int d, int64_t row,
                                             int64_t n) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int64_t before = load_global(g.before + d * p.rows + row), place = load_global(g.place + row);
  A h = 0;
  if (before >= 0) {
    h = load_global(y.output + (before * p.directions + d) * p.state + n);
  } else if (p.h0 != nullptr) {
    h = load_wide(static_cast<const T*>(p.h0) + state_row(p, y.layer, d, place) * p.state + n);
  }
  return h * y.noise.state_factor(p, y.layer, d, place, n);
}

// use(cell, kept, c) with an LSTM's step: what it kept and c before it.
template <class T, class Use>
__device__ inline Accumulate<T> at_step(const BackwardLayer<T>& y, const LayerGradients<T>& g, int d, int64_t row,
                                        int64_t unit, Use use) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int64_t before = load_global(g.before + d * p.rows + row);
  auto with = [&](auto cell) {
    constexpr int K = decltype(cell)::kKept;
    A kept[K], c = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) kept[k] = load_global(y.keep[d] + (row * K + k) * p.hidden + unit);
    if (before >= 0) {
      c = load_global(y.keep[d] + ((before + 1) * K - 1) * p.hidden + unit);
    } else if (p.c0 != nullptr) {
      c = load_wide(static_cast<const T*>(p.c0) + state_row(p, y.layer, d, load_global(g.place + row)) * p.hidden +
                    unit);
    }
    return use(cell, kept, c);
  };
  return p.cell == RnnCell::lstm ? with(Lstm<A>()) : with(CoupledLstm<A>());
}

// Element m of d at a row, as W_x (the first slots) or W_h (a GRU's last gate has a slot of its own) sees it.
template <class T>
__device__ inline Accumulate<T> d_of_row(const BackwardLayer<T>& y, bool of_state, int d, int64_t row, int64_t m) {
  const RnnBackward& p = y.p;
  const bool own_slot = of_state && y.slots > y.gates && m >= (y.gates - 1) * p.hidden;
  return load_global(y.d[d] + row * y.slots * p.hidden + m + (own_slot ? p.hidden : 0));
}

// ---- products -------------------------------------------------------------------------------------------------------

// blockIdx.z: direction, as in all of them.
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) rnn_grad_wx_kernel(BackwardLayer<T> y, LayerGradients<T> g) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.z);
  auto left = [&](int64_t m, int64_t i) { return d_of_row(y, false, d, nth_row(p, d, i), m); };
  auto right = [&](int64_t n, int64_t i) {
    const int64_t row = nth_row(p, d, i);
    if (g.from != nullptr) return load_global(g.from + row * y.width + n);
    return load_wide(caller_row<const T>(p, p.input, load_global(g.time + row), load_global(g.place + row)) + n);
  };
  product_tile<A, false, false>(y.gates * p.hidden, y.width, p.used, left, right, [&](int64_t m, int64_t n, A sum) {
    store_global(g.wx[d] + m * y.width + n, narrow<T>(sum));
  });
}

template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) rnn_grad_wh_kernel(BackwardLayer<T> y, LayerGradients<T> g) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.z);
  const int64_t rows = y.gates * p.hidden, drawn = (y.layer * p.directions + d) * rows;
  auto left = [&](int64_t m, int64_t i) { return d_of_row(y, true, d, nth_row(p, d, i), m); };
  auto right = [&](int64_t n, int64_t i) { return state_of_row(y, g, d, nth_row(p, d, i), n); };
  product_tile<A, false, false>(rows, p.state, p.used, left, right, [&](int64_t m, int64_t n, A sum) {
    if (y.noise.drops_weight)
      sum *= keeps(y.noise.weight, draw_row(RnnDraw::weight, drawn + m), n) ? y.noise.weight.scale : A(0);
    store_global(g.wh[d] + m * p.state + n, narrow<T>(sum));
  });
}

template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) rnn_grad_wr_kernel(BackwardLayer<T> y, LayerGradients<T> g) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.z);
  const Variant<A> variant{p.hard_sigmoid, p.hard_tanh, false, {}};
  auto left = [&](int64_t m, int64_t i) { return load_global(y.grad_r[d] + nth_row(p, d, i) * p.state + m); };
  auto right = [&](int64_t n, int64_t i) {
    return at_step(y, g, d, nth_row(p, d, i), n,
                   [&](auto cell, const auto& kept, A c) { return decltype(cell)::output(variant, kept, c); });
  };
  product_tile<A, false, false>(p.state, p.hidden, p.used, left, right, [&](int64_t m, int64_t n, A sum) {
    store_global(g.wr[d] + m * p.hidden + n, narrow<T>(sum));
  });
}

// Blocks of a multiprocessor: in float64 two would have too few registers.
template <class T>
inline constexpr int kInputBlocks = sizeof(T) == 8 ? 1 : 2;

// Over the gates of both directions.
template <class T>
__global__ void __launch_bounds__(kProductThreads, kInputBlocks<T>)
    rnn_grad_input_kernel(BackwardLayer<T> y, LayerGradients<T> g) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int64_t each = y.gates * p.hidden;
  auto left = [&](int64_t row, int64_t k) { return d_of_row(y, false, int(k / each), row, k % each); };
  auto right = [&](int64_t n, int64_t k) { return load_wide(y.wx[k / each] + k % each * y.width + n); };
  product_tile<A, true, false>(p.used, y.width, p.directions * each, left, right, [&](int64_t row, int64_t n, A sum) {
    const int64_t time = load_global(g.time + row), place = load_global(g.place + row);
    if (g.input == nullptr) {
      store_global(caller_row<T>(p, p.grad_input, time, place) + n, narrow<T>(sum));
    } else {
      if (y.noise.drops_input) sum *= y.noise.input_factor(p, y.layer, time, place, n);
      store_global(g.input + row * y.width + n, sum);
    }
  });
}

// ---- sums over rows -------------------------------------------------------------------------------------------------

// The sum of term(row) over all rows, of the column that this thread's lane stands for; valid in warp 0. Warps take
// every kSumWarps-th stretch of kSumRows rows, each stretch added up before it is added to the rest.
constexpr int kSumWarps = 8, kSumRows = 32;

template <class A, class Term>
__device__ inline A sum_rows(int64_t rows, bool there, Term term) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  A total = 0;
  for (int64_t from = warp * kSumRows; from < rows; from += kSumWarps * kSumRows) {
    const int64_t end = from + kSumRows < rows ? from + kSumRows : rows;
    A sum = 0;
    for (int64_t row = from; row < end; ++row)
      if (there) sum += term(row);
    total += sum;
  }
  const Shared<A> sums = shared<A>(0);  // [kSumWarps][kWarp]
  sums[warp * kWarp + lane] = total;
  __syncthreads();
  total = 0;
  for (int of = 0; of < kSumWarps; ++of) total += sums[of * kWarp + lane];
  return total;
}

// blockIdx.x: 32 of the gates' units; y: of b_x (0) or b_h (1); z: direction.
template <class T>
__global__ void rnn_grad_bias_kernel(BackwardLayer<T> y, LayerGradients<T> g) {
  using A = Accumulate<T>;
  const int d = int(blockIdx.z);
  const bool of_state = blockIdx.y != 0;
  const int64_t m = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp, columns = y.gates * y.p.hidden;
  const A sum = sum_rows<A>(y.p.used, m < columns, [&](int64_t row) { return d_of_row(y, of_state, d, row, m); });
  if (threadIdx.x < kWarp && m < columns) store_global((of_state ? g.bh[d] : g.bx[d]) + m, narrow<T>(sum));
}

// Of gate `nth` that has peepholes sums of d * c, and of d * c' for the last, o. blockIdx.x: 32 units; y: nth.
template <class T>
__global__ void rnn_grad_peepholes_kernel(BackwardLayer<T> y, LayerGradients<T> g) {
  using A = Accumulate<T>;
  const RnnBackward& p = y.p;
  const int d = int(blockIdx.z), nth = int(blockIdx.y);
  const bool after = nth + 1 == int(gridDim.y);
  const int64_t unit = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp, gate = after ? y.gates - 1 : nth;
  const A sum = sum_rows<A>(p.used, unit < p.hidden, [&](int64_t row) {
    const A seen = at_step(y, g, d, row, unit, [&](auto cell, const auto& kept, A c) {
      return after ? decltype(cell)::next_cell(kept, c) : c;
    });
    return d_of_row(y, false, d, row, gate * p.hidden + unit) * seen;
  });
  if (threadIdx.x < kWarp && unit < p.hidden) store_global(g.peepholes[d] + nth * p.hidden + unit, narrow<T>(sum));
}

}  // namespace handtuned::cuda
