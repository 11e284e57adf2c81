"""Benchmarks of the recurrent layers: streaming steps, inference, training, lengths, against torch and onnxruntime.

Rows of variants, which torch does not have, are held against the formula in torch's operators, step by step, and
against handtuned's own plain layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import rnn_cases as rc
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import handtuned
from handtuned.nn.functional import pack_rnn_weights

from . import gate
from .peers import RNN_PEERS, Case, OnnxGraph, OnnxNode, Tensors
from .room import Room, Target

FP32, BF16 = torch.float32, torch.bfloat16
MOST_STEPS = 64  # with one row; the loop over cells is left out above


@dataclass(frozen=True)
class Op:
    """One line of the table."""

    name: str
    case: rc.Case
    backward: bool = False
    ratio: float | None = None  # wanted against torch eager
    cell: bool = False  # the cell's module

    @property
    def id(self) -> str:
        return f"{self.name.replace(' ', '-')}-{cases.SHORT[self.case.dtype]}-{gate.shape_name(self.case.shape)}"


# ---- rows ------------------------------------------------------------------------------------------------------------


def _rows() -> list[Op]:
    def step(mode: str, batch: int, hidden: int, ratio: float | None = None, cell: bool = False) -> Op:
        case = rc.Case(mode, (1, batch, hidden, hidden), states=True)
        return Op(f"{mode}{'Cell' * cell} step", case, ratio=ratio, cell=cell)

    rows = [step("LSTM", 1, hidden, 20.0) for hidden in (128, 256, 512)] + [step("LSTM", 8, 512)]
    rows += [step("GRU", 1, 256), step("RNN_TANH", 1, 256)]
    rows += [step("LSTM", 1, hidden, 4.0, cell=True) for hidden in (64, 128, 256, 512)]
    for dtype, wanted in ((FP32, 2.2), (BF16, 2.5)):
        for shape in ((128, 1, 256, 256), (128, 1, 512, 512), (512, 1, 128, 128)):
            rows.append(Op("LSTM fwd", rc.Case("LSTM", shape, dtype=dtype), ratio=wanted))
    for shape in ((128, 8, 512, 512), (256, 16, 256, 256), (128, 32, 512, 512), (64, 64, 512, 512)):
        rows.append(Op("LSTM fwd", rc.Case("LSTM", shape), ratio=1.3))
    for mode, fwd, both in (("GRU", 8.0, 12.0), ("RNN_TANH", 5.0, 12.0)):
        rows += [Op(f"{mode} fwd", rc.Case(mode, (128, 1, 256, 256)), ratio=fwd)]
        rows += [Op(f"{mode} fwd", rc.Case(mode, (128, 16, 256, 256)), ratio=2.6 if mode == "GRU" else None)]
        rows += [Op(f"{mode} f+b", rc.Case(mode, (128, 1, 256, 256)), True, both)]
        rows += [Op(f"{mode} f+b", rc.Case(mode, (128, 16, 256, 256)), True)]
    for dtype in (FP32, BF16):
        for shape, ratio in (((128, 1, 256, 256), 2.2), ((128, 16, 256, 256), 1.5), ((64, 32, 512, 512), 1.5)):
            rows.append(Op("LSTM f+b", rc.Case("LSTM", shape, dtype=dtype), True, ratio))
    lengths = tuple(20 + 140 * b // 31 for b in range(32))
    rows += [Op("LSTM lengths fwd", rc.Case("LSTM", (160, 32, 256, 256), lengths=lengths), ratio=4.0)]
    rows += [Op("LSTM lengths f+b", rc.Case("LSTM", (160, 32, 256, 256), lengths=lengths), True)]
    rows += [Op("LSTM projected fwd", rc.Case("LSTM", (128, 8, 256, 512), proj=128), ratio=6.0)]
    return rows


def _variants() -> list[Op]:
    """Of each option the plain layer's time over the variant's: training where something is drawn."""
    hard: dict[str, object] = {"activation": "hardtanh", "recurrent_activation": "hardsigmoid"}
    forward: dict[str, dict[str, object]] = {
        "hard": hard,
        "coupled": {"coupled_gates": True},
        "peepholes": {"peepholes": True},
        "zoneout": {"zoneout": 0.1, "cell_zoneout": 0.1},
        "layer norm": {"layer_norm": True},
        "cell states": {"return_cell_states": True},
    }
    both = forward | {"state dropout": {"recurrent_dropout": 0.2}, "weight dropout": {"weight_dropout": 0.2}}
    del both["hard"], both["cell states"]
    rows = []
    for kinds, backward in ((forward, False), (both, True)):
        for name, options in kinds.items():
            case = rc.Case("LSTM", (128, 16, 256, 256), options=tuple(options.items()), training=backward)
            rows.append(Op(f"LSTM {name} {'f+b' if backward else 'fwd'}", case, backward))
    return rows


OPS = _rows() + _variants()
QUICK = {"LSTM step", "GRU step", "LSTMCell step"}


def work(case: rc.Case, backward: bool) -> float:
    """Multiplications and additions that the result needs."""
    steps, batch, width, hidden = case.shape
    rows = sum(case.lengths) if case.lengths else steps * batch
    each = case.cell.gates * hidden * (width + case.state) + hidden * case.proj
    return 2.0 * rows * each * (3 if backward else 1)


# ---- the sides -------------------------------------------------------------------------------------------------------

Names = tuple[str, ...]


def _torch_cells(op: Op, t: rc.Tensors) -> Callable[..., Tensors] | str:
    case = op.case
    if op.cell:
        return "torch itself is its cell here"
    if case.lengths or case.proj or case.options:
        return "has neither lengths nor projections nor options"
    if case.shape[0] > MOST_STEPS and case.shape[1] > 1:
        return "left out for this shape: a call takes long"
    operator = getattr(torch._VF, f"{case.mode.lower()}_cell")

    def cells(x: Tensor, *weights: Tensor) -> Tensors:
        zeros = x.new_zeros(x.shape[1], case.shape[3])
        h, c = (zeros if s is None else s[0] for s in (t.h0, t.c0))
        outputs = []
        for frame in x.unbind():
            if case.mode == "LSTM":
                h, c = operator(frame, (h, c), *weights)
            else:
                h = operator(frame, h, *weights)
            outputs.append(h)
        return (torch.stack(outputs),)

    return cells


GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}  # ONNX's of torch's


def onnx_graph(case: rc.Case, t: rc.Tensors) -> OnnxGraph | None:
    """ONNX's LSTM, GRU or RNN of one direction, float32."""
    if case.lengths or case.proj or case.options or case.dtype != FP32:
        return None
    steps, batch, _, hidden = case.shape
    w_ih, w_hh, b_ih, b_hh = (
        torch.cat([w.chunk(case.cell.gates)[i] for i in GATE_ORDER[case.mode]]) for w in t.weights
    )
    attributes: dict[str, object] = {"hidden_size": hidden}
    attributes |= {"linear_before_reset": 1} if case.mode == "GRU" else {}
    states = [s for s in (t.h0, t.c0) if s is not None]
    given = ("input0", "w_ih", "w_hh", "b", "", *(f"input{i + 1}" for i in range(len(states))))
    return OnnxGraph(
        nodes=(OnnxNode(case.mode.split("_")[0], given, ("y",), attributes),),
        outputs=("y",),
        constants={"w_ih": w_ih[None], "w_hh": w_hh[None], "b": torch.cat([b_ih, b_hh])[None]},
        inputs=(t.input, *states),
        shape=(steps, 1, batch, hidden),
        result=(steps, batch, hidden),
    )


