"""Which kernel serves a call: the policy table, the switches that override it, and the record that explain() reads.

serving.py makes the calls.

For a CUDA tensor the CUDA library comes before Triton, if it was built and has a kernel for the op: it holds every
shape, dtype and option of the norm, attention and recurrent families (but layer normalisation of recurrent gates), is
called without Python in between, and compiles nothing at the first call.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _C
from ._binary import build_facts, cuda_library

BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
gpu_ops: dict[str, set[str]] = {"cuda": set(), "triton": set()}  # which ops have kernels there: ops/ says it


class FallbackWarning(UserWarning):
    """A call was served by the reference formula because no kernel could; given once per reason."""


class FallbackError(RuntimeError):
    """The same under handtuned.strict()."""


@dataclass(frozen=True)
class Candidate:
    """One backend's answer to a call. refused is None where it can serve it."""

    backend: str
    kernel: str
    refused: str | None = None


@dataclass
class Call:
    """One op call as explain() shows it."""

    op: str
    served_by: Candidate
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)


@dataclass
class _State:
    backend: str = "auto"
    strict: bool = False
    record: list[Call] | None = None


_state = _State()
plain = True  # auto, and nobody records: the fast path asks only this
_warned: set[str] = set()


def _update(**changes: Any) -> None:
    global plain
    for name, value in changes.items():
        setattr(_state, name, value)
    plain = _state.backend == "auto" and _state.record is None


@contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    before = {name: getattr(_state, name) for name in changes}
    _update(**changes)
    try:
        yield
    finally:
        _update(**before)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op inside on one backend: "reference", "cpu", "triton", "cuda" or "auto" (the policy table).

    A backend that cannot serve a call raises RuntimeError with its reason. Process-wide, like torch.backends' flags;
    a backward runs on the backend of its forward.
    """
    if name not in BACKENDS:
        raise ValueError(f"handtuned.backend: name is {name!r}, allowed are {', '.join(BACKENDS)}")
    with _changed(backend=name):
        yield


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """Inside, a call that no kernel can serve raises FallbackError instead of running the reference formula."""
    with _changed(strict=enabled):
        yield


@contextmanager
def record(calls: list[Call]) -> Iterator[None]:
    """Appends every op call inside to `calls`."""
    with _changed(record=calls):
        yield


def reads_layout() -> bool:
    """Whether weights packed for the CPU kernels are what a call on the CPU reads."""
    return _state.backend in ("auto", "cpu")


def runs_kernels() -> bool:
    """False where the switch demands the formula, which reads no packed weights."""
    return _state.backend != "reference"


def triton_status() -> str | None:
    """None if Triton kernels can run on a device here, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "no CUDA, ROCm or XPU device is available"


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def why_no_triton_kernel(op: str) -> str | None:
    """None if an op has a Triton kernel, on whatever device."""
    return None if op in gpu_ops["triton"] else "no Triton kernel for this op"


def _why_not_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"{dtype} is not one of float32, float64, bfloat16, float16"


def _why_not_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    return _why_not_dtype(dtype) if device.type == "cpu" else f"input is on {device.type}"


def why_no_cuda_kernel(op: str) -> str | None:
    """None if the CUDA library beside the extension has a kernel for an op, else why not."""
    if not build_facts["cuda"].startswith("built"):
        return build_facts["cuda"]
    if not cuda_library.exists():
        return f"{cuda_library.name} is missing beside the extension"
    return None if op in gpu_ops["cuda"] else "no CUDA C++ kernel for this op"


def cuda_status() -> str | None:
    """None if CUDA C++ kernels can run on a device here, else why not."""
    return None if torch.cuda.is_available() and torch.version.cuda else "no CUDA device is available"


def _why_not_cuda(op: str, device: torch.device, dtype: torch.dtype, mode: str) -> str | None:
    if device.type != "cuda":
        return f"input is on {device.type}"
    return why_no_cuda_kernel(op) or _why_not_mode(mode) or _why_not_capability(device) or _why_not_dtype(dtype)


def _why_not_mode(mode: str) -> str | None:
    return "no GPU kernel normalises recurrent gates" if mode.endswith("layernorm") else None


def _why_not_capability(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # a tensor on such a device cannot be here, and nobody can be asked
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the device is sm_{major}{minor}, the CUDA kernels need sm_80"


def _why_not_triton(op: str, device: torch.device, dtype: torch.dtype, mode: str) -> str | None:
    lacking = why_no_triton_kernel(op) or _why_not_mode(mode)
    if lacking:
        return lacking
    if device.type in ("cuda", "xpu"):
        return triton_status() or _why_not_dtype(dtype)
    if device.type == "cpu" and _state.backend == "triton" and triton_interprets():
        return _why_not_dtype(dtype)
    return f"input is on {device.type}"


def candidates(op: str, device: torch.device, dtype: torch.dtype, mode: str = "") -> list[Candidate]:
    """The policy table: every backend in order of preference, with the reason of each that cannot serve the call.

    mode: of a recurrent op.
    """
    on_cpu = device.type == "cpu"
    return [
        Candidate("cpu", _C.isa(), _why_not_cpu(device, dtype)),
        Candidate("cuda", "cuda c++", _why_not_cuda(op, device, dtype, mode)),
        Candidate("triton", "interpreter" if on_cpu else "triton", _why_not_triton(op, device, dtype, mode)),
        Candidate("reference", "torch"),
    ]


def choose(op: str, device: torch.device, dtype: torch.dtype, mode: str = "") -> tuple[Candidate, list[Candidate]]:
    """(the one that serves, all of them) under the backend that is set."""
    table = candidates(op, device, dtype, mode)
    if _state.backend == "auto":
        return next(candidate for candidate in table if candidate.refused is None), table
    candidate = next(candidate for candidate in table if candidate.backend == _state.backend)
    if candidate.refused:
        raise RuntimeError(
            f"handtuned.backend({_state.backend!r}) cannot serve this call: {candidate.refused}; "
            "use handtuned.backend('auto') or move the input"
        )
    return candidate, table


def fell_back(op: str, reason: str) -> None:
    """Says once (or raises under strict()) that `op` is about to run as the reference formula."""
    message = f"handtuned.{op}: no kernel serves this call, running the reference formula instead: {reason}"
    if _state.strict:
        raise FallbackError(message)
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=4)


def say_if_formula(op: str, chosen: Candidate, table: list[Candidate]) -> None:
    if chosen.backend == "reference" and _state.backend == "auto" and _state.record is None:
        fell_back(op, "; ".join(f"{c.backend}: {c.refused}" for c in table if c.refused))


def dispatched(input: torch.Tensor, mode: str) -> bool:
    """Whether torch's dispatcher finds what serves a call: nothing is switched, and a device's own kernels take it."""
    return plain and not (input.is_cuda and _why_not_mode(mode))


def is_automatic() -> bool:
    """Whether the policy table decides, and no switch."""
    return _state.backend == "auto"


def recorded() -> list[Call] | None:
    """Where explain() wants calls noted, if it does."""
    return _state.record
