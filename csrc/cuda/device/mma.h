// The tensor cores' product of a warp: D[16, 8] += A[16, 16] B[16, 8], operands of 16 bits, sums in float.
//
// Lane 4 g + t holds (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), two elements a register:
//   a[0]: A[g, 2t..]   a[1]: A[g + 8, 2t..]   a[2]: A[g, 2t + 8..]   a[3]: A[g + 8, 2t + 8..]
//   b[0]: B[2t.., g]   b[1]: B[2t + 8.., g]
//   d[0], d[1]: D[g, 2t..]   d[2], d[3]: D[g + 8, 2t..]
// So the sums of two neighbouring D make, rounded, an A: that is how weights become an operand without moving.
#pragma once
#include <cstdint>

#include <device/intrinsics.h>

#include "../../params.h"

namespace handtuned::cuda {

template <class T>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_16x8x16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two elements of a register, `low` the one that comes first; rounded to nearest even.
template <class T>
__device__ inline uint32_t narrow_pair(float low, float high);

template <>
__device__ inline uint32_t narrow_pair<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ inline uint32_t narrow_pair<f16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace handtuned::cuda
