"""bench/gpu_check.py without a GPU: a dry run from beginning to end, and that no failing row stops the others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_workloads

needs_emulator = pytest.mark.skipif(
    not gpu_check.simt_tools.LIBRARY.exists(), reason="the emulator is part of the test build alone: make test"
)


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text())
    return data


@needs_emulator
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_check.main(["--dry-run", "--quick", "--output", str(tmp_path)])
    rows = read(tmp_path)["rows"]
    assert status == 0, [row for row in rows if row["status"] in ("wrong", "failed")]
    checks = [row for row in rows if row["part"] == "check" and row["kernels"] == "cuda"]
    assert {row["family"] for row in checks} == {"norm", "attention"}
    assert len(checks) > 25
    assert all(row["status"] == "ok" for row in checks)
    # The emulator stands for the device: its results are its own.
    assert {row["figures"]["from the emulator, eps of the largest value"] for row in checks} == {0.0}
    triton = [row for row in rows if row["kernels"] == "triton"]
    assert {row["why"] for row in triton} == {"triton kernels do not run in a dry run"}
    families = {row["family"] for row in rows if row["part"] == "time"}
    assert families == {"memory", "norm", "attention", "rnn"}
    assert "seconds" not in (tmp_path / "gpu-check.json").read_text()
    assert "<h2>Times</h2>" in (tmp_path / "gpu-check.html").read_text()
    assert "0 failed" in capsys.readouterr().out


class Broken(gpu_check.Dry):
    """Pretends to be an H100 with working events, on which every third row fails."""

    name = "NVIDIA H100 80GB HBM3"
    measures = True

    def __init__(self) -> None:
        self.rows = 0
        self.dead = False

    def describe(self) -> dict[str, str]:
        return {"device": self.name}

    @contextlib.contextmanager
    def kernels(self, backend: str) -> Iterator[None]:
        self.rows += 1
        if self.rows % 3 == 0:
            raise RuntimeError("CUDA error: too <many> resources\nsecond line")
        yield

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        call()
        return 1e-3

    def lost(self) -> str | None:
        return "an illegal memory access" if self.dead else None


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a device on which every third check fails, with the shapes of a dry run."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        original = gpu_workloads.workloads
        patch.setattr(gpu_workloads, "workloads", lambda small, quick: original(True, quick))
        assert gpu_check.report(Broken(), folder, quick=True) == 1
    return folder


def test_a_failing_row_is_reported_in_its_place(broken: Path) -> None:
    rows = read(broken)["rows"]
    failed = [row for row in rows if row["status"] == "failed"]
    checks = [row for row in rows if row["part"] == "check"]
    assert len(failed) == len(checks) // 3
    assert {row["why"] for row in failed} == {"RuntimeError: CUDA error: too <many> resources"}
    assert all("Traceback" in row["trace"] for row in failed)
    assert "too &lt;many&gt; resources" in (broken / "gpu-check.html").read_text()


def test_times_are_shares_of_the_peak(broken: Path) -> None:
    rows = [row for row in read(broken)["rows"] if row["part"] == "time"]
    norms = [row for row in rows if row["family"] == "norm"]
    assert norms
    for row in norms:
        ours = row["figures"]["peers"]["handtuned"]
        assert ours["seconds"] == 1e-3
        assert ours["of peak"] == pytest.approx(ours["rate"] / 3.35e12)
    attention = next(row for row in rows if row["family"] == "attention")
    assert attention["figures"]["peers"]["torch cuDNN"]["refused"].startswith("RuntimeError")  # on a CPU
    assert attention["figures"]["served by"] == "cpu"


def test_nothing_runs_on_a_lost_device(tmp_path: Path) -> None:
    device = Broken()
    device.dead = True
    rows = gpu_check.checks(device, quick=True)
    assert [row.status for row in rows[:4]] == ["ok", "ok", "failed", "skipped"]
    assert rows[-1].why == "the device was lost before: an illegal memory access"


def test_a_wrong_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu_check.norm_results
    monkeypatch.setattr(gpu_check, "norm_results", lambda *a: {name: v + 1 for name, v in original(*a).items()})
    rows = gpu_check.checks(gpu_check.Dry() if gpu_check.simt_tools.LIBRARY.exists() else Broken(), quick=True)
    assert rows[0].status == "wrong"
    assert "output: rms error" in rows[0].why


class FakeEvent:
    """Of torch.cuda: 2 ms between any two."""

    def __init__(self, enable_timing: bool) -> None:
        self.recorded = False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.recorded
        assert end.recorded
        return 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_real_device_on_a_fake_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A100", major=8, minor=0, multi_processor_count=108, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = gpu_check.Cuda()
    device.torch_device = torch.device("cpu")
    assert device.describe()["capability"] == "sm_80"
    assert device.seconds(lambda: None, 4) == 5e-4
    assert device.lost() is None
    row = gpu_check.Row("check", "norm", "a case", "cuda")
    rows: list[gpu_check.Row] = []
    gpu_check.attempt(rows, row, device, lambda row: device.kernels("cuda").__enter__())
    assert row.status == "skipped"
    assert row.why.startswith("no cuda kernels here: ")

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert device.lost() == "RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().out
    assert "torch sees no CUDA device" in said
    assert "--dry-run" in said
