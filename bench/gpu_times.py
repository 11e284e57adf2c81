"""What the GPU check times, by CUDA events and in turns with torch's own kernels, as a share of the data sheet's peak.

A call is repeated on the same tensors: what fits the L2 cache may exceed the memory's peak.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import gpu_workloads
from .gpu_device import Device
from .gpu_rows import Job, Row, first_line

# Data sheets: bytes a second of memory; operations a second of tensor cores on bfloat16 without sparsity, of float32.
PEAKS = {
    "A100-SXM4-80GB": (2.04e12, 312e12, 19.5e12),
    "A100 80GB PCIe": (1.94e12, 312e12, 19.5e12),
    "A100": (1.55e12, 312e12, 19.5e12),
    "H100 PCIe": (2.0e12, 756e12, 51e12),
    "H100": (3.35e12, 989e12, 67e12),
    "GH200": (4.0e12, 989e12, 67e12),
    "H200": (4.8e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
}


def peaks(device: Device) -> tuple[float, float, float] | None:
    """None for a device that is not in the list."""
    return next((found for name, found in PEAKS.items() if name in device.name), None)


def peak(device: Device, workload: gpu_workloads.Workload) -> float | None:
    """Units of the workload a second by the data sheet."""
    found = peaks(device)
    if found is None:
        return None
    return found[0 if workload.unit == "bytes" else 1 if workload.dtype != torch.float32 else 2]


def copy_bandwidth(device: Device) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.ones(device.copied, device=device.torch_device)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / min(device.seconds(lambda: b.copy_(a), 4) for _ in range(5))


def ready(workload: gpu_workloads.Workload, device: Device, figures: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The peers that can run, warm; why the others cannot goes into the figures."""
    found: dict[str, Callable[[], object]] = {}
    for name, prepare in workload.peers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's reasons, one by one, for a kernel that it refuses
                call = prepare(device.torch_device)
                for _ in range(3):
                    call()
                device.seconds(call, 1)
            found[name] = call
        except Exception as error:
            figures[name] = {"refused": first_line(error)}
            device.tidy()
            if name == gpu_workloads.OURS:
                raise
    return found


def measure(workload: gpu_workloads.Workload, device: Device, row: Row) -> None:
    """Peers in turns; the figure is the median over rounds. A peer that cannot run says so in its place."""
    figures: dict[str, Any] = row.figures.setdefault("peers", {})
    device.tidy()
    peers = ready(workload, device, figures)
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


def copy(device: Device, row: Row) -> None:
    bandwidth = copy_bandwidth(device)
    if device.measures:
        row.figures["bytes a second"] = bandwidth
        if found := peaks(device):
            row.figures["of peak"] = bandwidth / found[0]


def jobs(device: Device, quick: bool) -> list[Job]:
    found = [Job(Row("time", "memory", "copy", "torch"), partial(copy, device))]
    for workload in gpu_workloads.workloads(small=not device.measures, quick=quick):
        row = Row("time", workload.family, workload.name, "auto")
        found.append(Job(row, partial(measure, workload, device)))
    return found
