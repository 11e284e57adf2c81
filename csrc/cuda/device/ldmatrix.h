// Operands of mma.h from shared memory: four 8x8 matrices of 16-bit elements for a warp.
//
// Lane l names row l % 8 of matrix l / 8, 16 bytes. Of matrix n, lane 4 g + t gets in r[n] the elements [g, 2t..], or
// transposed [2t.., g] (PTX ISA, "ldmatrix"). The eight rows of a matrix are fetched together: without bank conflicts
// if their addresses differ in 16-byte units modulo 128 bytes.
#pragma once
#include <cstdint>

#include <device/intrinsics.h>

namespace handtuned::cuda {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], Shared<uint4> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<uint4> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace handtuned::cuda
