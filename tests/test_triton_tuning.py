"""The table of tile sizes: complete, found by architecture and bucket, overruled by the user's file; and tune()."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton_tools
from handtuned.triton_kernels import tune_tiles, tuning


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
            tune_tiles.tune_norm("forward", 1024, torch.float32)
    with pytest.raises(ValueError, match="kernel is 'softmax', expected one of forward, backward"):
        tune_tiles.tune_norm("softmax", 1024, torch.float32)
    with pytest.raises(ValueError, match="cols is 0"):
        tune_tiles.tune_norm("forward", 0, torch.float32)


@pytest.mark.parametrize(("kernel", "cols"), [("forward", 1000), ("backward", 100000), ("partials", 512)])
def test_tune_keeps_the_fastest(kernel: str, cols: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended GPU whose clock prefers many rows and 2 stages, and that refuses big blocks."""
    monkeypatch.setattr(tune_tiles, "_require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm90")
    monkeypatch.setattr(tune_tiles, "_workload", lambda *_: lambda: None)
    width = 4 if kernel == "partials" else 2

    def do_bench(run: object, return_mode: str) -> float:
        config = tuning._lookup(kernel, cols, width, "sm90")
        if config.warps > 8:
            raise RuntimeError("out of resources")
        return 1.0 / config.rows + (config.stages != 2)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    before = tuning._lookup(kernel, cols, width, "sm90")
    lines: list[str] = []
    best = tune_tiles.tune_norm(kernel, cols, torch.bfloat16, progress=lines.append)
    assert (best.rows, best.stages) == (before.rows * 2, 2)
    assert tuning._lookup(kernel, cols, width, "sm90") == best
    assert len(json.loads(cache.read_text())["tables"]["sm90"]) == 1
    assert len(lines) == len(set(lines)) >= 18


# ---- attention and recurrent layers ----------------------------------------------------------------------------------


def test_tune_of_tiles_refuses() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch sees none"):
            tune_tiles.tune_attention("forward", 64, torch.float32)
    with pytest.raises(ValueError, match="kernel is 'mask', expected one of forward, decode, rows, keys"):
        tune_tiles.tune_attention("mask", 64, torch.float32)
    with pytest.raises(ValueError, match="kernel is 'rows', expected one of forward, backward"):
        tune_tiles.tune_rnn("rows", 64, torch.float32)
    with pytest.raises(ValueError, match="hidden is 0"):
        tune_tiles.tune_rnn("forward", 0, torch.float32)


@pytest.mark.parametrize("family", ["attention", "rnn"])
def test_tune_of_tiles_keeps_the_fastest(family: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU, on which the kernels do not run and whose clock prefers 4 warps and many rows."""
    like = torch.zeros(1, dtype=torch.bfloat16)

    def look() -> Any:
        return tuning.attention("rows", 50, 64, like) if family == "attention" else tuning.rnn("backward", like)

    def do_bench(run: object, return_mode: str) -> float:
        config = look()._asdict()
        if config["stages"] == 3:
            raise RuntimeError("out of resources")
        return 1.0 / config["rows"] + abs(config["warps"] - 4)

    monkeypatch.setattr(tune_tiles, "_require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm90")
    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(tune_tiles.attention, name, lambda *_: (like, like))
    monkeypatch.setattr(tune_tiles.rnn, "rnn", lambda *_: (like,) * 5)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    before = look()
    lines: list[str] = []
    if family == "attention":
        best = tune_tiles.tune_attention("rows", 64, torch.bfloat16, rows=16, progress=lines.append)
    else:
        best = tune_tiles.tune_rnn("backward", 16, torch.float16, batch=2, steps=2, progress=lines.append)
    assert (best.rows, best.warps) == (before.rows * 2, 4)
    assert getattr(best, "descriptors", 1) == 1
    assert look() == best
    assert set(json.loads((cache.parent / f"triton_{family}.json").read_text())["tables"]) == {"sm90"}
    assert any("refused: out of resources" in line for line in lines)
    notes: list[str] = []
    with tuning.noted(notes):
        look()
    assert "your tuned table of sm90" in notes[0]
    (cache.parent / f"triton_{family}.json").write_text("[]")
    tuning.forget()
    with pytest.warns(UserWarning, match=f"triton_{family}.json is not a tuning table"):
        assert look() == before
