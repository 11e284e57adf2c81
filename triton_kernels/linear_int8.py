"""Linear layers with an int8 weight in Triton: product, scales and all that follows in one kernel.

    y = dropout(activation(scale[n] * sum over k of x[k] q[n, k] + bias)) + residual

A program owns rows and one panel of 64 columns of the packed weight [panels, steps, 64, 4] (csrc/linear.cpp), which it
reads once, in order, as int8: in 16 bits q is exact, so the product takes tensor cores. With few rows that is half of
the bytes of a bfloat16 weight. With a quantised input, x ~ s (u - zero), the sum is one of integers and exact:

    sum (u - zero) q = sum (u - 128) q + (128 - zero) * sum q,   the last of which the packed weight holds
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from handtuned import reference
from handtuned.ops.linear import PANEL

from . import common
from .common import keep_factor
from .linear import activated

QUAD = tl.constexpr(4)  # neighbours of a column that lie side by side
COLUMNS = tl.constexpr(PANEL)
TINY = tl.constexpr(2.0**-126)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off, it rounds to the nearest integer, ties to even


@triton.jit
def _rounded(x):
    return (x + ROUND) - ROUND


@triton.jit
def quantize_kernel(x, levels, scale, shift, stride, width, BLOCK: tl.constexpr):
    """Of a row: levels int8, u - 128; scale, NaN if a number is not finite; shift int32, 128 - zero."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, value), tl.maximum(high, value)
        bad = tl.where(tl.abs(value) < float("inf"), bad, 1)
    least, most = tl.min(low, 0), tl.max(high, 0)
    step = tl.div_rn(most, 255.0) - tl.div_rn(least, 255.0)
    inverse = tl.where(step >= TINY, tl.div_rn(1.0, tl.where(step >= TINY, step, 1.0)), 0.0)
    broken = tl.max(bad, 0) > 0
    zero = tl.where(broken, 0.0, _rounded(-least * inverse))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
        level = tl.minimum(tl.maximum(_rounded(value * inverse) + zero, 0.0), 255.0) - 128.0
        tl.store(levels + row * width + column, tl.where(broken, 0.0, level).to(tl.int8), mask=column < width)
    tl.store(scale + row, tl.where(broken, float("nan"), step))
    tl.store(shift + row, 128 - zero.to(tl.int32))


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(
    x,
    packed,
    scale,
    bias,
    residual,
    output,
    preactivation,
    row_scale,
    row_shift,
    seed,
    stride,
    rows,
    depth,
    width,
    threshold: tl.int64,
    keep_scale: tl.float64,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row_scale None: x [rows, depth] is multiplied as it is; else it holds levels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.cdiv(depth, QUAD) + 1  # the last one holds the sums of columns
    of_panel = packed + tl.program_id(1).to(tl.int64) * steps * (COLUMNS * QUAD)
    SUM: tl.constexpr = tl.float32 if row_scale is None else tl.int32
    total = tl.zeros((BLOCK_ROWS, COLUMNS), SUM)
    quads = tl.arange(0, COLUMNS)[None, :, None] * QUAD + tl.arange(0, QUAD)[None, None, :]
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        step = start // QUAD + tl.arange(0, BLOCK // QUAD)
        at = step[:, None, None] * (COLUMNS * QUAD) + quads
        q = tl.load(of_panel + at, mask=(step < steps - 1)[:, None, None], other=0)
        q = tl.reshape(tl.permute(q, (0, 2, 1)), (BLOCK, COLUMNS))
        a = tl.load(x + row[:, None] * stride + k[None, :], mask=(row < rows)[:, None] & (k < depth)[None, :], other=0)
        total = tl.dot(a, q.to(a.dtype), total, input_precision="ieee", out_dtype=SUM)
    inside = (row < rows)[:, None] & (n < width)[None, :]
    of_column = tl.load(scale + n, mask=n < width, other=0.0)[None, :]
    if row_scale is None:
        z = total * of_column
    else:
        j = tl.arange(0, COLUMNS) * QUAD
        last = of_panel + (steps - 1).to(tl.int64) * (COLUMNS * QUAD)
        sums = tl.load(last.to(tl.pointer_type(tl.int32)) + j // QUAD)
        shift = tl.load(row_shift + row, mask=row < rows, other=0)
        total += shift[:, None] * sums[None, :]
        z = total.to(tl.float32) * (tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None] * of_column)
    if bias is not None:
        z += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * width + n[None, :]
    if preactivation is not None:
        tl.store(preactivation + at, z.to(preactivation.dtype.element_ty), mask=inside)
    y, _slope = activated(z, ACTIVATION)
    if seed is not None:
        first = tl.program_id(1) * COLUMNS
        y *= keep_factor(seed, row, first, threshold, keep_scale, BLOCK_ROWS, COLUMNS, tl.float32)
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, y.to(output.dtype.element_ty), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def linear_int8_pack(weight: Tensor) -> Tensor:
    """torch's copies: one layout for all backends."""
    return reference.linear_int8_pack(weight)


def linear_int8(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    quantize_input: bool,
    need_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """(output, preactivation)."""
    depth, width = input.shape[-1], scale.shape[0]
    shape = (*input.shape[:-1], width)
    output = common.empty(shape, input)
    saved = common.empty(shape if activation and need_preactivation else (0,), input)
    if output.numel() == 0:
        return output, saved
    x = input.reshape(-1, depth) if depth else input.new_empty(output.numel() // width, 0)
    x = x if depth <= 1 or x.stride(-1) == 1 else x.contiguous()
    rows = x.shape[0]
    row_scale = row_shift = None
    with common.on_device(input):
        if quantize_input:
            levels = common.empty((rows, depth), input, torch.int8)
            row_scale = common.empty((rows,), input, torch.float32)
            row_shift = common.empty((rows,), input, torch.int32)
            quantize_kernel[(rows,)](
                *(x, levels, row_scale, row_shift, x.stride(0), depth), BLOCK=1024, num_warps=4, enable_fp_fusion=False
            )
            x = levels
        few = rows <= 16
        int8_kernel[(triton.cdiv(rows, 16 if few else 64), packed.shape[0])](
            *(x, packed, scale, None if bias is None else bias.contiguous()),
            *(None if residual is None else residual.contiguous(), output, saved if saved.numel() else None),
            *(row_scale, row_shift, seed if dropout_p > 0 else None, x.stride(0), rows, depth, width),
            *common.dropout_constants(dropout_p),
            ACTIVATION=activation,
            BLOCK_ROWS=16 if few else 64,
            BLOCK=64,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=True,
        )
    return output, saved
