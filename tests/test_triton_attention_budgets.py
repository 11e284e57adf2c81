"""Attention in Triton compiled ahead of time for each architecture: registers, spills, shared memory, tensor cores."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():  # as in conftest.py, for this file alone
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is first imported

import triton_tools

from handtuned.triton_kernels import attention, tuning

BUDGETS = Path(__file__).parent / "triton_attention_budgets.json"
EVERY = ("sm80", "sm90", "sm100", "gfx942")
MOST_SHARED = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 99 * 1024, "gfx942": 64 * 1024}
TENSOR_CORES = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}
# Forms: causal; every option at once; a query against pages. The others of the list need HANDTUNED_EVERY_TILE=1.
SAMPLED = [
    ("forward", "bfloat16", 128, "causal", EVERY),
    ("keys", "bfloat16", 64, "causal", ("sm80", "sm90", "gfx942")),
    ("forward", "bfloat16", 64, "paged", ("sm80",)),
]
OTHERS = [
    *((kernel, "bfloat16", 128, "causal", EVERY) for kernel in ("rows", "keys")),
    *((kernel, "bfloat16", 64, "everything", EVERY) for kernel in ("forward", "rows", "mask")),
    ("keys", "bfloat16", 64, "everything", ("sm80", "sm90", "gfx942")),
    *((kernel, "float32", 64, "causal", ("sm80", "gfx942")) for kernel in ("forward", "rows", "keys")),
    ("forward", "float64", 64, "causal", ("gfx942",)),
    *((kernel, "bfloat16", 512, "causal", ("sm80",)) for kernel in ("forward", "keys")),
]
CASES = list(dict.fromkeys([*SAMPLED, *(OTHERS if "HANDTUNED_EVERY_TILE" in os.environ else [])]))
Key = tuple[str, str]


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
def compiled() -> dict[Key, list[triton_tools.Resources]]:
    """(kernel dtype width form, architecture) -> the kernel, and behind it the one for tiles that met a NaN."""
    keys = [(case, arch) for *case, archs in CASES for arch in archs]
    cases = [
        {"arch": arch, "only": f"{kernel}_kernel", "kernel": kernel, "dtype": dtype, "width": width, "form": form}
        for (kernel, dtype, width, form), arch in keys
    ]
    found = triton_tools.ahead_of_time("test_triton_attention_budgets:launch", cases, timeout=3600.0)
    return {(" ".join(map(str, case)), arch): kernels for (case, arch), kernels in zip(keys, found, strict=True)}


def test_ahead_of_time_budgets(compiled: dict[Key, list[triton_tools.Resources]]) -> None:
    """No spills, an architecture's limits; of what is sampled also registers by the 8 in which hardware hands them out,
    shared memory and instructions. After a wanted change: HANDTUNED_WRITE_BUDGETS=1 pytest -k budgets."""
    found: dict[str, dict[str, list[int]]] = {}
    sampled = [(" ".join(map(str, case)), arch) for *case, archs in SAMPLED for arch in archs]
    for (case, arch), kernels in compiled.items():
        for kernel in kernels:
            assert kernel.spills == 0, f"{case} spills on {arch}: {kernel.spills} bytes"
            assert kernel.shared <= MOST_SHARED[arch], f"{case} takes {kernel.shared} bytes of shared memory on {arch}"
        used = [-(-kernels[0].registers // 8) * 8, kernels[0].shared, sum(kernels[0].mix.values())]
        found.setdefault(case, {})[arch] = used
    if os.environ.get("HANDTUNED_WRITE_BUDGETS") == "1":
        kept = {case: {a: u for a, u in used.items() if (case, a) in sampled} for case, used in found.items()}
        lines = [f'  "{case}": {json.dumps(used)}' for case, used in kept.items() if used]
        head = '{\n "entry": ["registers", "shared bytes", "instructions (PTX; AMD: assembly)"],\n "budgets": {\n'
        BUDGETS.write_text(head + ",\n".join(lines) + "\n }\n}\n")
    budgets = json.loads(BUDGETS.read_text())["budgets"]
    for case, of_arch in found.items():
        for arch, used in of_arch.items():
            if case not in budgets or arch not in budgets[case]:
                assert (case, arch) not in sampled
                continue
            named = zip(("registers", "shared bytes", "instructions"), used, budgets[case][arch], strict=True)
            for what, now, most in named:
                assert now <= most * 1.05, f"{case} on {arch} takes {now} {what}, budget {most}"


def test_instruction_mix(compiled: dict[Key, list[triton_tools.Resources]]) -> None:
    """Tensor cores where operands have 16 bits, no local memory, no atomics."""
    for (case, arch), kernels in compiled.items():
        for kernel in kernels:
            if "bfloat16" in case:
                cores = [op for op in kernel.mix if op.startswith(TENSOR_CORES[arch])]
                assert cores, f"{case} on {arch} has no {TENSOR_CORES[arch]}: {sorted(kernel.mix)}"
            wrong = [op for op in kernel.mix if op.startswith(("ld.local", "st.local", "scratch_", "atom.", "red."))]
            assert not wrong, f"{case} on {arch}: {wrong}"


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
                for rows, keys, warps, stages, widest in widths.values():
                    for number in (rows, keys, widest):
                        assert number >= 16
                        assert number & (number - 1) == 0
                    assert keys <= 128
                    assert 1 <= warps <= 8
                    assert 1 <= stages <= 4
