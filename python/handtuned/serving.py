"""How a call reaches what serves it. backends.py says what that is.

An op's arguments are the same for every backend, so a backend is a namespace of functions named like the ops:
``ops`` (torch's dispatcher: the compiled CPU and CUDA kernels, and whatever ``serve_device`` finds where there are
none), the Triton launchers, or ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import backends, ops, reference
from ._binary import OP_NAMESPACE
from .backends import Call, Candidate


def namespace(backend: str) -> Any:
    if backend == "reference":
        return reference
    if backend == "triton":
        from .triton_kernels import kernels

        return kernels
    return ops


# ---- from the dispatcher ---------------------------------------------------------------------------------------------


def serve_device(op: str, main: torch.Tensor, mode: str, args: tuple[Any, ...]) -> Any:
    """The dispatcher's kernel for every device but the CPU; arguments are checked and on `main`'s device."""
    chosen, table = backends.choose(op, main.device, main.dtype, mode)
    backends.say_if_formula(op, chosen, table)
    return getattr(namespace(chosen.backend), op)(*args)


def _on_devices(op: str) -> Callable[..., Any]:
    def serve(*args: Any) -> Any:
        found = ops.arguments(op, args)
        return serve_device(op, found.main, found.mode, args)

    return serve


for _op in ops.OPS:  # every device without a kernel in C++
    torch.library.impl(f"{OP_NAMESPACE}::{_op}", "CompositeExplicitAutograd", _on_devices(_op))


# ---- without it ------------------------------------------------------------------------------------------------------


class Direct:
    """A backend called without the dispatcher (or watched by explain()): notes and checks each call, then runs it."""

    def __init__(self, kernels: Any, chosen: Candidate, table: list[Candidate]) -> None:
        self.kernels, self.chosen, self.table = kernels, chosen, table

    @property
    def is_formula(self) -> bool:
        """True if torch's autograd differentiates what runs."""
        return self.chosen.backend == "reference"

    def note(self, op: str, args: tuple[Any, ...]) -> Call | None:
        """Checks a call's arguments and writes it into explain()'s record."""
        arguments, calls = ops.arguments(op, args), backends.recorded()
        if calls is None:
            return None
        calls.append(Call(op, self.chosen, self.table, arguments.copies()))
        return calls[-1]

    def __getattr__(self, op: str) -> Any:
        def call(*args: Any) -> Any:
            noted = self.note(op, args)
            if noted is None or self.chosen.backend != "triton":
                return getattr(self.kernels, op)(*args)
            from .triton_kernels import tuning

            with tuning.noted(noted.notes):
                return getattr(self.kernels, op)(*args)

        return call


def kernels(op: str, input: torch.Tensor, mode: str = "") -> Direct:
    """The namespace that serves an op (and its backward) on this input, when the dispatcher alone does not tell."""
    chosen, table = backends.choose(op, input.device, input.dtype, mode)
    backends.say_if_formula(op, chosen, table)
    automatic = backends.is_automatic() and chosen.backend != "reference"
    return Direct(ops if automatic else namespace(chosen.backend), chosen, table)


def formula(op: str, input: torch.Tensor) -> Direct:
    """The reference as a namespace."""
    return Direct(reference, Candidate("reference", "torch"), backends.candidates(op, input.device, input.dtype))
