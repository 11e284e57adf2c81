"""The one list of cases of the recurrent family, shared by tests and benchmarks.

A Case says what is computed; ``tensors`` draws the arguments, ``run`` calls handtuned, ``run_torch`` torch's operators
on the same weights, and ``results`` adds every gradient. ``exact`` is the formula in float64. With lengths the padding
holds NaN from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from cases import SEED, SHORT
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from handtuned import ops, reference
from handtuned.nn import functional as H
from handtuned.nn.functional.variants import Variant

MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
ACTIVATIONS = {"activation": "hardtanh", "recurrent_activation": "hardsigmoid"}


@contextmanager
def one_thread() -> Iterator[None]:
    """For torch's many small operators, which two threads slow down where others are at work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """One stack over one batch. shape: steps, batch, input size, hidden size."""

    mode: str
    shape: tuple[int, int, int, int]
    proj: int = 0
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    states: bool = False  # initial states, with gradients
    lengths: tuple[int, ...] = ()
    packed: bool = False  # lengths as a PackedSequence
    dropout: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()  # of a variant
    training: bool = True  # where something is dropped or zoned out
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        parts = [self.mode, SHORT[self.dtype], "x".join(map(str, self.shape))]
        for f in fields(self)[2:-1]:
            value = getattr(self, f.name)
            if value != f.default:
                value = ",".join(f"{n}_{v}" for n, v in value) if f.name == "options" else value
                parts.append(f.name if value is True else f"{f.name}_{value}".replace(" ", ""))
        return "-".join(parts)

    @property
    def variant(self) -> Variant:
        return Variant(**dict(self.options))

    @property
    def cell(self) -> ops.Cell:
        return ops.CELLS[self.variant.mode(self.mode)]

    @property
    def names(self) -> tuple[str, ...]:
        """Of what run gives."""
        names = ("output", "hn", "cn") if self.mode == "LSTM" else ("output", "hn")
        return (*names, "cells") if self.variant.return_cell_states else names

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1] * (self.shape[2] + self.shape[3]) * self.layers

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def state(self) -> int:
        return self.proj or self.shape[3]


@dataclass(frozen=True)
class Tensors:
    """What a case is computed on; input and grad_output [T, B, width], or [B, T, width] with batch_first."""

    input: Tensor
    weights: tuple[Tensor, ...]
    h0: Tensor | None
    c0: Tensor | None
    grad_output: Tensor
    grad_hn: Tensor
    grad_cn: Tensor
    grad_cells: Tensor
    lengths: Tensor | None

    def grads(self, case: Case) -> tuple[Tensor, ...]:
        """Of what run gives."""
        found: list[Tensor] = [getattr(self, f"grad_{name}") for name in case.names]
        return tuple(found)

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments by name, as new leaves that require grad."""
        named = {"input": self.input, "h0": self.h0, "c0": self.c0}
        named |= {f"w{i}": w for i, w in enumerate(self.weights)}
        return {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}

    def with_leaves(self, leaves: dict[str, Tensor]) -> Tensors:
        weights = tuple(leaves[f"w{i}"] for i in range(len(self.weights)))
        return replace(self, weights=weights, **{n: t for n, t in leaves.items() if not n.startswith("w")})


def weight_shapes(case: Case) -> list[tuple[int, ...]]:
    rows = case.cell.gates * case.shape[3]
    shapes: list[tuple[int, ...]] = []
    for layer in range(case.layers):
        for _ in range(case.directions):
            shapes += [(rows, case.directions * case.state if layer else case.shape[2]), (rows, case.state)]
            shapes += [(rows,), (rows,)] if case.bias else []
            shapes += [(case.proj, case.shape[3])] if case.proj else []
            shapes += [(case.cell.peephole_gates * case.shape[3],)] if case.cell.peepholes else []
            shapes += [(rows,), (rows,), (case.shape[3],), (case.shape[3],)][: case.cell.gains(case.bias)]
    return shapes


def tensors(case: Case, draw: int = 0) -> Tensors:
    """Draw number `draw` of the case's tensors; weights as torch initialises them."""
    generator = torch.Generator().manual_seed(SEED + draw)
    steps, batch, width, hidden = case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    def uniform(*shape: int) -> Tensor:
        drawn = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        return drawn.div(hidden**0.5).to(case.dtype)

    lead = (batch, steps) if case.batch_first else (steps, batch)
    x, lengths = normal(*lead, width), torch.tensor(case.lengths) if case.lengths else None
    if lengths is not None:
        padding = torch.arange(steps)[:, None] >= lengths
        x[padding.T if case.batch_first else padding] = torch.nan
    stack = case.layers * case.directions
    h0, c0 = normal(stack, batch, case.state), normal(stack, batch, hidden)
    return Tensors(
        input=x,
        weights=tuple(uniform(*shape) for shape in weight_shapes(case)),
        h0=h0 if case.states else None,
        c0=c0 if case.states and case.mode == "LSTM" else None,
        grad_output=normal(*lead, case.directions * case.state),
        grad_hn=normal(stack, batch, case.state),
        grad_cn=normal(stack, batch, hidden),
        grad_cells=normal(*lead, case.directions * hidden),
        lengths=lengths,
    )


