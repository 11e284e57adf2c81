"""The CUDA norms and recurrent layers under ThreadSanitizer (simt/races.cpp): no two CUDA threads touch one address of
global or shared memory, one of them storing, without a barrier between them, of whatever blocks they are; and such a
pair would be found."""

from __future__ import annotations

import subprocess

import pytest
import simt_tools

PROGRAM = simt_tools.FOLDER / "handtuned_simt_races"


def races(name: str) -> tuple[int, str]:
    """(exit status, report) of a run."""
    done = subprocess.run([simt_tools.require(PROGRAM), name], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["norms", "rnns", "barrier", "warp_barrier", "blocks", "blocks_meet", "two_launches"])
def test_no_race(name: str) -> None:
    status, report = races(name)
    assert status == 0, report[-6000:]


@pytest.mark.parametrize("name", ["no_barrier", "no_warp_barrier", "shuffle", "blocks_one_word", "blocks_do_not_meet"])
def test_a_race_is_found(name: str) -> None:
    status, report = races(name)
    assert status == 66
    assert "WARNING: ThreadSanitizer: data race" in report
    assert "races.cpp" in report
