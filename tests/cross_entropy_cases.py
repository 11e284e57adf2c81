"""The cases of linear_cross_entropy, shared by tests and benchmarks, and their float64 truth.

As in linear_cases.py: ``tensors`` draws, ``run`` calls handtuned, ``run_torch`` torch's own operators on the same
tensors, ``exact`` is the formula without an intermediate rounding. ``check_contract`` holds a case to the contract.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import cases
import numerics
import numpy as np
import torch
import torch.nn.functional as F
from numerics import Array
from torch import Tensor

from handtuned.nn import functional as H

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """input (*rows, in_features), linear_weight (classes, in_features), target (*rows)."""

    rows: tuple[int, ...]
    in_features: int
    classes: int
    dtype: torch.dtype = F32
    reduction: str = "mean"
    bias: bool = False
    weighted: bool = False
    smoothing: float = 0.0
    softcap: float = 0.0
    z_loss: float = 0.0
    ignored: float = 0.0  # share of the rows
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (*self.rows, self.in_features, self.classes)))
        parts = ["entropy", cases.SHORT[self.dtype], shape, self.reduction]
        named = ("bias", "weighted", "smoothing", "softcap", "z_loss", "ignored")
        return "-".join(
            [*parts, *(n for n in named if getattr(self, n)), *[self.layout][self.layout == "contiguous" :]]
        )

    @property
    def elements(self) -> int:
        return prod(self.rows) * self.classes + self.in_features * self.classes

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    grad_loss: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments by name, as new leaves that require grad; strides stay."""
        named = {name: getattr(self, name) for name in ("input", "linear_weight", "linear_bias")}
        return {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}


def tensors(case: Case, draw: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(cases.SEED + draw)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    target = (uniform(*case.rows) * case.classes).long()
    scale = 3 * max(case.in_features, 1) ** -0.5  # some classes are much likelier than others
    return Tensors(
        input=cases.LAYOUTS[case.layout](normal(*case.rows, case.in_features).to(case.dtype)),
        linear_weight=(normal(case.classes, case.in_features) * scale).to(case.dtype),
        linear_bias=normal(case.classes).to(case.dtype) if case.bias else None,
        target=target.masked_fill(uniform(*case.rows) < case.ignored, IGNORED),
        weight=(uniform(case.classes) + 0.5).to(case.dtype) if case.weighted else None,
        grad_loss=normal(*(case.rows if case.reduction == "none" else ())).to(case.dtype),
    )


def run(case: Case, leaves: dict[str, Tensor], t: Tensors) -> Tensor:
    return H.linear_cross_entropy(
        leaves["input"],
        leaves["linear_weight"],
        t.target,
        linear_bias=leaves.get("linear_bias"),
        weight=t.weight,
        reduction=case.reduction,
        label_smoothing=case.smoothing,
        softcap=case.softcap,
        z_loss=case.z_loss,
    )


def run_torch(case: Case, leaves: dict[str, Tensor], t: Tensors) -> Tensor:
    z = F.linear(leaves["input"], leaves["linear_weight"], leaves.get("linear_bias")).flatten(0, -2)
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    target = t.target.flatten()
    loss = F.cross_entropy(z, target, t.weight, reduction=case.reduction, label_smoothing=case.smoothing)
    if case.z_loss:
        counts = target != IGNORED
        squares = case.z_loss * torch.logsumexp(z, -1) ** 2 * counts
        own = counts if t.weight is None else t.weight[target.clamp(min=0)] * counts
        loss = loss + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / own.sum()}[case.reduction]
    return loss.reshape(t.grad_loss.shape)


