"""The one list of cases of the norm family, shared by tests and benchmarks.

A Case says what is computed on which tensors; ``tensors`` draws them, ``run`` calls handtuned, ``run_torch`` calls
torch's own operators on the same tensors, and ``results`` adds every gradient. CASES is the list of the tests,
BENCH_SHAPES the shapes that are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import handtuned

SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
SEED = 20240229


@dataclass(frozen=True)
class Case:
    """One computation. kind: "layer" or "rms"; add puts the residual add (and dropout) in front."""

    shape: tuple[int, ...]
    kind: str = "layer"
    add: bool = False
    dropout: float = 0.0
    normalized_ndim: int = 1
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype
    affine: str = "both"  # "both", "weight", "bias" or "none"; RMSNorm has no bias
    layout: str = "contiguous"  # a key of LAYOUTS: strides of input, residual and incoming gradients
    values: str = "normal"  # a key of VALUES: what input (and residual) holds

    @property
    def op(self) -> str:
        return f"{'add_' if self.add else ''}{self.kind}_norm"

    @property
    def name(self) -> str:
        parts = [self.op, SHORT[self.dtype], "x".join(map(str, self.shape))]
        parts += [f"last{self.normalized_ndim}"] if self.normalized_ndim > 1 else []
        parts += [f"weight_{SHORT[self.weight_dtype]}"] if self.weight_dtype else []
        parts += [f"affine_{self.affine}"] if self.affine != "both" else []
        parts += [f"dropout{self.dropout}"] if self.dropout else []
        parts += [x for x in (self.layout, self.values) if x not in ("contiguous", "normal")]
        return "-".join(parts)

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.normalized_ndim :]

    @property
    def cols(self) -> int:
        return prod(self.normalized_shape)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def eps(self) -> float:
        return 1e-5 if self.kind == "layer" else 1e-6

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Tensors:
    """What a case is computed on. Shapes: input, residual, grads as case.shape; weight, bias normalized_shape."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    grad_output: Tensor
    grad_new_residual: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments by name, as new leaves that require grad; strides stay."""
        named = {name: getattr(self, name) for name in ("input", "residual", "weight", "bias")}
        return {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}


# ---- layouts: same values, other strides -----------------------------------------------------------------------------


def _transposed(t: Tensor) -> Tensor:
    """The first two dims swapped in memory (the first and last of a matrix would scatter rows: see _scattered)."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def _sliced(t: Tensor) -> Tensor:
    """Rows cut out of wider rows: strided and misaligned."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 7), torch.nan)
    wide[..., 3:-4] = t
    return wide[..., 3:-4]


def _every_other(t: Tensor) -> Tensor:
    wide = t.new_full((2 * t.shape[0], *t.shape[1:]), torch.nan)
    wide[::2] = t
    return wide[::2]


def _expanded(t: Tensor) -> Tensor:
    """Stride 0 along the first dim: the values of its first entry everywhere."""
    return t[:1].clone().expand(t.shape)


def _scattered(t: Tensor) -> Tensor:
    """Last stride not 1."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _offset(t: Tensor) -> Tensor:
    """Starts one element into its storage, so that nothing is aligned."""
    flat = t.new_full((t.numel() + 1,), torch.nan)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def _permuted(t: Tensor) -> Tensor:
    """Outer dims in reversed order in memory."""
    outer = list(range(t.dim() - 1))
    order = [*reversed(outer), t.dim() - 1]
    return t.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": _transposed,
    "sliced": _sliced,
    "every_other": _every_other,
    "expanded": _expanded,
    "scattered": _scattered,
    "offset": _offset,
    "permuted": _permuted,
}


# What becomes of standard normal values.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda t: t,
    "shifted": lambda t: t + 1000,  # mean far above the standard deviation
    "huge": lambda t: t * 1e30,  # squares overflow float32
    "tiny": lambda t: t * 1e-30,  # squares underflow float32
    "constant": lambda t: t[..., :1].expand(t.shape),  # variance 0
}

# ---- drawing and running ---------------------------------------------------------------------------------------------


def tensors(case: Case, draw: int = 0) -> Tensors:
    """Draw number `draw` of the case's tensors."""
    generator = torch.Generator().manual_seed(SEED + draw)
    lay_out = LAYOUTS[case.layout]

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rows(values: str = "normal") -> Tensor:
        return lay_out(VALUES[values](normal(case.shape)).to(case.dtype))

    def parameter(wanted: str) -> Tensor | None:
        drawn = normal(case.normalized_shape).to(case.weight_dtype or case.dtype)
        return drawn if case.affine in (wanted, "both") else None

    return Tensors(
        input=rows(case.values),
        residual=rows(case.values) if case.add else None,
        weight=parameter("weight"),
        bias=parameter("bias") if case.kind == "layer" else None,
        grad_output=rows(),
        grad_new_residual=rows() if case.add else None,
    )


def run(case: Case, t: dict[str, Tensor], eps: float | None = None) -> tuple[Tensor, ...]:
    """handtuned.nn.functional on the arguments by name: (output,) or (output, new_residual)."""
    parameters = [t.get("weight"), t.get("bias")] if case.kind == "layer" else [t.get("weight")]
    arguments = (case.normalized_shape, *parameters, eps or case.eps)
    function = getattr(handtuned.nn.functional, case.op)
    if case.add:
        output, new_residual = function(t["input"], t["residual"], *arguments, case.dropout)
        return output, new_residual
    return (function(t["input"], *arguments),)


