"""Interleaved timing: what is compared runs in turns in one process, so that noise hits all of it alike.

A round is one slice per peer, and each round starts with the next one: A B C, B C A, C A B, ..., so that nobody always
runs after the same peer or at the same point of the scheduler's period. A slice is as many calls as fill
`slice_seconds`, the same number in every round. What is reported is the median over rounds of the ratio within a round,
with the 10-90 % spread, never the ratio of two times taken apart.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Clock = Callable[[], float]


@dataclass(frozen=True)
class Plan:
    """How long to measure one case, in seconds and rounds. At least min_rounds are made whatever they cost."""

    budget: float = 0.8
    min_rounds: int = 7
    max_rounds: int = 40
    slice_seconds: float = 2e-3
    warmup_calls: int = 3
    warmup_seconds: float = 0.05
    settle_seconds: float = 0.01


FULL = Plan()
QUICK = Plan(budget=0.15, min_rounds=5, max_rounds=15, warmup_calls=2, warmup_seconds=0.02)


@dataclass(frozen=True)
class Entry:
    """One callable to time. pool names the threads it runs on: see `interleave`."""

    name: str
    call: Callable[[], object]
    pool: str = "openmp"


@dataclass
class Rounds:
    """seconds[i]: time of one call in round i, the mean over the `calls` calls of the slice."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    faults: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def faults_per_call(self) -> float:
        return self.faults / (self.calls * len(self.seconds))


@dataclass(frozen=True)
class Spread:
    """Median and the 10 % and 90 % points."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Quantiles with linear interpolation between the sorted values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), tenths[0], tenths[-1])


def ratio(peer: Rounds, ours: Rounds) -> Spread:
    """How many times faster `ours` is than `peer`: > 1 where ours wins."""
    return spread([theirs / mine for theirs, mine in zip(peer.seconds, ours.seconds, strict=True)])


def minor_faults() -> int:
    """Page faults of this process that needed no disk: what fresh memory costs."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _warm_up(entry: Entry, plan: Plan, clock: Clock) -> int:
    """Runs entry until it is warm; returns the calls that fill a slice."""
    start, fastest, done = clock(), math.inf, 0
    while done < plan.warmup_calls or clock() - start < plan.warmup_seconds:
        before = clock()
        entry.call()
        fastest = min(fastest, clock() - before)
        done += 1
    return max(1, math.ceil(plan.slice_seconds / max(fastest, 1e-7)))


def _settle(entry: Entry, plan: Plan, clock: Clock) -> None:
    start = clock()
    while clock() - start < plan.settle_seconds:
        entry.call()


def _slice(entry: Entry, rounds: Rounds, clock: Clock) -> None:
    faults = minor_faults()
    call = entry.call
    start = clock()
    for _ in range(rounds.calls):
        call()
    elapsed = clock() - start
    rounds.faults += minor_faults() - faults
    rounds.seconds.append(elapsed / rounds.calls)


def interleave(entries: Sequence[Entry], plan: Plan, clock: Clock = time.perf_counter) -> dict[str, Rounds]:
    """Times the entries in turns until plan.budget is spent.

    Idle threads of a pool keep spinning for some milliseconds in wait of work. Where the pool changes from one slice to
    the next, the new one runs untimed until the old one sleeps; otherwise each would be timed on busy cores.
    """
    result = {entry.name: Rounds(_warm_up(entry, plan, clock)) for entry in entries}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, made, pool = clock(), 0, entries[-1].pool
        while made < plan.min_rounds or (made < plan.max_rounds and clock() - start < plan.budget):
            first = made % len(entries)
            for entry in (*entries[first:], *entries[:first]):
                if entry.pool != pool:
                    _settle(entry, plan, clock)
                _slice(entry, result[entry.name], clock)
                pool = entry.pool
            made += 1
    finally:
        if collecting:
            gc.enable()
    return result
