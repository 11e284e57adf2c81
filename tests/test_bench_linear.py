"""The linear rows of the benchmark room: every one computes the same thing on every side, on small shapes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import bench_linear, gate
from bench.peers import Eager, Handtuned, Int8

SMALL = {f"{op.name} {op.case.dtype}": op for op in bench_linear.OPS}


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_compute_the_truth(name: str) -> None:
    op = SMALL[name]
    op = dataclasses.replace(op, case=op.case.with_(rows=(9,), in_features=64, out_features=128))
    case, truth = bench_linear.prepare(op, no_compile="not in this test")
    with case.mode():
        gate.seed()
        assert truth.red(Handtuned().prepare(case)()) is None
        if not case.random:
            assert truth.differs(Eager().prepare(case)()) is None
        if not isinstance(case.int8, str):
            assert truth.differs(Int8().prepare(case)()) is None


@pytest.mark.parametrize("op", bench_linear.ENTROPIES, ids=lambda op: op.id)
def test_both_sides_compute_the_cross_entropy(op: bench_linear.Entropy) -> None:
    op = bench_linear.Entropy(op.case.with_(rows=(9,), in_features=40, classes=70), op.backward)
    case, truth = bench_linear.prepare_entropy(op)
    with case.mode():
        assert truth.red(Handtuned().prepare(case)()) is None
        assert truth.differs(Eager().prepare(case)()) is None


def test_targets() -> None:
    found = {op.id: bench_linear.target(op) for op in bench_linear.OPS}
    assert (found["linear-fwd-fp32-512x768x3072"].ratio, found["linear-fwd-fp32-512x768x3072"].share) == (1.35, 0.85)
    assert found["linear-f+b-bf16-128x768x768"].work == 6 * 128 * 768 * 768
    assert found["linear-fwd-bf16-1x4096x4096"].work == 4096 * 4096 * 2
    entropies = {op.id: op.target for op in bench_linear.ENTROPIES}
    assert entropies["cross-entropy-f+b-fp32-1024x768x32000"].work == 6 * 1024 * 768 * 32000
    assert entropies["cross-entropy-f+b-fp32-1024x768x32000"].ratio == 1.5