def run_torch(case: Case, t: dict[str, Tensor], factor: Tensor | None = None) -> tuple[Tensor, ...]:
    """torch's own operators. `factor` replaces the random factor of its dropout: 0 or 1 / (1 - p)."""
    h = t["input"]
    if case.add:
        h = (F.dropout(h, case.dropout) if factor is None else h * factor) + t["residual"]
    if case.kind == "layer":
        output = F.layer_norm(h, case.normalized_shape, t.get("weight"), t.get("bias"), case.eps)
    else:
        output = F.rms_norm(h, case.normalized_shape, t.get("weight"), case.eps)
    return (output, h) if case.add else (output,)


def results(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor], t: Tensors) -> dict[str, Tensor]:
    """Outputs and the gradient of every leaf, by name."""
    incoming = [t.grad_output, t.grad_new_residual][: len(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = dict(zip(("output", "new_residual"), (o.detach() for o in outputs), strict=False))
    return named | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


# ---- the list --------------------------------------------------------------------------------------------------------

FORMS = (
    Case((1,)),
    Case((1,), kind="rms"),
    Case((1,), add=True),
    Case((1,), kind="rms", add=True),
)
DROPOUTS = (Case((1,), add=True, dropout=0.3), Case((1,), kind="rms", add=True, dropout=0.3))
MIXED = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))
BF16 = torch.bfloat16


def _cases() -> list[Case]:
    layer, rms, add_layer, add_rms = FORMS
    dtypes = [(dtype, None) for dtype in SHORT] + list(MIXED)
    cases = [
        form.with_(shape=(37, 100), dtype=dtype, weight_dtype=weight_dtype)
        for form in FORMS + DROPOUTS
        for dtype, weight_dtype in dtypes
    ]
    for dtype in (torch.float32, BF16):
        cases += [form.with_(shape=(20, 72), affine="none", dtype=dtype) for form in FORMS]
        cases += [layer.with_(shape=(20, 72), affine=affine, dtype=dtype) for affine in ("weight", "bias")]
    for i, cols in enumerate((1, 3, 17, 33, 63, 65, 129)):
        cases += [FORMS[i % 4].with_(shape=(41, cols)), FORMS[(i + 1) % 4].with_(shape=(41, cols), dtype=BF16)]
        cases += [DROPOUTS[i % 2].with_(shape=(41, cols), dtype=torch.float16 if i % 3 else torch.float32)]
    cases += [form.with_(shape=(5, 1000)) for form in FORMS]
    cases += [FORMS[0].with_(shape=(3, 16384)), FORMS[1].with_(shape=(3, 16384), dtype=BF16)]
    cases += [DROPOUTS[0].with_(shape=(5, 20000)), DROPOUTS[1].with_(shape=(5, 20000), dtype=BF16)]
    cases += [layer.with_(shape=(5, 20000), dtype=torch.float64), rms.with_(shape=(5, 20001), dtype=torch.float16)]
    cases += [form.with_(shape=(0, 7)) for form in FORMS]
    cases += [
        layer.with_(shape=(2, 0, 5), dtype=BF16),
        layer.with_(shape=(64,)),
        add_rms.with_(shape=(65,), dtype=BF16),
    ]
    cases += [
        layer.with_(shape=(7, 3, 11), normalized_ndim=2),
        rms.with_(shape=(7, 3, 11), normalized_ndim=2, dtype=BF16),
    ]
    cases += [add_layer.with_(shape=(5, 2, 3, 7), normalized_ndim=3), rms.with_(shape=(3, 4, 5), normalized_ndim=3)]
    for layout in list(LAYOUTS)[1:]:
        cases += [layer.with_(shape=(6, 7, 40), layout=layout), rms.with_(shape=(6, 7, 40), layout=layout, dtype=BF16)]
        cases += [DROPOUTS[0].with_(shape=(6, 7, 41), layout=layout, dtype=BF16)]
        cases += [add_rms.with_(shape=(6, 7, 33), layout=layout)]
    cases += [
        layer.with_(shape=(2, 3, 4, 5, 24), layout="permuted"),
        add_layer.with_(shape=(3, 2, 3, 2, 31), layout="permuted"),
    ]
    for values in list(VALUES)[1:]:
        for dtype in (torch.float32, torch.float64, BF16):
            cases += [form.with_(shape=(16, 250), values=values, dtype=dtype) for form in FORMS]
    # Several threads and several chunks of rows; then outputs of more than 8 MB, which are stored past the caches.
    cases += [form.with_(shape=(1501, 257)) for form in FORMS] + [rms.with_(shape=(1501, 257), dtype=BF16)]
    cases += [DROPOUTS[0].with_(shape=(1001, 257), dtype=BF16, weight_dtype=torch.float32)]
    cases += [layer.with_(shape=(2100, 1024)), rms.with_(shape=(4200, 1024), dtype=BF16)]
    cases += [DROPOUTS[0].with_(shape=(2100, 1024))]
    return cases


CASES = tuple(_cases())

BENCH_SHAPES = tuple(
    Case(shape, dtype=dtype)
    for shape in ((4096, 768), (4096, 1024), (512, 4096), (64, 16384), (100000, 64), (8, 256))
    for dtype in (torch.float32, torch.bfloat16)
)
