"""What a run of the benchmarks leaves: its rows, the files they are in, and what is said of a row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .families import Family

Row = dict[str, Any]

EAGER, OURS = "torch eager", "handtuned"


@dataclass(frozen=True)
class Run:
    """One process: a family, an allocator setting, what it ran on, and its rows (room.Room.measure)."""

    family: Family
    allocator: str
    machine: dict[str, Any]
    rows: list[Row]
    commit: str = ""
    when: str = ""

    @property
    def title(self) -> str:
        return machine.TITLES.get(self.allocator, self.allocator)


def json_path(directory: Path, family: Family, allocator: str) -> Path:
    return directory / f"{family.name}-{allocator}.json"


def load(directory: Path, family: Family) -> list[Run]:
    """The family's runs found in `directory`, the default allocator first."""
    runs = []
    for allocator in machine.ALLOCATORS:
        path = json_path(directory, family, allocator)
        if path.exists() and path.stat().st_size:
            data = json.loads(path.read_text())
            commit = data.get("commit_info", {})
            runs.append(
                Run(
                    family,
                    data["allocator"],
                    data["machine_info"].get("handtuned", {}),
                    data["rows"],
                    str(commit.get("id", "unknown"))[:12] + (" with changes" if commit.get("dirty") else ""),
                    data.get("datetime", "")[:16].replace("T", " "),
                )
            )
    return runs


def losing(row: Row) -> bool:
    """True if torch eager is faster."""
    eager = row["peers"].get(EAGER, {})
    return "ratio" in eager and eager["ratio"]["median"] < 1


def verdict(row: Row) -> str:
    """The row against its target: "", "ok" or "missed"."""
    eager = row["peers"].get(EAGER, {})
    if (row["target"] is None and row["share_target"] is None) or "ratio" not in eager:
        return ""
    fast_enough = eager["ratio"]["median"] >= (row["target"] or 0)
    return "ok" if fast_enough and row["peers"][OURS]["share"] >= (row["share_target"] or 0) else "missed"
