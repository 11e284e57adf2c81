"""Rotary position embedding in one pass, differentiable to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import backends, serving
from ...autograd import apply, kernels_for, wants_grad

_OP = "rotary_embedding"


def rotary_tables(
    positions: int | Tensor,
    width: int,
    base: float = 10000.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * base^(-2i / width) for i < width / 2, computed in float64 and rounded once.

    Args:
        positions: how many, from 0; or a tensor (*, L) of positions.
        width: even, how many of a head's features are rotated.
        device: of the tables where positions is a number.

    Returns:
        Two tensors (*, L, width / 2) of dtype.
    """
    if width < 2 or width % 2:
        raise RuntimeError(
            f"handtuned.rotary_tables: width is {width}, it must be even and at least 2; pairs of features are rotated"
        )
    at = torch.arange(positions, device=device) if isinstance(positions, int) else positions
    rates = torch.arange(0, width, 2, device=at.device, dtype=torch.float64) / width
    angles = at.to(torch.float64)[..., None] * base**-rates
    return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
    ) -> Tensor:
        ctx.kernels, ctx.interleaved, ctx.inverse = kernels, interleaved, inverse
        ctx.save_for_backward(cos, sin)
        output: Tensor = kernels.rotary(input, cos, sin, interleaved, inverse)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The rotation the other way, which can be differentiated again in the same manner."""
        cos, sin = ctx.saved_tensors
        grad = _turn(ctx.kernels, grad_output, cos, sin, ctx.interleaved, not ctx.inverse)
        return None, grad, None, None, None, None


def _turn(kernels: Any, input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if torch.is_grad_enabled() and wants_grad(kernels, input):
        output: Tensor = apply(_Rotary, kernels, input, cos, sin, interleaved, inverse)
        return output
    output = kernels.rotary(input, cos, sin, interleaved, inverse)
    return output


def as_table(table: Tensor, input: Tensor) -> Tensor:
    """cos or sin in a dtype that kernels read beside input's."""
    if table.dtype == input.dtype or (table.dtype == torch.float32 and input.dtype.itemsize == 2):
        return table
    return table.to(torch.promote_types(input.dtype, torch.float32))


def rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates pairs of features by the angle of their position: (a, b) -> (a cos - b sin, b cos + a sin).

    Su et al. 2021 (arXiv:2104.09864). Features behind the rotated ones are passed on as they are. The gradient of
    input is the rotation the other way, by the same kernel; tables that require a gradient run the reference formula,
    with a FallbackWarning.

    Args:
        input: (*, L, D), queries or keys by heads, in any layout: float32, float64, bfloat16 or float16.
        cos, sin: (L, R / 2) or broadcastable to (*, L, R / 2), R <= D, from rotary_tables; float32 is best, also beside
            16 bits.
        interleaved: pairs are features (2i, 2i + 1), as in the paper and GPT-J; else (i, i + R / 2), as in Llama and
            GPT-NeoX.

    Returns:
        input's shape, dtype and layout in memory; computed in float32 (float64 for float64) and rounded once.
    """
    if min(input.dim(), cos.dim()) < 2:
        raise RuntimeError(
            f"handtuned.{_OP}: input has {input.dim()} dims and cos {cos.dim()}, the least is 2, positions and "
            "features; reshape them"
        )
    if 2 * cos.shape[-1] > input.shape[-1]:
        raise RuntimeError(
            f"handtuned.{_OP}: cos has width {cos.shape[-1]}, the limit is half of input's width {input.shape[-1]}; "
            "make the tables for at most that width"
        )
    if cos.shape != sin.shape:
        raise RuntimeError(f"handtuned.{_OP}: cos has shape {list(cos.shape)}, sin has {list(sin.shape)}; pass a pair")
    if cos.shape[-2] not in (1, input.shape[-2]):
        raise RuntimeError(
            f"handtuned.{_OP}: cos has shape {list(cos.shape)}, expected {input.shape[-2]} rows, one for each position "
            "of input; make or slice the tables for them"
        )
    cos, sin = as_table(cos, input), as_table(sin, input)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        backends.fell_back("rotary", "cos or sin requires a gradient, which the kernel does not give")
        return _turn(serving.formula("rotary", input), input, cos, sin, interleaved, False)
    return _turn(kernels_for("rotary", input), input, cos, sin, interleaved, False)
