"""Rotary position embedding in Triton: (a, b) -> (a cos - b sin, b cos + a sin) for pairs of features."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import number, stride_of


class Rows(NamedTuple):
    """Rows of [.., .., .., .., width] by their strides; 0 along a broadcast dim."""

    data: Tensor
    first: int  # hidden_strides()
    second: int
    third: int
    fourth: int
    loose: int | None
    column: int


@triton.jit
def _at(rows, i, j, k, m):
    outer = i * stride_of(rows.first, rows.loose) + j * stride_of(rows.second, rows.loose)
    return outer + k * stride_of(rows.third, rows.loose) + m * stride_of(rows.fourth, rows.loose)


@triton.jit
def turn(x, target, c, s, pair, angles, there, INTERLEAVED: tl.constexpr):
    """Pairs of features of rows that begin at x [rows, 1], to those that begin at target."""
    KIND: tl.constexpr = target.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if tl.float64 == KIND else tl.float32
    first, other = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, angles + pair)
    a = tl.load(x + first, mask=there, other=0.0).to(ACC)
    b = tl.load(x + other, mask=there, other=0.0).to(ACC)
    c, s = c.to(ACC), s.to(ACC)
    tl.store(target + first, (a * c - b * s).to(KIND), mask=there)
    tl.store(target + other, (b * c + a * s).to(KIND), mask=there)


@triton.jit
def pass_on(x, target, inside, begin, width, BLOCK: tl.constexpr):
    """The features that are not turned."""
    for start in range(begin, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        there = inside & (column < width)
        tl.store(target + column, tl.load(x + column, mask=there), mask=there)


@triton.jit(do_not_specialize=["count", "inverse"])
def rotary_kernel(
    x,
    cos,
    sin,
    output,
    sizes,
    count,
    width,
    angles,
    inverse,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sizes: of the second to fourth of the rows' dims, hidden. A program does BLOCK_ROWS rows."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    second, third, fourth = number(sizes[0]), number(sizes[1]), number(sizes[2])
    m, k = r % fourth, r // fourth % third
    j, i = r // fourth // third % second, r // fourth // third // second
    inside = (r < count)[:, None]
    x_at, out_at = _at(x, i, j, k, m)[:, None], _at(output, i, j, k, m)[:, None]
    cos_at, sin_at = _at(cos, i, j, k, m)[:, None], _at(sin, i, j, k, m)[:, None]
    for start in range(0, angles, BLOCK):
        pair = start + tl.arange(0, BLOCK)[None, :]
        there = inside & (pair < angles)
        c = tl.load(cos.data + cos_at + pair * cos.column, mask=there, other=0.0)
        s = tl.load(sin.data + sin_at + pair * sin.column, mask=there, other=0.0) * (1 - 2 * inverse)
        turn(x.data + x_at, output.data + out_at, c, s, pair, angles, there, INTERLEAVED)
    pass_on(x.data + x_at, output.data + out_at, inside, 2 * angles, width, BLOCK)


def _rows(tensor: Tensor, lead: int) -> Rows:
    *strides, column = [0] * (4 - lead) + list(tensor.stride())
    return Rows._make([tensor, *common.hidden_strides(*strides), column])


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    width, angles = input.shape[-1], cos.shape[-1]
    x = input if input.is_contiguous() or width <= 1 or input.stride(-1) == 1 else input.contiguous()
    output = common.empty_like(x)
    result = output
    cos, sin = (t.expand(*x.shape[:-1], angles) for t in (cos, sin))
    if x.dim() > 5:  # outer dims in one; views where their strides allow
        x, cos, sin = (t.reshape(-1, *t.shape[-4:]) for t in (x.contiguous(), cos, sin))
        output = common.empty(tuple(x.shape), x)
    lead = [1] * (5 - x.dim()) + list(x.shape[:-1])
    count = x.shape[:-1].numel()
    block = min(128, max(16, triton.next_power_of_2(max(angles, 1))))
    rows = 1024 // block
    if count and width:
        with common.on_device(x):
            rotary_kernel[(triton.cdiv(count, rows),)](
                *(_rows(t, x.dim() - 1) for t in (x, cos, sin, output)),
                *(tuple(map(common.hidden, lead[1:])), count, width, angles, int(inverse)),
                INTERLEAVED=interleaved,
                BLOCK_ROWS=rows,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return output if result is output else result.copy_(output.view(result.shape))
