"""Planted bugs (simt/mutate.py), hunted family by family: which ones a test run plants, and what caught each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import simt_tools
from simt import mutate

import handtuned

ROOT = Path(__file__).resolve().parents[1]
POINTS = mutate.points(ROOT / "csrc")
EVERY = os.environ.get("HANDTUNED_EVERY_MUTANT") == "1"  # make test-gpu-full


def hunted_points(family: str) -> list[mutate.Point]:
    """All of a family's, or every barrier and a sample of the rest."""
    own = [p for p in POINTS if p.family == family and p.equivalent is None]
    return [p for p in own if EVERY or p.kind == "barrier" or p.number % 16 == 0]


def preloaded() -> dict[str, str]:
    """An environment in which a Python process can load a library built with sanitizers."""
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(Path(handtuned.__file__).parents[1]), str(ROOT)]),
    }


@cache
def hunted(family: str) -> dict[int, str | None]:
    """What caught each mutant; -1: the program as it is, with sanitizers, which passes before any bug is planted."""
    library = simt_tools.require(simt_tools.CHECKED)
    numbers = [p.number for p in hunted_points(family)]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/simt/hunt.py", library, family, *map(str, numbers)],
        env=preloaded(),
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, f"the kernels as they are do not pass:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {-1: None} | {row["mutant"]: row["caught"] for row in found}


def wrong_in_ptx(family: str, paths: Sequence[Path]) -> list[str | None]:
    """What is wrong with a family's results or accesses to memory where its kernels are the PTX of each file."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/ptx_bounds.py", family, *paths],
        env=preloaded(),
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
