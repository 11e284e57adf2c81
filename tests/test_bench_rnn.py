"""The recurrent rows of the benchmark room: every side computes the same thing, on small shapes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import bench_rnn, families, gate
from bench.peers import RNN_PEERS, Cells, Eager, Handtuned, OnnxRuntime, Unavailable


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
