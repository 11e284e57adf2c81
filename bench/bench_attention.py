"""Benchmarks of attention: every regime, dtype and shape against torch's kernels.

Work is counted as what the result needs: 4 · heads · queries · keys · dim operations forward, half of that where
causal, only visible pairs where a window or padding leaves out more, and 3.5 times that with the backward. Decode rows
read every key and value once; their limit is the read bandwidth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import attention_cases as ac
import attention_numerics as an
import cases
import numerics
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import attention_forms as forms
from . import gate
from .peers import ATTENTION_PEERS, Case
from .room import Room, Target

FP32, BF16 = torch.float32, torch.bfloat16
BOTH = (FP32, BF16)
# A compilation takes some ten seconds, so one shape stands for all.
COMPILED = (4, 12, 512, 512, 64)
QUICK = ((1, 12, 128, 128, 64), (32, 12, 16, 16, 32), (1, 32, 1, 512, 128))
MOST_SCORES = 2**25  # torch's unfused kernel is left out above: a call takes seconds


@dataclass(frozen=True)
class Op:
    """One line of the table. padding: "bool" or "float", a mask that hides the last eighth of the keys."""

    name: str
    case: ac.Case
    backward: bool = False
    padding: str = ""
    paged: bool = False

    @property
    def decodes(self) -> bool:
        return self.case.shape[2] == 1

    @property
    def shape(self) -> tuple[str, ...]:
        batch, heads, queries, keys, width = self.case.shape
        if self.case.packed:
            return (f"{len(self.case.packed[0])} packed", str(heads), str(sum(self.case.query_lengths)), str(width))
        kv_heads = self.case.kv_heads or heads
        tokens = f"{queries}" if queries == keys else f"{queries}/{keys}"
        return (str(batch), f"{heads}" if kv_heads == heads else f"{heads}/{kv_heads}", tokens, str(width))

    @property
    def id(self) -> str:
        shape = gate.shape_name(self.shape).replace(" ", "-")
        return f"{self.name.replace(', ', '-').replace(' ', '-')}-{cases.SHORT[self.case.dtype]}-{shape}"


# ---- rows ------------------------------------------------------------------------------------------------------------


def _square(batch: int, heads: int, tokens: int, width: int) -> ac.Case:
    return ac.Case((batch, heads, tokens, tokens, width))


PLAIN = (
    *(_square(1, 12, 128, 64), _square(8, 12, 128, 64), _square(4, 12, 512, 64), _square(1, 16, 2048, 64)),
    *(_square(32, 12, 16, 32), *(_square(1, 8, 1024, width) for width in (40, 80, 96, 256))),
)
CAUSAL = tuple(
    shape.with_(causal=True) for shape in (_square(1, 12, 128, 64), _square(4, 12, 512, 64), _square(1, 16, 2048, 64))
)
USUAL = _square(4, 12, 512, 64)
# Lengths of eight sentences or documents, a quarter of them short.
PACKED = ac.Case((8, 12, 0, 0, 64), packed=((512, 17, 380, 256, 64, 490, 128, 201),) * 2)
DECODE = tuple(ac.Case((1, 32, 1, keys, 128), kv_heads=kv_heads) for keys in (512, 4096) for kv_heads in (32, 8))


def _rows(dtype: torch.dtype) -> list[Op]:
    """Forward and backward of one case stand side by side: they share tensors and float64 reference."""

    def both(name: str, case: ac.Case, padding: str = "") -> list[Op]:
        case = case.with_(dtype=dtype)
        return [Op(f"{name} fwd", case, False, padding), Op(f"{name} f+b", case, True, padding)]

    rows = [op for case in PLAIN for op in both("attention", case)]
    rows += [op for case in CAUSAL for op in both("causal attention", case)]
    rows += both("causal attention", ac.Case((1, 32, 1024, 1024, 128), kv_heads=8, causal=True))
    rows += both("attention, key lengths", USUAL.with_(lengths=(448,) * 4))
    rows += both("attention, bool mask", USUAL, "bool") + both("attention, float mask", USUAL, "float")
    rows += both("attention, bias with gradient", USUAL.with_(mask="add", mask_dims="hqk"))[1:]
    # One batch entry: the reference takes seconds for a mask of dropout.
    rows += both("attention, dropout", _square(1, 12, 512, 64).with_(dropout=0.1))
    rows += both("causal attention, window 256", _square(1, 16, 2048, 64).with_(causal=True, window=(255, 0)))
    rows += both("causal attention, ALiBi", USUAL.with_(causal=True, alibi="h"))
    rows += both("attention, softcap", USUAL.with_(softcap=30.0))
    rows += both("packed attention", PACKED)
    rows += [Op("decode", case.with_(dtype=dtype)) for case in DECODE]
    rows += [Op("decode, paged", DECODE[-1].with_(dtype=dtype), paged=True)]
    rows += [
        Op("decode, key lengths", ac.Case((8, 32, 1, 2048, 128), 8, lengths=tuple(range(256, 2049, 256)), dtype=dtype))
    ]
    return rows


OPS = [op for dtype in BOTH for op in _rows(dtype)]


# ---- targets and work ------------------------------------------------------------------------------------------------


def wanted(op: Op) -> tuple[float | None, float | None]:
    """(ratio to torch eager, share of the multiply-add peak)."""
    fp32, tokens = op.case.dtype == FP32, op.case.shape[2]
    if op.name == "attention, bias with gradient f+b":
        return (2.0, None) if fp32 else (None, None)
    if op.name == "decode" and op.case.shape[3] == 4096:
        grouped = op.case.kv_heads != op.case.shape[1]
        return {(True, False): 2.0, (True, True): 5.0, (False, False): 7.0, (False, True): 25.0}[fp32, grouped], None
    if op.name.startswith("attention f") and tokens >= 512:
        return (1.7, 0.85) if fp32 else (2.9, 0.75)
    if op.name == "attention fwd" and tokens in (16, 128):
        return {(16, True): 10.0, (16, False): 12.0, (128, True): 2.7}.get((tokens, fp32)), None
    if op.name == "attention f+b" and tokens == 16 and not fp32:
        return 35.0, None
    if op.name.startswith("causal attention f") and op.case.kv_heads is None:
        ratio = {512: 3.3, 2048: 2.2, 128: None if op.backward else 4.5} if fp32 else {512: 6.0, 128: 8.0}
        return ratio.get(tokens), None
    return None, None


def pairs(op: Op) -> float:
    """Pairs of a query and a key that count, over all batch entries and heads."""
    case, total = op.case, 0.0
    for b, (rows, keys) in enumerate(zip(case.query_lengths, case.seen_key_lengths, strict=True)):
        keys -= keys // 8 if op.padding else 0
        plain = case.window is None
        total += rows * keys * (0.5 if case.causal else 1) if plain else float(an.visible(case, None, b)[0].sum())
    return total * case.shape[1]


def target(op: Op) -> Target:
    ratio, share = wanted(op)
    case = op.case
    if op.decodes:
        heads = case.kv_heads or case.shape[1]
        return Target(
            ratio, 2 * sum(case.seen_key_lengths) * heads * case.shape[4] * case.dtype.itemsize, "read", share
        )
    limit = "dot" if case.dtype == torch.bfloat16 else "FMA"
    return Target(ratio, 4 * pairs(op) * case.shape[4] * (3.5 if op.backward else 1), limit, share)


# ---- preparation -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def draw(case: ac.Case, padding: str) -> tuple[ac.Tensors, dict[str, torch.Tensor], dict[str, numerics.Array]]:
    """Tensors, torch's results and the float64 truth; the last one is remembered."""
    tensors = ac.tensors(case, gate.DRAW)
    if padding:
        tensors = replace(tensors, mask=forms.padding_mask(case, padding))
    factor = an.dropout_factor(case, tensors, numerics.draw_seed(gate.DRAW))
    torchs = ac.results(case, tensors, lambda case, t: an.run_torch(case, t, factor))
    truth = an.exact(case, tensors, factor).values
    # Torch multiplies what a mask hides by 0, so the timed tensors hold no NaN there.
    filled = {name: getattr(tensors, name).nan_to_num(0) for name in ("query", "key", "value", "grad_output")}
    return replace(tensors, **filled), torchs, truth


