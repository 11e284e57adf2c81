"""The recurrent rows of the benchmark room: every side computes the same thing, on small shapes."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import bench_rnn, families, gate, teams  # noqa: E402
from bench.peers import RNN_PEERS, Cells, Eager, Handtuned, OnnxRuntime, Unavailable  # noqa: E402


def small(op: bench_rnn.Op) -> bench_rnn.Op:
    """The same row on few numbers."""
    lengths = (5, 2, 4) if op.case.lengths else ()
    shape = (1 if op.case.shape[0] == 1 else 5, 3, 8, 12)
    return replace(op, case=op.case.with_(shape=shape, lengths=lengths, proj=4 if op.case.proj else 0))


ROWS = {(op.name, op.case.dtype): op for op in bench_rnn.OPS}


@pytest.mark.parametrize("op", ROWS.values(), ids=lambda op: op.id)
def test_every_side_computes_the_same(op: bench_rnn.Op) -> None:
    case, truth = bench_rnn.prepare(small(op))
    with case.mode():
        for peer in (Handtuned(), Eager(), Cells(), OnnxRuntime()):
            try:
                call = peer.prepare(case)
            except Unavailable:
                assert not isinstance(peer, Handtuned)
                continue
            gate.seed()
            assert truth.differs(call()) is None, peer.name


def test_columns_are_peers() -> None:
    assert {name for _, name in families.RNN.peers} <= {peer.name for peer in RNN_PEERS}


def test_ids_are_distinct() -> None:
    ids = [op.id for op in bench_rnn.OPS]
    assert len(ids) == len(set(ids))


def test_work_is_what_the_result_needs() -> None:
    case = bench_rnn.rc.Case("LSTM", (10, 4, 32, 64))
    assert bench_rnn.work(case, False) == 2 * 40 * 4 * 64 * (32 + 64)
    assert bench_rnn.work(case, True) == 3 * bench_rnn.work(case, False)
    assert bench_rnn.work(case.with_(lengths=(10, 0, 5, 5)), False) == bench_rnn.work(case, False) / 2


# ---- bench.teams -----------------------------------------------------------------------------------------------------


def kernels_rule(folder: Path) -> Callable[[teams.Layer, int], int]:
    """slices_for as csrc/cpu/rnn_team.h has it, compiled alone."""
    text = (ROOT / "csrc/cpu/rnn_team.h").read_text()
    (most,) = re.findall(r"^inline constexpr int kMostSlices.*$", text, re.MULTILINE)
    (rule,) = re.findall(r"^inline int slices_for\(.*?^}$", text, re.MULTILINE | re.DOTALL)
    (folder / "rule.cpp").write_text(f"""
#include "rnn.h"
namespace handtuned {{
constexpr int64_t least(int64_t a, int64_t b) {{ return a < b ? a : b; }}
{most}
{rule}
}}
extern "C" int rule(int64_t steps, int64_t batch, int64_t input_size, int64_t hidden, int64_t panels, int threads) {{
  handtuned::Rnn p{{}};
  p.dtype = handtuned::DType::f32, p.cell = handtuned::RnnCell::lstm, p.directions = 1;
  p.steps = steps, p.batch = batch, p.hidden = p.state = hidden;
  return handtuned::slices_for(p, input_size, panels, threads);
}}
""")
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{ROOT}/csrc", "-o", "rule.so", "rule.cpp"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    function = ctypes.CDLL(str(folder / "rule.so")).rule
    function.argtypes = [*[ctypes.c_int64] * 5, ctypes.c_int]

    def rule_of(layer: teams.Layer, threads: int) -> int:
        sizes = (layer.steps, layer.batch, layer.input_size, layer.hidden)
        found: int = function(*sizes, layer.panels, threads)
        return found

    return rule_of


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles a function of the kernels with g++")
def test_slices_are_the_kernels(tmp_path: Path) -> None:
    rule = kernels_rule(tmp_path)
    shapes = itertools.product((1, 2, 128), (1, 16), (1, 256), (1, 17, 130, 256, 1000))
    layers = [*teams.LAYERS, *(teams.Layer(*shape) for shape in shapes)]
    pairs = [(layer, threads) for layer in layers for threads in (1, 2, 3, 8, 32, 64, 100)]
    found = {pair: teams.slices(*pair) for pair in pairs}
    assert found == {pair: rule(*pair) for pair in pairs}
    assert {1, 2, 3, 8} < set(found.values())


def test_times_of_teams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams.Layer, "panels", 6)
    layer = teams.Layer(10, 1, 1, 1)
    monkeypatch.setattr(teams, "MEET", 1)
    assert teams.simulated(layer, 1, work=12, loss=0.5) == 120
    assert teams.simulated(layer, 2, work=12) == 4 + 10 * (6 + 1)
    assert teams.simulated(layer, 2, work=12, loss=0.5) == 4 + 10 * (9 + 1)
    assert teams.simulated(layer, 4, work=12) == 4 + 10 * (4 + 2)  # two of six panels, as with three slices
    assert teams.simulated(layer, 5, work=12) == 4 + 10 * (4 + 3)
    assert [teams.best_slices(layer, threads, 12) for threads in (1, 2, 4, 64)] == [1, 2, 3, 6]
    assert teams.best_slices(layer, 64, 0.5) == 1
    assert teams.costs(layer, 120, 4 + 10 * 10) == (12, 0.5)
    assert teams.costs(layer, 120, 60) == (12, 0)


def test_teams_for_real() -> None:
    layer = teams.Layer(5, 2, 8, 40)
    one, two = teams.measure(layer)
    assert teams.row(layer, one, two).startswith(f"| 5×2×8×40 | {layer.panels} | {one / 5:.1f} | ")
