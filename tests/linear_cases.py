"""The cases of the linear family, shared by tests and benchmarks, and their float64 truth.

As in cases.py: ``tensors`` draws, ``run`` calls handtuned, ``run_torch`` torch's own operators on the same tensors,
``exact`` is the formula without an intermediate rounding. ``check_contract`` holds a case to the numerics contract.
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

from handtuned import reference
from handtuned.nn import functional as H

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class Case:
    """input (*rows, in_features) times weight (out_features, in_features) transposed, and what follows."""

    rows: tuple[int, ...]
    in_features: int
    out_features: int
    dtype: torch.dtype = F32
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    dropout: float = 0.0
    layout: str = "contiguous"  # a key of cases.LAYOUTS: strides of input, residual and incoming gradient

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (*self.rows, self.in_features, self.out_features)))
        parts = ["linear", cases.SHORT[self.dtype], shape]
        parts += [self.activation] if self.activation != "none" else []
        parts += ["no_bias"] * (not self.bias) + ["residual"] * self.residual + ["dropout"] * (self.dropout > 0)
        return "-".join(parts + [self.layout] * (self.layout != "contiguous"))

    @property
    def elements(self) -> int:
        return prod(self.rows) * max(self.in_features, self.out_features) + self.in_features * self.out_features

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.rows, self.out_features)

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Tensors:
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    grad_output: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments by name, as new leaves that require grad; strides stay."""
        named = {name: getattr(self, name) for name in ("input", "weight", "bias", "residual")}
        return {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}


def tensors(case: Case, draw: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(cases.SEED + draw)
    lay_out = cases.LAYOUTS[case.layout]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = max(case.in_features, 1) ** -0.5
    return Tensors(
        input=lay_out(normal(*case.rows, case.in_features).to(case.dtype)),
        weight=(normal(case.out_features, case.in_features) * scale).to(case.dtype),
        bias=normal(case.out_features).to(case.dtype) if case.bias else None,
        residual=lay_out(normal(*case.output_shape).to(case.dtype)) if case.residual else None,
        grad_output=lay_out(normal(*case.output_shape).to(case.dtype)),
    )


def run(case: Case, t: dict[str, Tensor], packed: Tensor | None = None) -> Tensor:
    options: dict[str, Any] = {"activation": case.activation, "dropout_p": case.dropout}
    return H.linear(t["input"], t["weight"], t.get("bias"), residual=t.get("residual"), packed=packed, **options)


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return z if activation == "none" else getattr(F, activation)(z)


def run_torch(case: Case, t: dict[str, Tensor], factor: Tensor | None) -> Tensor:
    """torch's own operators, as a model would write them; factor is what its dropout multiplies with."""
    y = activate(F.linear(t["input"], t["weight"], t.get("bias")), case.activation)
    y = y if factor is None else y * factor
    return y + t["residual"] if case.residual else y


def results(output: Tensor, leaves: dict[str, Tensor], t: Tensors) -> dict[str, Tensor]:
    grads = torch.autograd.grad(output, list(leaves.values()), t.grad_output)
    return {"output": output.detach()} | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


# ---- the truth -------------------------------------------------------------------------------------------------------


def _erf(x: Array) -> Array:
    """2 / sqrt(pi) e^(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!, whose terms have one sign, in the precision of x."""
    bounded = np.clip(x, -6, 6)  # beyond, erf is 1 to the last bit of a long double
    term = total = bounded
    for n in range(1, 200):
        term = term * 2 * bounded * bounded / (2 * n + 1)
        total = total + term
    erf: Array = 2 / np.sqrt(np.arccos(x.dtype.type(-1))) * np.exp(-bounded * bounded) * total
    return erf


def _activation(z: Array, name: str) -> tuple[Array, Array]:
    """Value and derivative."""
    one = z.dtype.type(1)
    pi = np.arccos(-one)
    if name == "relu":
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if name == "gelu":
        cdf = (1 + _erf(z / np.sqrt(2 * one))) / 2
        return z * cdf, cdf + z * np.exp(-z * z / 2) / np.sqrt(2 * pi)
    if name == "gelu_tanh":
        c, k = np.sqrt(2 / pi), one * 44715 / 1000000
        t = np.tanh(c * (z + k * z**3))
        return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) / 2 * c * (1 + 3 * k * z * z)
    if name == "silu":
        s = 1 / (1 + np.exp(-z))
        return z * s, s * (1 + z * (1 - s))
    return z, np.ones_like(z)


