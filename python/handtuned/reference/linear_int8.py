"""Linear with an int8 weight in plain PyTorch, with the op schemas' arguments and results.

Weight:    scale[n] = max |W[n]| / 127,   q[n][k] = round(W[n][k] / scale[n]),   so W ~ scale q
Forward:   z = input (scale q)^T + bias,  then as linear
Quantised input: of each row s = (high - low) / 255 with low = min(0, row), high = max(0, row),
           u = clamp(round(input / s) + zero, 0, 255) with zero = round(-low / s), so input ~ s (u - zero)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import PANEL, linear

QUAD = 4  # neighbours of a column that a packed weight has side by side
TINY = 2.0**-126  # rows whose scale is below it are taken for zeros


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 like weight, scale [out_features] float32)."""
    wide = weight.detach().to(torch.float32)
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scale = largest / 127
    quantized = (wide / torch.where(scale > 0, scale, 1.0)[:, None]).round().clamp(-127, 127)
    return quantized.to(torch.int8), scale


def linear_int8_pack(weight: Tensor) -> Tensor:
    """packed[p, s, n] is weight[64 p + n, 4 s : 4 s + 4], zeros beyond; in the last step the row's sum, an int32."""
    n, k = weight.shape
    padded = F.pad(weight, (0, -k % QUAD, 0, -n % PANEL)).reshape(-(-n // PANEL), PANEL, -(-k // QUAD), QUAD)
    sums = padded.to(torch.int32).sum((2, 3), dtype=torch.int32)
    last = sums.unsqueeze(-1).contiguous().view(torch.int8)
    return torch.cat([padded.transpose(1, 2), last.unsqueeze(1)], 1)


def linear_int8_unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The int8 weight [out_features, in_features] of a packed one."""
    panels, steps, _, _ = packed.shape
    weight = packed[:, :-1].transpose(1, 2).reshape(panels * PANEL, (steps - 1) * QUAD)
    return weight[:out_features, :in_features].contiguous()


def dequantize(packed: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """scale q [out_features, in_features], rounded once to dtype."""
    weight = linear_int8_unpack(packed, scale.shape[0], in_features)
    return (weight.to(torch.float32) * scale[:, None]).to(dtype)


def _quantized_rows(input: Tensor) -> Tensor:
    """s (u - zero) in float32; NaN throughout a row with a number that is not finite."""
    x = input.detach().to(torch.float32)
    if not x.shape[-1]:
        return x
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = high / 255 - low / 255
    inverse = torch.where(scale >= TINY, 1 / scale, 0.0)
    zero = (-low * inverse).round()
    levels = ((x * inverse).round() + zero).clamp(0, 255) - zero
    finite = x.isfinite().all(-1, keepdim=True)
    return torch.where(finite, levels * scale, torch.nan)


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
    x = input.to(torch.float32)
    if quantize_input:
        x = x + (_quantized_rows(input) - x).detach()  # its gradient is that of x as it is
    weight = dequantize(packed, scale, input.shape[-1], torch.float32)
    bias, residual = (None if t is None else t.to(torch.float32) for t in (bias, residual))
    output, preactivation = linear(x, weight, bias, residual, None, activation, dropout_p, seed)
    saved = activation and need_preactivation
    return output.to(input.dtype), preactivation.to(input.dtype) if saved else input.new_empty(0)
