"""Attention in Triton compiled ahead of time for each architecture: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import triton_ahead
import triton_tools
from handtuned.triton_kernels import attention, tuning

BUDGETS = Path(__file__).parent / "triton_attention_budgets.json"
EVERY = ("sm80", "sm90", "sm100", "gfx942")
TENSOR_CORES = {"sm80": ["mma.sync"], "sm90": ["wgmma"], "sm100": ["tcgen05.mma"], "gfx942": ["v_mfma"]}
# Forms: causal; every option at once; a query against pages. The others of the list need HANDTUNED_EVERY_TILE=1.
SAMPLED = [
    ("forward", "bfloat16", 128, "causal", EVERY),
    ("keys", "bfloat16", 64, "causal", ("sm80", "sm90", "gfx942")),
    ("forward", "bfloat16", 64, "paged", ("sm80",)),
    ("forward", "float32", 32, "causal", ("sm80",)),
]
OTHERS = [
    *((kernel, "bfloat16", 128, "causal", EVERY) for kernel in ("rows", "keys")),
    *((kernel, "bfloat16", 64, "everything", EVERY) for kernel in ("forward", "rows", "mask")),
    ("keys", "bfloat16", 64, "everything", ("sm80", "sm90", "gfx942")),
    *((kernel, "float32", 64, "causal", ("sm80", "gfx942")) for kernel in ("forward", "rows", "keys")),
    ("forward", "float64", 64, "causal", ("gfx942",)),
    *((kernel, "bfloat16", 512, "causal", ("sm80",)) for kernel in ("forward", "keys")),
    # Narrow and wide heads; products without tensor cores.
    *((kernel, "bfloat16", width, "causal", EVERY) for kernel in ("forward", "rows", "keys") for width in (32, 512)),
    *((kernel, "float32", width, "causal", EVERY) for kernel in ("forward", "rows", "keys") for width in (32, 128)),
    *((kernel, "float64", 64, "causal", ("sm90", "gfx942")) for kernel in ("forward", "rows", "keys")),
]
CASES = [*SAMPLED, *(OTHERS if "HANDTUNED_EVERY_TILE" in os.environ else [])]


def launch(arch: str, kernel: str, dtype: str, width: int, form: str) -> None:
    """Called in the ahead-of-time process, where launches are recorded."""
    tuning.architecture = lambda device: arch
    wide = torch.float64 if dtype == "float64" else torch.float32
    all_options, rows = form == "everything", 1 if form == "paged" else 512

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    query, key = zeros(2, 8, rows, width), zeros(2, 8, 512, width)
    given: list[torch.Tensor | None] = [None] * 5
    mask, slopes, sinks, lengths, table = given
    if all_options:
        mask, slopes, sinks = zeros(2, 8, rows, 512), torch.zeros(8), torch.zeros(8)
    if form == "paged":
        key, table = zeros(64, 2, 16, width), torch.zeros(2, 32, dtype=torch.int32)
    if form != "causal":
        lengths = torch.full((2,), 512)
    options = (0.125, True, -1, 0, 3.0 * all_options, 0.1 * all_options, torch.zeros(1, dtype=torch.int64))
    if kernel == "forward":
        attention.attention(query, key, key, mask, None, None, lengths, table, slopes, sinks, *options)
    else:
        lse = torch.zeros(2, 8, rows, dtype=wide)
        saved = (query, lse, query, key, key, query, lse)
        attention.attention_backward(*saved, mask, None, None, lengths, slopes, sinks, *options, *[True] * 5)


@pytest.fixture(scope="module")
def compiled() -> triton_ahead.Compiled:
    """Behind each kernel the one for tiles that met a NaN."""
    names = ("kernel", "dtype", "width", "form")
    return triton_ahead.compiled_forms("test_triton_attention_budgets:launch", names, CASES)


def test_ahead_of_time_budgets(compiled: triton_ahead.Compiled) -> None:
    triton_ahead.check_budgets(compiled, SAMPLED, BUDGETS)


def test_instruction_mix(compiled: triton_ahead.Compiled) -> None:
    """What a kernel walks over comes by TMA where the table says so."""
    triton_ahead.check_instructions(compiled, TENSOR_CORES)
    copied = {key: any(op.startswith("cp.async.bulk.tensor") for op in found[0].mix) for key, found in compiled.items()}
    assert any(copied.values())
    for (case, arch), by_descriptor in copied.items():
        kernel, dtype, width, form = case.split()
        name = kernel + "_options" * (form == "everything")
        if kernel != "mask" and form != "paged":
            config = tuning._tile("attention", (arch, name, str(getattr(torch, dtype).itemsize), width))[0]
            assert by_descriptor == (config[5:] == [1]), f"{case} on {arch}"


def test_committed_table_is_complete() -> None:
    table = json.loads((tuning.COMMITTED.parent / "attention.json").read_text())["tables"]
    assert set(table) == {"default", *triton_tools.ARCHITECTURES}
    for kernels in table.values():
        assert set(kernels) == {
            kernel + options for kernel in ("forward", "decode", "rows", "keys", "mask") for options in ("", "_options")
        }
        for sizes in kernels.values():
            assert set(sizes) == {"2", "4", "8"}
            for widths in sizes.values():
                assert set(widths) == {"32", "64", "128", "256", "512"}
                for rows, keys, warps, stages, widest, *descriptors in widths.values():
                    assert descriptors in ([], [0], [1])
                    for number in (rows, keys, widest):
                        assert number >= 16
                        assert number & (number - 1) == 0
                    assert keys <= 128
                    assert 1 <= warps <= 8
                    assert 1 <= stages <= 4
