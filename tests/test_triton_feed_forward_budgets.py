"""The kernels around torch's products in Triton, compiled ahead of time: registers, spills, instructions. A sample runs
here, every type and architecture with HANDTUNED_EVERY_TILE=1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import triton_ahead
import triton_tools
from handtuned.triton_kernels import cross_entropy, kv_cache, linear, linear_int8, rotary, tuning

BUDGETS = Path(__file__).parent / "triton_feed_forward_budgets.json"
LAUNCH = "test_triton_feed_forward_budgets:launch"
GELU, GELU_TANH, SILU = 2, 3, 4
ROUNDED = 12  # GELU, the input rounded to 8 bits
ALL = tuple(triton_tools.ARCHITECTURES)
SAMPLED: list[triton_ahead.Form] = [
    ("epilogue", "bfloat16", GELU, ("sm80", "gfx942")),
    ("epilogue_backward", "bfloat16", GELU_TANH, ("sm90",)),
    ("loss", "bfloat16", 0, ("sm80", "gfx942")),
    ("logits_backward", "bfloat16", 0, ("sm100",)),
    ("rotary", "bfloat16", 0, ("sm80",)),
    ("append", "bfloat16", 0, ("sm80", "gfx942")),
    ("int8", "bfloat16", GELU, ALL),
    ("quantize", "bfloat16", 0, ("sm90",)),
]
OTHERS: list[triton_ahead.Form] = [
    (kernel, dtype, activation, ALL)
    for dtype in ("bfloat16", "float32", "float64")
    for kernel, activations in (
        ("epilogue", (GELU, GELU_TANH, SILU)),
        ("epilogue_backward", (GELU, GELU_TANH, SILU)),
        ("loss", (0,)),
        ("logits_backward", (0,)),
        ("rotary", (0, 1)),
        ("append", (0, 1)),
        ("int8", (0, GELU, ROUNDED)),
        ("quantize", (0,)),
    )
    for activation in activations
    if kernel not in ("int8", "quantize") or dtype != "float64"
]
CASES = [*SAMPLED, *(OTHERS if "HANDTUNED_EVERY_TILE" in os.environ else [])]


def launch(arch: str, kernel: str, dtype: str, activation: int) -> None:
    """Called in the ahead-of-time process, where launches are recorded. activation: rotary's interleaved."""
    tuning.architecture = lambda device: arch

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    x, w, bias = zeros(64, 128), zeros(1024, 128), zeros(1024)
    seed, wide = torch.zeros(1, dtype=torch.int64), torch.promote_types(x.dtype, torch.float32)
    if kernel.startswith("epilogue"):
        linear.linear(x, w, bias, zeros(64, 1024), None, activation, 0.1, seed)
        saved = zeros(64, 1024)
        linear.linear_backward(saved, x, w, bias, saved, activation, 0.1, seed, True, True, True)
    elif kernel in ("int8", "quantize"):
        packed, rounded = linear_int8.linear_int8_pack(w.to(torch.int8)), activation == ROUNDED or kernel == "quantize"
        scale = torch.zeros(1024)
        linear_int8.linear_int8(x, packed, scale, bias, zeros(64, 1024), activation % 10, 0.1, seed, rounded, True)
    elif kernel == "append":
        new, cache, angles = zeros(2, 4, 4, 64), zeros(8, 4, 16, 64), zeros(99, 32)
        lengths, table = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int32)
        kv_cache.append_kv(new, new, new, cache, cache, lengths, table, angles, angles, bool(activation), True)
    elif kernel == "rotary":
        angles = zeros(64, 32)
        rotary.rotary(zeros(2, 4, 64, 64).transpose(1, 2), angles[:, None], angles[:, None], bool(activation), False)
    else:
        given = (x, w, bias, torch.zeros(64, dtype=torch.int64), bias)
        options = (1, -100, 0.1, 20.0, 0.01)
        cross_entropy.linear_cross_entropy(*given, *options, 0)
        grad, stats, kept = torch.zeros((), dtype=wide), torch.zeros(2, 64, dtype=wide), zeros(64, 0)
        cross_entropy.linear_cross_entropy_backward(grad, *given, stats, kept, *options, True, True, True)


@pytest.fixture(scope="module")
def compiled() -> triton_ahead.Compiled:
    return triton_ahead.compiled_forms(LAUNCH, ("kernel", "dtype", "activation"), CASES)


def test_ahead_of_time_budgets(compiled: triton_ahead.Compiled) -> None:
    triton_ahead.check_budgets(compiled, SAMPLED, BUDGETS)


def test_accesses_are_wide(compiled: triton_ahead.Compiled) -> None:
    """Loads of 8 or 16 bytes at once, but in rotary and append, whose rows are strided; no atomics. int8 weights are
    multiplied by tensor cores."""
    for (case, arch), kernels in compiled.items():
        for kernel in kernels:
            atomics = [op for op in kernel.mix if op.startswith(("atom.", "red.")) or "atomic" in op]
            assert not atomics, f"{case} on {arch}: {atomics}"
            wide = [op for op in kernel.mix if ".v4.b32" in op or ".v2.b" in op or "load_dwordx" in op]
            strided = case.startswith(("rotary", "append"))
            assert wide or strided, f"{case} on {arch} has no wide access: {sorted(kernel.mix)}"
            if case.startswith("int8 bfloat16"):
                assert any(op.startswith(("mma.sync", "wgmma", "tcgen05.mma", "v_mfma")) for op in kernel.mix)
