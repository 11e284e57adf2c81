// The emulator's version of csrc/cuda/device/mma.h: lane 4 g + t holds what the PTX manual says. Products are exact and
// are added one after the other, each sum rounded to float; hardware adds them in another order and rounds less often.
#pragma once
#include <cmath>

#include <device/intrinsics.h>
#include <device/vector.h>

namespace handtuned::cuda {

template <class T>
inline float element(uint32_t pair, int i) {
  return widen(T{uint16_t(pair >> 16 * i)});
}

template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  simt::warp_meet("mma_16x8x16", 0xffffffffu, &mine, [](void** lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int l = 0; l < simt::kWarp; ++l) {
      const Lane& from = *static_cast<Lane*>(lanes[l]);
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 2; ++i) {
        a[g][2 * t + i] = element<T>(from.a[0], i);
        a[g + 8][2 * t + i] = element<T>(from.a[1], i);
        a[g][2 * t + 8 + i] = element<T>(from.a[2], i);
        a[g + 8][2 * t + 8 + i] = element<T>(from.a[3], i);
        b[2 * t + i][g] = element<T>(from.b[0], i);
        b[2 * t + 8 + i][g] = element<T>(from.b[1], i);
      }
    }
    for (int l = 0; l < simt::kWarp; ++l) {
      float* d = static_cast<Lane*>(lanes[l])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        // D[row, column] += sum_k A[row, k] B[k, column]
        for (int k = 0; k < 16; ++k) d[i] = d[i] + a[row][k] * b[k][column];
      }
    }
  });
}

template <class T>
inline uint32_t narrow_pair(float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}

}  // namespace handtuned::cuda
