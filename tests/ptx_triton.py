"""Ops of the Triton backend whose launches run, in the PTX simulator, the sm_80 PTX that Triton compiles.

Run as a script it is a process of its own, without the interpreter, which conftest.py switches on for all tests:

    python ptx_triton.py MODULE:FUNCTION NAME...    calls FUNCTION(NAME) with launches simulated

and prints a line of JSON a name: what went wrong (null if nothing did), seconds, and instructions of warps.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ptx_tools
import torch
import triton_tools
from torch import Tensor
from triton.runtime import jit

ARCHITECTURE = "sm80"


def bits(kind: str, value: Any) -> int:
    """An argument as its parameter holds it; kind: its type in the kernel's signature."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind == "fp64":
        return int(struct.unpack("<Q", struct.pack("<d", value))[0])
    return ptx_tools.word(float(value) if kind == "fp32" else value)


class Launcher:
    """Compiles as the launch would on a device, and simulates."""

    def __init__(self) -> None:
        self.modules: dict[str, ptx_tools.Module] = {}
        self.fresh: list[Tensor] = []  # what kernels write: keeps its memory until the end of the op

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype or like.dtype)
        self.fresh.append(tensor)
        ptx_tools.map_tensor(tensor, written=False)
        return tensor

    def forget(self) -> None:
        self.fresh.clear()
        ptx_tools.library().ptx_forget()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        compiled = triton_tools.compile_call(kernel, args, options, ARCHITECTURE)
        if compiled.hash not in self.modules:
            self.modules[compiled.hash] = ptx_tools.Module(compiled.asm["ptx"])
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        words = [
            bits(kind.lstrip("*"), values[name]) for name, kind in compiled.src.signature.items() if kind != "constexpr"
        ]
        words += [0, 0]  # Triton's own scratch, which these kernels have no use for
        given = [t for t in args if isinstance(t, Tensor) and not self.is_fresh(t)]
        for tensor in given:
            ptx_tools.map_tensor(tensor, written=True)
        size = grid(values) if callable(grid) else grid
        block = (32 * compiled.metadata.num_warps,)
        module = self.modules[compiled.hash]
        module.start(compiled.metadata.name, words, size, block, compiled.metadata.shared)
        for tensor in given:
            ptx_tools.library().ptx_unmap(tensor.data_ptr())

    def is_fresh(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(t.untyped_storage().data_ptr() == storage for t in self.fresh)


@contextlib.contextmanager
def simulated() -> Iterator[Launcher]:
    """Inside, Triton kernels run in the simulator on CPU tensors, and may touch their arguments alone."""
    from handtuned import backends
    from handtuned.triton_kernels import common, tuning

    launcher = Launcher()
    before = (jit.JITFunction.run, common.empty, tuning.architecture, backends.triton_interprets)
    jit.JITFunction.run = lambda self, *args, **options: launcher.run(self, *args, **options)
    common.empty, tuning.architecture = launcher.empty, lambda device: ARCHITECTURE  # type: ignore[assignment]
    backends.triton_interprets = lambda: True  # so the backend takes CPU tensors
    try:
        yield launcher
    finally:
        jit.JITFunction.run, common.empty, tuning.architecture, backends.triton_interprets = before
        launcher.forget()


def in_a_process(function: str, names: Sequence[str], timeout: float = 500.0) -> dict[str, dict[str, Any]]:
    """Name -> what the script found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, function, *names],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-6000:]}"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


def main() -> None:
    torch.set_num_threads(1)
    module, function = sys.argv[1].split(":")
    sys.path.insert(0, str(Path(__file__).parent))
    call = getattr(importlib.import_module(module), function)
    for name in sys.argv[2:]:
        wrong, start = None, time.perf_counter()
        ptx_tools.reset_counts()
        with simulated() as launcher:
            try:
                call(name, launcher)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - start, 2)
        row = {"name": name, "wrong": wrong, "seconds": seconds, "instructions": ptx_tools.counts().instructions}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
