"""Plans of the GPU check that end badly, for the processes of test_gpu_check.py. No torch: they start soon."""

from __future__ import annotations

import os
import signal
import time

from bench.gpu_rows import Job, Plan, Row

lost = False


def fine(row: Row) -> None:
    row.figures["ran"] = True


def crash(row: Row) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(row: Row) -> None:
    """As blocks at a barrier whose others never come."""
    time.sleep(1000)


def lose(row: Row) -> None:
    """As after an access outside all tensors: nothing can run in this process any more."""
    global lost
    lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def plan(*works: str) -> Plan:
    known = {work.__name__: work for work in (fine, crash, hang, lose)}
    jobs = [Job(Row("check", "norm", f"{number} {work}", "cuda"), known[work]) for number, work in enumerate(works)]
    return Plan({"device": "none"}, jobs, lambda: "an illegal memory access" if lost else None)


def no_device() -> Plan:
    raise LookupError("torch sees no CUDA device: the driver is too old")
