"""Rotary position embedding: plain torch code, differentiable to any order, on any device, fused by torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

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


def rotary_embedding(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates pairs of features by the angle of their position: (a, b) -> (a cos - b sin, b cos + a sin).

    Su et al. 2021 (arXiv:2104.09864). Features behind the rotated ones are passed on as they are.

    Args:
        input: (*, L, D), queries or keys by heads.
        cos, sin: (L, R / 2) or broadcastable to (*, L, R / 2), R <= D, from rotary_tables.
        interleaved: pairs are features (2i, 2i + 1), as in the paper and GPT-J; else (i, i + R / 2), as in Llama and
            GPT-NeoX.

    Returns:
        input's shape and dtype; computed in the wider dtype of input and cos.
    """
    rotated = 2 * cos.shape[-1]
    if rotated > input.shape[-1]:
        raise RuntimeError(
            f"handtuned.{_OP}: cos has width {cos.shape[-1]}, the limit is half of input's width {input.shape[-1]}; "
            "make the tables for at most that width"
        )
    if cos.shape != sin.shape:
        raise RuntimeError(f"handtuned.{_OP}: cos has shape {list(cos.shape)}, sin has {list(sin.shape)}; pass a pair")
    if cos.dim() < 2 or cos.shape[-2] not in (1, input.shape[-2]):
        raise RuntimeError(
            f"handtuned.{_OP}: cos has shape {list(cos.shape)}, expected {input.shape[-2]} rows, one for each position "
            "of input; make or slice the tables for them"
        )
    x, rest = input[..., :rotated], input[..., rotated:]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    turned = turned.to(input.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