# ---- running ---------------------------------------------------------------------------------------------------------

Run = Callable[[Case, Tensors], tuple[Tensor, ...]]


def function(mode: str) -> Callable[..., Any]:
    """nn.functional's function of a mode."""
    if mode.startswith("RNN"):
        return lambda *args, **kwargs: H.rnn(*args, nonlinearity=mode[4:].lower(), **kwargs)
    functions: dict[str, Callable[..., Any]] = {"LSTM": H.lstm, "GRU": H.gru}
    return functions[mode]


def _hx(case: Case, t: Tensors) -> Any:
    if t.h0 is None:
        return None
    return (t.h0, t.c0) if case.mode == "LSTM" else t.h0


def _sequence(case: Case, t: Tensors) -> PackedSequence:
    assert t.lengths is not None
    return pack_padded_sequence(t.input, t.lengths, batch_first=case.batch_first, enforce_sorted=False)


def run(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """handtuned.nn.functional: what case.names says."""
    x: Any = _sequence(case, t) if case.packed else t.input
    options: dict[str, Any] = dict(bias=case.bias, num_layers=case.layers, bidirectional=case.bidirectional)
    options |= dict(batch_first=case.batch_first, dropout=case.dropout, training=case.training)
    options |= dict(lengths=None if case.packed else t.lengths)
    output, states, *cells = function(case.mode)(x, _hx(case, t), t.weights, **options, **dict(case.options))

    def padded(sequence: Any) -> Tensor:
        whole: Tensor = sequence
        if case.packed:
            whole = pad_packed_sequence(sequence, case.batch_first, total_length=case.shape[0])[0]
        return whole

    return padded(output), *(states if case.mode == "LSTM" else (states,)), *map(padded, cells)


def run_torch(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """torch's own operators, lengths as a PackedSequence."""
    steps, batch, _, hidden = case.shape
    stack = case.layers * case.directions
    h0 = t.input.new_zeros(stack, batch, case.state) if t.h0 is None else t.h0
    c0 = t.input.new_zeros(stack, batch, hidden) if t.c0 is None else t.c0
    operator = getattr(torch._VF, case.mode.lower())
    options = (list(t.weights), case.bias, case.layers, 0.0, False, case.bidirectional)
    if t.lengths is None:
        hx = (h0, c0) if case.mode == "LSTM" else h0
        found: tuple[Tensor, ...] = operator(t.input, hx, *options, case.batch_first)
        return found
    sequence = _sequence(case, t)
    h0, c0 = (s[:, sequence.sorted_indices] for s in (h0, c0))
    hx = (h0, c0) if case.mode == "LSTM" else h0
    data, *states = operator(sequence.data, sequence.batch_sizes, hx, *options)
    output = pad_packed_sequence(sequence._replace(data=data), case.batch_first, total_length=steps)[0]
    return output, *(s[:, sequence.unsorted_indices] for s in states)


def run_formula(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    """reference.recur, which does everything; at random with the key that the next call would draw."""
    x, lengths, h0, c0 = t.input.transpose(0, 1) if case.batch_first else t.input, t.lengths, t.h0, t.c0
    sequence = _sequence(case, t) if case.packed else None
    if sequence is not None:  # masks are of the rows in their order there
        assert t.lengths is not None
        x, order = sequence.data, sequence.sorted_indices
        lengths = t.lengths[order]
        h0, c0 = (s if s is None else s[:, order] for s in (h0, c0))
    dropout = case.dropout if case.layers > 1 and case.training else 0.0
    rates = case.variant.rates(case.training)
    draws = dropout > 0 or (case.training and rates is not None)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64) if draws else None
    rest = (case.cell.mode, case.bidirectional, case.bias, dropout, rates, seed)
    results = reference.recur(x, lengths, h0, c0, list(t.weights), *rest)
    found = dict(zip(("output", "hn", "cn", "cells"), results, strict=True))
    for name in case.names:
        if name in ("hn", "cn") and sequence is not None:
            found[name] = found[name][:, sequence.unsorted_indices]
        elif name in ("output", "cells") and sequence is not None:
            padded = pad_packed_sequence(sequence._replace(data=found[name]), case.batch_first, 0.0, case.shape[0])
            found[name] = padded[0]
        elif name in ("output", "cells") and case.batch_first:
            found[name] = found[name].transpose(0, 1)
    return tuple(found[name] for name in case.names)


def results(case: Case, t: Tensors, how: Run = run) -> dict[str, Tensor]:
    """Outputs and every gradient by name."""
    leaves = t.leaves()
    outputs = how(case, t.with_leaves(leaves))
    grads = torch.autograd.grad(outputs, list(leaves.values()), t.grads(case), materialize_grads=True)
    found = dict(zip(case.names, outputs, strict=True))
    return {n: o.detach() for n, o in found.items()} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


def exact(case: Case, t: Tensors) -> dict[str, Tensor]:
    """The formula on the same numbers in float64."""
    changes = {f.name: getattr(t, f.name) for f in fields(t)}
    wide = {n: v.double() for n, v in changes.items() if isinstance(v, Tensor) and v.is_floating_point()}
    wide_t = replace(t, **wide, weights=tuple(w.double() for w in t.weights))
    with one_thread():
        return results(case.with_(dtype=torch.float64), wide_t, run_formula)


# ---- the list --------------------------------------------------------------------------------------------------------


def _forms(mode: str) -> list[Case]:
    ragged = (3, 7, 1, 5, 7, 2)
    forms = [
        Case(mode, (9, 5, 7, 19), layers=2, bidirectional=True, states=True),
        Case(mode, (12, 1, 17, 65), states=True),
        Case(mode, (4, 21, 33, 40), bias=False, batch_first=True),
        Case(mode, (7, 6, 5, 33), lengths=ragged, layers=2, bidirectional=True, states=True, batch_first=True),
        Case(mode, (7, 6, 5, 16), lengths=ragged, packed=True, bidirectional=True, states=True),
        Case(mode, (3, 2, 1, 1)),
    ]
    if mode == "LSTM":
        forms += [
            Case(mode, (6, 4, 9, 21), proj=5, layers=2, bidirectional=True, states=True),
            Case(mode, (7, 6, 5, 34), proj=17, bias=False, lengths=ragged),
        ]
    return forms


FORMS = [case for mode in MODES for case in _forms(mode)]
# Sums over a thousand rows, where the order of additions shows.
LONG = [Case(mode, (64, 16, 64, 64), states=True) for mode in MODES]
# Of one unit and few rows an error in bfloat16 is one rounding or two, whichever: there it has more rows and steps. Not
# with ReLU, where one rounding across 0 in a row, which torch meets too, turns all of the row's gradients.
ONE_UNIT = [Case(mode, (16, 64, 5, 1), states=True, dtype=torch.bfloat16) for mode in MODES if mode != "RNN_RELU"]
CASES = [case.with_(dtype=dtype) for case in FORMS for dtype in SHORT if case.shape[3] > 1 or dtype != torch.bfloat16]
CASES += ONE_UNIT + LONG
