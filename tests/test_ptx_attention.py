"""The sm_80 PTX that nvcc emits for attention, executed by the simulator (tests/ptx) behind the launchers of the ops.

Where every query sees one key, no exponential is needed: softmax gives 1 exactly and the log-sum-exp is the score. What
is left is products, sums and roundings, so that PTX without contraction into fused multiply-adds must give the
emulator's bits (tests/simt), outputs and gradients. Everything else is held to the contract against float64: hardware,
simulator and host have exponentials of their own.
"""

from __future__ import annotations

from pathlib import Path

import attention_cases as ac
import attention_numerics as an
import numerics
import ptx_tools
import pytest
import simt_tools
import torch
from attention_cases import ALL, ALL_PACKED, BF16, CAUSAL, F16, F32, F64, PACKED, Case
from hunting import EVERY, wrong_in_ptx
from test_cuda_attention import everything
from test_norm_properties import assert_same_bits
from torch import Tensor

pytestmark = ptx_tools.needs_nvcc

SOURCES = ("attention.cu", "attention_backward.cu")

# Each query sees the key at its own place, which is exact whatever else is asked for.
ONE_KEY = [
    Case((1, 2, 20, 30, 24), window=(0, 0), dtype=F32),
    Case((1, 2, 70, 70, 40), kv_heads=1, window=(0, 0), dtype=BF16, mask="add", mask_dims="qk", dropout=0.3),
    Case((2, 1, 17, 70, 128), window=(0, 0), alignment="bottom_right", dtype=F16, lengths=(70, 40), alibi="h"),
    Case((1, 1, 17, 70, 256), value_width=192, window=(0, 0), dtype=BF16, mask="add", mask_dims="h1k"),
    Case((1, 1, 9, 20, 20), value_width=136, window=(0, 0), dtype=F64, dropout=0.5, grad_lse=True),
    PACKED.with_(window=(0, 0), dtype=F16),
]
VALUES = [
    ALL.with_(dtype=BF16),
    ALL_PACKED,
    CAUSAL.with_(shape=(1, 2, 70, 130, 64), dtype=F16),
    Case((1, 1, 17, 70, 128), dtype=BF16, mask="add", mask_dims="qk"),
    Case((1, 1, 17, 70, 256), dtype=F16, value_width=192, sinks=F32),
    Case((1, 1, 5, 20, 264), dtype=BF16),
    PACKED.with_(dtype=F64),
    Case((1, 2, 1, 520, 16), kv_heads=1, dtype=BF16, sinks=F32),
    Case((1, 2, 1, 520, 16), dtype=F32, window=(300, 0), alignment="bottom_right"),
    ALL.with_(dtype=F16),
    ALL_PACKED.with_(dtype=BF16),
    ALL.with_(dtype=F64, sinks=F64),
]


def outputs(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(7)
    with torch.no_grad():
        return dict(zip(("output", "lse"), ac.run(case, ac.tensors(case)), strict=True))


@pytest.mark.parametrize("case", ONE_KEY, ids=lambda c: c.name)
@pytest.mark.usefixtures("poison")
def test_bits_are_the_emulators(case: Case) -> None:
    results = everything if EVERY else outputs
    with simt_tools.emulated() as emulator:
        wanted = results(case)
        traffic = (emulator.counts.bytes_loaded, emulator.counts.bytes_stored)
    # make test compiles the forward alone for this.
    with ptx_tools.simulated(ptx_tools.cuda_module(SOURCES if EVERY else SOURCES[:1], "-fmad=false"), junk=True):
        found = results(case)
        counts = ptx_tools.counts()
    assert_same_bits(found, wanted)
    assert counts.bytes_stored == traffic[1]
    assert counts.bytes_loaded <= traffic[0]  # nvcc keeps lengths and starts in registers
    if not case.lengths and not case.packed:
        assert counts.bytes_loaded == traffic[0]
    assert (counts.products > 0) == (case.dtype in (BF16, F16))


@pytest.mark.parametrize("case", VALUES if EVERY else VALUES[:7:2], ids=lambda c: c.name)
@pytest.mark.usefixtures("poison")
def test_values_as_shipped(case: Case) -> None:
    with ptx_tools.simulated(ptx_tools.cuda_module(SOURCES), junk=True):
        d = an.drawn(case, 0)
        numerics.draw_seed(0)
        an.check_every_element(case, ac.results(case, d.tensors), d.truth)


@pytest.mark.skipif(not EVERY, reason="takes HANDTUNED_EVERY_MUTANT=1: make test-gpu-full")
def test_every_access_is_inside_a_tensor(tmp_path: Path) -> None:
    """Tensors that end where their memory ends, as AddressSanitizer's allocator knows it."""
    simt_tools.require(ptx_tools.LIBRARY)
    path = tmp_path / "attention.ptx"
    path.write_text("\n".join(map(ptx_tools.compile_cuda, SOURCES)))
    assert wrong_in_ptx("attention", [path]) == [None]
