"""Recurrent layers in Triton, in the interpreter: the CPU kernels' cases and options against float64 with guard bands
around every buffer, the same bits in any order of programs and of launches, and how they are reached.

A sample of the cases runs here, all small ones with HANDTUNED_EVERY_CASE=1. Budgets: test_triton_rnn_budgets.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numerics
import pytest
import rnn_cases as rc
import torch
import triton_tools
from handtuned.triton_kernels import common, rnn_plan, tuning
from rnn_cases import Case
from test_rnn_variants import ALL_OF, PAIRS
from torch import Tensor

import handtuned
from handtuned import FallbackWarning, nn
from handtuned.nn import functional as H

triton_tools.mend_bfloat16()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device Triton is not interpreted")

EVERY_CASE = "HANDTUNED_EVERY_CASE" in os.environ
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL_TILE = tuning.RnnConfig(16, 16, 16, 4, 1)
# Small forms: the interpreter takes milliseconds for each line of each program.
RAGGED = (3, 4, 1, 0, 4)
LSTM = Case("LSTM", (4, 5, 6, 19), lengths=RAGGED, bidirectional=True, states=True)
GRU = Case("GRU", (3, 3, 4, 7), layers=2, states=True, batch_first=True)
PACKED = LSTM.with_(shape=(3, 4, 5, 6), lengths=(1, 3, 3, 2), packed=True)
PROJECTED = Case("LSTM", (3, 2, 4, 18), proj=5, layers=2, states=True)
WITHOUT_LAYERNORM = [case for case in PAIRS if not case.cell.layernorm]
EVERYTHING = [
    Case(mode, (3, 3, 5, 7), options=tuple((n, v) for n, v in options.items() if n != "layer_norm"), states=True)
    for mode, options in ALL_OF.items()
]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with handtuned.backend("triton"), rc.one_thread():
        yield


@contextlib.contextmanager
def a_launch_for_each_step(tile: tuning.RnnConfig = SMALL_TILE) -> Iterator[None]:
    """Programs of few units, so that several share a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "ONE_PROGRAM", 0)
        patch.setattr(tuning, "rnn", lambda *_: tile)
        yield


def fenced(t: rc.Tensors) -> rc.Tensors:
    """Every floating-point tensor between NaNs."""
    named = {f.name: getattr(t, f.name) for f in fields(t) if f.name not in ("weights", "lengths")}
    outside = {n: triton_tools.fenced(x) for n, x in named.items() if x is not None}
    return replace(t, **outside, weights=tuple(triton_tools.fenced(w) for w in t.weights))


