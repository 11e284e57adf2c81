"""Norm family in plain PyTorch, with the op schemas' arguments and results.

Forward:   h = input   or   round(input * keep / (1-p) + residual)
           xhat = (h - mean) * rstd,   output = xhat * weight + bias          (RMSNorm: mean = 0, no bias)
Backward:  g = grad_output * weight
           grad_h = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_new_residual   (RMSNorm: no mean(g))
           grad_weight = sum(grad_output * xhat),   grad_bias = sum(grad_output)

The backward recomputes mean and rstd from h, so that it can be differentiated once more.
Sources: Ba et al. 2016 (arXiv:1607.06450), Zhang and Sennrich 2019 (arXiv:1910.07467), torch.nn.functional.layer_norm
and rms_norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype of statistics and accumulation: float32, or float64 for float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _rows(tensor: Tensor, normalized_ndim: int) -> tuple[int, int]:
    outer = tensor.shape[: tensor.dim() - normalized_ndim]
    return int(torch.Size(outer).numel()), int(torch.Size(tensor.shape[tensor.dim() - normalized_ndim :]).numel())


def _statistics(h: Tensor, dims: tuple[int, ...], eps: float, centre: bool) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of wide h, the normalised dims kept with size 1."""
    mean = torch.zeros((), dtype=h.dtype, device=h.device)
    if centre:
        mean = h.mean(dims, keepdim=True)
        mean = mean + (h - mean).mean(dims, keepdim=True)  # what its own rounding left over
    return mean, torch.rsqrt(((h - mean) ** 2).mean(dims, keepdim=True) + eps)


def _forward(
    h: Tensor, normalized_ndim: int, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor]:
    dims = tuple(range(-normalized_ndim, 0))
    wide = _wide(h)
    mean, rstd = _statistics(wide, dims, eps, centre)
    y = (wide - mean) * rstd
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    stats = torch.stack([mean.reshape(-1), rstd.reshape(-1)]) if centre else rstd.reshape(-1)
    return y.to(h.dtype), stats


