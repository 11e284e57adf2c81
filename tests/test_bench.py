"""The benchmark room: turns, arithmetic, refusal of red ops, report, and one row of the suite for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cases  # noqa: E402

from bench import bench_norm, families, gate, machine, report, results, room, timing  # noqa: E402
from bench.peers import PEERS, Case, Eager, Handtuned, OnnxRuntime, Unavailable  # noqa: E402


class Clock:
    """Time that passes only when a callable says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def entry(self, name: str, seconds: float, pool: str = "openmp") -> timing.Entry:
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return timing.Entry(name, call, pool)


PLAN = timing.Plan(
    budget=1e9, min_rounds=3, max_rounds=4, slice_seconds=1.0, warmup_calls=1, warmup_seconds=0.0, settle_seconds=0.5
)


def test_turns() -> None:
    clock = Clock()
    result = timing.interleave([clock.entry("a", 1.0), clock.entry("b", 0.5)], PLAN, clock)
    assert "".join(clock.log) == "ab" + "abbbba" * 2  # warm-up, then slices of one second: a bb, bb a, ...
    assert result["a"].seconds == [1.0] * 4
    assert result["b"].seconds == [0.5] * 4
    assert (result["a"].calls, result["b"].calls) == (1, 2)
    assert timing.ratio(result["a"], result["b"]) == timing.Spread(2.0, 2.0, 2.0)


def test_budget_ends_the_rounds() -> None:
    clock = Clock()
    plan = timing.Plan(budget=0.0, min_rounds=3, slice_seconds=1.0, warmup_calls=1, warmup_seconds=0.0)
    assert timing.interleave([clock.entry("a", 1.0)], plan, clock)["a"].seconds == [1.0] * 3


def test_another_pool_settles_first() -> None:
    clock = Clock()
    entries = [clock.entry("a", 1.0), clock.entry("x", 1.0, pool="other")]
    result = timing.interleave(entries, PLAN, clock)
    assert "".join(clock.log) == "ax" + "aaxx" + "xaa" + "axx" + "xaa"  # one untimed call where the pool changes
    assert len(result["x"].seconds) == 4


def test_ratio_is_taken_within_a_round() -> None:
    # The machine is ten times slower in the last round; the ratio does not notice.
    theirs, ours = timing.Rounds(1, [2.0, 4.0, 30.0]), timing.Rounds(1, [1.0, 2.0, 10.0])
    assert timing.ratio(theirs, ours).median == 2.0
    assert timing.spread([float(i) for i in range(11)]) == timing.Spread(5.0, 1.0, 9.0)
    assert timing.spread([3.0]) == timing.Spread(3.0, 3.0, 3.0)


