"""Linear with a weight of int8: a quarter of float32's bytes, half of bfloat16's, for inference.

The weight is symmetric with one scale for each output feature. By default it is all that is quantised: the result is
that of the dequantised weight, as exactly as linear computes. With quantize_input each row of the input is rounded to 8
bits too, which is faster and less exact; sums are then integers, the same on every instruction set.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import Function

from ... import ops, reference
from ...autograd import apply, backward_op, kernels_for, wants_grad
from .linear import _autocast, activation_number, output_tells_slope
from .norm import _draw_seed, _dropout, _or_none


class _LinearInt8(Function):
    """The gradient goes through the dequantised weight, as if neither rounding had been done; q and scale get none."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        input: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: int,
        p: float,
        seed: Tensor | None,
        quantize_input: bool,
    ) -> Tensor:
        told = output_tells_slope(activation, residual)
        args = (packed, scale, bias, residual, activation, p, seed, quantize_input, not told)
        output, preactivation = kernels.linear_int8(input, *args)
        preactivation = output if told else preactivation
        ctx.kernels, ctx.activation, ctx.p = kernels, activation, p
        ctx.save_for_backward(input, packed, scale, bias, preactivation, seed)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, packed, scale, bias, preactivation, seed = ctx.saved_tensors
        _, need_input, _, _, need_bias, need_residual, *_ = ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = (None, None)
        if need_input or need_bias:
            weight = reference.dequantize(packed, scale, input.shape[-1], input.dtype)
            grad_input, _, grad_bias = backward_op(
                "linear_backward",
                ctx.kernels,
                *(grad_output, input, weight, bias, preactivation, ctx.activation, ctx.p, seed),
                *(need_input, False, need_bias),
            )
            grads = (_or_none(need_input, grad_input), _or_none(need_bias, grad_bias))
        grad_residual = _or_none(need_residual, grad_output)
        return None, grads[0], None, None, grads[1], grad_residual, None, None, None, None


def quantize_linear_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 and a scale for each of its rows: weight ~ scale[:, None] * quantized.

    Args:
        weight: (out_features, in_features), of a floating-point dtype.

    Returns:
        quantized, int8 like weight, from -127 to 127; scale (out_features,) float32, a row's largest value over 127.
    """
    if weight.dim() != 2:
        raise RuntimeError(
            f"handtuned.quantize_linear_weight: weight has shape {list(weight.shape)}, expected "
            "[out_features, in_features]; reshape it"
        )
    return reference.quantize_weight(weight)


def pack_int8_weight(quantized: Tensor) -> Tensor:
    """An int8 weight in the order in which linear_int8 reads it.

    Args:
        quantized: (out_features, in_features) int8.

    Returns:
        int8 of quantized's size, out_features rounded up to a multiple of 64 and in_features to one of 4, and 4 bytes
        more for each row; the same for every instruction set.
    """
    packed: Tensor = ops.linear_int8_pack(quantized)  # one layout for all backends, so none is asked for
    return packed


def linear_int8(
    input: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    quantize_input: bool = False,
) -> Tensor:
    """dropout(activation(input (scale * quantized)^T + bias)) + residual.

    Args:
        input: (*, in_features), float32, bfloat16 or float16.
        packed: what pack_int8_weight made.   scale: (out_features,) float32, as quantize_linear_weight made it.
        bias: (out_features,), input's dtype.
        activation, residual, dropout_p, training: as linear's.
        quantize_input: round each row of input to 8 bits, between its smallest value (or 0) and its largest (or 0), and
            sum in integers; in_features is then at most 65536. A row with a value that is not finite gives NaN.

    Returns:
        A contiguous tensor (*, out_features) of input's dtype. Gradients reach input, bias and residual, through the
        dequantised weight; input's as if it had not been rounded.
    """
    number = activation_number("linear_int8", activation)
    if _any_autocast():
        input, bias, residual = _autocast(input, bias, residual)  # type: ignore[assignment]
    kernels = kernels_for("linear_int8", input)
    p = _dropout("linear_int8", dropout_p, training) if dropout_p else 0.0
    seed = _draw_seed(input) if p > 0 else None
    args = (packed, scale, bias, residual, number, p, seed, quantize_input)
    if torch.is_grad_enabled() and wants_grad(kernels, input, bias, residual, scale):
        if scale.requires_grad:
            raise RuntimeError(
                "handtuned.linear_int8: scale requires grad, which an int8 weight has none of; detach it, or train the "
                "float layer and quantize it after"
            )
        output: Tensor = apply(_LinearInt8, kernels, input, *args)
        return output
    output, _ = kernels.linear_int8(input, *args, False)
    return output
