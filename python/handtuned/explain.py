"""explain(fn, *args): runs a call once and says which kernel served each op, and why the others did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import backends


@dataclass(frozen=True)
class Explanation:
    """The op calls of one run, in order. Prints as text; `result` is what the run returned."""

    calls: list[backends.Call]
    result: Any

    def __str__(self) -> str:
        if not self.calls:
            return "no handtuned op was called"
        lines = []
        for call in self.calls:
            lines.append(f"{call.op}: {call.served_by.backend} ({call.served_by.kernel})")
            for candidate in call.candidates:
                if candidate.backend == call.served_by.backend:
                    continue
                lines.append(f"  not {candidate.backend}: {candidate.refused or _lower(call)}")
            lines += [f"  {note}" for note in call.notes]
        return "\n".join(lines)

    __repr__ = __str__


def _lower(call: backends.Call) -> str:
    return f"could serve, but {call.served_by.backend} comes first"


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Runs fn(*args, **kwargs), a function or module, and explains every handtuned op it called.

    Runs under the current grad mode and the backend() in force; a compiled module is run as it was written, since the
    kernels are the same.
    """
    calls: list[backends.Call] = []
    fn = getattr(fn, "_orig_mod", fn)
    with backends.record(calls):
        result = fn(*args, **kwargs)
    return Explanation(calls, result)
