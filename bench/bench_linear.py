"""Benchmarks of the linear family: a linear layer, and one with what follows it, at the shapes of transformers; the
cross-entropy of a language model's head, against torch's linear and cross_entropy.

The weight is packed once in forward rows, as the module keeps it, and in every call in rows with the backward. Work is
2 · rows · in · out operations forward and three times that with the backward; with one row the limit is the read
bandwidth, of the bytes of the weight. In int8 rows the input lies on the grid that it is quantised to, so that all
sides have the same float64 truth.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import cases
import cross_entropy_cases as cc
import linear_cases as lc
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import handtuned.nn.functional as H

from . import gate
from .peers import LINEAR_PEERS, Case, Function
from .room import Room, Target

FP32, BF16 = torch.float32, torch.bfloat16
COMPILED = ((512,), 768, 3072)  # a compilation takes seconds, so one shape stands for all
QUICK = (((128,), 768, 768), ((1,), 768, 768))


@dataclass(frozen=True)
class Op:
    """One line of the table."""

    name: str
    case: lc.Case
    backward: bool = False
    int8: str = ""  # what is quantised: "weight" or "weight and input"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.case.rows, self.case.in_features, self.case.out_features)

    @property
    def size(self) -> tuple[tuple[int, ...], int, int]:
        return self.case.rows, self.case.in_features, self.case.out_features

    @property
    def id(self) -> str:
        name = self.name.replace(", ", "-").replace(" ", "-")
        return f"{name}-{cases.SHORT[self.case.dtype]}-{gate.shape_name(self.shape)}"


# rows, in, out
MANY = ((128, 768, 768), (512, 768, 3072), (512, 3072, 768), (800, 384, 1536), (2048, 1024, 1024), (512, 1024, 4096))
KINDS = ("fwd", "f+b")
FEW = ((1, 768, 768), (1, 1024, 4096), (1, 4096, 4096), (4, 4096, 4096), (16, 1024, 4096))


INT8 = ("weight", "weight and input")


def _rows(dtype: torch.dtype) -> list[Op]:
    """Forward and backward of one case stand side by side: they share tensors and float64 truth."""

    def case(rows: int, k: int, n: int) -> lc.Case:
        return lc.Case((rows,), k, n, dtype)

    found = [Op(f"linear {kind}", case(*size), kind == "f+b") for size in MANY for kind in KINDS]
    found += [Op("linear fwd", case(*size)) for size in FEW]
    usual = case(512, 768, 3072)
    for activation in ("gelu", "silu"):
        found += [
            Op(f"linear, {activation} {kind}", usual.with_(activation=activation), kind == "f+b") for kind in KINDS
        ]
    added = case(512, 3072, 768).with_(residual=True)
    found += [Op(f"linear, add {kind}", added, kind == "f+b") for kind in KINDS]
    found += [Op(f"int8 {what} fwd", case(*size), int8=what) for what in INT8 for size in (*FEW[2:], MANY[1])]
    return [*found, Op("linear, dropout, add f+b", added.with_(dropout=0.1), True)]


OPS = [op for dtype in (FP32, BF16) for op in _rows(dtype)]


def target(op: Op) -> Target:
    case = op.case
    rows, weights = prod(case.rows), case.in_features * case.out_features
    if rows == 1:
        width = 1 if op.int8 else case.dtype.itemsize
        return Target(None, weights * width, "read", 0.85 if weights == 4096 * 4096 else None)
    plain, fp32 = op.name == "linear fwd", case.dtype == FP32
    share = (0.85 if rows >= 512 else 0.75 if rows >= 128 else None) if plain and fp32 else None
    ratio = (1.35 if fp32 else 0.95) if plain and rows >= 128 else None
    return Target(ratio, 2 * rows * weights * (3 if op.backward else 1), "FMA" if fp32 else "dot", share)


@functools.lru_cache(maxsize=1)
def draw(case: lc.Case) -> lc.Drawn:
    return lc.drawn(case, gate.DRAW)


def prepare(op: Op, no_compile: str = "") -> tuple[Case, gate.Truth]:
    """What is timed, and what its results must be."""
    if op.int8:
        return prepare_int8(op)
    case, drawn = op.case, draw(op.case)
    leaves = {name: leaf.requires_grad_(op.backward) for name, leaf in drawn.tensors.leaves().items()}
    packed = None if op.backward else H.pack_linear_weight(drawn.tensors.weight)

    def function(run: Callable[[dict[str, Tensor]], Tensor]) -> Function:
        return lambda *values: (run(dict(zip(leaves, values, strict=True))),)

    def eager(t: dict[str, Tensor]) -> Tensor:
        y = lc.activate(torch.nn.functional.linear(t["input"], t["weight"], t["bias"]), case.activation)
        y = torch.nn.functional.dropout(y, case.dropout) if case.dropout else y
        return y + t["residual"] if case.residual else y

    made = Case(
        op=op.name,
        dtype=case.dtype,
        shape=op.shape,
        eager=function(eager),
        ours=function(lambda t: lc.run(case, t, packed)),
        inputs=tuple(leaves.values()),
        grad_outputs=(drawn.tensors.grad_output,) if op.backward else None,
        no_compile=no_compile,
        random=case.dropout > 0,
    )
    names = ("output", *(f"grad_{name}" for name in leaves)) if op.backward else ("output",)
    return made, gate.Truth(names, drawn.torchs, drawn.truth)


def prepare_int8(op: Op) -> tuple[Case, gate.Truth]:
    case, t = op.case, lc.tensors(op.case, gate.DRAW)
    levels = torch.randint(0, 256, t.input.shape, generator=torch.Generator().manual_seed(gate.DRAW))
    levels[:, 0], levels[:, 1] = 0, 255
    x = ((levels - 128) / 64).to(case.dtype)
    q, scale = H.quantize_linear_weight(t.weight)
    exact = dataclasses.replace(t, input=x, weight=q.double() * scale.double()[:, None])
    weight, bias = exact.weight.to(case.dtype), t.bias
    assert bias is not None
    packed, quantize_input = H.pack_int8_weight(q), op.int8 != "weight"

    def eager(x: Tensor) -> tuple[Tensor]:
        return (torch.nn.functional.linear(x, weight, bias),)

    made = Case(
        op=op.name,
        dtype=case.dtype,
        shape=op.shape,
        eager=eager,
        ours=lambda x: (H.linear_int8(x, packed, scale, bias, quantize_input=quantize_input),),
        inputs=(x,),
        no_compile="left out: each compilation takes seconds",
        int8=_torch_int8(case, q, scale, bias, quantize_input),
    )
    return made, gate.Truth(("output",), {"output": eager(x)[0]}, {"output": lc.exact(case, exact, None)["output"]})


def _torch_int8(case: lc.Case, q: Tensor, scale: Tensor, bias: Tensor, quantize_input: bool) -> Function | str:
    if not quantize_input:
        scales = scale.to(case.dtype)
        return lambda x: (torch._weight_int8pack_mm(x, q, scales) + bias,)
    if case.dtype != FP32:
        return "float32 only"
    zeros = torch.zeros(len(scale), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, bias)
    return lambda x: (torch.ops.quantized.linear_dynamic(x, packed, reduce_range=False),)


@pytest.fixture(scope="module")
def linear_room(room: Room) -> Room:
    """The same room, rows included, with other peers."""
    return dataclasses.replace(room, peers=LINEAR_PEERS)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in OPS])
def test_linear(op: Op, linear_room: Room, benchmark: BenchmarkFixture) -> None:
    room = linear_room
    if room.quick and op.size not in QUICK:
        pytest.skip("not in --quick")
    left_out = "left out of --quick" if room.quick else "left out: each compilation takes seconds"
    made, truth = prepare(op, "" if op.size == COMPILED and not room.quick else left_out)
    room.measure(made, truth, target(op), benchmark)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entropy:
    """One line of the table: rows x in x classes."""

    case: cc.Case
    backward: bool = False

    @property
    def name(self) -> str:
        return f"linear, cross-entropy {KINDS[self.backward]}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.case.rows, self.case.in_features, self.case.classes)

    @property
    def id(self) -> str:
        return f"cross-entropy-{KINDS[self.backward]}-{cases.SHORT[self.case.dtype]}-{gate.shape_name(self.shape)}"

    @property
    def target(self) -> Target:
        """Operations that the result needs: the logits, and two products as large with the backward."""
        work = 2 * math.prod(self.shape) * (3 if self.backward else 1)
        fp32 = self.case.dtype == FP32
        return Target(1.5 if self.backward and fp32 else None, work, "FMA" if fp32 else "dot")


HEADS = ((1024, 768, 32000), (512, 2048, 32000))
ENTROPIES = [
    Entropy(cc.Case((rows,), k, classes, dtype), backward)
    for dtype in (FP32, BF16)
    for rows, k, classes in HEADS
    for backward in (False, True)
]


@functools.lru_cache(maxsize=1)
def draw_entropy(case: cc.Case) -> cc.Drawn:
    drawn: cc.Drawn = cc.drawn.__wrapped__(case, gate.DRAW)  # not kept: float64 gradients of many classes are large
    return drawn


def prepare_entropy(op: Entropy) -> tuple[Case, gate.Truth]:
    """What is timed, and what its results must be."""
    case, drawn = op.case, draw_entropy(op.case)
    t = drawn.tensors
    leaves = {name: leaf.requires_grad_(op.backward) for name, leaf in t.leaves().items()}

    def function(run: Callable[[cc.Case, dict[str, Tensor], cc.Tensors], Tensor]) -> Function:
        return lambda *values: (run(case, dict(zip(leaves, values, strict=True)), t),)

    made = Case(
        op=op.name,
        dtype=case.dtype,
        shape=op.shape,
        eager=function(cc.run_torch),
        ours=function(cc.run),
        inputs=tuple(leaves.values()),
        grad_outputs=(t.grad_loss,) if op.backward else None,
        no_compile="left out: each compilation takes seconds",
    )
    names = ("loss", *(f"grad_{name}" for name in leaves)) if op.backward else ("loss",)
    return made, gate.Truth(names, drawn.torchs, drawn.truth)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in ENTROPIES])
def test_linear_cross_entropy(op: Entropy, room: Room, benchmark: BenchmarkFixture) -> None:
    if room.quick:
        pytest.skip("not in --quick")
    made, truth = prepare_entropy(op)
    room.measure(made, truth, op.target, benchmark)
