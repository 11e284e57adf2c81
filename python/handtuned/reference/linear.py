"""The linear family in plain PyTorch, with the op schemas' arguments and results.

Forward:   z = input weight^T + bias,   y = activation(z) * keep / (1-p) + residual,   rounded once
Backward:  dz = grad_output * keep / (1-p) * activation'(z)
           grad_input = dz weight,   grad_weight = dz^T input,   grad_bias = sum(dz)

Sources: torch.nn.functional.linear; GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415); SiLU: Elfwing et al. 2018
(arXiv:1702.03118).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import dropout_factor

PANEL = 64  # columns of a panel of the packed weight
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype of accumulation: float32, or float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def linear_pack(weight: Tensor) -> Tensor:
    """packed[p, s, n] is weight[64 p + n, s], or for bfloat16 its elements 2 s and 2 s + 1; zeros beyond."""
    n, k = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    padded = F.pad(weight, (0, -k % pair, 0, -n % PANEL))
    panels = padded.reshape(-(-n // PANEL), PANEL, -(-k // pair), pair)
    return panels.transpose(1, 2).contiguous()


def _activate(z: Tensor, activation: int) -> Tensor:
    name = ACTIVATIONS[activation]
    if name == "relu":
        return torch.relu(z)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return F.silu(z) if name == "silu" else z


def _derivative(z: Tensor, activation: int) -> Tensor:
    name = ACTIVATIONS[activation]
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "gelu":
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
        t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


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
    z = F.linear(_wide(input), _wide(weight), None if bias is None else _wide(bias))
    y = _activate(z, activation)
    if dropout_p > 0:
        assert seed is not None
        y = y * dropout_factor(y.shape, 1, dropout_p, seed, y.dtype)
    if residual is not None:
        y = y + _wide(residual)
    saved = z.to(input.dtype) if activation else input.new_empty(0)
    return y.to(input.dtype), saved


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
    x, w, dz = _wide(input), _wide(weight), _wide(grad_output)
    if dropout_p > 0:
        assert seed is not None
        dz = dz * dropout_factor(dz.shape, 1, dropout_p, seed, dz.dtype)
    if activation:
        z = _wide(preactivation)
        if torch.is_grad_enabled():  # with its dependence on input, weight and bias
            z = F.linear(x, w, None if bias is None else _wide(bias))
        dz = dz * _derivative(z, activation)
    rows, columns = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in (dz, x))

    def wanted(need: bool, grad: Tensor) -> Tensor:
        return grad.to(input.dtype) if need else grad.new_empty(0, dtype=input.dtype)

    return (
        wanted(need_input, dz @ w),
        wanted(need_weight, rows.T @ columns),
        wanted(need_bias, rows.sum(0)),
    )
