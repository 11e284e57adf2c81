"""LayerNorm and RMSNorm as functions: arguments made canonical, autograd only where a gradient is wanted.

Statistics and sums are float32 (float64 for float64 tensors) and results are rounded once. weight and bias may be
float32 beside a 16-bit input. Gradients are ops of their own and can be differentiated again. On CPU any strides are
read in place as long as each row is contiguous, else the tensor is copied once; outputs are contiguous.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...autograd import apply, backward_op, kernels_for, wants_grad


def _normalized_ndim(op: str, input: Tensor, normalized_shape: Sequence[int]) -> int:
    """How many trailing dims normalized_shape names; an error if they are not input's."""
    ndim, shape = len(normalized_shape), input.shape
    if ndim == 1 and len(shape) > 0 and shape[-1] == normalized_shape[0]:  # most calls, at half the time
        return 1
    if ndim == 0 or shape[-ndim:] != torch.Size(normalized_shape):
        raise RuntimeError(
            f"handtuned.{op}: normalized_shape is {list(normalized_shape)}, expected the last dims of input, whose "
            f"shape is {list(input.shape)}; pass input.shape[-k:] with k >= 1"
        )
    return ndim


def _rms_eps(input: Tensor, eps: float | None) -> float:
    """torch's default: the machine epsilon of the dtype that statistics are computed in."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


def _draw_seed(input: Tensor) -> Tensor:
    """A Philox key from torch's generator, so torch.manual_seed() governs the masks. Stays on the device."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=input.device)


def _dropout(op: str, p: float, training: bool) -> float:
    if not 0 <= p <= 1:
        raise RuntimeError(f"handtuned.{op}: dropout_p is {p}, the limits are 0 and 1; pass a probability")
    return p if training else 0.0


def _or_none(wanted: bool, grad: Tensor) -> Tensor | None:
    return grad if wanted else None


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Any, input: Tensor, ndim: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        output, stats = kernels.layer_norm(input, ndim, weight, bias, eps)
        ctx.kernels, ctx.ndim = kernels, ndim
        ctx.save_for_backward(input, stats, weight)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, stats, weight = ctx.saved_tensors
        _, need_input, _, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias = backward_op(
            "layer_norm_backward",
            ctx.kernels,
            *(grad_output, input, ctx.ndim, stats, weight, need_input, need_weight, need_bias),
        )
        return (
            None,
            _or_none(need_input, grad_input),
            None,
            _or_none(need_weight, grad_weight),
            _or_none(need_bias, grad_bias),
            None,
        )


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, input: Tensor, ndim: int, weight: Tensor | None, eps: float) -> Tensor:
        output, rstd = kernels.rms_norm(input, ndim, weight, eps)
        ctx.kernels, ctx.ndim = kernels, ndim
        ctx.save_for_backward(input, rstd, weight)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, rstd, weight = ctx.saved_tensors
        _, need_input, _, need_weight, _ = ctx.needs_input_grad
        grad_input, grad_weight = backward_op(
            "rms_norm_backward", ctx.kernels, grad_output, input, ctx.ndim, rstd, weight, need_input, need_weight
        )
        return None, _or_none(need_input, grad_input), None, _or_none(need_weight, grad_weight), None


def _incoming(ctx: Any, h: Tensor, grad_output: Tensor | None) -> Tensor:
    """grad_output, or zeros where only new_residual was used."""
    return torch.zeros_like(h) if grad_output is None else grad_output