def _modules(case: rc.Case, t: rc.Tensors, cell: bool) -> tuple[Callable[..., Tensors], ...]:
    """(torch's, ours): streaming is done with modules, which have the weights themselves."""
    name, *kind = case.mode.split("_")
    options = {"nonlinearity": kind[0].lower()} if kind else {}
    hx = tuple(s[0] if cell else s for s in (t.h0, t.c0) if s is not None)

    def call(package: Any) -> Callable[..., Tensors]:
        module = getattr(package, name + "Cell" * cell)(*case.shape[2:], dtype=case.dtype, **options).eval()
        for parameter, weight in zip(module.parameters(), t.weights, strict=True):
            parameter.data = weight
        state = hx if case.mode == "LSTM" else hx[0]

        def run(x: Tensor, *weights: Tensor) -> Tensors:
            return (module(x, state)[0],)

        return run

    return call(torch.nn), call(handtuned.nn)


def _sides(op: Op, t: rc.Tensors, backward: bool) -> tuple[Callable[..., Tensors], ...]:
    """(torch's, ours) of input and weights; what does not depend on them is made before anything is timed."""
    case = op.case
    if case.shape[0] == 1:
        return _modules(case, t, op.cell)
    hx = None if t.h0 is None else (t.h0, t.c0) if case.mode == "LSTM" else t.h0
    options: dict[str, Any] = {**dict(case.options), "training": case.training}
    if not backward:
        options["packed"] = pack_rnn_weights(case.mode, t.weights, **dict(case.options))
    ours = functools.partial(rc.function(case.mode), **options)
    if case.options:
        return (
            lambda x, *weights: rc.run_formula(case, dataclasses.replace(t, input=x, weights=weights))[:1],
            lambda x, *weights: (ours(x, hx, weights)[0],),
        )
    if not case.lengths:
        return (
            lambda x, *weights: rc.run_torch(case, dataclasses.replace(t, input=x, weights=weights))[:1],
            lambda x, *weights: (ours(x, hx, weights)[0],),
        )
    sequence = pack_padded_sequence(t.input, list(case.lengths), enforce_sorted=False)
    operator = getattr(torch._VF, case.mode.lower())
    zeros = t.input.new_zeros(1, case.shape[1], case.shape[3])
    state = (zeros, zeros) if case.mode == "LSTM" else zeros

    def packed(x: Tensor) -> PackedSequence:
        return sequence._replace(data=x)

    return (
        lambda x, *weights: operator(x, sequence.batch_sizes, state, list(weights), True, 1, 0.0, False, False)[:1],
        lambda x, *weights: (ours(packed(x), None, weights)[0].data,),
    )