def check(case: Case, rtol: float, atol: float) -> dict[str, Tensor]:
    """Outputs and every gradient are the formula's in float64, for one seed; nothing beside a buffer is touched."""
    t = rc.tensors(case)
    torch.manual_seed(7)
    truth = rc.exact(case, t)
    torch.manual_seed(7)
    with triton_tools.guarded(common):
        found = rc.results(case, fenced(t))
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        torch.testing.assert_close(
            found[name].double(), exact, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found


CLOSE = {F64: (1e-9, 1e-11), F32: (1e-4, 2e-5), F16: (2e-2, 1e-2), BF16: (6e-2, 6e-2)}

# ---- values ----------------------------------------------------------------------------------------------------------

CHOSEN = [
    LSTM,
    *(GRU.with_(dtype=dtype) for dtype in (F16, F64)),
    *(PACKED.with_(mode=mode) for mode in ("LSTM", "RNN_RELU")),
    Case("RNN_TANH", (0, 2, 3, 4), states=True),
    Case("GRU", (2, 0, 3, 4), states=True),
]
OPTIONS = [*EVERYTHING[1:], EVERYTHING[0].with_(training=False)]
CASES = [*CHOSEN, *OPTIONS, *(WITHOUT_LAYERNORM + rc.CASES if EVERY_CASE else WITHOUT_LAYERNORM[1::20])]


@pytest.mark.parametrize("case", [c for c in CASES if c.elements < 20_000], ids=lambda case: case.name)
def test_values(case: Case) -> None:
    check(case, *CLOSE[case.dtype])


@pytest.mark.parametrize("case", [PROJECTED, EVERYTHING[0]], ids=lambda case: case.name)
def test_a_launch_for_each_step(case: Case) -> None:
    with a_launch_for_each_step():
        check(case.with_(shape=(2, 2, 4, 18)), *CLOSE[case.dtype])


@pytest.mark.parametrize(
    "case",
    [LSTM.with_(shape=(3, 2, 6, 18), lengths=(3, 1), dtype=BF16), GRU.with_(shape=(2, 2, 4, 18))],
    ids=lambda case: case.name,
)
def test_one_launch_gives_the_bits_of_many(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the programs of a launch come in any order: a step reads nothing that its own launch writes."""
    t = rc.tensors(case)
    monkeypatch.setattr(tuning, "rnn", lambda *_: SMALL_TILE)
    one = rc.results(case, t)
    with a_launch_for_each_step(), triton_tools.shuffled_programs(1):
        many = rc.results(case, t)
    for name, tensor in one.items():
        assert torch.equal(many[name].nan_to_num(), tensor.nan_to_num()), name


@pytest.mark.parametrize("mode", rc.MODES)
def test_numerics_contract(mode: str) -> None:
    """No error exceeds 1.5 times torch's own, in bfloat16, where rounding between steps shows."""
    case = Case(mode, (5, 16, 8, 16), dtype=BF16 if mode != "RNN_RELU" else F32)
    errors: dict[str, numerics.Errors] = {}
    for draw in range(2):
        t = rc.tensors(case, draw)
        ours, torchs, truth = rc.results(case, t), rc.results(case, t, rc.run_torch), rc.exact(case, t)
        for name, tensor in ours.items():
            entry = errors.setdefault(name, numerics.Errors(torch.finfo(case.dtype).eps, 0.0))
            entry.add(tensor, torchs[name], truth[name].numpy())
    assert not {name: text for name, entry in errors.items() if (text := entry.excess())}


# ---- how they are reached --------------------------------------------------------------------------------------------


def test_explain_names_kernel_tile_and_reason() -> None:
    case = LSTM.with_(bidirectional=False, lengths=(), shape=(1, 1, 3, 19))
    explanation = handtuned.explain(rc.results, case, rc.tensors(case))
    assert [call.op for call in explanation.calls] == ["rnn_pack", "rnn", "rnn_backward"]
    assert all(call.served_by.backend == "triton" for call in explanation.calls)
    for words in ("forward kernel: rows 16, units 32", "one launch for all steps: W_hh of a direction has 5776 bytes"):
        assert words in str(explanation)
    with torch.no_grad():
        explanation = handtuned.explain(rc.run, PROJECTED, rc.tensors(PROJECTED))
    assert "a launch for each step: a projection" in str(explanation)


def test_layer_norm_of_gates_is_refused_or_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("GRU", (2, 2, 3, 4), options=(("layer_norm", True),))
    t = rc.tensors(case)
    with pytest.raises(RuntimeError, match="no GPU kernel normalises recurrent gates"):
        rc.run(case, t)
    device, mode = torch.device("cuda", 0), case.cell.mode
    monkeypatch.setattr(handtuned.backends, "triton_status", lambda: None)
    monkeypatch.setattr(handtuned.backends, "why_no_cuda_kernel", lambda op: "not built")
    with handtuned.backend("auto"):
        assert handtuned.backends.choose("rnn", device, F32, mode)[0].backend == "reference"
        assert handtuned.backends.choose("rnn", device, F32, "GRU")[0].backend == "triton"
        packed = handtuned.ops.rnn_pack(t.weights, mode, False, True, 0.0, None)
        args = (t.input, None, None, None, packed, mode, 4, 0, 1, False, 0.0, None, None, False, False)
        with pytest.warns(FallbackWarning, match="normalises recurrent gates"):
            handtuned.serving.serve_device("rnn", torch.empty(1, device="meta"), mode, args)


def test_packed_of_the_cpu_kernels_is_refused() -> None:
    case = Case("GRU", (2, 2, 3, 4))
    t = rc.tensors(case)
    with handtuned.backend("cpu"):
        packed = H.pack_rnn_weights("GRU", t.weights)
    with pytest.raises(RuntimeError, match=r"packed is of the CPU kernels, .* pack on cpu"):
        H.gru(t.input, None, t.weights, packed=packed)
    ours = H.pack_rnn_weights("GRU", t.weights)
    moved = ours.clone()
    assert ours in rnn_plan._known  # nobody waits for those
    assert moved not in rnn_plan._known
    torch.testing.assert_close(H.gru(t.input, None, t.weights, packed=moved), H.gru(t.input, None, t.weights))
    assert moved in rnn_plan._known


def test_modules_and_cells() -> None:
    """A module keeps nothing that was packed for other kernels."""
    for module in (nn.GRU(3, 4).eval(), nn.LSTMCell(3, 4).eval()):
        x = torch.randn(2, 3)
        with torch.no_grad():
            found = module(x)
            with handtuned.backend("cpu"):
                expected = module(x)
            again = module(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_packed_rows_and_lengths_that_do_not_agree() -> None:
    t = rc.tensors(PACKED)
    packed = handtuned.triton_kernels.rnn.rnn_pack(list(t.weights), "LSTM", True, True, 0.0, None)
    args: tuple[Any, ...] = (packed, "LSTM", 6, 0, 1, True)
    for lengths in ([3, 3, 2], [1, 3, 3, 2]):
        with pytest.raises(RuntimeError, match="lengths do not fall or add up to"):
            handtuned.triton_kernels.rnn.rnn_inference(torch.zeros(9, 5), torch.tensor(lengths), None, None, *args)


def test_gradcheck() -> None:
    x = torch.randn(2, 1, 2, dtype=F64, requires_grad=True)
    weights = [w.double().requires_grad_() for w in rc.tensors(Case("RNN_TANH", (1, 1, 2, 2))).weights]
    assert torch.autograd.gradcheck(lambda x, *w: H.rnn(x, None, list(w)), (x, *weights), fast_mode=True)
