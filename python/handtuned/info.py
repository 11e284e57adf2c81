"""What was built, for what, and what this machine can run."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import _C, backends, ops
from ._binary import build_facts, cuda_library


@dataclass(frozen=True)
class KernelRow:
    """One op on one backend: built or not, and why."""

    op: str
    backend: str
    built: bool
    usable: bool
    why: str


@dataclass(frozen=True)
class Info:
    """Prints as a table; as_dict() for machines."""

    version: str
    torch_found: str
    torch_built: str
    torch_minimum: str
    compiler: str
    cpu: str
    threads: int
    isa: str
    isas: list[dict[str, Any]]
    cuda: str
    cuda_devices: list[str]
    triton: str
    kernels: list[KernelRow]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        facts = Table(show_header=False, box=None)
        for name in ("version", "torch_found", "torch_built", "torch_minimum", "compiler", "cpu", "threads", "cuda"):
            facts.add_row(name.replace("_", " "), str(getattr(self, name)))
        facts.add_row("cuda devices", ", ".join(self.cuda_devices) or "none")
        facts.add_row("triton", self.triton)
        isas = Table("ISA", "bits", "built", "this CPU", "needs", title="Instruction sets (HANDTUNED_ISA forces one)")
        for isa in self.isas:
            chosen = " (chosen)" if isa["name"] == self.isa else ""
            isas.add_row(
                isa["name"] + chosen,
                str(isa["vector_bits"]),
                _yes(isa["built"]),
                _yes(isa["supported"]),
                isa["needs"],
            )
        kernels = Table("op", "backend", "built", "usable here", "why", title="Kernels")
        for row in self.kernels:
            kernels.add_row(row.op, row.backend, _yes(row.built), _yes(row.usable), row.why)
        return Group(facts, isas, kernels)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cuda_devices() -> list[str]:
    """The devices that the CUDA library sees; empty where it was not built or there is no driver."""
    if not cuda_library.exists():
        return []
    library = ctypes.CDLL(str(cuda_library))
    library.handtuned_cuda_error.restype = ctypes.c_char_p
    devices = []
    for index in range(library.handtuned_cuda_device_count()):
        capability, processors, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_longlong()
        status = library.handtuned_cuda_device(
            index, ctypes.byref(capability), ctypes.byref(processors), ctypes.byref(memory)
        )
        if status:
            devices.append(f"{index}: {library.handtuned_cuda_error(status).decode()}")
        else:
            devices.append(f"{index}: sm_{capability.value}, {processors.value} SMs, {memory.value / 2**30:.0f} GiB")
    return devices


def _kernel_rows(triton: str | None) -> list[KernelRow]:
    rows = []
    for op in ops.OPS:
        lacking = backends.why_no_triton_kernel(op)
        no_cuda = backends.why_no_cuda_kernel(op)
        cuda_unusable = no_cuda or backends.cuda_status()
        why = lacking or triton or "compiled at first use, per device"
        rows.append(KernelRow(op, "cpu", True, True, f"compiled in for {', '.join(_built_isas())}"))
        rows.append(KernelRow(op, "cuda", no_cuda is None, cuda_unusable is None, cuda_unusable or "compiled in"))
        rows.append(KernelRow(op, "triton", lacking is None, lacking is None and triton is None, why))
        rows.append(KernelRow(op, "reference", True, True, "plain torch"))
    return rows


def _built_isas() -> list[str]:
    return [isa["name"] for isa in _C.isa_table() if isa["built"]]


def info() -> Info:
    """CPU, instruction sets, torch found and built for, and every kernel by op and backend: built or not, and why."""
    triton = backends.triton_status()
    return Info(
        version=build_facts["version"],
        torch_found=torch.__version__,
        torch_built=build_facts["torch_built"],
        torch_minimum=build_facts["torch_minimum"],
        compiler=build_facts["compiler"],
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        isa=_C.isa(),
        isas=[dict(row) for row in _C.isa_table()],
        cuda=build_facts["cuda"],
        cuda_devices=cuda_devices(),
        triton=triton or "usable",
        kernels=_kernel_rows(triton),
    )
