"""The Triton norms compiled ahead of time for each architecture: registers, spills, shared memory, instruction mix."""

import json
import os
from pathlib import Path

import pytest
import torch
import triton_tools
from handtuned.triton_kernels import norm, tuning

BUDGETS = Path(__file__).parent / "triton_budgets.json"
EVERY = ("sm80", "sm90", "sm100", "gfx942")
AHEAD_OF_TIME = [  # every kernel on every architecture; what lies between the extremes on two of them
    ("layer_norm", "bfloat16", 1024, ("sm80", "gfx942")),
    ("add_layer_norm", "bfloat16", 1024, EVERY),
    ("add_layer_norm_backward", "bfloat16", 1024, ("sm90", "sm100")),
    ("add_layer_norm_backward", "bfloat16", 8192, EVERY),
    ("add_layer_norm", "bfloat16", 100000, EVERY),
    ("add_layer_norm_backward", "bfloat16", 100000, EVERY),
    ("layer_norm", "float16", 99, ("sm80", "sm100")),
    ("add_rms_norm", "float32", 16384, ("sm90", "gfx942")),
    ("layer_norm_backward", "float32", 4096, ("sm80", "sm100")),
    ("rms_norm_backward", "float64", 2048, ("sm90", "gfx942")),
    ("layer_norm", "float64", 1, ("sm80", "sm100")),
]
DISASSEMBLED = [("add_layer_norm", "bfloat16", 1024), ("add_layer_norm_backward", "bfloat16", 8192)]


def launch(arch: str, op: str, dtype: str, cols: int) -> None:
    """Called in the ahead-of-time process, where launches are recorded: everything the op can be asked for."""
    tuning.architecture = lambda device: arch
    x, w = (torch.zeros(*shape, dtype=getattr(torch, dtype)) for shape in ((8, cols), (cols,)))
    stats = torch.zeros(2, 8, dtype=torch.float64 if dtype == "float64" else torch.float32)
    stats, affine = (stats, (w, w)) if "layer" in op else (stats[1], (w,))
    dropout = (0.1, torch.zeros(1, dtype=torch.int64))
    needs = (True,) * (1 + len(affine))
    if op.endswith("backward"):
        add = op.startswith("add")
        getattr(norm, op)(*((x, x, x, 1, stats, w, *dropout, True) if add else (x, x, 1, stats, w)), *needs)
    elif op.startswith("add"):
        getattr(norm, op)(x, x, 1, *affine, 1e-5, *dropout)
    else:
        getattr(norm, op)(x, 1, *affine, 1e-5)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], dict[str, triton_tools.Resources]]:
    """(op dtype cols, architecture) -> kernel -> resources."""
    keys = [(case, arch) for *case, archs in AHEAD_OF_TIME for arch in archs]
    found = triton_tools.ahead_of_time(
        "test_triton_budgets:launch",
        [
            {"arch": arch, "op": op, "dtype": dtype, "cols": cols, "disassemble": (op, dtype, cols) in DISASSEMBLED}
            for (op, dtype, cols), arch in keys
        ],
    )
    return {
        (" ".join(map(str, case)), arch): {kernel.kernel: kernel for kernel in kernels}
        for (case, arch), kernels in zip(keys, found, strict=True)
    }


def test_ahead_of_time_budgets(compiled: dict[tuple[str, str], dict[str, triton_tools.Resources]]) -> None:
    """Registers by the 8 in which hardware hands them out, shared memory, no spills. After a wanted change:
    HANDTUNED_WRITE_BUDGETS=1 pytest -k budgets, and read the difference."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (case, arch), kernels in compiled.items():
        for kernel in kernels.values():
            assert kernel.spills == 0, f"{kernel.kernel} spills for {case} on {arch}"
            used = [-(-kernel.registers // 8) * 8, kernel.shared]
            found.setdefault(case, {}).setdefault(kernel.kernel.strip("_"), {})[arch] = used
    if os.environ.get("HANDTUNED_WRITE_BUDGETS") == "1":
        lines = [
            f'  "{case} {kernel}": {json.dumps(used)}'
            for case, kernels in found.items()
            for kernel, used in kernels.items()
        ]
        head = '{\n "entry": ["registers", "shared bytes"],\n "budgets": {\n'
        BUDGETS.write_text(head + ",\n".join(lines) + "\n }\n}\n")
    budgets = json.loads(BUDGETS.read_text())["budgets"]
    for case, kernels in found.items():
        for kernel, used in kernels.items():
            for arch, (registers, shared) in used.items():
                most = budgets[f"{case} {kernel}"][arch]
                what = f"{kernel} for {case} on {arch}"
                assert registers <= most[0], f"{what} takes {registers} registers, budget {most[0]}"
                assert shared <= most[1], f"{what} takes {shared} bytes of shared memory, budget {most[1]}"


def test_instruction_mix(compiled: dict[tuple[str, str], dict[str, triton_tools.Resources]]) -> None:
    """No local memory, no atomics; 16 bytes a load where rows are aligned; one Philox for four elements."""
    for (case, arch), kernels in compiled.items():
        for kernel in kernels.values():
            local = [op for op in kernel.mix if op.startswith(("LDL", "STL", "ld.local", "st.local", "scratch_"))]
            assert not local, f"{kernel.kernel} for {case} on {arch}: {local}"
            atomics = [op for op in kernel.mix if op.startswith(("ATOM", "RED.", "atom.", "red.")) or "atomic" in op]
            assert not atomics, f"{kernel.kernel} for {case} on {arch}: {atomics}"
            if not case.endswith((" 1", " 99")):
                wide = [
                    op
                    for op in kernel.mix
                    if op.startswith(("LDG.E.128", "ld.global.v4.b32", "ld.global.v2.b64")) or "load_dwordx4" in op
                ]
                assert wide, f"{kernel.kernel} for {case} on {arch} never loads 16 bytes: {sorted(kernel.mix)}"
    for arch in ("sm80", "sm90", "sm100"):
        config = tuning._lookup("forward", 1024, 2, arch)
        counters = config.tile * config.rows // (4 * 32 * config.warps)  # of a thread
        mix = compiled["add_layer_norm bfloat16 1024", arch]["forward_kernel"].mix
        products = sum(n for op, n in mix.items() if op.startswith("IMAD") and ("WIDE" in op or "HI" in op))
        assert products < 1.5 * 20 * counters, f"{products} wide products on {arch}"  # 10 rounds of 2


@pytest.mark.skipif("HANDTUNED_EVERY_TILE" not in os.environ, reason="ten minutes: set HANDTUNED_EVERY_TILE=1")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_no_committed_tile_spills(dtype: str) -> None:
    cases = [
        {"arch": arch, "op": op, "dtype": dtype, "cols": cols}
        for arch in triton_tools.ARCHITECTURES
        for cols in (*(128 << i for i in range(9)), 99, 99999)
        for op in ("layer_norm", "add_layer_norm", "layer_norm_backward", "add_layer_norm_backward")
    ]
    found = triton_tools.ahead_of_time("test_triton_budgets:launch", cases, timeout=3600.0)
    spilling = [
        (case, kernel.kernel) for case, kernels in zip(cases, found, strict=True) for kernel in kernels if kernel.spills
    ]
    assert not spilling
