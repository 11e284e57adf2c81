"""The sm_80 PTX that nvcc emits for the norms, executed by the simulator (tests/ptx) behind the launchers of the ops.

Compiled without contraction into fused multiply-adds it does the arithmetic of the emulator (tests/simt), so every
result must have the same bits, and every byte of global memory must be moved as often. Compiled as it is shipped it is
held to the contract against float64. Registers and SASS are in test_cuda_budgets.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import cases
import hunting
import numerics
import ptx_tools
import pytest
import simt_tools
import test_cuda_norm
import torch

pytestmark = ptx_tools.needs_nvcc

SMALL = [c for c in cases.CASES if c.elements < 20_000]
CASES = [*SMALL, *(c for c in test_cuda_norm.EVERY_WIDTH if c.elements < (100_000 if hunting.EVERY else 30_000))]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.usefixtures("poison")
def test_bits_and_traffic_are_the_emulators(case: cases.Case) -> None:
    with simt_tools.emulated() as emulator:
        wanted = test_cuda_norm.everything(case)
        traffic = (emulator.counts.bytes_loaded, emulator.counts.bytes_stored)
    with ptx_tools.simulated(ptx_tools.cuda_module("norm.cu", "-fmad=false"), junk=True):
        found = test_cuda_norm.everything(case)
        counts = ptx_tools.counts()
    for name, tensor in wanted.items():
        same = found[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
        assert same, f"{name}: differs by {(found[name].double() - tensor.double()).abs().max().item():.3g}"
    assert (counts.bytes_loaded, counts.bytes_stored) == traffic
    assert counts.instructions > 0 or case.elements == 0


@pytest.mark.parametrize("case", CASES if hunting.EVERY else CASES[::5], ids=lambda c: c.name)
@pytest.mark.usefixtures("poison")
def test_contract(case: cases.Case) -> None:
    with ptx_tools.simulated(ptx_tools.cuda_module("norm.cu"), junk=True):
        numerics.check_contract(case, "simt")


@pytest.mark.parametrize("case", test_cuda_norm.EVERY_WIDTH[3::7], ids=lambda c: c.name)
def test_any_order_of_warps_gives_the_same_bits(case: cases.Case) -> None:
    found = []
    for seed in (0, 1, 2):
        with ptx_tools.simulated(ptx_tools.cuda_module("norm.cu"), seed):
            found.append(test_cuda_norm.everything(case))
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert other[name].equal(tensor), name


def test_every_access_is_inside_a_tensor(tmp_path: Path) -> None:
    """Tensors that end where their memory ends, as AddressSanitizer's allocator knows it. As a proof of the method,
    with stores of 16 bytes that go 16 bytes too far as well."""
    simt_tools.require(ptx_tools.LIBRARY)
    text = ptx_tools.compile_cuda("norm.cu")
    further = re.sub(r"(st\.global\.v4\.\w+\s+\[%rd\d+)\]", r"\1+16]", text)
    assert further != text
    paths = [tmp_path / "norm.ptx", tmp_path / "further.ptx"]
    for path, content in zip(paths, (text, further), strict=True):
        path.write_text(content)
    right, wrong = hunting.wrong_in_ptx("norm", paths)
    assert right is None
    assert wrong is not None
    assert "global memory outside every tensor" in wrong
    assert "st.global.v4." in wrong
