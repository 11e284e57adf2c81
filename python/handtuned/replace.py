"""replace(model): every module whose exact type has a twin becomes the twin, in place, and a report says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import backends, nn
from .nn.twins import TWINS

Find = Callable[[torch.nn.Module], type[torch.nn.Module] | str | None]  # a module's twin, or why it is left
Kind = TypeVar("Kind", bound="Report")
GRAD = "grad of "
CONVOLUTION = "handtuned has no convolutions: torch's stay, through oneDNN"


@dataclass(frozen=True)
class Replaced:
    name: str
    module: torch.nn.Module
    before: type[torch.nn.Module]
    after: type[torch.nn.Module]


@dataclass(frozen=True)
class Left:
    name: str
    type: str
    why: str


@dataclass(frozen=True)
class Difference:
    """One tensor of a check: the largest difference between torch's modules and their twins, and the bound."""

    tensor: str
    largest: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.largest <= self.allowed


@dataclass
class Report:
    """What replace() did. Prints as a table."""

    model: torch.nn.Module
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    torchs: list[Left] = field(default_factory=list)  # convolutions: none is expected to become a twin
    differences: list[Difference] = field(default_factory=list)

    def undo(self) -> None:
        """Gives every replaced module its class back. Parameters were never touched, so nothing else changes."""
        for row in self.replaced:
            row.module.__class__ = row.before

    def redo(self) -> None:
        """Replaces again what undo() gave back."""
        for row in self.replaced:
            row.module.__class__ = row.after

    def check(self, *args: Any, **kwargs: Any) -> list[Difference]:
        """Runs model(*args, **kwargs) with torch's modules and with the twins; compares outputs and gradients.

        Both runs start from the same random state and grads are not left behind. Raises AssertionError if a tensor
        differs by more than 64 roundings of its dtype relative to its largest value: twins round differently from
        torch, not more. Gradients may also differ by 4 roundings of the largest one of all: some are 0 but for
        rounding, such as that of the bias of an attention's keys. Dropout has to be off (model.eval()) where a twin
        draws its own: in attention, behind a linear, before a norm.
        """
        self.undo()
        try:
            expected = _run(self.model, args, kwargs)
        finally:
            self.redo()
        actual = _run(self.model, args, kwargs)
        noise = max((4 * _rounding(expected[name]) for name in expected if name.startswith(GRAD)), default=0.0)
        self.differences = [
            _difference(name, expected[name], actual[name], noise if name.startswith(GRAD) else 0.0)
            for name in expected
        ]
        wrong = [d for d in self.differences if not d.ok]
        if wrong:
            worst = max(wrong, key=lambda d: d.largest / max(d.allowed, 1e-300))
            raise AssertionError(
                f"handtuned.replace: {worst.tensor} differs by {worst.largest:.3g}, allowed {worst.allowed:.3g} "
                f"({len(wrong)} of {len(self.differences)} tensors over their bound); "
                "report.undo() gives torch's modules back"
            )
        return self.differences

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("module", "was", "is", "why left", title=f"handtuned.replace: {len(self.replaced)} replaced")
        for row in self.replaced:
            table.add_row(row.name, row.before.__name__, f"handtuned.nn.{row.after.__name__}", "")
        for left in (*self.left, *self.torchs):
            table.add_row(left.name, left.type, left.type, left.why)
        return table

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def as_text(report: Any) -> str:
    """What a report prints as."""
    from rich.console import Console

    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def replace(model: torch.nn.Module, *, check: Any = None, strict: bool = False) -> Report:
    """Replaces, in place, every module whose exact type has a twin in handtuned.nn.

    Only the class of the instance changes: parameters, buffers, hooks, optimizer references, tied weights and
    state_dict stay what they are. Subclasses of torch's modules may compute something else and are left alone.

    Args:
        model: any module; also wrapped by torch.compile or DistributedDataParallel.
        check: an input to compare on, before against after: a tensor, a tuple of positional or a dict of keyword
            arguments. Raises AssertionError if outputs or gradients differ (see Report.check); the model is then as
            before.
        strict: raise ValueError, with nothing replaced, if anything is among the report's .left.

    Returns:
        Report with .replaced, .left, .torchs (convolutions, which stay), .check(*args), .undo(); prints as a table.
    """
    return replace_by(find_twin, Report(model), check, strict)


