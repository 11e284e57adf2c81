"""The CUDA kernels of every family under ThreadSanitizer (simt/races.cpp): no two CUDA threads touch one address of
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


FAMILIES = ["norms", "rnns", "attentions", "attention_in_chunks"]
RIGHT = ["barrier", "warp_barrier", "blocks", "blocks_meet", "two_launches"]


@pytest.mark.parametrize("name", [*FAMILIES, *RIGHT])
def test_no_race(name: str) -> None:
    status, report = races(name)
    assert status == 0, report[-6000:]


# What has a race, and a word that says where.
PLANTED = dict.fromkeys(
    ["no_barrier", "no_warp_barrier", "shuffle", "blocks_one_word", "blocks_do_not_meet"], "races.cpp"
) | {
    "attention_with_one_output": "attention_forward_kernel",
    "attention_with_one_gradient": "attention_grad_key_kernel",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_race_is_found(name: str) -> None:
    status, report = races(name)
    assert status == 66
    assert "WARNING: ThreadSanitizer: data race" in report
    assert PLANTED[name] in report
