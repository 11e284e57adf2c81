"""The CUDA recurrent kernels in the emulator: the cases of the CPU kernels, wherever the weights stay, under every
schedule. Planted bugs are in test_cuda_hunt.py, registers in test_cuda_budgets.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import rnn_cases as rc
import simt_tools
import torch
from hunting import EVERY
from rnn_cases import CASES, FORMS, Case
from test_rnn import check_contract
from test_rnn_variants import PAIRS, SHORT, check_short, close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import handtuned
from handtuned import ops
from handtuned.autograd import kernels_for
from handtuned.nn import functional as H

pytestmark = pytest.mark.usefixtures("poison")
BF16, F64 = torch.bfloat16, torch.float64
SCHEDULES = [("random", 0), ("random", 1), ("random", 2), ("forward", 0), ("backward", 0), ("warp_greedy", 3)]
# Multiprocessors and bytes of shared memory of a block: weights in registers; in shared memory; a launch a step.
WAYS = {"registers": (0, 0), "shared": (2, 0), "steps": (2, 18 << 10)}


def sampled(cases: list[Case], every: int) -> list[Case]:
    """All of them in make test-gpu-full."""
    return cases if EVERY else cases[::every]


def served(cases: list[Case]) -> list[Case]:
    """Without layer normalisation, which is refused."""
    kept = (tuple(option for option in case.options if option[0] != "layer_norm") for case in cases)
    return list(dict.fromkeys(case.with_(options=options) for case, options in zip(cases, kept, strict=True)))


def everything(case: Case) -> dict[str, Tensor]:
    t = rc.tensors(case)
    torch.manual_seed(7)
    return rc.results(case, t)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sampled([c for c in CASES if c.elements <= 20_000], 12), ids=lambda c: c.name)
def test_contract(case: Case) -> None:
    with simt_tools.emulated("random", seed=1), handtuned.strict():
        check_contract(case)


@pytest.mark.parametrize("case", sampled(served(PAIRS), 2), ids=lambda c: c.name)
def test_every_pair_of_options(case: Case) -> None:
    with simt_tools.emulated("random", seed=2), handtuned.strict():
        close(case, 0, 1e-4, 2e-5)


@pytest.mark.parametrize("case", sampled(served(PAIRS), 5), ids=lambda c: c.name)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "registers"])
def test_every_pair_of_options_wherever_weights_are(way: str, case: Case) -> None:
    with simt_tools.emulated("random", seed=3, device=WAYS[way]), handtuned.strict():
        close(case.with_(dtype=F64), 0, 1e-9, 1e-11)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("case", served(SHORT), ids=lambda c: c.name)
def test_short_floats(case: Case, dtype: torch.dtype) -> None:
    with simt_tools.emulated("random", seed=4), handtuned.strict():
        check_short(case.with_(dtype=dtype))


# More rows than a block takes between barriers; more steps than a stretch; a depth of several parts; more of it in a
# warp's part than registers are for.
LARGE = [
    Case("LSTM", (2, 70, 3, 9), states=True),
    Case("GRU", (131, 1, 2, 3), states=True, bidirectional=True),
    Case("RNN_TANH", (2, 3, 2, 517), states=True, dtype=F64),
    Case("LSTM", (2, 2, 2, 261), states=True, proj=130, dtype=F64),
    Case("LSTM", (3, 9, 70, 66), layers=2, dtype=BF16),
    Case("LSTM", (2, 2, 2, 1800), proj=8, bias=False),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
def test_sizes(way: str, case: Case) -> None:
    with simt_tools.emulated("random", seed=5, device=WAYS[way]), handtuned.strict():
        if case.dtype == BF16:
            check_short(case)
        else:
            close(case, 0, *((1e-4, 5e-5) if case.dtype == torch.float32 else (1e-9, 1e-11)))


def test_cells_and_empty_sizes() -> None:
    with simt_tools.emulated("random", seed=6), handtuned.strict():
        for mode, cell in (("LSTM", H.lstm_cell), ("GRU", H.gru_cell)):
            t = rc.tensors(Case(mode, (1, 5, 7, 11), states=True))
            hx = (t.h0[0], t.c0[0]) if mode == "LSTM" else t.h0[0]  # type: ignore[index]
            whole = (t.h0, t.c0) if mode == "LSTM" else t.h0
            found, expected = cell(t.input[0], hx, *t.weights), rc.function(mode)(t.input, whole, t.weights)[1]
            for a, b in zip(*((x if mode == "LSTM" else (x,)) for x in (found, expected)), strict=True):
                assert a.equal(b[0])
        for shape in ((0, 3, 4, 5), (3, 0, 4, 5), (2, 3, 0, 5)):
            everything(Case("LSTM", shape, states=True))
        close(Case("GRU", (4, 3, 4, 5), lengths=(0, 0, 0), states=True), 0, 1e-5, 1e-5)


# ---- bits ------------------------------------------------------------------------------------------------------------

MIXED = [
    Case("LSTM", (3, 9, 6, 21), proj=9, layers=2, bidirectional=True, states=True, lengths=(3, 0, 3, 1, 3, 2, 2, 2, 1)),
    Case("GRU", (3, 10, 6, 21), dropout=0.3, layers=2, states=True, dtype=BF16,
         options=(("zoneout", 0.4), ("recurrent_dropout", 0.3), ("weight_dropout", 0.2))),
    Case("RNN_RELU", (4, 3, 5, 40), states=True, bidirectional=True, dtype=F64),
]  # fmt: skip


@pytest.mark.parametrize("case", MIXED, ids=lambda c: c.name)
def test_every_schedule_and_device_gives_the_same_bits(case: Case) -> None:
    """Sums are cut by shapes alone: neither the order of threads nor where weights stay changes a bit."""
    found = []
    for schedule, seed in SCHEDULES:
        with simt_tools.emulated(schedule, seed):
            found.append(everything(case))
    for device in (*WAYS.values(), (5, 0), (3, 40 << 10)):
        with simt_tools.emulated("random", 8, device=device):
            found.append(everything(case))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, equal_nan=True)


# ---- where weights are -----------------------------------------------------------------------------------------------


def test_the_rule() -> None:
    """Registers where each warp has one quad of rows; shared memory where they fit; else a launch a step."""
    t = rc.tensors(Case("LSTM", (6, 3, 5, 32)))
    launches, shared = {}, {}
    for way, device in WAYS.items():
        with simt_tools.emulated(device=device) as emulator, torch.no_grad():
            packed = ops.rnn_pack(list(t.weights), "LSTM", False, True, 0.0, None)
            emulator.reset()
            ops.rnn_inference(t.input, None, None, None, packed, "LSTM", 32, 0, 1, False)
            launches[way], shared[way] = emulator.counts.launches, emulator.counts.most_shared_bytes
    assert launches == {"registers": 3, "shared": 3, "steps": 2 + 6}
    assert shared["shared"] >= 16 * 4 * 128 * 4 > shared["registers"]


def test_few_bank_conflicts() -> None:
    """None in the products with W_h; those of reading a step's sums are a few in a hundred accesses."""
    for case in FORMS[:2]:
        with simt_tools.emulated() as emulator:
            everything(case)
            counts = emulator.counts
        assert counts.bank_conflicts <= 0.02 * counts.shared_accesses
        assert counts.most_shared_bytes <= 99 << 10