def replace_by(find: Find, report: Kind, check: Any, strict: bool) -> Kind:
    """replace() with the twins that find() finds, into a report of any class."""
    for name, module in report.model.named_modules():
        kind, found = type(module), find(module)
        if isinstance(found, str):
            report.left.append(Left(name or "(model)", kind.__name__, found))
        elif isinstance(module, _ConvNd):
            report.torchs.append(Left(name or "(model)", kind.__name__, CONVOLUTION))
        elif found is not None:
            report.replaced.append(Replaced(name or "(model)", module, kind, found))
    if strict and report.left:
        rows = "; ".join(f"{left.name} ({left.type}): {left.why}" for left in report.left)
        raise ValueError(f"handtuned.replace(strict=True): {len(report.left)} left: {rows}; use strict=False to accept")
    report.redo()
    if check is not None:
        args, kwargs = _call_arguments(check)
        try:
            report.check(*args, **kwargs)
        except BaseException:
            report.undo()
            raise
    return report


def find_twin(module: torch.nn.Module) -> type[torch.nn.Module] | str | None:
    """A module's twin, or why it is left; None for what is a twin already and for modules that none is expected of."""
    kind = type(module)
    if kind in TWINS:
        return _why_left(module) or TWINS[kind]
    if kind in TWINS.values() or kind in (nn.AddLayerNorm, nn.AddRMSNorm):
        return None
    if kind is NonDynamicallyQuantizableLinear:  # MultiheadAttention's out_proj, whose parameters that reads itself
        return None
    for twin in TWINS:
        if isinstance(module, twin):
            return f"a subclass of torch.nn.{twin.__name__} may compute something else"
    if kind.__name__.endswith(("LayerNorm", "RMSNorm")):
        return "not a torch.nn class: no twin is known to compute the same"
    return None


def _why_left(module: torch.nn.Module) -> str | None:
    """Why a module of torch's cannot become its twin."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    eps = getattr(module, "eps", None)
    if eps is not None and eps <= 0:
        return f"its eps is {eps}, kernels need eps > 0"
    odd = [p.dtype for p in module.parameters(recurse=False) if p.dtype not in backends.DTYPES]
    return f"its parameters are {odd[0]}, which no kernel reads" if odd else None


def _call_arguments(check: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(check, dict):
        return (), check
    return (check, {}) if isinstance(check, tuple) else ((check,), {})


# ---- check ----------------------------------------------------------------------------------------------------------


@contextmanager
def _grads_set_aside(model: torch.nn.Module) -> Iterator[None]:
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


def _run(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by name, from a fixed random state."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _grads_set_aside(model), torch.enable_grad():
        torch.manual_seed(0)
        outputs = dict(_tensors("output", model(*args, **kwargs)))
        found = {name: tensor.detach().clone() for name, tensor in outputs.items()}
        differentiable = [t for t in outputs.values() if t.requires_grad]
        if differentiable:
            # A fixed, uneven weighting, so that no gradient vanishes by symmetry.
            weights = [
                torch.linspace(-1, 1, t.numel(), device=t.device, dtype=t.dtype).reshape(t.shape)
                for t in differentiable
            ]
            torch.autograd.backward(differentiable, weights)
            grads = ((GRAD + n, p.grad) for n, p in model.named_parameters())
            found |= {name: grad.clone() for name, grad in grads if grad is not None}
    return found


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in nested outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


def _rounding(tensor: Tensor) -> float:
    """One rounding of the tensor's largest finite value."""
    scale = tensor.double().nan_to_num(0, 0, 0).abs().max().item() if tensor.numel() else 0.0
    return torch.finfo(tensor.dtype).eps * scale


def _difference(name: str, expected: Tensor, actual: Tensor, noise: float) -> Difference:
    both_nan = expected.isnan() & actual.isnan()
    gap = (expected.double() - actual.double()).abs().masked_fill(both_nan | (expected == actual), 0)
    largest = gap.max().item() if gap.numel() else 0.0
    return Difference(name, float("inf") if largest != largest else largest, max(64 * _rounding(expected), noise))
