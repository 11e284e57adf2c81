"""pytest's side of the benchmark room: options, the shared Room, rows into the JSON, the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # cases.py and numerics.py serve both rooms

import handtuned

from . import families, machine, report, results, timing
from .room import Room

ROOM = pytest.StashKey[Room]()
OTHER = pytest.StashKey[machine.OtherWork]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("handtuned benchmarks")
    group.addoption("--family", choices=list(families.FAMILIES), default="norm", help="whose benchmarks these are")
    group.addoption("--quick", action="store_true", help="two shapes, few rounds, no torch.compile")
    group.addoption("--threads", type=int, default=None, help="torch's and onnxruntime's threads (torch's default)")


@pytest.fixture(scope="session")
def room(request: pytest.FixtureRequest) -> Iterator[Room]:
    quick = request.config.getoption("--quick")
    threads = request.config.getoption("--threads")
    if threads:
        torch.set_num_threads(threads)
    request.config.stash[OTHER] = machine.OtherWork()
    machine.adapt_allocator()
    made = Room(quick, timing.QUICK if quick else timing.FULL, machine.limits(quick))
    request.config.stash[ROOM] = made
    with handtuned.strict():
        yield made


def _run(config: pytest.Config) -> results.Run | None:
    found = config.stash.get(ROOM, None)
    if found is None:
        return None
    facts = machine.facts(found.limits, config.stash[OTHER].cores())
    return results.Run(families.FAMILIES[config.getoption("--family")], machine.allocator(), facts, found.rows)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    run = _run(config)
    if run is not None:
        machine_info["handtuned"] = run.machine


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    run = _run(config)
    if run is not None:
        output_json |= {"allocator": run.allocator, "rows": run.rows}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = _run(config)
    if run is not None and run.rows and not all(row["status"] == "not timed" for row in run.rows):
        terminalreporter.ensure_newline()
        terminalreporter.write(report.terminal(run, colour=terminalreporter.hasmarkup))
