"""Linear as a function, with what usually follows it done in the same pass: activation, dropout, residual add.

Sums are float32 (float64 for float64 tensors) and results are rounded once, after the last step. The backward is an op
of its own and can be differentiated again. On CPU any strides are read in place as long as each row is contiguous, else
the tensor is copied once; outputs are contiguous. Under autocast tensors are taken in its dtype, as by torch's linear.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import Function

from ...autograd import apply, backward_op, kernels_for, wants_grad
from ...ops.linear import ACTIVATIONS
from .norm import _draw_seed, _dropout, _or_none

_NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}


def output_tells_slope(activation: int, residual: Tensor | None) -> bool:
    """Whether the output serves a backward as well as what stands before the activation, which need not be kept then:
    ReLU's is above 0 in the same places, but where dropout put a 0, and there the gradient is 0 too."""
    return ACTIVATIONS[activation] == "relu" and residual is None


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        packed: Tensor | None,
        activation: int,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:
        args = (input, weight, bias, residual, packed, activation, p, seed)
        if output_tells_slope(activation, residual):
            output = preactivation = kernels.linear_inference(*args)
        else:
            output, preactivation = kernels.linear(*args)
        ctx.kernels, ctx.activation, ctx.p = kernels, activation, p
        ctx.save_for_backward(input, weight, bias, preactivation, seed)
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, preactivation, seed = ctx.saved_tensors
        _, need_input, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if need_input or need_weight or need_bias:
            found = backward_op(
                "linear_backward",
                ctx.kernels,
                *(grad_output, input, weight, bias, preactivation, ctx.activation, ctx.p, seed),
                *(need_input, need_weight, need_bias),
            )
            needs = (need_input, need_weight, need_bias)
            grads = tuple(_or_none(need, grad) for need, grad in zip(needs, found, strict=True))
        return (None, *grads, _or_none(need_residual, grad_output), None, None, None, None)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast float32 and 16-bit tensors in its dtype, as torch's own linear takes them."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]
    return tuple(cast)


def activation_number(op: str, activation: str) -> int:
    number = _NUMBER.get(activation)
    if number is None:
        raise RuntimeError(
            f"handtuned.{op}: activation is {activation!r}, allowed are {', '.join(ACTIVATIONS)}; pass one of them"
        )
    return number


def pack_linear_weight(weight: Tensor) -> Tensor:
    """The weight in the order in which linear reads it, for linear's argument `packed`.

    Args:
        weight: (out_features, in_features), float32, float64, bfloat16 or float16.

    Returns:
        A tensor of weight's dtype and of its size, out_features rounded up to a multiple of 64. It is a copy: it does
        not follow later changes of weight, and carries no gradient.
    """
    with torch.no_grad():
        packed: Tensor = kernels_for("linear_pack", weight).linear_pack(weight)
    return packed


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """dropout(activation(input weight^T + bias)) + residual: torch.nn.functional.linear and what follows it.

    Args:
        input: (*, in_features), float32, float64, bfloat16 or float16.
        weight: (out_features, in_features); bias: (out_features,); input's dtype.
        activation: "none", "relu", "gelu", "gelu_tanh" (torch's approximate="tanh") or "silu".
        residual: (*, out_features), added last; input's dtype.
        dropout_p: probability of dropping an element of the activation, in [0, 1], in steps of 2^-16; the mask as in
            add_layer_norm.
        training: False switches the dropout off.
        packed: what pack_linear_weight made of this very weight, for a weight that is used more than once; without it
            the weight is packed in each call. Ignored where autocast takes the weight in another dtype.

    Returns:
        A contiguous tensor (*, out_features) of input's dtype.
    """
    number = activation_number("linear", activation)
    if _any_autocast():
        before = weight
        input, weight, bias, residual = _autocast(input, weight, bias, residual)  # type: ignore[assignment]
        packed = packed if weight.dtype == before.dtype else None
    kernels = kernels_for("linear", input)
    p = _dropout("linear", dropout_p, training) if dropout_p else 0.0
    seed = _draw_seed(input) if p > 0 else None
    if torch.is_grad_enabled() and wants_grad(kernels, input, weight, bias, residual):
        output: Tensor = apply(_Linear, kernels, input, weight, bias, residual, packed, number, p, seed)
        return output
    output = kernels.linear_inference(input, weight, bias, residual, packed, number, p, seed)
    return output
