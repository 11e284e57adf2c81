"""Rows of the GPU check, and who makes them: a process of its own, so that a crash or a hang on the device costs one
row. The process that watches it never touches the device and imports no torch."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any


@dataclass
class Row:
    """One line of the report. status: ok, wrong (a result), failed (an error), skipped (why says so)."""

    part: str  # "check" or "time"
    family: str
    name: str
    kernels: str
    status: str = "ok"
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    trace: str = ""


@dataclass(frozen=True)
class Job:
    """A row and what fills it in."""

    row: Row
    work: Callable[[Row], None]


START = 600.0  # seconds: imports, and what every row needs


def nothing_lost() -> str | None:
    return None


@dataclass(frozen=True)
class Plan:
    """facts: what is known of the device. lost: why nothing can run in this process any more, after an error that the
    driver does not forgive; else None."""

    facts: dict[str, str]
    jobs: list[Job]
    lost: Callable[[], str | None] = nothing_lost


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def fill(job: Job, lost: Callable[[], str | None]) -> bool:
    """Fills the row in, whatever happens; whether this process can go on."""
    row = job.row
    try:
        job.work(row)
    except LookupError as error:
        row.status, row.why = "skipped", str(error.args[0] if error.args else error)
    except AssertionError as error:
        row.status, row.why = "wrong", str(error)
    except Exception as error:
        row.status, row.why, row.trace = "failed", first_line(error), traceback.format_exc()[-4000:]
        if (reason := lost()) is not None:
            row.figures["lost"] = reason
            return False
    return True


# ---- two processes ---------------------------------------------------------------------------------------------------


def worker(make: Callable[[], Plan], first: int, to: Connection) -> None:
    """Sends the facts and all rows, empty; then each row from `first` on, as it is done."""
    try:
        plan = make()
    except Exception as error:
        to.send(first_line(error))
        return
    to.send((plan.facts, [job.row for job in plan.jobs]))
    for number, job in enumerate(plan.jobs[first:], first):
        goes_on = fill(job, plan.lost)
        to.send((number, job.row))
        if not goes_on:
            return


class Broken(RuntimeError):
    """There is no plan: the device does not answer at all."""


def received(make: Callable[[], Plan], first: int, patience: float) -> Iterator[Any]:
    """What a new worker sends; at last, where it did not end by itself, a sentence about how it ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(make, first, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(START):
            yield ours.recv()
        while ours.poll(patience):
            yield ours.recv()
        yield f"no answer in {patience:.0f} s: its process was killed"
    except EOFError:
        process.join()
        if code := process.exitcode:
            yield f"its process ended: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
    finally:
        process.kill()
        process.join()


def supervised(
    make: Callable[[], Plan],
    rows: list[Row],
    facts: dict[str, str],
    patience: float = 600.0,
    starts: int = 20,
    say: Callable[[str], None] = print,
) -> None:
    """Fills rows and facts in, with a new process after each row that took the last one along; `starts` at most.

    make has to be of a module that a new process can import. What was not reached is marked as skipped.
    """
    done, began = 0, time.monotonic()
    for _ in range(starts):
        for message in received(make, done, patience):
            if isinstance(message, str):
                if not rows:
                    raise Broken(message)
                if done < len(rows):
                    rows[done].status, rows[done].why = "failed", message
                    say(sentence(rows[done]))
                    done += 1
            elif isinstance(message[0], int):
                done, rows[message[0]] = message[0] + 1, message[1]
                if message[1].status in ("wrong", "failed"):
                    say(sentence(message[1]))
                elif done % 100 == 0:
                    say(f"{done} of {len(rows)} rows, {time.monotonic() - began:.0f} s")
            elif not rows:
                facts.update(message[0])
                rows += message[1]
                for row in rows:
                    row.status, row.why = "skipped", "the check ended before it"
        if done == len(rows):
            return
    for row in rows[done:]:
        row.why = f"{starts} processes were lost before it"


def sentence(row: Row) -> str:
    return f"{row.status}: {row.part} {row.family} {row.name} ({row.kernels}): {row.why}"
