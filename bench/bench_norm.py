"""Benchmarks of the norm family: every op, dtype and shape against its peers.

Traffic is counted as the least a kernel must move, in tensors of the input's size: LayerNorm and RMSNorm forward 2
(read x, write y); with backward 5 (and read dy and x, write dx); with the residual add 4 (read x and residual, write
the sum and y) and 8 (and read both incoming gradients and the sum, write one gradient); with dropout 9 (the two
gradients differ). Parameters and statistics are left out. Small shapes stay in the caches and may exceed 100 % of the
copy bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cases
import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import handtuned.nn.functional as H

from . import gate
from .peers import Case, Function, OnnxGraph, OnnxNode, Tensors
from .room import Room, Target

FP32, BF16 = torch.float32, torch.bfloat16
DROPOUT = 0.1
SMALL = (8, 256)
QUICK_SHAPES = ((4096, 768), SMALL)
# A compilation takes seconds, so three shapes stand for all: wide, long and small.
COMPILED_SHAPES = ((4096, 768), (512, 4096), SMALL)


@dataclass(frozen=True)
class Op:
    """kind, add, dropout: as in cases.Case. targets: ratio to torch eager by dtype, and small_target on 8x256."""

    name: str
    kind: str
    backward: bool
    traffic: int
    add: bool = False
    dropout: float = 0.0
    targets: dict[torch.dtype, float] = field(default_factory=dict)
    small_target: float | None = None

    @property
    def id(self) -> str:
        parts = ["dropout"] * bool(self.dropout) + ["add"] * self.add + [f"{self.kind}_norm"]
        return "_".join(parts) + ("-f+b" if self.backward else "-fwd")


# Forward and backward of one case stand side by side: they share tensors and float64 reference.
OPS = (
    Op("LayerNorm fwd", "layer", False, 2, targets={FP32: 2.1, BF16: 3.2}, small_target=1.0),
    Op("LayerNorm f+b", "layer", True, 5, targets={FP32: 1.7, BF16: 3.0}, small_target=1.0),
    Op("RMSNorm fwd", "rms", False, 2, targets={FP32: 5.0, BF16: 9.0}, small_target=1.0),
    Op("RMSNorm f+b", "rms", True, 5),
    Op("add+LayerNorm fwd", "layer", False, 4, add=True, small_target=1.0),
    Op("add+LayerNorm f+b", "layer", True, 8, add=True, targets={FP32: 2.1, BF16: 3.2}, small_target=1.4),
    Op(
        "dropout+add+LayerNorm f+b",
        *("layer", True, 9, True, DROPOUT),
        targets={FP32: 10.0, BF16: 10.0},
        small_target=2.0,
    ),
    Op("add+RMSNorm f+b", "rms", True, 8, add=True),
)


def torch_function(op: Op, eps: float) -> Function:
    """torch's own operators, as a model would write them."""

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensors:
        return (F.layer_norm(x, x.shape[-1:], w, b, eps),)

    def rms(x: Tensor, w: Tensor) -> Tensors:
        return (F.rms_norm(x, x.shape[-1:], w, eps),)

    def add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensors:
        h = x + r
        return F.layer_norm(h, h.shape[-1:], w, b, eps), h

    def dropout_add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensors:
        h = F.dropout(x, op.dropout) + r
        return F.layer_norm(h, h.shape[-1:], w, b, eps), h

    def add_rms(x: Tensor, r: Tensor, w: Tensor) -> Tensors:
        h = x + r
        return F.rms_norm(h, h.shape[-1:], w, eps), h

    if op.kind == "rms":
        return add_rms if op.add else rms
    if op.dropout:
        return dropout_add_layer
    return add_layer if op.add else layer


def handtuned_function(op: Op, eps: float) -> Function:
    p = op.dropout

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensors:
        return (H.layer_norm(x, x.shape[-1:], w, b, eps),)

    def rms(x: Tensor, w: Tensor) -> Tensors:
        return (H.rms_norm(x, x.shape[-1:], w, eps),)

    def add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensors:
        return H.add_layer_norm(x, r, x.shape[-1:], w, b, eps, p)

    def add_rms(x: Tensor, r: Tensor, w: Tensor) -> Tensors:
        return H.add_rms_norm(x, r, x.shape[-1:], w, eps, p)

    if op.kind == "rms":
        return add_rms if op.add else rms
    return add_layer if op.add else layer


def onnx_graph(op: Op, eps: float, inputs: int) -> OnnxGraph | None:
    """The fused kernels of onnxruntime; its RMSNorm is called SimplifiedLayerNormalization. It has no backward."""
    if op.backward:
        return None
    names = tuple(f"input{i}" for i in range(inputs))
    if op.add:
        kind = "SkipLayerNormalization" if op.kind == "layer" else "SkipSimplifiedLayerNormalization"
        node = OnnxNode(kind, names, ("y", "", "", "h"), {"epsilon": eps}, "com.microsoft")
    else:
        kind = "LayerNormalization" if op.kind == "layer" else "SimplifiedLayerNormalization"
        node = OnnxNode(kind, names, ("y",), {"epsilon": eps, "axis": -1})
    return OnnxGraph((node,), node.outputs)


def parameters() -> list[object]:
    """Shape, then dtype, then op, so that neighbours share tensors."""
    return [
        pytest.param(
            op,
            base.with_(kind=op.kind, add=op.add, dropout=op.dropout),
            id=f"{op.id}-{cases.SHORT[base.dtype]}-{gate.shape_name(base.shape)}",
        )
        for base in cases.BENCH_SHAPES
        for op in OPS
    ]


def prepare(op: Op, case: cases.Case, no_compile: str = "") -> tuple[Case, gate.Truth]:
    """What is timed, and what its results must be."""
    drawn = gate.draw(case)
    leaves = drawn.tensors.leaves()
    incoming = (drawn.tensors.grad_output, drawn.tensors.grad_new_residual)
    names = ("output", "new_residual")[: 1 + op.add]
    if op.backward:
        names += tuple(f"grad_{name}" for name in leaves)
    made = Case(
        op=op.name,
        dtype=case.dtype,
        shape=case.shape,
        eager=torch_function(op, case.eps),
        ours=handtuned_function(op, case.eps),
        inputs=tuple(leaves.values()),
        grad_outputs=tuple(t for t in incoming if t is not None) if op.backward else None,
        onnx=onnx_graph(op, case.eps, len(leaves)),
        no_compile=no_compile,
        random=op.dropout > 0,
    )
    return made, gate.Truth(names, drawn.torchs, drawn.truth)


def not_compiled(room: Room, shape: tuple[int, ...]) -> str:
    if room.quick:
        return "left out of --quick"
    return "" if shape in COMPILED_SHAPES else "left out for this shape: each compilation takes seconds"


@pytest.mark.parametrize(("op", "case"), parameters())
def test_norm(op: Op, case: cases.Case, room: Room, benchmark: BenchmarkFixture) -> None:
    if room.quick and case.shape not in QUICK_SHAPES:
        pytest.skip("not in --quick")
    ratio = op.small_target if case.shape == SMALL else op.targets.get(case.dtype)
    made, truth = prepare(op, case, not_compiled(room, case.shape))
    room.measure(made, truth, Target(ratio, op.traffic * case.elements * case.dtype.itemsize), benchmark)
