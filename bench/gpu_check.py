"""What a machine with a GPU alone can say: the CUDA and Triton kernels on the real device, checked and timed.

    make gpu-check [ARGS="--quick | --dry-run | --output DIR"]        PYTHONPATH=tests python -m bench.gpu_check ...

Checks: the cases of the tests on the device, against the contract (errors against float64 at most 1.5 times torch's)
and against what the emulator of the tests computes for the same tensors. Times: against torch's own kernels, by CUDA
events, in turns. Writes gpu-check.json and gpu-check.html. A row that fails says why in its place and the run goes on.

--dry-run does all of that without a GPU: the emulator stands for the device, and times are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import attention_cases as ac
import attention_numerics as an
import cases
import numerics
import simt_tools
import torch
from torch import Tensor

import handtuned

from . import gpu_workloads

# ---- devices ---------------------------------------------------------------------------------------------------------


class Device(Protocol):
    """Where rows run. Tests have one that fails on purpose."""

    name: str
    torch_device: torch.device
    measures: bool  # whether times mean something
    copied: int  # float32 elements, far more than caches hold

    def describe(self) -> dict[str, str]: ...
    def kernels(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """Inside, ops run on the kernels of this backend; raises where it has none."""
        ...

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Of one call, the mean over so many."""
        ...

    def lost(self) -> str | None:
        """Why nothing can run any more, after an error that the driver does not forgive; else None."""
        ...


class Cuda:
    """The first CUDA device."""

    measures = True
    copied = 2**27

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        self.name = torch.cuda.get_device_name(0)

    def describe(self) -> dict[str, str]:
        p = torch.cuda.get_device_properties(0)
        return {
            "device": p.name,
            "capability": f"sm_{p.major}{p.minor}",
            "multiprocessors": str(p.multi_processor_count),
            "memory": f"{p.total_memory / 2**30:.0f} GiB",
            "CUDA of torch": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }

    @contextlib.contextmanager
    def kernels(self, backend: str) -> Iterator[None]:
        rows = [row for row in handtuned.info().kernels if row.backend == backend]
        if rows and not any(row.usable for row in rows):
            raise LookupError(f"no {backend} kernels here: {rows[0].why}")
        with handtuned.backend(backend), handtuned.strict():
            yield
        torch.cuda.synchronize()  # errors of this row belong to this row

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls

    def lost(self) -> str | None:
        try:
            torch.cuda.synchronize()
            torch.ones(8, device=self.torch_device).sum().item()
        except RuntimeError as error:
            return first_line(error)
        return None


