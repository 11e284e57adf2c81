"""Linear layers in Triton: y = activation(x weight^T + bias) * keep / (1-p) + residual.

The product is torch's, summed and kept in float32 where elements have 16 bits; what follows is one kernel, and rounds
once. `packed` is of no use here and not read. Maths: csrc/linear.cpp.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from handtuned.ops.linear import packed_shape

from . import common
from .common import LOG2_E, keep_factor, tanh

NONE, RELU, GELU, GELU_TANH, SILU = (tl.constexpr(n) for n in range(5))
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2_BY_PI = tl.constexpr(0.7978845608028654)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """(activation(z), its slope)."""
    if ACTIVATION == RELU:
        y, slope = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL), tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == GELU:
        share = 0.5 * (1.0 + tl.erf(z * ROOT_HALF))
        y, slope = z * share, share + z * DENSITY * tl.exp2(-0.5 * z * z * LOG2_E)
    elif ACTIVATION == GELU_TANH:
        t = tanh((z + 0.044715 * z * z * z) * ROOT_2_BY_PI)
        y = 0.5 * z * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * ((1.0 + 3.0 * 0.044715 * z * z) * ROOT_2_BY_PI)
    elif ACTIVATION == SILU:
        s = 1.0 / (1.0 + tl.exp2(-z * LOG2_E))
        y, slope = z * s, s * (1.0 + z * (1.0 - s))
    else:
        y, slope = z, tl.full(z.shape, 1.0, z.dtype)
    return y, slope


@triton.jit
def _place(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, first column, columns, offsets, which are inside) of a program's tile of contiguous rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    at = row[:, None] * width + column[None, :]
    return row, start, column, at, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def epilogue_kernel(
    product,
    bias,
    residual,
    output,
    preactivation,
    seed,
    rows,
    width,
    threshold: tl.int64,
    scale: tl.float64,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = product.dtype.element_ty
    row, start, column, at, inside = _place(rows, width, BLOCK_ROWS, BLOCK)
    z = tl.load(product + at, mask=inside, other=0.0)
    if bias is not None:
        z += tl.load(bias + column, mask=column < width, other=0.0).to(ACC)[None, :]
    if preactivation is not None:
        tl.store(preactivation + at, z.to(preactivation.dtype.element_ty), mask=inside)
    y, _slope = activated(z, ACTIVATION)
    if seed is not None:
        y *= keep_factor(seed, row, start, threshold, scale, BLOCK_ROWS, BLOCK, ACC)
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(ACC)
    tl.store(output + at, y.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def epilogue_backward_kernel(
    grad_output,
    preactivation,
    target,
    seed,
    rows,
    width,
    threshold: tl.int64,
    scale: tl.float64,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the product."""
    ACC: tl.constexpr = tl.float64 if target.dtype.element_ty == tl.float64 else tl.float32
    row, start, _column, at, inside = _place(rows, width, BLOCK_ROWS, BLOCK)
    dz = tl.load(grad_output + at, mask=inside, other=0.0).to(ACC)
    if seed is not None:
        dz *= keep_factor(seed, row, start, threshold, scale, BLOCK_ROWS, BLOCK, ACC)
    if preactivation is not None:
        _y, slope = activated(tl.load(preactivation + at, mask=inside, other=0.0).to(ACC), ACTIVATION)
        dz *= slope
    tl.store(target + at, dz.to(target.dtype.element_ty), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """(grid, tile) of an elementwise kernel."""
    block = min(1024, max(128, triton.next_power_of_2(width)))
    tile: dict[str, int | bool] = {
        "BLOCK_ROWS": 1024 // block,
        "BLOCK": block,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    return (triton.cdiv(rows, 1024 // block), triton.cdiv(width, block)), tile


def linear_pack(weight: Tensor) -> Tensor:
    return weight.new_zeros(packed_shape(weight))


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output, preactivation)."""
    shape = (*input.shape[:-1], weight.shape[0])
    output = common.empty(shape, input)
    saved = common.empty(shape if activation else (0,), input)
    if output.numel() == 0:
        return output, saved
    with common.on_device(input):
        product = common.product(_flat(input), weight.t())
        rest = None if residual is None else residual.contiguous()
        grid, tile = _tiles(*product.shape)
        epilogue_kernel[grid](
            *(product, None if bias is None else bias.contiguous(), rest, output, saved if activation else None),
            *(seed if dropout_p > 0 else None, *product.shape, *common.dropout_constants(dropout_p)),
            ACTIVATION=activation,
            **tile,
        )
    return output, saved


def linear_inference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    return linear(input, weight, bias, residual, packed, activation, dropout_p, seed)[0]


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    preactivation: Tensor,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias); what is not needed has shape (0,)."""
    dz = _flat(grad_output).contiguous()
    if dz.numel() and (activation or dropout_p > 0):
        given, dz = dz, common.empty(tuple(dz.shape), input)
        grid, tile = _tiles(*dz.shape)
        with common.on_device(input):
            epilogue_backward_kernel[grid](
                *(given, _flat(preactivation).contiguous() if activation else None, dz),
                *(seed if dropout_p > 0 else None, *dz.shape, *common.dropout_constants(dropout_p)),
                ACTIVATION=activation,
                **tile,
            )
    wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
    nothing = common.empty((0,), input)
    return (
        torch.mm(dz, weight).view(input.shape) if need_input else nothing,
        torch.mm(dz.t(), _flat(input)) if need_weight else nothing,
        dz.sum(0, dtype=wide).to(dz.dtype) if need_bias else nothing,
    )