def test_packed_weights_of_the_cpu_give_nan() -> None:
    t = rc.tensors(Case("GRU", (2, 3, 4, 5)))
    packed = ops.rnn_pack(list(t.weights), "GRU", False, True, 0.0, None)
    with simt_tools.emulated():
        found = ops.rnn_inference(t.input, None, None, None, packed, "GRU", 5, 0, 1, False)
    assert found[0].isnan().all()


def test_lengths_lie_on_the_cpu() -> None:
    """As torch's PackedSequence has them: to plan steps from a device's memory would be to wait for it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        lengths = torch.empty(3, dtype=torch.int64, device="cuda:0")
        x, packed = torch.empty(2, 3, 4, device="cuda:0"), torch.empty(9, dtype=torch.uint8, device="cuda:0")
        with pytest.raises(RuntimeError, match=r"lengths is on cuda:0, expected on the CPU.*\.cpu\(\)"):
            ops.rnn_inference(x, lengths, None, None, packed, "GRU", 5, 0, 1, False)


def test_layer_normalisation_is_refused() -> None:
    words = r"mode is 'GRU layernorm', and the CUDA kernels do not normalise gates; use handtuned\.backend"
    t = rc.tensors(Case("GRU", (2, 3, 4, 5), options=(("layer_norm", True),)))
    with simt_tools.emulated(), pytest.raises(RuntimeError, match=words):
        ops.rnn_pack(list(t.weights), "GRU layernorm", False, True, 0.0, None)


def test_layer_normalisation_on_cuda_is_the_formula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Functions and modules ask the policy table before the dispatcher gives the call to the CUDA library."""
    library = tmp_path / "libhandtuned_cuda.so"
    library.touch()
    monkeypatch.setattr(handtuned.backends, "build_facts", {"cuda": "built: nvcc 13.0"})
    monkeypatch.setattr(handtuned.backends, "cuda_library", library)
    monkeypatch.setattr(handtuned.backends, "_warned", set())
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, device="cuda:0")
    assert kernels_for("rnn", x, "GRU") is ops
    with pytest.warns(handtuned.FallbackWarning, match="cuda: no GPU kernel normalises recurrent gates"):
        assert kernels_for("rnn", x, "GRU layernorm").is_formula
    with handtuned.strict(), pytest.raises(handtuned.FallbackError, match="normalises recurrent gates"):
        kernels_for("rnn", x, "GRU layernorm")