def results(loss: Tensor, leaves: dict[str, Tensor], t: Tensors) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(leaves.values()), t.grad_loss)
    return {"loss": loss.detach()} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def exact(case: Case, t: Tensors) -> dict[str, Array]:
    x, w = numerics.wide(t.input).reshape(-1, case.in_features), numerics.wide(t.linear_weight)
    target, counts = t.target.flatten().numpy(), (t.target.flatten() != IGNORED).numpy()
    z = x @ w.T + (0 if t.linear_bias is None else numerics.wide(t.linear_bias))
    one = z.dtype.type(1)
    slope = np.ones_like(z)
    if case.softcap:
        ratio = np.tanh(z / (one * case.softcap))
        z, slope = case.softcap * ratio, 1 - ratio * ratio
    classes = np.ones(case.classes, z.dtype) if t.weight is None else numerics.wide(t.weight)
    rows, s = np.arange(len(target)), one * case.smoothing
    safe = np.where(counts, target, 0)
    own = classes[safe] * counts
    top = z.max(1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(1, keepdims=True)))[:, 0]
    spread = ((lse[:, None] - z) * classes).sum(1) / case.classes
    loss = (1 - s) * own * (lse - z[rows, safe]) + counts * (s * spread + case.z_loss * lse**2)
    divisor = own.sum() if case.reduction == "mean" else one
    g = numerics.wide(t.grad_loss).reshape(-1) / divisor * counts
    of_p = (1 - s) * own + s * classes.sum() / case.classes + 2 * case.z_loss * lse
    dz = of_p[:, None] * np.exp(z - lse[:, None]) - s / case.classes * classes
    dz[rows, safe] -= (1 - s) * own
    dz = dz * slope * g[:, None]
    reduced = loss.reshape(case.rows) if case.reduction == "none" else loss.sum() / divisor
    found = {"loss": np.asarray(reduced), "grad_input": (dz @ w).reshape(t.input.shape), "grad_linear_weight": dz.T @ x}
    return found | ({"grad_linear_bias": dz.sum(0)} if case.bias else {})


@dataclass
class Drawn:
    tensors: Tensors
    torchs: dict[str, Tensor]
    truth: dict[str, Array]


@functools.lru_cache(maxsize=8)
def drawn(case: Case, draw: int) -> Drawn:
    """One draw with torch's results and the truth, which do not depend on the kernel under test."""
    t = tensors(case, draw)
    leaves = t.leaves()
    return Drawn(t, results(run_torch(case, leaves, t), leaves, t), exact(case, t))


def draws(case: Case) -> int:
    return max(1, min(6, 200 // max(1, prod(case.rows)), 100_000 // case.elements))


def check_contract(case: Case) -> None:
    """Runs the case on the kernels in force and holds loss and gradients to the bound."""
    errors: dict[str, numerics.Errors] = {}
    for draw in range(draws(case)):
        d = drawn(case, draw)
        leaves = d.tensors.leaves()
        ours = results(run(case, leaves, d.tensors), leaves, d.tensors)
        assert ours.keys() == d.torchs.keys() == d.truth.keys()
        for name, tensor in ours.items():
            same = d.torchs[name]
            assert (tensor.shape, tensor.dtype) == (same.shape, same.dtype), name
            assert tensor.isfinite().all(), name
            errors.setdefault(name, numerics.Errors(torch.finfo(tensor.dtype).eps)).add(tensor, same, d.truth[name])
    excess = {name: text for name, entry in errors.items() if (text := entry.excess())}
    assert not excess, f"{case.name}: {excess}"


# ---- the lists -------------------------------------------------------------------------------------------------------

EVERYTHING = Case((21,), 34, 150, F32, "none", True, True, 0.2, 20.0, 0.01, 0.3)


def _cases() -> list[Case]:
    found = [EVERYTHING.with_(dtype=dtype, reduction=how) for dtype in cases.SHORT for how in ("none", "mean", "sum")]
    found += [Case((19,), 33, 70, dtype) for dtype in cases.SHORT]
    found += [Case((19,), 33, 70, dtype, smoothing=0.1, bias=True) for dtype in (F32, BF16)]
    found += [Case((7,), 12, 65, F32, weighted=True, reduction=how) for how in ("mean", "sum")]
    found += [Case((7,), 12, 65, dtype, softcap=5.0) for dtype in (F32, F16)]
    found += [Case((7,), 12, 65, dtype, z_loss=0.1) for dtype in (F32, BF16)]
    for rows, k, classes in (((1,), 1, 1), ((1,), 300, 3), ((2, 3), 5, 64), ((5,), 7, 257), ((193,), 17, 63)):
        found += [Case(rows, k, classes, dtype, ignored=0.2 if rows == (193,) else 0.0) for dtype in (F32, BF16)]
    for layout in list(cases.LAYOUTS)[1:]:
        found += [Case((4, 5, 3), 24, 40, dtype, layout=layout, ignored=0.3) for dtype in (F32, BF16, F16)]
    # Several chunks of classes and of rows, pieces and threads.
    found += [Case((6,), 3, 8300, dtype, bias=True, smoothing=0.1) for dtype in (F32, BF16)]
    found += [Case((1100,), 40, 90, dtype, bias=True, ignored=0.02) for dtype in (F32, BF16, F16)]
    return found


CASES = tuple(_cases())
SEVERAL_CHUNKS = Case((2100,), 6, 8300, F32, bias=True, ignored=0.1)
