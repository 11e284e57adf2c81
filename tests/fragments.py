"""Which element of a matrix each lane of a warp holds, by the tables of the PTX manual. Shared by the tests of the two
layers that execute such instructions: the emulator (test_simt.py) and the PTX simulator (test_ptx.py).

PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8", "... mma.m16n8k4", and
"ldmatrix". groupID is lane >> 2, threadID_in_group lane % 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = torch.arange(32)
GROUP, THREAD = LANES >> 2, LANES % 4


def a_16x16(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 to 7) of A of m16n8k16, 16-bit elements, for each lane."""
    row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
    return row, THREAD * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16x8(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 to 3) of B of m16n8k16."""
    return THREAD * 2 + (i & 1) + (0 if i < 2 else 8), GROUP


def a_16x8(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 to 3) of A of m16n8k8, 16-bit elements."""
    return GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)


def b_8x8(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 or 1) of B of m16n8k8, 16-bit elements."""
    return THREAD * 2 + i, GROUP


def a_16x8_tf32(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 to 3) of A of m16n8k8, tf32; m16n8k4 has the first two."""
    return GROUP if i in (0, 2) else GROUP + 8, THREAD if i < 2 else THREAD + 4


def b_8x8_tf32(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 or 1) of B of m16n8k8, tf32; m16n8k4 has the first."""
    return THREAD if i == 0 else THREAD + 4, GROUP


def d_16x8(i: int) -> tuple[Tensor, Tensor]:
    """(row, column) of element i (0 to 3) of C and D, of every m16n8."""
    return GROUP if i < 2 else GROUP + 8, THREAD * 2 + (i & 1)


def ldmatrix_row(matrix: int) -> Tensor:
    """The lanes whose addresses are the rows 0 to 7 of a matrix."""
    return 8 * matrix + torch.arange(8)


def ldmatrix_pair(transposed: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(row, column) of the lower and of the upper half of each lane's register, of an 8x8 matrix."""
    low, high = (GROUP, THREAD * 2), (GROUP, THREAD * 2 + 1)
    return (low[::-1], high[::-1]) if transposed else (low, high)


def shuffled(mode: str, by: int, width: int = 32) -> list[tuple[int, bool]]:
    """(lane that is read, predicate) for each lane: shfl.sync's pseudocode, for segments of `width` lanes."""
    found = []
    for lane in range(32):
        first, last = lane // width * width, lane // width * width + width - 1
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & (width - 1))}[mode]
        inside = first <= source <= last if mode != "bfly" else source <= last
        found.append((source if inside else lane, inside))
    return found


def as_pairs(low: Tensor, high: Tensor) -> Tensor:
    """16-bit elements as registers, the first in the lower half."""
    return torch.stack([low, high], -1).view(torch.int32)[..., 0]