class Dry:
    """No device: CPU tensors, the CUDA kernels in the emulator."""

    name = "dry run"
    measures = False
    copied = 2**12
    torch_device = torch.device("cpu")

    def describe(self) -> dict[str, str]:
        return {"device": "none: a dry run, no time is shown"}

    @contextlib.contextmanager
    def kernels(self, backend: str) -> Iterator[None]:
        if backend == "auto":
            yield
            return
        if backend != "cuda":
            raise LookupError(f"{backend} kernels do not run in a dry run")
        if not simt_tools.LIBRARY.exists():
            raise LookupError("the emulator is not part of this build (HANDTUNED_EMULATE=1)")
        with simt_tools.emulated("random", seed=1), handtuned.strict():
            yield

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def lost(self) -> str | None:
        return None


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the report. status: ok, wrong (a result), failed (an error), skipped (why says so)."""

    part: str  # "check" or "time"
    family: str
    name: str
    kernels: str
    status: str = "ok"
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    trace: str = ""


def attempt(rows: list[Row], row: Row, device: Device, work: Callable[[Row], None]) -> None:
    """Fills the row in, whatever happens."""
    gone = next((r.figures["lost"] for r in rows if "lost" in r.figures), None)
    if gone:
        row.status, row.why = "skipped", f"the device was lost before: {gone}"
    else:
        try:
            work(row)
        except LookupError as error:
            row.status, row.why = "skipped", str(error.args[0] if error.args else error)
        except Exception as error:
            row.status, row.why, row.trace = "failed", first_line(error), traceback.format_exc()[-4000:]
            if (lost := device.lost()) is not None:
                row.figures["lost"] = lost
    rows.append(row)


# ---- checks ----------------------------------------------------------------------------------------------------------

MOST_ELEMENTS = 20_000  # what the emulator needs a tenth of a second for


@contextlib.contextmanager
def fixed_seed(seed: Tensor) -> Iterator[None]:
    """Dropout draws this Philox key, on whatever device."""
    from handtuned.nn.functional import attention, norm

    modules = (attention, norm)
    before = norm._draw_seed
    for module in modules:
        module._draw_seed = lambda input: seed.to(input.device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module._draw_seed = before  # type: ignore[attr-defined]


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on the device, with its strides; anything else as it is."""
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    if 0 in value.stride():
        return value.to(device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def all_moved(tensors: Any, device: torch.device) -> Any:
    """A dataclass of tensors."""
    return replace(tensors, **{f.name: moved(getattr(tensors, f.name), device) for f in fields(tensors)})


def norm_results(case: cases.Case, t: cases.Tensors, device: torch.device) -> dict[str, Tensor]:
    """Outputs and gradients, on the CPU."""
    there = all_moved(t, device)
    leaves = there.leaves()
    return {name: v.cpu() for name, v in cases.results(cases.run(case, leaves), leaves, there).items()}


def attention_results(case: ac.Case, t: ac.Tensors, device: torch.device) -> dict[str, Tensor]:
    """Likewise."""
    return {name: v.cpu() for name, v in ac.results(case, all_moved(t, device)).items()}


Results = Callable[[torch.device], dict[str, Tensor]]


def compared(row: Row, results: Results, backend: str, device: Device) -> dict[str, Tensor]:
    """Results of the device; the row says how far they are from the emulator's."""
    with fixed_seed(numerics.draw_seed(0)):
        with device.kernels(backend):
            found = results(device.torch_device)
        if not simt_tools.LIBRARY.exists():
            row.figures[FROM_EMULATOR] = None
            return found
        with simt_tools.emulated():
            emulated = results(torch.device("cpu"))
    distance = 0.0
    for name, tensor in found.items():
        wanted, actual = emulated[name].double(), tensor.double()
        finite = wanted.isfinite()
        if finite.any():
            unit = torch.finfo(tensor.dtype).eps * (float(wanted[finite].abs().max()) or 1.0)
            distance = max(distance, float((actual - wanted)[finite].abs().max()) / unit)
    row.figures[FROM_EMULATOR] = round(distance, 2)
    return found


FROM_EMULATOR = "from the emulator, eps of the largest value"


def check_norm(row: Row, case: cases.Case, backend: str, device: Device) -> None:
    drawn = numerics.drawn(case, 0)
    wrong = []
    for name, tensor in compared(row, lambda d: norm_results(case, drawn.tensors, d), backend, device).items():
        torchs, eps = drawn.torchs[name], torch.finfo(tensor.dtype).eps
        numerics.check_same_non_finite(name, tensor, torchs)
        if not torchs.isfinite().all():
            continue
        errors = numerics.Errors(eps, slack=4 * eps)  # one draw says little
        errors.add(tensor, torchs, drawn.truth[name])
        if excess := errors.excess():
            wrong.append(f"{name}: {excess}")
    if wrong:
        row.status, row.why = "wrong", "; ".join(wrong)


def check_attention(row: Row, case: ac.Case, backend: str, device: Device) -> None:
    drawn = an.drawn(case, 0)
    found = compared(row, lambda d: attention_results(case, drawn.tensors, d), backend, device)
    try:
        an.check_every_element(case, found, drawn.truth, pairs=an.on_gpu(case.dtype))
    except AssertionError as error:
        row.status, row.why = "wrong", str(error)


def checks(device: Device, quick: bool) -> list[Row]:
    rows: list[Row] = []
    norms = [case for case in cases.CASES if case.elements <= MOST_ELEMENTS]
    attentions = [case for case in ac.CASES if case.elements <= MOST_ELEMENTS]
    for backend in ("cuda", "triton"):
        for case in norms[:: 8 if quick else 1]:
            row = Row("check", "norm", case.name, backend)
            attempt(rows, row, device, lambda r, c=case, b=backend: check_norm(r, c, b, device))  # type: ignore[misc]
        for one in attentions[:: 31 if quick else 1]:
            row = Row("check", "attention", one.name, backend)
            attempt(rows, row, device, lambda r, c=one, b=backend: check_attention(r, c, b, device))  # type: ignore[misc]
    return rows


# ---- times -----------------------------------------------------------------------------------------------------------

# Data sheets: bytes a second of memory; operations a second of tensor cores on bfloat16 without sparsity, of float32.
PEAKS = {
    "A100-SXM4-80GB": (2.04e12, 312e12, 19.5e12),
    "A100": (1.55e12, 312e12, 19.5e12),
    "H100 PCIe": (2.0e12, 756e12, 51e12),
    "H100": (3.35e12, 989e12, 67e12),
    "H200": (4.8e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
}


def peak(device: Device, workload: gpu_workloads.Workload) -> float | None:
    """Units of the workload a second by the data sheet; None for a device that is not in the list."""
    found = next((peaks for name, peaks in PEAKS.items() if name in device.name), None)
    if found is None:
        return None
    return found[0 if workload.unit == "bytes" else 1 if workload.dtype != torch.float32 else 2]


def copy_bandwidth(device: Device) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.ones(device.copied, device=device.torch_device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / min(device.seconds(lambda: b.copy_(a), 4) for _ in range(5))


def measure(row: Row, workload: gpu_workloads.Workload, device: Device) -> None:
    """Peers in turns; the figure is the median over rounds. A peer that cannot run says so in its place."""
    peers: dict[str, Callable[[], object]] = {}
    figures: dict[str, Any] = row.figures.setdefault("peers", {})
    for name, prepare in workload.peers.items():
        try:
            call = prepare(device.torch_device)
            for _ in range(3):
                call()
            device.seconds(call, 1)
            peers[name] = call
        except Exception as error:
            figures[name] = {"refused": first_line(error)}
            if name == gpu_workloads.OURS:
                raise
    rounds: dict[str, list[float]] = {name: [] for name in peers}
    once = {name: max(device.seconds(call, 1), 1e-6) for name, call in peers.items()}
    for _ in range(15 if device.measures else 1):
        for name, call in peers.items():
            rounds[name].append(device.seconds(call, max(1, min(100, int(5e-3 / once[name])))))
    row.figures["served by"] = workload.served(device.torch_device)
    if not device.measures:
        for name in peers:
            figures[name] = {"ran": True}
        return
    limit = peak(device, workload)
    for name, seconds in rounds.items():
        median = statistics.median(seconds)
        figures[name] = {"seconds": median, "rate": workload.work / median}
        if limit:
            figures[name]["of peak"] = workload.work / median / limit


def times(device: Device, quick: bool) -> list[Row]:
    rows: list[Row] = []

    def copy(row: Row) -> None:
        bandwidth = copy_bandwidth(device)
        row.figures = {"bytes a second": bandwidth} if device.measures else {}

    attempt(rows, Row("time", "memory", "copy", "torch"), device, copy)
    for workload in gpu_workloads.workloads(small=not device.measures, quick=quick):
        row = Row("time", workload.family, workload.name, "auto")
        attempt(rows, row, device, lambda r, w=workload: measure(r, w, device))  # type: ignore[misc]
    return rows


# ---- report ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    count = {status: sum(row.status == status for row in rows) for status in ("ok", "wrong", "failed", "skipped")}
    return ", ".join(f"{number} {status}" for status, number in count.items())


def _figures(row: Row) -> str:
    parts = [f"{name}: {value}" for name, value in row.figures.items() if name != "peers"]
    for name, found in row.figures.get("peers", {}).items():
        if "refused" in found:
            parts.append(f"{name}: – ({found['refused']})")
        elif "seconds" in found:
            share = f", {found['of peak']:.0%} of peak" if "of peak" in found else ""
            parts.append(f"{name}: {found['seconds'] * 1e6:.1f} µs{share}")
        else:
            parts.append(f"{name}: ran")
    return "; ".join(parts)


def page(facts: dict[str, str], rows: Sequence[Row]) -> str:
    """One self-contained HTML page."""
    lines = [
        "<!doctype html><meta charset=utf-8><title>handtuned on a GPU</title>",
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:2px 8px;text-align:left;vertical-align:top}"
        ".wrong,.failed{background:#fcc}.skipped{color:#777}</style>",
        f"<h1>handtuned on {html.escape(facts['device'])}</h1><p>{html.escape(summary(rows))}</p><ul>",
        *(f"<li>{html.escape(name)}: {html.escape(value)}</li>" for name, value in facts.items()),
        "</ul>",
    ]
    for part, title in (("time", "Times"), ("check", "Checks")):
        lines.append(f"<h2>{title}</h2><table><tr><th>family<th>row<th>kernels<th>status<th>figures<th>why</tr>")
        for row in sorted((r for r in rows if r.part == part), key=lambda r: r.status in ("ok", "skipped")):
            cells = (row.family, row.name, row.kernels, row.status, _figures(row), row.why)
            lines.append(f"<tr class={row.status}>" + "".join(f"<td>{html.escape(c)}" for c in cells) + "</tr>")
        lines.append("</table>")
    return "\n".join(lines)


def report(device: Device, output: Path, quick: bool) -> int:
    """Runs everything and writes both files; the exit status."""
    facts = {"handtuned": handtuned.__version__, "torch": torch.__version__, **device.describe()}
    rows = checks(device, quick) + times(device, quick)
    output.mkdir(parents=True, exist_ok=True)
    data = {"facts": facts, "summary": summary(rows), "rows": [asdict(row) for row in rows]}
    (output / "gpu-check.json").write_text(json.dumps(data, indent=1) + "\n")
    (output / "gpu-check.html").write_text(page(facts, rows))
    for row in rows:
        if row.status in ("wrong", "failed"):
            print(f"{row.status}: {row.part} {row.family} {row.name} ({row.kernels}): {row.why}")
    print(f"{facts['device']}: {summary(rows)}; see {output / 'gpu-check.html'} and gpu-check.json beside it")
    return int(any(row.status in ("wrong", "failed") for row in rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: everything but the times")
    parser.add_argument("--quick", action="store_true", help="a sample of the cases, one shape a family")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR")
    chosen = parser.parse_args(arguments)
    if chosen.dry_run:
        return report(Dry(), chosen.output, chosen.quick)
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else (
            f"torch {torch.__version__} is a CPU build; install one for CUDA into .venv and run make gpu-check again"
        )  # fmt: skip
        print(f"torch sees no CUDA device: {built}. What the check does can be seen with --dry-run.")
        return 2
    return report(Cuda(), chosen.output, chosen.quick)


if __name__ == "__main__":
    sys.exit(main())
