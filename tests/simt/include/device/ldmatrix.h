// The emulator's version of csrc/cuda/device/ldmatrix.h: each lane reads the row that it names, and the lanes deal the
// elements out as the PTX manual says.
#pragma once
#include <device/intrinsics.h>

namespace handtuned::cuda {

template <bool Transposed>
inline void ldmatrix(const char* name, uint32_t (&r)[4], Shared<uint4> row) {
  struct Lane {
    uint16_t element[8];
    uint32_t* r;
  } mine;
  const uint4 bits = row[0];
  std::memcpy(mine.element, &bits, sizeof bits);
  mine.r = r;
  simt::warp_meet(name, 0xffffffffu, &mine, [](void** lanes, unsigned) {
    const auto at = [&](int matrix, int row, int column) -> uint32_t {
      return static_cast<Lane*>(lanes[8 * matrix + row])->element[column];
    };
    for (int l = 0; l < simt::kWarp; ++l)
      for (int n = 0; n < 4; ++n) {
        const int g = l / 4, t = l % 4;
        static_cast<Lane*>(lanes[l])->r[n] =
            Transposed ? at(n, 2 * t, g) | at(n, 2 * t + 1, g) << 16 : at(n, g, 2 * t) | at(n, g, 2 * t + 1) << 16;
      }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], Shared<uint4> row) { ldmatrix<false>("ldmatrix_x4", r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<uint4> row) { ldmatrix<true>("ldmatrix_x4_trans", r, row); }

}  // namespace handtuned::cuda
