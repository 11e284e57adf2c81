// The recurrent cells on single numbers: gates.h, compiled for the device.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

#include "../rnn.h"

namespace handtuned::cuda {

// 1 / (1 + e^-x); where e^-x overflows it is 0.
__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }
__device__ inline float tanh(float x) { return tanhf(x); }
__device__ inline double tanh(double x) { return ::tanh(x); }
// min(max(x, low), high);  NaN stays
template <class A>
__device__ inline A clamp(A x, double low, double high) {
  return x < A(low) ? A(low) : x > A(high) ? A(high) : x;
}

}  // namespace handtuned::cuda

#define HANDTUNED_ISA cuda
#define HT_INLINE __device__ inline
#include "../gates.h"
#undef HT_INLINE
#undef HANDTUNED_ISA

namespace handtuned::cuda {

// Calls use(cell) with the struct of a cell: all threads take one way.
template <class A, class Use>
__device__ inline void with_cell(RnnCell cell, Use use) {
  switch (cell) {
    case RnnCell::lstm: return use(Lstm<A>());
    case RnnCell::coupled: return use(CoupledLstm<A>());
    case RnnCell::gru: return use(Gru<A>());
    case RnnCell::tanh: return use(ElmanTanh<A>());
    case RnnCell::relu: return use(ElmanRelu<A>());
  }
}

}  // namespace handtuned::cuda
