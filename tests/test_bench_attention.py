"""The attention rows of the benchmark room: every form computes the same thing on every side, on small shapes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import balance, bench_attention, families, gate  # noqa: E402
from bench.peers import ATTENTION_PEERS, Eager, Handtuned, Math  # noqa: E402


def small(op: bench_attention.Op) -> bench_attention.Op:
    """The same row on few tokens."""
    case = op.case
    heads = (2, 1) if case.kv_heads != case.shape[1] and case.kv_heads else (2, None)
    changes: dict[str, Any] = {"shape": (2, heads[0], min(case.shape[2], 48), 48, 16), "kv_heads": heads[1]}
    if case.lengths:
        changes["lengths"] = (48, 20)
    if case.window:
        changes["window"] = (7, 0)
    if case.packed:
        changes |= {"shape": (3, 2, 0, 0, 16), "packed": ((17, 0, 30),) * 2}
    return replace(op, case=case.with_(**changes))


NAMES = list(dict.fromkeys(op.name for op in bench_attention.OPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_side_computes_the_same(name: str, dtype: torch.dtype) -> None:
    op = small(next(op for op in bench_attention.OPS if op.name == name and op.case.dtype == dtype))
    case, truth = bench_attention.prepare(op, no_compile="not in this test")
    with case.mode():
        gate.seed()
        # As a peer: on so few elements the largest error is a matter of luck.
        assert truth.differs(Handtuned().prepare(case)()) is None
        if case.random:
            return
        assert truth.differs(Eager().prepare(case)()) is None
        if callable(case.math):
            assert truth.differs(Math().prepare(case)()) is None
        if callable(case.flex):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # flex_attention warns that it is not compiled
                assert truth.differs(case.bind(case.flex)()) is None


def test_columns_are_peers() -> None:
    assert {name for _, name in families.ATTENTION.peers} <= {peer.name for peer in ATTENTION_PEERS}


def test_ids_are_distinct() -> None:
    ids = [op.id for op in bench_attention.OPS]
    assert len(ids) == len(set(ids))


def named(name: str, tokens: int, dtype: torch.dtype = torch.float32) -> bench_attention.Op:
    return next(
        op for op in bench_attention.OPS if op.name == name and op.case.shape[2] == tokens and op.case.dtype == dtype
    )


def test_work_is_what_the_result_needs() -> None:
    full, causal = (bench_attention.target(named(f"{kind}attention fwd", 512)) for kind in ("", "causal "))
    assert (full.limit, full.work) == ("FMA", 4 * 4 * 12 * 512 * 512 * 64)
    assert causal.work == full.work / 2
    assert bench_attention.target(named("attention f+b", 512)).work == full.work * 3.5
    for padded in ("key lengths", "bool mask", "float mask"):
        assert bench_attention.target(named(f"attention, {padded} fwd", 512)).work == full.work * 7 / 8
    window = bench_attention.target(named("causal attention, window 256 fwd", 2048))
    assert window.work == 4 * 16 * 64 * (256 * 257 / 2 + (2048 - 256) * 256)
    decode = bench_attention.target(named("decode", 1, torch.bfloat16))
    assert (decode.limit, decode.work) == ("read", 2 * 32 * 512 * 128 * 2)


def test_targets() -> None:
    found = {op.id: bench_attention.wanted(op) for op in bench_attention.OPS}
    assert found["attention-fwd-fp32-4x12x512x64"] == (1.7, 0.85)
    assert found["attention-f+b-bf16-1x16x2048x64"] == (2.9, 0.75)
    assert found["causal-attention-fwd-fp32-1x16x2048x64"] == (2.2, None)
    assert found["causal-attention-f+b-bf16-4x12x512x64"] == (6.0, None)
    assert found["attention-fwd-bf16-32x12x16x32"] == (12.0, None)
    assert found["attention-f+b-bf16-32x12x16x32"] == (35.0, None)
    assert found["attention-bias-with-gradient-f+b-fp32-4x12x512x64"] == (2.0, None)
    assert found["decode-bf16-1x32/8x1/4096x128"] == (25.0, None)
    assert found["decode-fp32-1x32x1/4096x128"] == (2.0, None)


def test_one_row_for_real(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--threads=1", f"--output={tmp_path}", "--family=attention"]
    command += ["--allocator=no-page-faults", "-k", "attention-fwd-fp32-32x12x16x32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "attention-no-page-faults.json").read_text())["rows"]
    assert set(row["peers"]) == {peer.name for peer in ATTENTION_PEERS}
    assert row["peers"]["flex, compiled"] == {"refused": "left out of --quick"}
    assert 0 < row["peers"]["handtuned"]["share"] < 10
    assert "| attention fwd | fp32 | 32x12x16x32 |" in (tmp_path / "attention.md").read_text()


def test_balance_is_that_of_a_counter() -> None:
    assert balance.balance([1.0] * 4, 2) == 1.0
    assert balance.balance([1.0] * 3, 2) == 0.75
    assert balance.balance([2.0, 1.0, 1.0], 2) == 1.0
    assert balance.balance([1.0, 1.0, 2.0], 2) == 4 / 6  # the largest piece last


def test_pieces_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "seconds", lambda rows, keys, width, alignment, backward: float(rows * keys))
    shape = balance.Shape(2, 4, 2, 128, 8, causal=True)
    # Each of the four kv heads has two query heads of two tiles, taken from the last on.
    assert balance.forward_pieces(shape) == [64 * 128.0, 64 * 64.0] * 8
    # Two chunks of 64 keys, seen by 128 and by 64 rows of each query head.
    assert balance.backward_pieces(shape) == [2 * 128 * 64.0, 2 * 64 * 64.0] * 4
    assert balance.backward_runs(shape, threads=1) == [2 * 128 * 64.0 + 2 * 64 * 64.0] * 4
    assert balance.backward_runs(shape, threads=64) == balance.backward_pieces(shape)
    assert sum(balance.forward_runs(shape, threads=1)) == sum(balance.forward_pieces(shape))
