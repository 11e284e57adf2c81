"""One measurement from case to row: check, prepare the peers, time them in turns, record.

A row is what tables, page and JSON show: a plain dict, see `Room.measure`. pytest-benchmark keeps handtuned's rounds as
the record of the test; the peers' rounds of the same measurement lie in its extra_info.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import cases
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import gate, timing
from .peers import OURS, PEERS, Case, Peer, PlainLayer, Tensors, Unavailable

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """ratio: wanted against torch eager; share: wanted of the limit. None where nothing is.

    work: what one call must do at least, in the unit of `limit`, a key of machine.LIMITS: bytes or operations.
    """

    ratio: float | None
    work: float
    limit: str = "copy"
    share: float | None = None


@dataclass
class Room:
    """State of one run. limits: machine.limits, measured in this process."""

    quick: bool
    plan: timing.Plan
    limits: dict[str, float]
    peers: tuple[Peer, ...] = PEERS
    rows: list[Row] = field(default_factory=list)

    def measure(self, case: Case, truth: gate.Truth, target: Target, benchmark: BenchmarkFixture) -> None:
        """Appends the case's row; fails the test without timing anything if handtuned's result is wrong."""
        row: Row = {
            "op": case.op,
            "dtype": cases.SHORT[case.dtype],
            "shape": list(case.shape),
            "target": target.ratio,
            "limit": target.limit,
            "share_target": target.share,
            "status": "ok",
            "why": "",
            "peers": {},
        }
        self.rows.append(row)
        benchmark.group = f"{case.op} {row['dtype']} {gate.shape_name(case.shape)}"
        benchmark.extra_info |= {"op": case.op, "dtype": row["dtype"], "shape": row["shape"]}
        with case.mode():
            entries, refused = self._prepare(case, truth, row)
            if row["status"] != "ok":
                benchmark._mode = "refused"  # no record of it, and no warning that there is none
                pytest.fail(f"test red, nothing is timed: {row['why']}", pytrace=False)
            if benchmark.disabled:
                entries[0].call()
                row["status"] = "not timed"
                benchmark._mode = "not timed"
                return
            rounds = timing.interleave(entries, self.plan)
        row["peers"] = {name: self._figures(made, rounds[OURS], target) for name, made in rounds.items()}
        row["peers"] |= {name: {"refused": why} for name, why in refused.items()}
        benchmark.extra_info["peers"] = row["peers"]
        benchmark.extra_info["rounds"] = {name: made.seconds for name, made in rounds.items() if name != OURS}
        record(benchmark, rounds[OURS])

    def _prepare(self, case: Case, truth: gate.Truth, row: Row) -> tuple[list[timing.Entry], dict[str, str]]:
        """Callables that compute the right thing, and why the others are left out. Marks the row if ours does not."""
        entries: list[timing.Entry] = []
        refused: dict[str, str] = {}
        for peer in self.peers:
            try:
                call = peer.prepare(case)
                wrong = self._wrong(peer, call, case, truth)
            except Unavailable as reason:
                refused[peer.name] = str(reason)
                continue
            except Exception as error:
                if peer.name != OURS:
                    raise
                wrong = f"{type(error).__name__}: {error}"
            if wrong and peer.name == OURS:
                row["status"], row["why"] = "test red", wrong
                break
            if wrong:
                refused[peer.name] = wrong
            else:
                entries.append(timing.Entry(peer.name, call, peer.pool))
        return entries, refused

    @staticmethod
    def _wrong(peer: Peer, call: Callable[[], Tensors], case: Case, truth: gate.Truth) -> str | None:
        gate.seed()
        results = call()
        if peer.name == OURS:
            return truth.red(results)
        return None if case.random or isinstance(peer, PlainLayer) else truth.differs(results)

    def _figures(self, made: timing.Rounds, ours: timing.Rounds, target: Target) -> dict[str, Any]:
        """ratio: this peer's time over handtuned's, round by round."""
        return {
            "seconds": asdict(timing.spread(made.seconds)),
            "ratio": asdict(timing.ratio(made, ours)),
            "share": target.work / made.median / self.limits[target.limit],
            "faults_per_call": made.faults_per_call,
            "calls": made.calls,
            "rounds": len(made.seconds),
        }


def record(benchmark: BenchmarkFixture, rounds: timing.Rounds) -> None:
    """Gives pytest-benchmark rounds that were timed outside it: its own modes time one callable alone.

    _make_stats and _mode are what its `pedantic` uses; both are checked by tests/test_bench.py for the pinned version.
    """
    benchmark._mode = "interleaved"
    stats = benchmark._make_stats(rounds.calls)  # type: ignore[no-untyped-call]
    for seconds in rounds.seconds:
        stats.update(seconds * rounds.calls)
