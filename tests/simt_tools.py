"""The CUDA emulator from Python: the kernels of csrc/cuda on CPU tensors, what they did, and how they were scheduled.

The library is part of the test build (HANDTUNED_EMULATE=1, which `make test` asks for) and of no wheel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handtuned import _C

FOLDER = Path(__file__).resolve().parents[1] / "build" / "simt"
LIBRARY = FOLDER / "libhandtuned_simt.so"
CHECKED = FOLDER / "libhandtuned_simt_checked.so"  # with sanitizers and mutation points
SCHEDULES = {"random": 0, "forward": 1, "backward": 2, "warp_greedy": 3}


running = False  # whether the emulator serves the ops now


class Counts(ctypes.Structure):
    """What launches did since the last reset; the fields of simt::Counts."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "launches",
            "blocks",
            "threads",
            "switches",
            "bytes_loaded",
            "bytes_stored",
            "shared_accesses",
            "bank_conflicts",
            "most_shared_bytes",
        )
    )
    launches: int
    blocks: int
    threads: int
    switches: int
    bytes_loaded: int
    bytes_stored: int
    shared_accesses: int
    bank_conflicts: int
    most_shared_bytes: int


class Emulator:
    """One library, opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.simt_counts.restype = Counts
        self.library.simt_configure.argtypes = (ctypes.c_int, ctypes.c_ulonglong)

    def schedule(self, name: str, seed: int = 0) -> None:
        """In which order threads run that can: random (by seed), forward, backward, warp_greedy."""
        self.library.simt_configure(SCHEDULES[name], seed)

    def device(self, multiprocessors: int = 0, shared_bytes: int = 0) -> None:
        """What launchers see; 0 for what it is at first. A small device sends small shapes the ways of large ones."""
        self.library.simt_device(multiprocessors, shared_bytes)

    def plant(self, mutant: int) -> None:
        """Makes one mutation point the planted bug; -1: none."""
        self.library.simt_plant(mutant)

    def take_passed(self) -> frozenset[int]:
        """The mutation points that kernels passed since the last call, planted or not."""
        flags = (ctypes.c_ubyte * self.library.simt_take_passed(None))()
        self.library.simt_take_passed(flags)
        return frozenset(number for number, flag in enumerate(flags) if flag)

    def reset(self) -> None:
        self.library.simt_reset_counts()

    @property
    def counts(self) -> Counts:
        counts: Counts = self.library.simt_counts()
        return counts


def require(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is part of the test build alone: make test, or HANDTUNED_EMULATE=1")
    return path


@contextmanager
def emulated(
    schedule: str = "forward", seed: int = 0, path: Path = LIBRARY, device: tuple[int, int] = (0, 0)
) -> Iterator[Emulator]:
    """Inside, ops with a CUDA kernel run it on CPU tensors in the emulator; device: as Emulator.device takes it."""
    global running
    emulator = Emulator(require(path))
    emulator.schedule(schedule, seed)
    emulator.device(*device)
    emulator.reset()
    _C.emulate_cuda(str(path))
    running = True
    try:
        yield emulator
    finally:
        running = False
        _C.emulate_cuda("")
