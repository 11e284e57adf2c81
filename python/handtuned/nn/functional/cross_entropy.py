"""Cross-entropy of a linear layer's outputs, the logits of a language model's head, which are never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import Function

from ... import ops
from ...autograd import apply, backward_op, is_distributed, kernels_for, wants_grad
from ...ops.cross_entropy import REDUCTIONS
from .linear import _autocast
from .norm import _or_none

_OP = "linear_cross_entropy"
_NUMBER = {name: number for number, name in enumerate(REDUCTIONS)}
KEPT_BYTES = 2**28  # most that probabilities take between forward and backward


def _classes_kept(kernels: Any, input: Tensor, linear_weight: Tensor, target: Tensor, softcap: float) -> int:
    """Of how many classes the forward keeps probabilities; for the others the backward makes the logits again."""
    on_cpu = input.device.type == "cpu" and (kernels is ops or kernels.chosen.backend == "cpu")
    if not on_cpu or softcap or linear_weight.dim() != 2:
        return 0
    classes: int = linear_weight.shape[0]
    bytes_of_class = target.numel() * input.element_size()
    return classes if bytes_of_class * classes <= KEPT_BYTES else KEPT_BYTES // bytes_of_class


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        *options: Any,
    ) -> Tensor:
        *_, softcap, _z_loss = options
        keep = _classes_kept(kernels, input, linear_weight, target, softcap)
        loss, *found = kernels.linear_cross_entropy(input, linear_weight, linear_bias, target, weight, *options, keep)
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, *found)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:4]
        found = backward_op(
            "linear_cross_entropy_backward", ctx.kernels, grad_loss, *ctx.saved_tensors, *ctx.options, *needs
        )
        grads = (_or_none(need, grad) for need, grad in zip(needs, found, strict=True))
        return (None, *grads, None, None, *(None for _ in ctx.options))


def _total_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: the rows that count, by their weights."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return (weight[torch.where(counts, target, 0)] * counts).sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target) without the logits.

    torch.nn.functional.linear_cross_entropy (torch 2.13) with class numbers as targets. The memory that it needs beside
    its arguments and gradients grows with the rows and with the classes; with their product only up to 256 MB of
    probabilities, kept from forward to backward on the CPU, which makes the logits of classes beyond those again. Rows
    that are left out by ignore_index cost nothing. Differentiable in input, linear_weight and linear_bias, to any
    order.

    Args:
        input: (*, in_features), float32, float64, bfloat16 or float16.
        linear_weight: (classes, in_features); linear_bias: (classes,); input's dtype.
        target: (*) int64, classes from 0 on.
        weight: (classes,), a factor for each class, of input's dtype; no gradient.
        reduction: "mean" (over the rows that count, by their weights), "sum" or "none".
        ignore_index: the target of rows that do not count; None: -100.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes.
        options: torch's LinearCrossEntropyOptions, how it cuts the work into pieces; not used, there is one way here.
        softcap: c > 0 makes of each logit z c tanh(z / c), as Gemma 2 does.
        z_loss: adds z_loss times the square of the log-sum-exp to the loss of each row (PaLM).

    Returns:
        A number, or (*) for reduction "none", of input's dtype (float32 under autocast); NaN for the mean of no rows.

    Errors: RuntimeError naming the argument, its value, the limit and the remedy. Probabilities as targets and weights
    of more than two dims are for torch's function.
    """
    number = _NUMBER.get(reduction)
    if number is None:
        raise RuntimeError(
            f"handtuned.{_OP}: reduction is {reduction!r}, allowed are {', '.join(REDUCTIONS)}; pass one of them"
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"handtuned.{_OP}: weight requires a gradient, but it has none; detach it")
    dtype = input.dtype
    if _any_autocast() and torch.is_autocast_enabled(input.device.type):
        input, linear_weight, linear_bias, weight = _autocast(input, linear_weight, linear_bias, weight)  # type: ignore[assignment]
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
    kernels = kernels_for(_OP, input)
    ignored = -100 if ignore_index is None else ignore_index
    divides = reduction == "mean" and is_distributed(input)  # a mean is not the sum of the processes' means
    number = _NUMBER["sum"] if divides else number
    numbers = (number, ignored, float(label_smoothing), float(softcap), float(z_loss))
    given = (input, linear_weight, linear_bias, target, weight, *numbers)
    if torch.is_grad_enabled() and wants_grad(kernels, input, linear_weight, linear_bias):
        loss: Tensor = apply(_LinearCrossEntropy, kernels, *given)
    else:
        loss = kernels.linear_cross_entropy(*given, 0)[0]
    if divides:
        loss = loss / _total_weight(target, weight, ignored)
    return loss.to(dtype)
