"""Devices of the GPU check: the real one, and none, in whose stead the emulator of the tests runs the CUDA kernels."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import simt_tools
import torch

import handtuned

from .gpu_rows import first_line


class Device(Protocol):
    """Where rows run. Tests have one that fails on purpose."""

    name: str
    torch_device: torch.device
    measures: bool  # whether times mean something
    copied: int  # float32 elements, far more than caches hold

    def describe(self) -> dict[str, str]: ...
    def kernels(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """Inside, ops run on the kernels of this backend. LookupError where it has none, or none for the call."""
        ...

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Of one call, the mean over so many."""
        ...

    def tidy(self) -> None:
        """Gives memory back that nobody uses."""
        ...

    def lost(self) -> str | None:
        """Why nothing can run any more, after an error that the driver does not forgive; else None."""
        ...


def driver() -> str:
    """The driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({first_line(error)})"
    return done.stdout.split("\n")[0].strip()


def why_no_device() -> str:
    """Why torch sees no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build; install one for CUDA into .venv and run make gpu-check again"
    try:
        torch.cuda.init()
    except Exception as error:  # an old driver, no permission, no device
        return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}: {first_line(error)}"
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, counts {torch.cuda.device_count()} devices"


class Cuda:
    """The first of the GPUs that torch sees, of NVIDIA or AMD; CUDA_VISIBLE_DEVICES chooses another."""

    measures = True
    copied = 2**27

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        torch.cuda.set_device(self.torch_device)
        self.name = torch.cuda.get_device_name(0)

    def describe(self) -> dict[str, str]:
        p = torch.cuda.get_device_properties(0)
        return {
            "device": p.name,
            "capability": f"sm_{p.major}{p.minor}",
            "multiprocessors": str(p.multi_processor_count),
            "memory": f"{p.total_memory / 2**30:.0f} GiB",
            "devices": f"{torch.cuda.device_count()}, of which the first is checked",
            "driver": driver(),
            "CUDA of torch": str(torch.version.cuda or f"none, ROCm {torch.version.hip}"),
            "cuDNN": str(torch.backends.cudnn.version()),
        }

    @contextlib.contextmanager
    def kernels(self, backend: str) -> Iterator[None]:
        rows = [row for row in handtuned.info().kernels if row.backend == backend]
        if rows and not any(row.usable for row in rows):
            raise LookupError(f"no {backend} kernels here: {rows[0].why}")
        try:
            with handtuned.backend(backend), handtuned.strict():
                yield
        except handtuned.FallbackError as error:
            raise LookupError(str(error)) from error
        torch.cuda.synchronize()  # errors of this row belong to this row

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls

    def tidy(self) -> None:
        torch.cuda.empty_cache()

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

    def tidy(self) -> None:
        pass

    def lost(self) -> str | None:
        return None
