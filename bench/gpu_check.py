"""What a machine with a GPU alone can say: the CUDA and Triton kernels on the real device, checked and timed.

    make gpu-check [ARGS="--quick | --dry-run | --output DIR"]        PYTHONPATH=tests python -m bench.gpu_check ...

Checks (gpu_checks.py): the cases of the tests on the device, against the contract (errors against float64 at most 1.5
times torch's) and against what the emulator of the tests computes for the same tensors. Times (gpu_times.py): against
torch's own kernels, by CUDA events, in turns. Writes gpu-check.json and gpu-check.html, whatever happens: a row that
fails says why in its place, and one that crashes or hangs is given up by a process that never touches the device
(gpu_rows.py).

--dry-run does all of that without a GPU: the emulator stands for the device, and times are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .gpu_report import summary, write
from .gpu_rows import Broken, Plan, Row, supervised

if TYPE_CHECKING:
    from .gpu_device import Device


def dry(quick: bool) -> Plan:
    """Without a GPU."""
    from .gpu_device import Dry

    return plan(Dry(), quick)


def real(quick: bool) -> Plan:
    import torch

    from .gpu_device import Cuda, why_no_device

    if not torch.cuda.is_available():
        raise LookupError(f"torch sees no CUDA device: {why_no_device()}")
    return plan(Cuda(), quick)


def plan(device: Device, quick: bool) -> Plan:
    import torch

    import handtuned

    from . import gpu_checks, gpu_times

    facts = {"handtuned": handtuned.__version__, "torch": torch.__version__, **device.describe()}
    return Plan(facts, gpu_checks.jobs(device, quick) + gpu_times.jobs(device, quick), device.lost)


def report(make: Callable[[], Plan], output: Path, patience: float = 600.0) -> int:
    """Runs everything and writes both files; the exit status."""
    facts: dict[str, str] = {}
    rows: list[Row] = []
    status = 2
    try:
        supervised(make, rows, facts, patience)
        status = int(any(row.status in ("wrong", "failed") for row in rows))
    except Broken as error:
        facts["device"] = f"none: {error}"
        print(f"{error}. What the check does can be seen with --dry-run.")
    finally:  # also where somebody has had enough
        write(output, facts, rows)
        print(f"{facts.get('device')}: {summary(rows)}; see {output / 'gpu-check.html'} and gpu-check.json beside it")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: everything but the times")
    parser.add_argument("--quick", action="store_true", help="a sample of the cases, one shape a family")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR")
    chosen = parser.parse_args(arguments)
    return report(partial(dry if chosen.dry_run else real, chosen.quick), chosen.output)


if __name__ == "__main__":
    sys.exit(main())
