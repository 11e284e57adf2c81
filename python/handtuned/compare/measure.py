"""The measuring behind compare(): errors against float64, times of two sides in turn, and the kernels that served."""

from __future__ import annotations

import collections
import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ..explain import explain
from ..replace import Replaced
from .result import Kernel, Ratio

SHORTEST_SAMPLE = 2e-3  # seconds; short calls are repeated to fill it, so that the clock's grain does not show
FEWEST_ROUNDS, MOST_ROUNDS = 3, 200


# ---- errors ---------------------------------------------------------------------------------------------------------


def float_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):  # the usual case, and inside what is timed
        return [value] if value.is_floating_point() else []
    leaves = _pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def map_floats(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every floating-point tensor replaced by function(tensor)."""
    return _pytree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value
    )


def relative_error(actual: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """max |actual - exact| / max |exact| of each pair of tensors; the worst of the pairs."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        if e.numel():
            largest = e.abs().max().item()
            worst = max(worst, (a.double() - e).abs().max().item() / (largest or 1.0))
    return worst


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """Largest 1 - cosine between rows of a and b, as |a/|a| - b/|b||² / 2, which does not cancel. (rows, features)"""
    a, b = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (a, b))
    return float(((a - b) ** 2).sum(-1).max().item() / 2)


# ---- one replaced module on an input that was caught ----------------------------------------------------------------


@dataclass
class Subject:
    """A replaced module as torch's and as its twin, sharing parameters, and its input in the model."""

    name: str
    kind: str
    theirs: torch.nn.Module
    ours: torch.nn.Module
    args: Any
    kwargs: Any
    wanted: list[Tensor]  # what gradients are taken of: inputs, then parameters
    output_grads: list[Tensor]  # fixed random ones

    @classmethod
    def of(cls, row: Replaced, rows: list[Replaced], args: Any, kwargs: Any) -> Subject:
        """rows: all that were replaced, among them what is inside of this one."""
        theirs, ours = _sides(row, rows)
        args, kwargs = map_floats(lambda t: t.requires_grad_(), (args, kwargs))
        wanted = [*float_tensors((args, kwargs)), *theirs.parameters()]
        generator = torch.Generator().manual_seed(0)
        grads = [
            torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            for output in float_tensors(theirs(*args, **kwargs))
        ]
        return cls(row.name, row.before.__name__, theirs, ours, args, kwargs, wanted, grads)

    @property
    def shape(self) -> list[int]:
        return list(float_tensors((self.args, self.kwargs))[0].shape)

    def gradients(self, module: torch.nn.Module) -> list[Tensor]:
        outputs = float_tensors(module(*self.args, **self.kwargs))
        return list(torch.autograd.grad(outputs, self.wanted, self.output_grads))

    def errors(self, backward: bool) -> tuple[float, float]:
        """(torch's, handtuned's) error of the outputs, or of the gradients."""
        exact = self.in_float64()
        if backward:
            return self._against(exact.gradients(exact.theirs), self.gradients)
        with torch.no_grad():
            results = float_tensors(exact.theirs(*exact.args, **exact.kwargs))
            return self._against(results, lambda module: float_tensors(module(*self.args, **self.kwargs)))

    def _against(self, exact: list[Tensor], run: Callable[[torch.nn.Module], list[Tensor]]) -> tuple[float, float]:
        return relative_error(run(self.theirs), exact), relative_error(run(self.ours), exact)

    def in_float64(self) -> Subject:
        """The same numbers, weights and inputs alike, in float64."""
        module = copy.deepcopy(self.theirs).double()
        args, kwargs = map_floats(lambda t: t.detach().double().requires_grad_(), (self.args, self.kwargs))
        wanted = [*float_tensors((args, kwargs)), *module.parameters()]
        grads = [grad.double() for grad in self.output_grads]
        return Subject(self.name, self.kind, module, module, args, kwargs, wanted, grads)


def _sides(row: Replaced, rows: list[Replaced]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two copies of a module that share its parameters, one all torch's, in the other all that has a twin is it."""
    shared: dict[int, Any] = {id(t): t for t in (*row.module.parameters(), *row.module.buffers())}
    theirs, ours = (copy.deepcopy(row.module, dict(shared)) for _ in range(2))
    for inside in rows:
        if inside.name == row.name or inside.name.startswith(f"{row.name}."):
            name = inside.name[len(row.name) + 1 :]
            theirs.get_submodule(name).__class__ = inside.before
            ours.get_submodule(name).__class__ = inside.after
    return theirs, ours


def catch_inputs(replaced: list[Replaced], run: Callable[[], Any]) -> dict[str, tuple[Any, Any]]:
    """Module name -> (args, kwargs) of its first call while run() runs; copies, with their strides kept."""
    caught: dict[str, tuple[Any, Any]] = {}

    def catch(name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if name not in caught:
                caught[name] = map_floats(lambda t: t.detach().clone(), (args, kwargs))

        return hook

    hooks = [row.module.register_forward_pre_hook(catch(row.name), with_kwargs=True) for row in replaced]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return caught


# ---- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """What is timed, and what is done before each sample without being timed."""

    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds per run, and the ratio of every round, torch's / handtuned's."""

    theirs: float
    ours: float
    ratios: list[float]

    @property
    def ratio(self) -> Ratio:
        p10, median, p90 = quantiles(self.ratios, 0.1, 0.5, 0.9)
        return Ratio(median, p10, p90)


def interleave(
    theirs: Side, ours: Side, seconds: float, rounds: int | None, progress: Callable[[float], None]
) -> Timing:
    """Times both sides in one process, in turn, who goes first alternating, for `rounds` rounds or about `seconds`."""
    sides = (theirs, ours)
    started = time.perf_counter()
    repeats = max(1, math.ceil(SHORTEST_SAMPLE / min(_warm_up(side) for side in sides)))
    samples: tuple[list[float], list[float]] = ([], [])
    done = 0.0
    while done < 1:
        first = len(samples[0]) % 2
        for which in (first, 1 - first):
            samples[which].append(_sample(sides[which], repeats))
        progress(done := _done(len(samples[0]), time.perf_counter() - started, seconds, rounds))
    ratios = [a / b for a, b in zip(*samples, strict=True)]
    return Timing(quantiles(samples[0], 0.5)[0], quantiles(samples[1], 0.5)[0], ratios)


def _warm_up(side: Side) -> float:
    """Seconds of a run, the first of a short one not counted."""
    first = _sample(side, 1)
    return _sample(side, 2) if first < 10 * SHORTEST_SAMPLE else first


def _sample(side: Side, repeats: int) -> float:
    side.prepare()
    started = time.perf_counter()
    for _ in range(repeats):
        side.run()
    return (time.perf_counter() - started) / repeats


def _done(rounds: int, elapsed: float, seconds: float, rounds_wanted: int | None) -> float:
    """How much of the work is done; 1 is all."""
    if rounds_wanted is not None:
        return rounds / rounds_wanted
    return min(rounds / FEWEST_ROUNDS, max(elapsed / seconds, rounds / MOST_ROUNDS))


def quantiles(values: list[float], *at: float) -> list[float]:
    found: list[float] = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(at, dtype=torch.float64)).tolist()
    )
    return found


# ---- kernels --------------------------------------------------------------------------------------------------------


def kernels(run: Callable[[], Any]) -> list[Kernel]:
    """Which kernels served the calls of one run, in order of first use."""
    calls = explain(run).calls
    counted = collections.Counter((call.op, call.served_by.backend, call.served_by.kernel) for call in calls)
    return [Kernel(*served, count) for served, count in counted.items()]
