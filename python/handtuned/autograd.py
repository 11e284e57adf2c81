"""What the families' autograd.Functions share.

A Function is used only where a gradient is wanted. Its forward and backward are ops; the backward of a backward
recomputes the reference formula of the backward op under autograd, so second and higher derivatives are exact.
torch.func transforms (grad, vmap, jvp, ...) and forward-mode AD run the reference formula throughout: it is made of
torch's own differentiable, batchable ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.autograd import Function, forward_ad

from . import backends, ops, reference, serving


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without the import of torch.distributed.tensor."""
    return type(tensor) is not Tensor and type(tensor).__name__ == "DTensor"


def kernels_for(op: str, input: Tensor, mode: str = "") -> Any:
    """The namespace that serves a call: torch's dispatcher, unless a switch or a transform says otherwise.

    mode: of a recurrent op.
    """
    if _transforms_active() or forward_ad._current_level >= 0:
        backends.fell_back(op, "a torch.func transform or forward-mode AD is active, which kernels cannot enter")
        return serving.formula(op, input)
    if is_distributed(input):
        from . import sharding  # noqa: F401 (here, since it is slow to import; registers the ops' rules)
    return ops if backends.dispatched(input, mode) else serving.kernels(op, input, mode)


def wants_grad(kernels: Any, *tensors: Tensor | None) -> bool:
    """Whether a call needs an autograd.Function: a gradient is wanted and torch cannot find it by itself.

    Callers ask torch.is_grad_enabled() first, which is all that inference pays for.
    """
    if kernels is not ops and kernels.is_formula:
        return False
    for tensor in tensors:  # noqa: SIM110 (any() over a generator takes three times as long)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def apply(function: type[Function], *args: Any) -> Any:
    """function.apply(*args), in a form that torch.compile can trace."""
    if torch.compiler.is_compiling():
        args = _traceable(args)
    return function.apply(*args)


def _traceable(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Under dynamic=True dynamo makes of a number a symbol where it first meets it. If that is inside a Function, the
    next Function cannot see it: so here. And a Function of dynamo's takes no tensor twice."""
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, float):
            arg = float(arg)
        elif isinstance(arg, Tensor) and any(arg is other for other in found):
            arg = arg.view_as(arg)
        found.append(arg)
    return tuple(found)


def _view(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def _flat(args: tuple[Any, ...]) -> tuple[list[int | None], list[Any]]:
    """Arguments with lists of tensors laid open (autograd does not look into them), and each list's length."""
    counts = [len(arg) if isinstance(arg, list) else None for arg in args]
    return counts, [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]


def _nested(counts: list[int | None], flat: list[Any]) -> list[Any]:
    items = iter(flat)
    return [next(items) if count is None else [next(items) for _ in range(count)] for count in counts]


class _BackwardOp(Function):
    """A backward op that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, op: str, kernels: Any, counts: list[int | None], *args: Any) -> tuple[Tensor, ...]:
        ctx.op, ctx.counts = op, counts
        ctx.set_materialize_grads(False)
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        result: tuple[Tensor, ...] = getattr(kernels, op)(*_nested(counts, list(args)))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views cut each argument off from the others' history (an input may itself depend on the weight), so that
            # partial derivatives are taken, and still lead back to it for the derivatives above.
            args = [
                _view(next(saved)) if is_tensor else other
                for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
            ]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
            outputs = getattr(reference, ctx.op)(*_nested(ctx.counts, args))
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [args[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        result: list[Tensor | None] = [None] * len(args)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return (None, None, None, *result)


def backward_op(op: str, kernels: Any, *args: Any) -> tuple[Tensor, ...]:
    """Runs a backward op, differentiably when autograd asks for it (create_graph=True)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        counts, flat = _flat(args)
        result: tuple[Tensor, ...] = _BackwardOp.apply(op, kernels, counts, *flat)  # type: ignore[no-untyped-call]
        return result
    result = getattr(kernels, op)(*args)
    return result
