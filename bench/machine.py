"""What a figure was measured on, and the two allocator settings.

Fresh memory costs a page fault per 4 KiB, often more than the op that writes it, and an op that allocates less wins by
that alone. So everything is measured twice: with glibc's defaults, and with the heap never given back, where after the
warm-up all sides reuse memory. glibc's defaults adapt: freeing one large block makes it keep up to twice that size from
then on. `adapt_allocator` brings them where a program ends up that has run for a while, so that what ran before a case,
such as its check in float64, does not matter. Each row says how many faults a call had.
"""

from __future__ import annotations

import math
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TUNABLES = "GLIBC_TUNABLES"
ALLOCATORS = {
    "default": "",
    "no-page-faults": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776",
}
TITLES = {
    "default": "Default allocator",
    "no-page-faults": "Page faults removed for all sides",
}


LIMITS = {  # what a row's share is a share of
    "copy": "copy bandwidth",
    "read": "read bandwidth",
    "FMA": "FMA peak",
    "dot": "bf16 dot peak",
}
OTHER_WORK = "cores busy with other work"
QUIET = 0.1  # cores


def allocator() -> str:
    """The setting that this process was started with: a key of ALLOCATORS."""
    tunables = os.environ.get(TUNABLES, "")
    wanted = ALLOCATORS["no-page-faults"].split(":")
    return "no-page-faults" if all(part in tunables.split(":") for part in wanted) else "default"


def adapt_allocator() -> None:
    """Frees a block just below glibc's largest threshold (32 MiB): from now on it keeps up to 64 MiB at the heap's top.

    Without effect where the thresholds were set by hand.
    """
    import torch

    block = torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)
    del block


def copy_bandwidth(quick: bool) -> float:
    """Bytes per second, reading and writing counted, of all threads on buffers far larger than the caches."""
    from handtuned import _C

    return max(_C.copy_bandwidth(64 if quick else 256) for _ in range(1 if quick else 3)) * 1e9


def read_bandwidth(quick: bool) -> float:
    """Bytes per second of all threads, summing a buffer far larger than the caches."""
    import torch

    buffer = torch.ones((64 if quick else 512) * 2**18)
    best = math.inf
    for _ in range(3 if quick else 9):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.numel() * buffer.itemsize / best


def multiply_add_rate(*, of_bf16: bool) -> float:
    """Operations per second of all threads on multiply-adds in registers, of float32 or, where there are some, bf16."""
    import torch

    from handtuned import _C

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: _C.multiply_add_rate(of_bf16), range(threads))) * 1e9


def limits(quick: bool) -> dict[str, float]:
    """The keys of LIMITS, in bytes or operations per second."""
    rates = {"FMA": multiply_add_rate(of_bf16=False), "dot": multiply_add_rate(of_bf16=True)}
    return {"copy": copy_bandwidth(quick), "read": read_bandwidth(quick), **rates}


def facts(limits: dict[str, float], other_cores: float) -> dict[str, Any]:
    import torch

    import handtuned

    info = handtuned.info()
    return {
        "cpu": info.cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": info.isa,
        "copy bandwidth GB/s": round(limits["copy"] / 1e9, 1),
        "read bandwidth GB/s": round(limits["read"] / 1e9, 1),
        "FMA peak GFLOP/s": round(limits["FMA"] / 1e9, 1),
        "bf16 dot peak GFLOP/s": round(limits["dot"] / 1e9, 1),
        "handtuned": info.version,
        "compiler": info.compiler,
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "kernel": platform.release(),
        "transparent huge pages": _huge_pages(),
        OTHER_WORK: round(other_cores, 2),
        **{
            name: os.environ.get(name, "not set")
            for name in (TUNABLES, "OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY")
        },
    }


class OtherWork:
    """How many cores other processes kept busy between start and `cores()`, from /proc/stat."""

    def __init__(self) -> None:
        self._start = self._reading()

    @staticmethod
    def _reading() -> tuple[float, float, float]:
        """Now, the seconds that all cores were busy, and those of this process and its children."""
        own = os.times()
        user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
        busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(own[:4])

    def cores(self) -> float:
        (then, busy_then, own_then), (now, busy, own) = self._start, self._reading()
        return max(0.0, (busy - busy_then - own + own_then) / max(now - then, 1e-3))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text() if path.exists() else ""
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else "unknown"
