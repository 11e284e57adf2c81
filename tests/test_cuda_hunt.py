"""The hunt for planted bugs in the CUDA kernels of every family, in the emulator with sanitizers. Points and those that
change no result are in simt/mutate.py, the families' checks in simt/hunt.py.

A sample is planted, without HANDTUNED_EVERY_MUTANT (make test-gpu-full).
"""

from __future__ import annotations

import collections

import pytest
from hunting import POINTS, hunted, hunted_points
from simt import mutate

FAMILIES = tuple(dict.fromkeys(mutate.FILES.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_sanitizers_find_nothing(family: str) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer on tensors that end where their memory ends."""
    assert hunted(family)[-1] is None


@pytest.mark.parametrize(
    "point", [point for family in FAMILIES for point in hunted_points(family)], ids=lambda p: p.name
)
def test_planted_bug_is_caught(point: mutate.Point) -> None:
    """A barrier, predicate or loop bound is broken: a wrong value, a race, other traffic or a sanitizer must tell."""
    assert hunted(point.family)[point.number] is not None


def test_equivalent_mutants_are_still_there() -> None:
    places = collections.Counter((p.file, p.text) for p in POINTS)
    for file, text, *which in mutate.EQUIVALENT:
        assert places[file, text] > max(which, default=0), f"{file}: {text} has changed: judge it anew"
