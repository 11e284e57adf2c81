"""The sm_80 PTX that nvcc emits for recurrent layers, executed by the simulator (tests/ptx) behind the launchers of the
ops: cooperative launches with weights in registers and in shared memory, and a launch a step.

A layer with ReLU takes no exponential, and neither do hard gates, so that PTX without contraction into fused
multiply-adds must give the emulator's bits (tests/simt). Everything else is held to float64: hardware, simulator and
host have exponentials of their own.
"""

from __future__ import annotations

from pathlib import Path

import ptx_tools
import pytest
import rnn_cases as rc
import simt_tools
import torch
from hunting import EVERY, wrong_in_ptx
from rnn_cases import Case
from test_cuda_rnn import WAYS
from test_norm_properties import assert_same_bits
from test_rnn_variants import close
from torch import Tensor

pytestmark = [ptx_tools.needs_nvcc, pytest.mark.usefixtures("poison")]
BF16, F64 = torch.bfloat16, torch.float64
SOURCES = ("rnn.cu", "rnn_backward.cu")
HARD = (("recurrent_activation", "hardsigmoid"), ("activation", "hardtanh"))

EXACT = [
    Case("RNN_RELU", (3, 3, 5, 21), states=True, bidirectional=True, lengths=(3, 1, 2)),
    Case("LSTM", (2, 9, 5, 21), states=True, proj=6, options=(*HARD, ("peepholes", True), ("zoneout", 0.4))),
    Case("GRU", (2, 3, 5, 21), layers=2, dtype=BF16, options=HARD),
    Case("GRU", (2, 2, 3, 9), bias=False, dtype=F64, options=HARD),
]
VALUES = [
    Case("LSTM", (3, 3, 5, 21), states=True, layers=2, dropout=0.3, lengths=(3, 0, 2)),
    Case("GRU", (2, 9, 5, 13), states=True, dtype=F64),
    Case("RNN_TANH", (2, 2, 3, 300), bidirectional=True),
]


def exact_results(case: Case) -> dict[str, Tensor]:
    """make test compiles the forward alone without contraction."""
    t = rc.tensors(case)
    torch.manual_seed(7)
    if EVERY:
        return rc.results(case, t)
    with torch.no_grad():
        return dict(zip(case.names, rc.run(case, t), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", EXACT, ids=lambda c: c.name)
def test_bits_are_the_emulators(way: str, case: Case) -> None:
    with simt_tools.emulated(device=WAYS[way]) as emulator:
        wanted = exact_results(case)
        launches, stored = emulator.counts.launches, emulator.counts.bytes_stored
    module = ptx_tools.cuda_module(SOURCES if EVERY else SOURCES[:1], "-fmad=false")
    with ptx_tools.simulated(module, junk=True, device=WAYS[way]):
        found = exact_results(case)
        counts = ptx_tools.counts()
    assert_same_bits(found, wanted)
    assert counts.launches == launches
    assert 0 <= counts.bytes_stored - stored <= 256  # signals of blocks, which the emulator does not count


@pytest.mark.parametrize("case", VALUES, ids=lambda c: c.name)
def test_values_as_shipped(case: Case) -> None:
    with ptx_tools.simulated(ptx_tools.cuda_module(SOURCES), junk=True):
        close(case, 0, *((1e-9, 1e-11) if case.dtype == F64 else (1e-4, 2e-5)))


def test_any_order_of_warps_gives_the_same_bits() -> None:
    found = []
    for seed in (0, 1, 2):
        with ptx_tools.simulated(ptx_tools.cuda_module(SOURCES), seed):
            torch.manual_seed(7)
            found.append(rc.results(EXACT[1], rc.tensors(EXACT[1])))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.skipif(not EVERY, reason="takes HANDTUNED_EVERY_MUTANT=1: make test-gpu-full")
def test_every_access_is_inside_a_tensor(tmp_path: Path) -> None:
    """Tensors that end where their memory ends, as AddressSanitizer's allocator knows it."""
    simt_tools.require(ptx_tools.LIBRARY)
    path = tmp_path / "rnn.ptx"
    path.write_text("\n".join(map(ptx_tools.compile_cuda, SOURCES)))
    assert wrong_in_ptx("rnn", [path]) == [None]
