"""The Transformer rows of the benchmark room: every side computes the same thing, on small shapes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import bench_transformer, families, report  # noqa: E402
from bench.peers import TRANSFORMER_PEERS, Compiled, Unavailable  # noqa: E402

ROWS = {(op.name, op.dtype): op for op in bench_transformer.OPS}


@pytest.mark.parametrize(("name", "dtype"), ROWS, ids=str)
def test_every_side_computes_the_same(name: str, dtype: torch.dtype) -> None:
    op = ROWS[name, dtype]
    op = replace(op, shape=(3, 7, 128), kept=(7, 2, 4) if op.kept else ())
    case, truth = bench_transformer.prepare(op, no_compile="not in this test")
    served = set()
    with case.mode():
        for peer in TRANSFORMER_PEERS:
            try:
                call = peer.prepare(case)
            except Unavailable:
                continue
            assert truth.differs(call()) is None, peer.name
            served.add(peer.name)
    assert {"torch eager", "handtuned"} <= served
    assert ("torch fast path" in served) != op.backward
    if dtype == torch.float32 and not op.backward and not op.kept and not op.norm_first:
        assert "onnxruntime" in served
    assert torch.backends.mha.get_fastpath_enabled()


def test_columns_are_peers() -> None:
    family = families.TRANSFORMER
    assert {name for _, name in family.peers} <= {peer.name for peer in TRANSFORMER_PEERS}
    row = {"op": "x", "dtype": "fp32", "shape": [1], "status": "test red", "peers": {}}
    assert len(report.cells(row, family)) == len(family.columns)
    assert Compiled.name in {name for _, name in family.peers}


def test_ids_are_distinct() -> None:
    ids = [op.id for op in bench_transformer.OPS]
    assert len(ids) == len(set(ids))


def test_work_is_what_the_result_needs() -> None:
    def work(name: str, shape: tuple[int, int, int]) -> float:
        return next(op for op in bench_transformer.OPS if op.name == name and op.shape == shape).work

    rows, width, scores = 1024, 768, 4 * 8 * 128 * 128 * 768
    assert work("MultiheadAttention fwd", (8, 128, 768)) == 2 * rows * width * 4 * width + scores
    layer = 2 * rows * width * 12 * width
    assert work("encoder layer fwd", (8, 128, 768)) == layer + scores
    assert work("encoder layer f+b", (8, 128, 768)) == 3 * layer + 3.5 * scores
    kept = bench_transformer.KEPT
    expected = 6 * (2 * sum(kept) * 384 * 12 * 384 + 4 * sum(n * n for n in kept) * 384)
    assert work("encoder of 6, padding fwd", (32, 25, 384)) == expected


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_side_computes_the_same_of_a_real_model(packed: bool) -> None:
    pytest.importorskip("transformers")
    try:
        case, truth, target = bench_transformer.prepare_minilm(packed, no_compile="not in this test")
    except bench_transformer.models.ModelUnavailable as error:
        pytest.skip(str(error))
    assert target.work > 1e10
    served = set()
    with case.mode():
        for peer in TRANSFORMER_PEERS:
            try:
                call = peer.prepare(case)
            except Unavailable:
                continue
            assert truth.differs(call()) is None, peer.name
            served.add(peer.name)
    assert {"torch eager", "handtuned", "onnxruntime"} <= served
