"""The bounds in docs/gpu.md: they are what gpu_bounds.py computes, and it computes what a data sheet says."""

from __future__ import annotations

from dataclasses import replace

import gpu_bounds
import ptx_tools
import simt_tools


def test_bounds_of_a_plain_gpu() -> None:
    """One multiprocessor at 1 Hz that moves a byte a second: 64 units serve two warps a cycle, four instructions
    are issued a cycle, and tensor cores do 1024 operations a second, of 4096 that a product has."""
    gpu = gpu_bounds.Gpu("plain", 1.0, 1, 1.0, 64, 1024.0)
    found = gpu_bounds.Work(bytes=100, arithmetic=10, issued=40).bounds(gpu)
    assert found == {"bytes": 100.0, "arithmetic": 5.0, "issue": 10.0}
    assert gpu_bounds.Work(bytes=1, arithmetic=2, issued=4, products=3).bounds(gpu)["tensor"] == 12.0
    larger = replace(gpu, multiprocessors=8)
    assert gpu_bounds.Work(bytes=1, arithmetic=16, issued=4, blocks=4).bounds(larger)["arithmetic"] == 2.0


@ptx_tools.needs_nvcc
def test_docs_are_what_the_script_prints() -> None:
    simt_tools.require(ptx_tools.LIBRARY)
    written = gpu_bounds.parts(gpu_bounds.DOCS.read_text())[1]
    assert written == gpu_bounds.tables(), "python tests/gpu_bounds.py --write, and read the difference"