def small(op_id: str = "add_layer_norm-f+b", dtype: torch.dtype = torch.float32) -> tuple[Case, gate.Truth]:
    op = next(op for op in bench_norm.OPS if op.id == op_id)
    case = cases.Case((16, 64), kind=op.kind, add=op.add, dropout=op.dropout, dtype=dtype)
    return bench_norm.prepare(op, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", bench_norm.OPS, ids=lambda op: op.id)
def test_peers_compute_the_same(op: bench_norm.Op, dtype: torch.dtype) -> None:
    case, truth = small(op.id, dtype)
    with case.mode():
        gate.seed()
        assert truth.red(Handtuned().prepare(case)()) is None
        if not case.random:
            assert truth.differs(Eager().prepare(case)()) is None
        if case.onnx:
            assert truth.differs(OnnxRuntime().prepare(case)()) is None
        else:
            with pytest.raises(Unavailable, match="forward only"):
                OnnxRuntime().prepare(case)


def fake_benchmark(disabled: bool = False) -> Any:
    return SimpleNamespace(group=None, extra_info={}, skipped=False, disabled=disabled)


def test_red_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, truth = small()

    class Wrong(Handtuned):
        def prepare(self, case: Case) -> Any:
            call = super().prepare(case)

            def wrong() -> tuple[torch.Tensor, ...]:
                *right, grad_bias = call()
                return (*right, grad_bias * 1.001)

            return wrong

    def no_timing(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(timing, "interleave", no_timing)
    red = room.Room(quick=True, plan=timing.QUICK, limits={"copy": 1e9}, peers=(Eager(), Wrong()))
    with pytest.raises(pytest.fail.Exception, match=r"test red.*grad_bias"):
        red.measure(case, truth, room.Target(2.0, 1), fake_benchmark())
    (row,) = red.rows
    assert row["status"] == "test red"
    assert row["peers"] == {}
    assert report.cells(row)[-1] == "test red"
    assert not any(re.search(r"\d", cell) for cell in report.cells(row)[3:])


def test_an_op_that_raises_is_red() -> None:
    case, truth = small()

    class Raises(Handtuned):
        def prepare(self, case: Case) -> Any:
            raise ValueError("broken")

    red = room.Room(quick=True, plan=timing.QUICK, limits={"copy": 1e9}, peers=(Eager(), Raises()))
    with pytest.raises(pytest.fail.Exception, match="ValueError: broken"):
        red.measure(case, truth, room.Target(2.0, 1), fake_benchmark())


def test_a_wrong_peer_is_left_out() -> None:
    case, truth = small("layer_norm-fwd")

    class Wrong(OnnxRuntime):
        def prepare(self, case: Case) -> Any:
            return lambda: (torch.zeros(case.shape),)

    found = room.Room(quick=True, plan=timing.QUICK, limits={"copy": 1e9}, peers=(Eager(), Handtuned(), Wrong()))
    entries, refused = found._prepare(case, truth, {"status": "ok"})
    assert [entry.name for entry in entries] == ["torch eager", "handtuned"]
    assert refused["onnxruntime"].startswith("output differs")


def row(op: str, ratio: float, target: float | None, **changes: Any) -> results.Row:
    def figures(seconds: float) -> dict[str, Any]:
        r = seconds / 1e-3
        return {
            "seconds": {"median": seconds, "low": seconds, "high": seconds},
            "ratio": {"median": r, "low": r * 0.9, "high": r * 1.1},
            "share": 0.5 / r,
            "faults_per_call": 0 if r == 1 else 3000,
        }

    peers = {"torch eager": figures(ratio * 1e-3), "handtuned": figures(1e-3), "onnxruntime": {"refused": "<none>"}}
    made = {"op": op, "dtype": "fp32", "shape": [8, 256], "target": target, "limit": "copy", "share_target": None}
    return made | {"status": "ok", "why": "", "peers": peers} | changes


ROWS = [
    row("LayerNorm fwd", 2.0, 1.5),
    row("LayerNorm f+b", 0.5, 1.5),
    row("RMSNorm fwd", 2.0, None, status="test red", why="output: <1>", peers={}),
]


def test_verdicts() -> None:
    assert [results.verdict(r) for r in ROWS] == ["ok", "missed", ""]
    assert [report.cells(r)[-1] for r in ROWS] == ["", "slower", "test red"]
    assert report.cells(ROWS[0])[5] == "2.00 (1.80–2.20)"
    assert report.cells(ROWS[0])[8:11] == ["25 → 50", "3000 → 0", "1.5 ok"]
    run = results.Run(families.NORM, "default", {machine.OTHER_WORK: 1.0}, ROWS)
    assert report.summary(run).startswith("2 rows timed, 1 slower than torch eager, 1 refused")
    assert "Not a quiet machine" in report.terminal(run, colour=False)


def test_a_target_may_be_a_share_of_the_limit() -> None:
    reached, missed = (row("attention fwd", 2.0, 1.5, limit="FMA", share_target=share) for share in (0.5, 0.6))
    assert report.cells(reached, families.ATTENTION)[10] == "1.5, 50% ok"
    assert report.cells(missed, families.ATTENTION)[10] == "1.5, 60% missed"
    assert results.verdict(row("attention fwd", 2.0, None, share_target=0.4)) == "ok"


def test_limits_are_positive() -> None:
    assert machine.limits(quick=True).keys() == machine.LIMITS.keys()
    assert min(machine.limits(quick=True).values()) > 1e8


def test_page_is_self_contained(tmp_path: Path) -> None:
    for allocator in machine.ALLOCATORS:
        data = {"allocator": allocator, "rows": ROWS, "machine_info": {"handtuned": {"cpu": "a <cpu>"}}}
        results.json_path(tmp_path, families.NORM, allocator).write_text(json.dumps(data))
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "norm.html").read_text()
    assert not re.search(r"<(script|link|img|iframe|object)|@import|url\((?!#)", page)
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "<none>" not in page
    assert "a &lt;cpu&gt;" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == 4  # two plots for each op that was timed
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert "currentColor" in svg
    assert "| LayerNorm f+b | fp32 | 8x256 |" in (tmp_path / "norm.md").read_text()


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "run python -m bench first" in capsys.readouterr().err


def test_one_row_for_real(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--threads=1", f"--output={tmp_path}"]
    command += ["--family=norm", "--allocator=no-page-faults", "-k", "rms_norm-fwd-fp32-8x256"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Page faults removed for all sides" in done.stdout
    data = json.loads((tmp_path / "norm-no-page-faults.json").read_text())
    (record,), (measured,) = data["benchmarks"], data["rows"]
    peers = measured["peers"]
    assert set(peers) == {peer.name for peer in PEERS}
    # pytest-benchmark's record is handtuned's rounds, in seconds per call
    assert record["stats"]["median"] == pytest.approx(peers["handtuned"]["seconds"]["median"])
    assert record["stats"]["rounds"] == len(record["extra_info"]["rounds"]["torch eager"])
    assert record["extra_info"]["peers"]["torch eager"]["ratio"]["median"] > 0
    facts = data["machine_info"]["handtuned"]
    assert facts["threads"] == 1
    assert facts["torch"] == torch.__version__
    assert facts["copy bandwidth GB/s"] > 0
    assert (tmp_path / "norm.md").exists()