def exact(case: Case, t: Tensors, keep: Tensor | None) -> dict[str, Array]:
    x, w, dy = (numerics.wide(v) for v in (t.input, t.weight, t.grad_output))
    rows = prod(case.rows)
    x2, dy2 = x.reshape(rows, case.in_features), dy.reshape(rows, case.out_features)
    z = x2 @ w.T + (0 if t.bias is None else numerics.wide(t.bias))
    y, slope = _activation(z, case.activation)
    if keep is not None:
        factor = keep.numpy().reshape(y.shape) / (x.dtype.type(1) - case.dropout)
        y, slope = y * factor, slope * factor
    if t.residual is not None:
        y = y + numerics.wide(t.residual).reshape(y.shape)
    dz = dy2 * slope
    found = {"output": y.reshape(case.output_shape), "grad_input": (dz @ w).reshape(x.shape), "grad_weight": dz.T @ x2}
    found |= {"grad_bias": dz.sum(0)} if case.bias else {}
    return found | ({"grad_residual": dy} if case.residual else {})


@dataclass
class Drawn:
    tensors: Tensors
    torchs: dict[str, Tensor]
    truth: dict[str, Array]


@functools.lru_cache(maxsize=8)
def drawn(case: Case, draw: int) -> Drawn:
    """One draw with torch's results and the truth, which do not depend on the kernel under test."""
    t, seed = tensors(case, draw), numerics.draw_seed(draw)
    keep = None
    if case.dropout:
        keep = reference.dropout_factor(torch.Size(case.output_shape), 1, case.dropout, seed, F32) != 0
    leaves = t.leaves()
    factor = None if keep is None else keep.to(case.dtype).div_(1 - case.dropout)
    return Drawn(t, results(run_torch(case, leaves, factor), leaves, t), exact(case, t, keep))


def draws(case: Case) -> int:
    smaller = max(1, min(prod(case.rows), case.in_features, case.out_features))
    return max(1, min(6, 200 // smaller, 100_000 // max(case.elements, 1)))


def check_contract(case: Case) -> None:
    """Runs the case on the kernels in force and holds output and gradients to the bound."""
    errors: dict[str, numerics.Errors] = {}
    for draw in range(draws(case)):
        d = drawn(case, draw)
        leaves = d.tensors.leaves()
        numerics.draw_seed(draw)
        ours = results(run(case, leaves), leaves, d.tensors)
        assert ours.keys() == d.torchs.keys() == d.truth.keys()
        for name, tensor in ours.items():
            same = d.torchs[name]
            assert (tensor.shape, tensor.dtype) == (same.shape, same.dtype), name
            numerics.check_same_non_finite(name, tensor, same)
            errors.setdefault(name, numerics.Errors(torch.finfo(tensor.dtype).eps)).add(tensor, same, d.truth[name])
    excess = {name: text for name, entry in errors.items() if (text := entry.excess())}
    assert not excess, f"{case.name}: {excess}"


# ---- the lists -------------------------------------------------------------------------------------------------------

EVERYTHING = Case((37,), 66, 70, residual=True, dropout=0.3)
# rows, in, out: one row and few, odd widths, one more than a block of anything.
SIZES = (
    *(((1,), 1, 1), ((1,), 300, 65), ((2,), 33, 130), ((3,), 5, 64), ((4,), 4099, 3), ((5,), 17, 63), ((7,), 1, 9)),
    *(((12,), 64, 129), ((13,), 31, 1), ((25,), 259, 70), ((49,), 515, 33), ((2, 3, 4), 20, 40)),
)


def _cases() -> list[Case]:
    found = [EVERYTHING.with_(dtype=dtype, activation=a) for dtype in cases.SHORT for a in ACTIVATIONS]
    found += [
        Case((21,), 40, 50, dtype=dtype, activation=a, bias=a != "gelu") for dtype in (F32, BF16) for a in ACTIVATIONS
    ]
    found += [Case(rows, k, n, dtype=dtype) for rows, k, n in SIZES for dtype in cases.SHORT]
    found += [Case((6,), 40, 50, dropout=0.3), Case((6,), 40, 50, residual=True, bias=False, dtype=F16)]
    for layout in list(cases.LAYOUTS)[1:]:
        found += [Case((4, 5, 3), 24, 24, dtype=dtype, layout=layout, residual=True) for dtype in (F32, BF16, F16)]
        found += [Case((2, 2), 24, 24, layout=layout, activation="silu", residual=True)]
    found += [Case((0,), 5, 7), Case((4,), 0, 5), Case((4,), 5, 0), Case((2, 0), 5, 7, BF16), Case((4,), 0, 5, BF16)]
    found += [Case((0,), 5, 7, activation="gelu", residual=True), Case((), 12, 5), Case((), 12, 5, BF16)]
    # Several pieces, blocks of the summed dimension and threads.
    found += [Case((410,), 530, 300, dtype=dtype, activation="gelu") for dtype in (F32, BF16, F16)]
    return found


CASES = tuple(_cases())
