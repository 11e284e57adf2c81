// Recurrent layers: what is done element by element, a thread each.
#pragma once
#include "rnn_rows.cuh"

namespace handtuned::cuda {

__device__ inline int64_t thread_number() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// An element of W_h under its dropout (as rnn_noise.h has it), or of any weights as they are. first: the drawn row of
// row 0.
template <class T>
__device__ inline T dropped_weight(const T* from, int64_t row, int64_t column, int64_t width,
                                   const Keep<Accumulate<T>>& keep, bool drops, int64_t first) {
  const T value = load_global(from + row * width + column);
  if (!drops) return value;
  const bool kept = keeps(keep, draw_row(RnnDraw::weight, first + row), column);
  return narrow<T>(widen(value) * (kept ? keep.scale : Accumulate<T>(0)));
}

template <class T>
__global__ void rnn_copy_weights_kernel(int64_t count, const T* from, T* to, int64_t width, Keep<Accumulate<T>> keep,
                                        bool drops, int64_t first) {
  const int64_t i = thread_number();
  if (i < count) store_global(to + i, dropped_weight(from, i / width, i % width, width, keep, drops, first));
}

// The transposed matrix [width][rows] of one, likewise.
template <class T>
__global__ void rnn_transpose_kernel(int64_t count, const T* from, T* to, int64_t rows, int64_t width,
                                     Keep<Accumulate<T>> keep, bool drops, int64_t first) {
  const int64_t i = thread_number(), row = i % rows, column = i / rows;
  if (i < count) store_global(to + i, dropped_weight(from, row, column, width, keep, drops, first));
}

template <class T>
__global__ void rnn_widen_kernel(int64_t count, const T* from, Accumulate<T>* to) {
  const int64_t i = thread_number();
  if (i < count) store_global(to + i, load_wide(from + i));
}

// A layer's input [rows][width] under dropout, of `count` rows of times and places.
template <class A>
__global__ void rnn_drop_input_kernel(int64_t count, Rnn p, Noise<A> noise, int64_t layer, const A* from, A* to,
                                      int64_t width) {
  const int64_t i = thread_number(), time = i / width / p.batch, place = i / width % p.batch;
  if (i >= count || place >= active_at(p, time)) return;
  const int64_t at = row_of(p, time, place) * width + i % width;
  store_global(to + at, load_global(from + at) * noise.input_factor(p, layer, time, place, i % width));
}

// Zeros in the rows of a tensor of the caller that lie past a place's length; `count` numbers in all of them.
template <class T>
__global__ void rnn_clear_kernel(int64_t count, Rnn p, RnnTensor tensor, int64_t width) {
  const int64_t i = thread_number(), time = i / width % p.steps, place = i / width / p.steps;
  if (i < count && time >= length_of(p, place))
    store_global(caller_row<T>(p, tensor, time, place) + i % width, narrow<T>(0));
}

}  // namespace handtuned::cuda
