"""What is particular to the CUDA norms, in the emulator: rows of every width, every schedule, memory touched once,
no bank conflict. Values on the shared cases are in test_norm.py, planted bugs in test_cuda_hunt.py, registers in
test_cuda_budgets.py."""

from __future__ import annotations

import cases
import numerics
import pytest
import simt_tools
import torch
from torch import Tensor

from handtuned import ops

BF16, F64 = torch.bfloat16, torch.float64
SCHEDULES = [("random", 0), ("random", 1), ("random", 2), ("forward", 0), ("backward", 0), ("warp_greedy", 3)]

# Rows of a part of a warp, of a warp and of several; held in registers, in shared memory, and read again; the sums of
# the columns in the kernel of the rows and in one of their own.
WIDTHS = {
    torch.float32: (8, 72, 500, 1028, 12288),
    BF16: (8, 100, 1000, 2056, 16392),
    torch.float16: (24, 250),
    F64: (4, 130, 1030, 7000, 13000),
}
EVERY_WIDTH = [
    form.with_(shape=(21 if cols < 2000 else 3, cols), dtype=dtype)
    for dtype, widths in WIDTHS.items()
    for cols in widths
    for form in (cases.FORMS[0], cases.DROPOUTS[1])
]


def everything(case: cases.Case) -> dict[str, Tensor]:
    t = cases.tensors(case)
    leaves = t.leaves()
    torch.manual_seed(7)
    return cases.results(cases.run(case, leaves), leaves, t)


@pytest.mark.parametrize("case", EVERY_WIDTH, ids=lambda c: c.name)
@pytest.mark.usefixtures("poison")
def test_every_width_meets_the_contract(case: cases.Case) -> None:
    with simt_tools.emulated("random", seed=5):
        numerics.check_contract(case, "simt")


@pytest.mark.parametrize("case", [c for c in EVERY_WIDTH if c.cols < 3000], ids=lambda c: c.name)
def test_every_schedule_gives_the_same_bits(case: cases.Case) -> None:
    found = []
    for schedule, seed in SCHEDULES:
        with simt_tools.emulated(schedule, seed):
            found.append(everything(case))
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert other[name].equal(tensor), name


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in EVERY_WIDTH if c.kind == "layer"], ids=lambda c: c.name)
def test_memory_is_touched_once(case: cases.Case) -> None:
    """Every element of the input is loaded once and of the output stored once, unless the row fits nowhere."""
    t = cases.tensors(case)
    size, rows = t.input.element_size(), case.elements // case.cols
    statistics = rows * 2 * (8 if case.dtype == F64 else 4)
    parameters = rows * case.cols * size
    with simt_tools.emulated() as emulator:
        _, stats = ops.layer_norm(t.input, 1, t.weight, t.bias, 1e-5)
        forward = emulator.counts
        emulator.reset()
        ops.layer_norm_backward(t.grad_output, t.input, 1, stats, t.weight, True, False, False)
        backward = emulator.counts
    tensor = case.elements * size
    held = case.cols * size <= 98 << 10
    assert forward.bytes_stored == tensor + statistics
    assert forward.bytes_loaded == (1 if held else 3) * tensor + 2 * parameters
    assert backward.bytes_stored == tensor
    # Every thread of a row reads its statistics; weight is read in both passes.
    without = backward.bytes_loaded - 2 * parameters
    twice = 2 * case.cols * size > 98 << 10 and case.cols > 512 * 4 * 16 // size
    assert 0 < without - (2 if twice else 1) * 2 * tensor <= statistics * min(512, case.cols)


@pytest.mark.parametrize("case", [c for c in EVERY_WIDTH if c.cols >= 72 and c.cols % 4 == 0], ids=lambda c: c.name)
def test_no_bank_conflicts(case: cases.Case) -> None:
    with simt_tools.emulated() as emulator:
        everything(case)
        assert emulator.counts.bank_conflicts == 0
        assert emulator.counts.most_shared_bytes <= 99 << 10
