"""bench/gpu_check.py without a GPU: a dry run from beginning to end, and that the report is written whatever happens:
rows that fail, crash or hang, no device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check_subjects as subjects
import pytest
import torch

import handtuned
from bench import gpu_check, gpu_checks, gpu_device, gpu_report, gpu_rows, gpu_times, gpu_workloads

needs_emulator = pytest.mark.skipif(
    not gpu_device.simt_tools.LIBRARY.exists(), reason="the emulator is part of the test build alone: make test"
)


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text())
    return data


def filled(plan: gpu_rows.Plan) -> list[gpu_rows.Row]:
    """The rows, made in this process."""
    for job in plan.jobs:
        gpu_rows.fill(job, plan.lost)
    return [job.row for job in plan.jobs]


@needs_emulator
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_check.main(["--dry-run", "--quick", "--output", str(tmp_path)])
    rows = read(tmp_path)["rows"]
    assert status == 0, [row for row in rows if row["status"] in ("wrong", "failed")]
    checks = [row for row in rows if row["part"] == "check" and row["kernels"] == "cuda"]
    assert {row["family"] for row in checks} == {"norm", "attention", "rnn"}
    assert len(checks) > 25
    assert {row["name"] for row in checks if row["status"] != "ok"} == {"replayed from a CUDA graph"}
    # The emulator stands for the device: its results are its own.
    distances = [row["figures"].get(gpu_checks.FROM_EMULATOR) for row in checks]
    assert distances.count(0.0) == len(checks) - 6
    triton = [row for row in rows if row["kernels"] == "triton"]
    assert {row["why"] for row in triton} == {
        "triton kernels do not run in a dry run",
        "CUDA graphs need a CUDA device",
    }
    families = {row["family"] for row in rows if row["part"] == "time"}
    assert families == {"memory", "norm", "attention", "rnn"}
    assert "seconds" not in (tmp_path / "gpu-check.json").read_text()
    assert "<h2>Times</h2>" in (tmp_path / "gpu-check.html").read_text()
    assert "0 failed" in capsys.readouterr().out


class Broken(gpu_device.Dry):
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
        patch.setattr(gpu_checks, "RUNS", 1)
        plan = gpu_check.plan(Broken(), quick=True)
        gpu_report.write(folder, plan.facts, filled(plan))
    return folder


def test_a_failing_row_is_reported_in_its_place(broken: Path) -> None:
    rows = read(broken)["rows"]
    failed = [row for row in rows if row["status"] == "failed"]
    checks = [row for row in rows if row["part"] == "check" and row["status"] != "skipped"]
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


def test_a_wrong_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu_checks.norm_results
    monkeypatch.setattr(gpu_checks, "norm_results", lambda *a: {name: v + 1 for name, v in original(*a).items()})
    row = filled(gpu_rows.Plan({}, gpu_checks.jobs(Broken(), quick=True)[:1]))[0]
    assert row.status == "wrong"
    assert "output: rms error" in row.why


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that needs too much says so in its place; where it is handtuned, the row fails and the next one runs."""

    def greedy(device: torch.device) -> Callable[[], object]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nMore words")

    small = next(iter(gpu_workloads.workloads(small=True, quick=True)))
    for name, status in (("torch", "ok"), (gpu_workloads.OURS, "failed")):
        workload = replace(small, peers=small.peers | {name: greedy})
        job = gpu_rows.Job(
            gpu_rows.Row("time", "norm", "a shape", "auto"), partial(gpu_times.measure, workload, Broken())
        )
        assert gpu_rows.fill(job, lambda: None)
        assert job.row.status == status
        refused = job.row.figures["peers"][name]["refused"]
        assert refused == "OutOfMemoryError: CUDA out of memory. Tried to allocate 4.00 GiB."


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_a_crash_and_a_hang_cost_one_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = partial(subjects.plan, "fine", "crash", "fine", "hang", "lose", "fine")
    assert gpu_check.report(make, tmp_path, patience=2) == 1
    rows = read(tmp_path)["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "failed", "failed", "ok"]
    assert rows[1]["why"] == "its process ended: SIGSEGV"
    assert rows[3]["why"] == "no answer in 2 s: its process was killed"
    assert "illegal memory access" in rows[4]["why"]
    assert "2 crash" not in capsys.readouterr().out
    assert "SIGSEGV" in (tmp_path / "gpu-check.html").read_text()


def test_after_many_crashes_the_rest_is_skipped() -> None:
    rows: list[gpu_rows.Row] = []
    gpu_rows.supervised(partial(subjects.plan, *["crash"] * 2, "fine"), rows, {}, starts=2, say=lambda line: None)
    assert [row.status for row in rows] == ["failed", "failed", "skipped"]
    assert rows[2].why == "2 processes were lost before it"


def test_without_a_device_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.report(subjects.no_device, tmp_path) == 2
    said = capsys.readouterr().out
    assert "torch sees no CUDA device: the driver is too old" in said
    assert "--dry-run" in said
    assert read(tmp_path)["rows"] == []
    assert "the driver is too old" in (tmp_path / "gpu-check.html").read_text()


# ---- the real device -------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = gpu_device.Cuda()
    device.torch_device = torch.device("cpu")
    found = device.describe()
    assert found["capability"] == "sm_80"
    assert found["devices"] == "2, of which the first is checked"
    assert found["driver"].startswith("unknown (FileNotFoundError")
    assert device.seconds(lambda: None, 4) == 5e-4
    assert device.lost() is None
    with pytest.raises(LookupError, match="no cuda kernels here: "), device.kernels("cuda"):
        pass
    row = SimpleNamespace(backend="cuda", usable=True)
    monkeypatch.setattr(handtuned, "info", lambda: SimpleNamespace(kernels=[row]))
    with pytest.raises(LookupError, match="no GPU kernel normalises gates"), device.kernels("cuda"):
        raise handtuned.FallbackError("no GPU kernel normalises gates")

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "init", lambda: broken())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0: RuntimeError: CUDA error: an illegal" in gpu_device.why_no_device()
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert device.lost() == "RuntimeError: CUDA error: an illegal memory access was encountered"
