"""The numerics contract as a bound: no tensor's error may exceed 1.5 times torch's own on the same inputs.

Errors are taken against the formulas below in float64 (numpy's long double for float64 tensors), as the root mean
square over the tensor and as the largest element, averaged over a few draws. Both bounds have the floor of half a unit
in the last place of the tensor's scale, eps / 2 * scale (scale: root mean square or largest value of the reference),
since torch's error can happen to be 0. NaN and infinities must stand where torch has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cases
import numpy as np
import torch
from torch import Tensor

from handtuned import reference

FACTOR = 1.5
Array = np.ndarray[Any, np.dtype[Any]]


def wide(tensor: Tensor) -> Array:
    """Exactly, in the dtype of the reference."""
    array = tensor.detach().double().numpy()
    return array.astype(np.longdouble) if tensor.dtype == torch.float64 else array


def draw_seed(draw: int) -> Tensor:
    """The Philox key of the next dropout call, after seeding torch's generator so that the call draws that key."""
    torch.manual_seed(draw)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    torch.manual_seed(draw)
    return seed


def keep_mask(case: cases.Case, seed: Tensor) -> Tensor | None:
    """Which elements of input the dropout keeps; None without dropout."""
    if case.dropout == 0:
        return None
    shape, p = torch.Size(case.shape), case.dropout
    return reference.dropout_factor(shape, case.normalized_ndim, p, seed, torch.float32) != 0


def torch_factor(case: cases.Case, keep: Tensor | None) -> Tensor | None:
    """What torch's dropout multiplies with: the mask divided by 1 - p in input's dtype."""
    if keep is None:
        return torch.ones((), dtype=case.dtype) if case.add else None
    return keep.to(case.dtype).div_(1 - case.dropout)


def exact(case: cases.Case, t: cases.Tensors, keep: Tensor | None) -> dict[str, Array]:
    """Outputs and gradients by the textbook, without an intermediate rounding."""
    columns = tuple(range(len(case.shape) - case.normalized_ndim, len(case.shape)))
    rows = tuple(range(len(case.shape) - case.normalized_ndim))
    one = np.longdouble(1) if case.dtype == torch.float64 else np.float64(1)
    factor = one if keep is None else keep.numpy() / (one - case.dropout)
    h = wide(t.input)
    if t.residual is not None:
        h = h * factor + wide(t.residual)
    mean = h.mean(columns, keepdims=True) if case.kind == "layer" else 0 * one
    rstd = 1 / np.sqrt(((h - mean) ** 2).mean(columns, keepdims=True) + case.eps)
    xhat = (h - mean) * rstd
    dy = wide(t.grad_output)
    weight = one if t.weight is None else wide(t.weight)
    g = dy * weight
    dh = g - xhat * (g * xhat).mean(columns, keepdims=True)
    if case.kind == "layer":
        dh = dh - g.mean(columns, keepdims=True)
    dh = dh * rstd
    if t.grad_new_residual is not None:
        dh = dh + wide(t.grad_new_residual)
    found = {"output": xhat * weight + (0 * one if t.bias is None else wide(t.bias)), "grad_input": dh * factor}
    if t.residual is not None:
        found |= {"new_residual": h, "grad_residual": dh}
    if t.weight is not None:
        found["grad_weight"] = (dy * xhat).sum(rows)
    if t.bias is not None:
        found["grad_bias"] = dy.sum(rows)
    return found


@dataclass
class Errors:
    """Errors of one tensor, averaged over draws: of ours, of torch's, and the size of the reference."""

    eps: float
    slack: float = 0.0  # how much more than eps / 2 of its scale a tensor may be off beside torch's error
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # sums of mean squares
    largest: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # sums of largest values
    draws: int = 0

    def add(self, ours: Tensor, torchs: Tensor, truth: Array) -> None:
        if truth.size == 0:
            return
        self.draws += 1
        for i, values in enumerate((wide(ours) - truth, wide(torchs) - truth, truth)):
            self.squares[i] += float((values**2).mean())
            self.largest[i] += float(np.abs(values).max())

    def excess(self, *, largest: bool = True) -> str | None:
        """What is wrong, or None. largest: whether the largest error is judged too."""
        if self.draws == 0:
            return None
        bounded = {"rms": [(s / self.draws) ** 0.5 for s in self.squares]}
        if largest:
            bounded["largest"] = [v / self.draws for v in self.largest]
        for name, (ours, torchs, scale) in bounded.items():
            allowed = FACTOR * torchs + (self.eps / 2 + self.slack) * scale
            if not ours <= allowed:
                unit = self.eps * scale or self.eps
                return f"{name} error {ours / unit:.3g} eps, torch's {torchs / unit:.3g}, allowed {allowed / unit:.3g}"
        return None


def check_same_non_finite(name: str, ours: Tensor, torchs: Tensor, kinds: bool = True) -> None:
    """NaN, inf and -inf at the same places; without kinds: any of them where torch has any."""
    for what in (torch.isnan, torch.isposinf, torch.isneginf) if kinds else (torch.isfinite,):
        differ = what(ours) != what(torchs)
        where = differ.nonzero()[:3].tolist()
        assert not differ.any(), f"{name}: {what.__name__} differs from torch at {int(differ.sum())} places: {where}"


@dataclass
class Drawn:
    """One draw of a case with torch's results and the truth, which do not depend on the kernel under test."""

    tensors: cases.Tensors
    torchs: dict[str, Tensor]
    truth: dict[str, Array]


_drawn: dict[tuple[cases.Case, int], Drawn] = {}


def drawn(case: cases.Case, draw: int) -> Drawn:
    """Draw `draw`; those of the last case are remembered, for the next kernels."""
    if (case, draw) not in _drawn:
        if any(case != other for other, _ in _drawn):
            _drawn.clear()
        t = cases.tensors(case, draw)
        keep = keep_mask(case, draw_seed(draw))
        leaves = t.leaves()
        torchs = cases.results(cases.run_torch(case, leaves, torch_factor(case, keep)), leaves, t)
        _drawn[case, draw] = Drawn(t, torchs, exact(case, t, keep))
    return _drawn[case, draw]


def draws(case: cases.Case, kernels: str = "") -> int:
    """How many draws are averaged: few rows or columns say little about an error. Interpreters are slow."""
    smaller = max(min(case.cols, case.elements // max(case.cols, 1)), 1)
    most = 3 if kernels == "triton" or (kernels == "simt" and case.cols > 2000) else 8
    return max(1, min(most, 600 // smaller, 400_000 // max(case.elements, 1)))


def check_contract(case: cases.Case, kernels: str = "") -> None:
    """Runs the case on the kernels in force and holds every output and gradient to the bound."""
    errors: dict[str, Errors] = {}
    for draw in range(draws(case, kernels)):
        d = drawn(case, draw)
        leaves = d.tensors.leaves()
        draw_seed(draw)
        ours = cases.results(cases.run(case, leaves), leaves, d.tensors)
        assert ours.keys() == d.torchs.keys() == d.truth.keys()
        for name, tensor in ours.items():
            same = d.torchs[name]
            assert tensor.shape == same.shape, f"{name}: shape {tensor.shape}, torch's {same.shape}"
            assert tensor.dtype == same.dtype, f"{name}: {tensor.dtype}, torch's {same.dtype}"
            check_same_non_finite(name, tensor, same)
            entry = errors.setdefault(name, Errors(torch.finfo(tensor.dtype).eps))
            entry.add(tensor, same, d.truth[name])
    excess = {name: text for name, entry in errors.items() if (text := entry.excess())}
    assert not excess, f"{case.name}: {excess}"