def layer_norm(
    input: Tensor, normalized_ndim: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _forward(input, normalized_ndim, weight, bias, eps, centre=True)


def layer_norm_inference(
    input: Tensor, normalized_ndim: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _forward(input, normalized_ndim, weight, bias, eps, centre=True)[0]


def rms_norm(input: Tensor, normalized_ndim: int, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(input, normalized_ndim, weight, None, eps, centre=False)


def rms_norm_inference(input: Tensor, normalized_ndim: int, weight: Tensor | None, eps: float) -> Tensor:
    return _forward(input, normalized_ndim, weight, None, eps, centre=False)[0]


def philox4x32(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words. Returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32x32-bit product overflows int64, so it is made of 16-bit halves.
        h0, l0 = _multiply(c0, 0xD2511F53)
        h1, l1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit values in int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_factor(
    shape: torch.Size, normalized_ndim: int, p: float, seed: Tensor, dtype: torch.dtype, first_row: int = 0
) -> Tensor:
    """1 / (1-p) where an element is kept, else 0; the same mask as every kernel (layout: csrc/cpu/philox.h)."""
    rows, cols = _rows(torch.empty(shape, device="meta"), normalized_ndim)
    device = seed.device
    column = torch.arange(cols, device=device)
    row = first_row + torch.arange(rows, device=device)[:, None]
    zero = torch.zeros(rows, cols, dtype=torch.int64, device=device)
    key = int(seed.item())
    words = philox4x32(
        [zero + (column // 128 * 16 + column % 16), zero + (row & MASK32), zero + (row >> 32), zero],
        (key & MASK32, (key >> 32) & MASK32),
    )
    numbers = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)])
    number = numbers.gather(0, (zero + column // 16 % 8)[None])[0]
    scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
    return ((number >= int(p * 65536 + 0.5)).to(dtype) * scale).reshape(shape)


def _add(input: Tensor, residual: Tensor, normalized_ndim: int, p: float, seed: Tensor | None) -> Tensor:
    h = _wide(input)
    if p > 0:
        assert seed is not None
        h = h * dropout_factor(input.shape, normalized_ndim, p, seed, h.dtype)
    return (h + _wide(residual)).to(input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _add(input, residual, normalized_ndim, dropout_p, seed)
    y, stats = _forward(h, normalized_ndim, weight, bias, eps, centre=True)
    return y, h, stats


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_ndim: int,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _add(input, residual, normalized_ndim, dropout_p, seed)
    y, rstd = _forward(h, normalized_ndim, weight, None, eps, centre=False)
    return y, h, rstd


def _saved_statistics(h: Tensor, dims: tuple[int, ...], stats: Tensor, centre: bool) -> tuple[Tensor, Tensor]:
    """(mean, rstd) with the saved values and, where a gradient is recorded, with their dependence on h.

    var + eps = 1 / rstd^2, so eps need not be known: it is the constant between the two.
    """
    shape = [*h.shape[: h.dim() + dims[0]], *[1] * len(dims)]
    rstd = (stats[1] if centre else stats).reshape(shape)
    saved_mean = stats[0].reshape(shape) if centre else torch.zeros((), dtype=h.dtype, device=h.device)
    if not (torch.is_grad_enabled() and h.requires_grad):
        return saved_mean, rstd
    mean = h.mean(dims, keepdim=True) if centre else saved_mean
    variance = ((h - mean) ** 2).mean(dims, keepdim=True)
    return mean, torch.rsqrt(variance + (rstd**-2 - variance).detach())


def _backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    h: Tensor,
    normalized_ndim: int,
    stats: Tensor,
    weight: Tensor | None,
    centre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Wide gradients of h, weight and bias."""
    dims = tuple(range(-normalized_ndim, 0))
    outer = tuple(range(h.dim() - normalized_ndim))
    wide, dy = _wide(h), _wide(grad_output)
    mean, rstd = _saved_statistics(wide, dims, stats, centre)
    xhat = (wide - mean) * rstd
    g = dy if weight is None else dy * _wide(weight)
    grad = g - xhat * (g * xhat).mean(dims, keepdim=True)
    if centre:
        grad = grad - g.mean(dims, keepdim=True)
    grad = grad * rstd
    if grad_new_residual is not None:
        grad = grad + _wide(grad_new_residual)
    if not outer:  # a single row
        return grad, dy * xhat, dy
    return grad, (dy * xhat).sum(outer), dy.sum(outer)


def _wanted(wanted: bool, grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.to(dtype) if wanted else grad.new_empty(0, dtype=dtype)


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_ndim: int,
    stats: Tensor,
    weight: Tensor | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, grad_weight, grad_bias = _backward(grad_output, None, input, normalized_ndim, stats, weight, centre=True)
    dtype = input.dtype if weight is None else weight.dtype
    return (
        _wanted(need_input, grad, input.dtype),
        _wanted(need_weight, grad_weight, dtype),
        _wanted(need_bias, grad_bias, dtype),
    )


def rms_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_ndim: int,
    rstd: Tensor,
    weight: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad, grad_weight, _ = _backward(grad_output, None, input, normalized_ndim, rstd, weight, centre=False)
    dtype = input.dtype if weight is None else weight.dtype
    return _wanted(need_input, grad, input.dtype), _wanted(need_weight, grad_weight, dtype)


def _through_dropout(grad: Tensor, normalized_ndim: int, p: float, seed: Tensor | None) -> Tensor:
    if p == 0:
        return grad
    assert seed is not None
    return grad * dropout_factor(grad.shape, normalized_ndim, p, seed, grad.dtype)


def add_layer_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_ndim: int,
    stats: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = new_residual
    grad, grad_weight, grad_bias = _backward(
        grad_output, grad_new_residual, h, normalized_ndim, stats, weight, centre=True
    )
    dtype = h.dtype if weight is None else weight.dtype
    return (
        _wanted(need_input and dropout_p > 0, _through_dropout(grad, normalized_ndim, dropout_p, seed), h.dtype),
        _wanted(need_residual or need_input, grad, h.dtype),
        _wanted(need_weight, grad_weight, dtype),
        _wanted(need_bias, grad_bias, dtype),
    )


def add_rms_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_ndim: int,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    h = new_residual
    grad, grad_weight, _ = _backward(grad_output, grad_new_residual, h, normalized_ndim, rstd, weight, centre=False)
    dtype = h.dtype if weight is None else weight.dtype
    return (
        _wanted(need_input and dropout_p > 0, _through_dropout(grad, normalized_ndim, dropout_p, seed), h.dtype),
        _wanted(need_residual or need_input, grad, h.dtype),
        _wanted(need_weight, grad_weight, dtype),
    )
