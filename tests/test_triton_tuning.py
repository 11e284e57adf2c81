"""The table of tile sizes: complete, found by architecture and bucket, overruled by the user's file; and tune()."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton_tools

from handtuned.triton_kernels import tuning


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HANDTUNED_CACHE_DIR", str(tmp_path))
    tuning.forget()
    yield tmp_path / "triton_norm.json"
    monkeypatch.undo()
    tuning.forget()


def test_committed_table_is_complete() -> None:
    tables = json.loads(tuning.COMMITTED.read_text())["tables"]
    assert set(tables) == {"default", *triton_tools.ARCHITECTURES}
    for arch, kernels in tables.items():
        assert set(kernels) == set(tuning.KERNELS)
        wave = 64 if arch == "gfx942" else 32
        for kernel, widths in kernels.items():
            assert set(widths) == ({"4", "8"} if kernel == "partials" else {"2", "4", "8"})
            for buckets in widths.values():
                for name, (tile, rows, warps, stages) in buckets.items():
                    tuning._check([tile, rows, warps, stages])
                    assert name in ("long", str(tile))
                    assert warps * wave <= 1024
                tiles = [int(name) for name in buckets if name != "long"]
                assert tiles == [128 << i for i in range(len(tiles))]


def test_lookup() -> None:
    look = tuning._lookup
    assert look("forward", 1, 2, "sm90").tile == 128
    assert look("forward", 65, 2, "sm90").tile == 128
    assert look("backward", 8192, 2, "sm80").tile == 8192
    assert look("backward", 8193, 2, "sm80").tile == 1024
    assert look("forward", 1024, 4, "sm86") == look("forward", 1024, 4, "sm80")
    assert look("forward", 1024, 4, "gfx90a") == look("forward", 1024, 4, "gfx942")
    assert look("forward", 1024, 4, "sm120") == look("forward", 1024, 4, "sm100")
    assert look("forward", 1024, 4, "sm75") == look("forward", 1024, 4, "default")
    assert tuning.lookup("forward", 1024, 4, torch.device("cpu")) == look("forward", 1024, 4, "default")


def test_users_file_wins_and_a_broken_one_is_named(cache: Path) -> None:
    committed = tuning._lookup("forward", 1000, 2, "sm90")
    cache.write_text(json.dumps({"tables": {"sm90": {"forward": {"2": {"1024": [1024, 2, 8, 3]}}}}}))
    tuning.forget()
    assert tuning._lookup("forward", 1000, 2, "sm90") == tuning.Config(1024, 2, 8, 3)
    assert tuning._lookup("forward", 1000, 2, "sm80") == tuning._lookup("forward", 1024, 2, "sm80")
    for broken in ("{", "[]", '{"tables": {"sm90": {"forward": {"2": {"1024": [1000, 2, 8, 3]}}}}}'):
        cache.write_text(broken)
        tuning.forget()
        with pytest.warns(UserWarning, match="triton_norm.json is not a tuning table"):
            assert tuning._lookup("forward", 1000, 2, "sm90") == committed


def test_tune_refuses() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"torch sees none .* Run it on a machine with a GPU"):
            tuning.tune("forward", 1024, torch.float32)
    with pytest.raises(ValueError, match="kernel is 'softmax', expected one of forward, backward"):
        tuning.tune("softmax", 1024, torch.float32)
    with pytest.raises(ValueError, match="cols is 0"):
        tuning.tune("forward", 0, torch.float32)


@pytest.mark.parametrize(("kernel", "cols"), [("forward", 1000), ("backward", 100000), ("partials", 512)])
def test_tune_keeps_the_fastest(kernel: str, cols: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended GPU whose clock prefers many rows and 2 stages, and that refuses big blocks."""
    monkeypatch.setattr(tuning, "_require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm90")
    monkeypatch.setattr(tuning, "_workload", lambda *_: lambda: None)
    width = 4 if kernel == "partials" else 2

    def do_bench(run: object, return_mode: str) -> float:
        config = tuning._lookup(kernel, cols, width, "sm90")
        if config.warps > 8:
            raise RuntimeError("out of resources")
        return 1.0 / config.rows + (config.stages != 2)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    before = tuning._lookup(kernel, cols, width, "sm90")
    lines: list[str] = []
    best = tuning.tune(kernel, cols, torch.bfloat16, progress=lines.append)
    assert (best.rows, best.stages) == (before.rows * 2, 2)
    assert tuning._lookup(kernel, cols, width, "sm90") == best
    assert len(json.loads(cache.read_text())["tables"]["sm90"]) == 1
    assert len(lines) == len(set(lines)) >= 18
