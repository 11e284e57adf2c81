// Sixteen bytes of a row: how they are read and written, and what they are in float or double.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include <device/intrinsics.h>

#include "../../params.h"

namespace handtuned::cuda {

// What sums and statistics are kept in.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

__device__ inline float widen(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ inline float widen(f16 v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }

// Rounds to nearest even.
template <class T>
__device__ inline T narrow(Accumulate<T> v) {
  return v;
}
template <>
__device__ inline bf16 narrow<bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ inline f16 narrow<f16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

template <class T>
inline constexpr int kLanes = 16 / int(sizeof(T));

// As they lie in memory; elements that are not there are 0.
template <class T>
struct alignas(16) Pack {
  T value[kLanes<T>];
};

// The elements from p on, `count` of them: none if it is not positive, at most kLanes. wide: p is aligned to 16 bytes,
// and a pack that has any element has them all.
template <class T>
__device__ inline Pack<T> load_pack(const T* p, int count, bool wide) {
  Pack<T> pack = {};
  if (wide) {
    if (count > 0) {
      const uint4 bits = load_global(reinterpret_cast<const uint4*>(p));
      __builtin_memcpy(&pack, &bits, sizeof bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T> && i < count; ++i) pack.value[i] = load_global(p + i);
  }
  return pack;
}

template <class T>
__device__ inline void store_pack(T* p, const Pack<T>& pack, int count, bool wide) {
  if (wide) {
    if (count > 0) {
      uint4 bits;
      __builtin_memcpy(&bits, &pack, sizeof bits);
      store_global(reinterpret_cast<uint4*>(p), bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T> && i < count; ++i) store_global(p + i, pack.value[i]);
  }
}

// The same elements of a parameter of T or, beside 16-bit T, of float; `absent` where it is not given.
template <class T>
__device__ inline void load_parameter(Accumulate<T> (&value)[kLanes<T>], const void* parameter, bool as_float,
                                      int64_t column, int count, bool wide, Accumulate<T> absent) {
  if (parameter == nullptr) {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) value[i] = absent;
    return;
  }
  if constexpr (sizeof(T) == 2) {
    if (as_float) {
      const float* p = static_cast<const float*>(parameter) + column;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pack<float> pack = load_pack(p + 4 * half, count - 4 * half, wide);
#pragma unroll
        for (int i = 0; i < 4; ++i) value[4 * half + i] = pack.value[i];
      }
      return;
    }
  }
  const Pack<T> pack = load_pack(static_cast<const T*>(parameter) + column, count, wide);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) value[i] = widen(pack.value[i]);
}

template <class T>
__device__ inline const T* row_of(const StridedRows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.ndim - 1; d > 0; --d) {
    offset += row % rows.size[d] * rows.stride[d];
    row /= rows.size[d];
  }
  return static_cast<const T*>(rows.data) + offset + row * rows.stride[0];
}

}  // namespace handtuned::cuda
