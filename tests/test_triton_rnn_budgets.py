"""Recurrent layers in Triton compiled ahead of time for each architecture: registers, spills, shared memory, tensor
cores. A sample runs here, every committed tile with HANDTUNED_EVERY_TILE=1."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import triton_ahead
import triton_tools
from handtuned.triton_kernels import rnn, tuning

from handtuned.ops import CELLS

BUDGETS = Path(__file__).parent / "triton_rnn_budgets.json"
STEPS, INPUTS, HIDDEN, PROJECTED = 3, 64, 128, 64
# Forms: plain; drawn: all that is drawn, lengths, and the cell's states returned; with a projection. Then the batch.
SAMPLED = [
    ("forward", "bfloat16", "LSTM", "plain", 64, ("sm80", "sm90", "sm100", "gfx942")),
    ("backward", "bfloat16", "GRU", "plain", 64, ("sm80", "gfx942")),
    ("forward", "bfloat16", "LSTM peepholes", "drawn", 8, ("sm80",)),
]
FORMS = [
    (mode, form + projected)
    for mode, projected in (("LSTM peepholes", ""), ("LSTM", " projected"), ("GRU", ""), ("RNN_TANH", ""))
    for form in ("plain", "drawn")
]
OTHERS = [
    (kernel, dtype, mode, form, batch, tuple(triton_tools.ARCHITECTURES))
    for kernel in ("forward", "backward")
    for dtype in ("bfloat16", "float32", "float64")
    for mode, form in FORMS
    for batch in (8, 64)
]
CASES = [*SAMPLED, *(OTHERS if "HANDTUNED_EVERY_TILE" in os.environ else [])]


def launch(arch: str, kernel: str, dtype: str, mode: str, form: str, batch: int) -> None:
    """Called in the ahead-of-time process, where launches are recorded."""
    tuning.architecture = lambda device: arch
    cell, drawn = CELLS[mode], form.startswith("drawn")
    width = PROJECTED if form.endswith("projected") else HIDDEN

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    gates = cell.gates * HIDDEN
    weights = [zeros(gates, INPUTS), zeros(gates, width), zeros(gates), zeros(gates)]
    weights += [zeros(width, HIDDEN)] if width != HIDDEN else []
    weights += [zeros(cell.peephole_gates * HIDDEN)] if cell.peepholes else []
    rates = [0.1, 0.1 * cell.is_lstm, 0.1, 0.0] if drawn else None
    seed = torch.zeros(1, dtype=torch.int64) if drawn else None
    lengths = torch.full((batch,), STEPS) if drawn else None
    x, cells = zeros(STEPS, batch, INPUTS), drawn and cell.is_lstm
    if kernel == "forward":
        packed = rnn.rnn_pack(weights, mode, False, True, 0.0, None)
        sizes = (mode, HIDDEN, width % HIDDEN, 1, False)
        rnn.rnn(x, lengths, None, None, packed, *sizes, 0.0, rates, seed, True, cells)
        return
    wide = torch.float64 if dtype == "float64" else torch.float32
    numbers = STEPS * batch * (width + cell.kept(0.1 * drawn) * HIDDEN)
    grads = (zeros(STEPS, batch, width), None, None, zeros(STEPS, batch, HIDDEN) if cells else None)
    options = (mode, False, True, 0.0, rates, seed, True, True, cell.is_lstm, True)
    rnn.rnn_backward(*grads, x, lengths, None, None, weights, torch.zeros(numbers, dtype=wide), *options)


NAMES = ("kernel", "dtype", "mode", "form", "batch")
LAUNCH = "test_triton_rnn_budgets:launch"


@pytest.fixture(scope="module")
def compiled() -> triton_ahead.Compiled:
    return triton_ahead.compiled_forms(LAUNCH, NAMES, CASES)


def test_ahead_of_time_budgets(compiled: triton_ahead.Compiled) -> None:
    triton_ahead.check_budgets(compiled, SAMPLED, BUDGETS)


def test_instruction_mix(compiled: triton_ahead.Compiled) -> None:
    """A tile of few rows takes the smaller tensor instructions on each architecture."""
    cores = {arch: ["mma.sync", "wgmma", "tcgen05.mma", "v_mfma"] for arch in triton_tools.ARCHITECTURES}
    triton_ahead.check_instructions(compiled, cores)


def test_committed_table_is_complete() -> None:
    table = json.loads((tuning.COMMITTED.parent / "rnn.json").read_text())["tables"]
    assert set(table) == {"default", *triton_tools.ARCHITECTURES}
    for kernels in table.values():
        assert set(kernels) == {kernel + drawn for kernel in ("forward", "backward") for drawn in ("", "_options")}
        for sizes in kernels.values():
            assert set(sizes) == {"2", "4", "8"}
            for rows, units, depth, warps, stages in sizes.values():
                assert all(number >= 16 and number & (number - 1) == 0 for number in (rows, units, depth))
                assert warps in (4, 8)
                assert 1 <= stages <= 3