class _AddLayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        input: Tensor,
        residual: Tensor,
        ndim: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output, h, stats = kernels.add_layer_norm(input, residual, ndim, weight, bias, eps, p, seed)
        ctx.kernels, ctx.ndim, ctx.p = kernels, ndim, p
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, stats, weight, seed)
        return output, h

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        h, stats, weight, seed = ctx.saved_tensors
        _, need_input, need_residual, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_input, grad_residual, grad_weight, grad_bias = backward_op(
            "add_layer_norm_backward",
            ctx.kernels,
            *(_incoming(ctx, h, grad_output), grad_h, h, ctx.ndim, stats, weight, ctx.p, seed),
            *(need_input, need_residual, need_weight, need_bias),
        )
        return (
            None,
            _or_none(need_input, grad_input if ctx.p > 0 else grad_residual),
            _or_none(need_residual, grad_residual),
            None,
            _or_none(need_weight, grad_weight),
            _or_none(need_bias, grad_bias),
            None,
            None,
            None,
        )


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        input: Tensor,
        residual: Tensor,
        ndim: int,
        weight: Tensor | None,
        eps: float,
        p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output, h, rstd = kernels.add_rms_norm(input, residual, ndim, weight, eps, p, seed)
        ctx.kernels, ctx.ndim, ctx.p = kernels, ndim, p
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, rstd, weight, seed)
        return output, h

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        h, rstd, weight, seed = ctx.saved_tensors
        _, need_input, need_residual, _, need_weight, *_ = ctx.needs_input_grad
        grad_input, grad_residual, grad_weight = backward_op(
            "add_rms_norm_backward",
            ctx.kernels,
            *(_incoming(ctx, h, grad_output), grad_h, h, ctx.ndim, rstd, weight, ctx.p, seed),
            *(need_input, need_residual, need_weight),
        )
        return (
            None,
            _or_none(need_input, grad_input if ctx.p > 0 else grad_residual),
            _or_none(need_residual, grad_residual),
            None,
            _or_none(need_weight, grad_weight),
            None,
            None,
            None,
        )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm: (input - mean) / sqrt(var + eps) * weight + bias over the last dims.

    Args:
        input: (*, *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the sizes of the trailing dims to normalise over.
        weight, bias: normalized_shape; input's dtype, or float32 beside a 16-bit input.
        eps: > 0.

    Returns:
        A contiguous tensor of input's shape and dtype.
    """
    ndim = _normalized_ndim("layer_norm", input, normalized_shape)
    kernels = kernels_for("layer_norm", input)
    if torch.is_grad_enabled() and wants_grad(kernels, input, weight, bias):
        output: Tensor = apply(_LayerNorm, kernels, input, ndim, weight, bias, eps)
        return output
    output = kernels.layer_norm_inference(input, ndim, weight, bias, eps)
    return output


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm: input / sqrt(mean(input^2) + eps) * weight over the last dims.

    Args:
        input: (*, *normalized_shape), float32, float64, bfloat16 or float16.
        normalized_shape: the sizes of the trailing dims to normalise over.
        weight: normalized_shape; input's dtype, or float32 beside a 16-bit input.
        eps: > 0; None takes the machine epsilon of float32 (float64 for float64), as torch does.

    Returns:
        A contiguous tensor of input's shape and dtype.
    """
    ndim = _normalized_ndim("rms_norm", input, normalized_shape)
    kernels = kernels_for("rms_norm", input)
    eps = _rms_eps(input, eps)
    if torch.is_grad_enabled() and wants_grad(kernels, input, weight):
        output: Tensor = apply(_RMSNorm, kernels, input, ndim, weight, eps)
        return output
    output = kernels.rms_norm_inference(input, ndim, weight, eps)
    return output


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """new_residual = dropout(input) + residual, output = layer_norm(new_residual), in one pass over memory.

    Args:
        input, residual: (*, *normalized_shape), one dtype, as in layer_norm.
        normalized_shape, weight, bias, eps: as in layer_norm.
        dropout_p: probability of dropping an element of input, in [0, 1], in steps of 2^-16. The mask comes from
            Philox4x32-10 keyed by a seed drawn from torch's generator: the same on any thread count, ISA and backend,
            made again in the backward.
        training: False switches the dropout off.

    Returns:
        (output, new_residual), both of input's shape and dtype. output is the norm of new_residual as rounded.
    """
    op = "add_layer_norm"
    ndim = _normalized_ndim(op, input, normalized_shape)
    kernels = kernels_for(op, input)
    p = _dropout(op, dropout_p, training)
    seed = _draw_seed(input) if p > 0 else None
    if torch.is_grad_enabled() and wants_grad(kernels, input, residual, weight, bias):
        pair: tuple[Tensor, Tensor] = apply(_AddLayerNorm, kernels, input, residual, ndim, weight, bias, eps, p, seed)
        return pair
    output, new_residual, _ = kernels.add_layer_norm(input, residual, ndim, weight, bias, eps, p, seed)
    return output, new_residual


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """new_residual = dropout(input) + residual, output = rms_norm(new_residual), in one pass over memory.

    Arguments and results as in add_layer_norm and rms_norm.
    """
    op = "add_rms_norm"
    ndim = _normalized_ndim(op, input, normalized_shape)
    kernels = kernels_for(op, input)
    p = _dropout(op, dropout_p, training)
    eps = _rms_eps(input, eps)
    seed = _draw_seed(input) if p > 0 else None
    if torch.is_grad_enabled() and wants_grad(kernels, input, residual, weight):
        pair: tuple[Tensor, Tensor] = apply(_AddRMSNorm, kernels, input, residual, ndim, weight, eps, p, seed)
        return pair
    output, new_residual, _ = kernels.add_rms_norm(input, residual, ndim, weight, eps, p, seed)
    return output, new_residual