def prepare(op: Op) -> tuple[Case, gate.Truth]:
    """What is timed, and what its results must be."""
    case = op.case
    t = rc.tensors(case, gate.DRAW)
    eager, ours = _sides(op, t, op.backward)
    x, grad = t.input[0] if op.cell else t.input, t.grad_output
    if case.lengths:
        sequence = pack_padded_sequence(t.input, list(case.lengths), enforce_sorted=False)
        x = sequence.data
        grad = pack_padded_sequence(t.grad_output, list(case.lengths), enforce_sorted=False).data
    inputs = tuple(i.detach().requires_grad_(op.backward) for i in (x, *t.weights))
    made = Case(
        op=op.name,
        dtype=case.dtype,
        shape=case.shape,
        eager=eager,
        ours=ours,
        inputs=inputs,
        grad_outputs=(grad,) if op.backward else None,
        onnx=None if op.backward or op.cell else onnx_graph(case, t),
        cells=_torch_cells(op, t),
        plain=prepare(dataclasses.replace(op, case=case.with_(options=())))[0] if case.options else None,
    )
    return made, _truth(op, t, made)


def _truth(op: Op, t: rc.Tensors, made: Case) -> gate.Truth:
    """torch's own results on these inputs, in their dtype and in float64."""
    doubled = dataclasses.replace(
        t,
        **{
            f.name: v.double()
            for f in dataclasses.fields(t)
            if isinstance(v := getattr(t, f.name), Tensor) and v.is_floating_point()
        },
        weights=tuple(w.double() for w in t.weights),
    )
    wide_eager, _ = _sides(dataclasses.replace(op, case=op.case.with_(dtype=torch.float64)), doubled, True)
    wide_inputs = tuple(i.detach().double().requires_grad_(i.requires_grad) for i in made.inputs)
    grads = None if made.grad_outputs is None else tuple(g.double() for g in made.grad_outputs)
    wide = dataclasses.replace(made, eager=wide_eager, inputs=wide_inputs, grad_outputs=grads, dtype=torch.float64)
    names: Names = ("output",)
    if grads is not None:
        names += ("grad_input", *(f"grad_w{i}" for i in range(len(made.inputs) - 1)))
    found = []
    with made.mode():
        for side in (made, wide):
            gate.seed()
            found.append(dict(zip(names, side.bind(side.eager)(), strict=True)))
    torchs, truth = found
    arrays = {name: tensor.detach().numpy() for name, tensor in truth.items()}
    return gate.Truth(names, {name: tensor.detach() for name, tensor in torchs.items()}, arrays)


@pytest.fixture(scope="module")
def rnn_room(room: Room) -> Room:
    """The same room, rows included, with other peers."""
    return dataclasses.replace(room, peers=RNN_PEERS)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in OPS])
def test_rnn(op: Op, rnn_room: Room, benchmark: BenchmarkFixture) -> None:
    if rnn_room.quick and op.name not in QUICK:
        pytest.skip("not in --quick")
    made, truth = prepare(op)
    rnn_room.measure(made, truth, Target(op.ratio, work(op.case, op.backward), "FMA"), benchmark)