def prepare(op: Op, no_compile: str = "") -> tuple[Case, gate.Truth]:
    """What is timed, and what its results must be."""
    tensors, torchs, truth = draw(op.case, op.padding)
    leaves = tensors.leaves()
    if op.padding:
        leaves.pop("mask", None)  # what hides padding is not learned
    make = forms.paged if op.paged else forms.packed if op.case.packed else forms.dense
    form = make(op.case, tensors)
    too_many = op.backward and prod(op.case.shape[:4]) > MOST_SCORES
    made = Case(
        op=op.name,
        dtype=op.case.dtype,
        shape=op.shape,
        eager=form.eager,
        ours=form.ours,
        inputs=form.inputs or tuple(leaf.requires_grad_(op.backward) for leaf in leaves.values()),
        grad_outputs=(tensors.grad_output,) if op.backward else None,
        no_compile=no_compile,
        random=op.case.dropout > 0,
        math="left out for this shape: a call takes seconds" if too_many else form.math,
        flex="has no backward on CPU" if op.backward else form.flex,
    )
    names = ("output", *(f"grad_{name}" for name in leaves)) if op.backward else ("output",)
    return made, gate.Truth(names, torchs, truth)


def not_compiled(room: Room, op: Op) -> str:
    if room.quick:
        return "left out of --quick"
    return "" if op.case.shape == COMPILED and op.case.dtype == FP32 else "left out: each compilation takes seconds"


@pytest.fixture(scope="module")
def attention_room(room: Room) -> Room:
    """The same room, rows included, with other peers."""
    return dataclasses.replace(room, peers=ATTENTION_PEERS)


def parameters(ops: Sequence[Op] = OPS) -> list[object]:
    return [pytest.param(op, id=op.id) for op in ops]


@pytest.mark.parametrize("op", parameters())
def test_attention(op: Op, attention_room: Room, benchmark: BenchmarkFixture) -> None:
    if attention_room.quick and op.case.shape not in QUICK:
        pytest.skip("not in --quick")
    made, truth = prepare(op, not_compiled(attention_room, op))
    attention_room.measure(made, truth, target(op), benchmark)
