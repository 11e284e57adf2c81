"""The sm_80 PTX of the Triton kernels, executed: what Triton's interpreter cannot show, because it never sees the PTX.

Every access lies inside a tensor and reads something that was written; values meet the contract against float64.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import attention_cases
import attention_numerics
import cases
import numerics
import ptx_tools
import pytest
import rnn_cases
import test_rotary
import torch
from handtuned.triton_kernels import kernels

import handtuned

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
import ptx_triton

LAYER, RMS, ADD_LAYER, ADD_RMS = cases.FORMS
DROP_LAYER, DROP_RMS = cases.DROPOUTS
BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64

# Each kernel in each type; rows shorter than a tile, of one tile and of several; aligned and not; every option.
CASES = {
    case.name: case
    for case in (
        LAYER.with_(shape=(9, 100)),
        DROP_LAYER.with_(shape=(5, 1000), dtype=BF16),
        DROP_RMS.with_(shape=(6, 136), dtype=F16, weight_dtype=torch.float32),
        LAYER.with_(shape=(3, 70), dtype=F64),
        RMS.with_(shape=(41, 17), dtype=BF16, layout="sliced"),
        ADD_RMS.with_(shape=(6, 40), affine="none"),
        ADD_LAYER.with_(shape=(3, 9000), dtype=BF16),
        LAYER.with_(shape=(2, 40000), dtype=F16),
        RMS.with_(shape=(2, 20001)),
        LAYER.with_(shape=(6, 7, 33), layout="permuted"),
        LAYER.with_(shape=(600, 24), values="shifted"),
        LAYER.with_(shape=(16, 250), values="huge", dtype=BF16),
    )
}


def check(name: str, launcher: Any) -> None:
    """Called in the other process."""
    with handtuned.backend("triton"), handtuned.strict():
        numerics.check_contract(CASES[name], "triton")
    assert launcher.modules, "no kernel was launched"


# Recurrent layers: one launch for all steps, and with a projection one for each; products on tensor cores.
EVERY_CASE = "HANDTUNED_EVERY_CASE" in os.environ
RECURRENT = {
    case.name: case
    for case in (
        rnn_cases.Case("LSTM", (3, 3, 16, 32), lengths=(3, 1, 2), bidirectional=True, states=True, dtype=BF16),
        rnn_cases.Case("GRU", (3, 2, 8, 21), layers=2, states=True),
        rnn_cases.Case("LSTM", (2, 2, 4, 18), proj=5, states=True),
    )[: None if EVERY_CASE else 2]
}
ATTENTION = {
    case.name: case
    for case in (
        attention_cases.Case((1, 2, 19, 35, 12), causal=True, kv_heads=1, dtype=BF16),
        attention_cases.Case((1, 1, 18, 21, 19), mask="add", mask_dims="qk", dropout=0.2),
    )[: None if EVERY_CASE else 1]
}


def check_recurrent(name: str, launcher: Any) -> None:
    case = RECURRENT[name]
    t = rnn_cases.tensors(case)
    with handtuned.backend("triton"), handtuned.strict():
        found = rnn_cases.results(case, t)
    rtol, atol = (6e-2, 6e-2) if case.dtype == BF16 else (1e-4, 2e-5)
    for key, truth in rnn_cases.exact(case, t).items():
        torch.testing.assert_close(found[key].double(), truth, rtol=rtol, atol=atol, equal_nan=True)
    assert len(launcher.modules) >= 3


def check_attention(name: str, launcher: Any) -> None:
    case = ATTENTION[name]
    t = attention_cases.tensors(case)
    truth = attention_numerics.exact(case, t, attention_numerics.dropout_factor(case, t, numerics.draw_seed(0)))
    numerics.draw_seed(0)
    with handtuned.backend("triton"), handtuned.strict():
        found = attention_cases.results(case, t)
    attention_numerics.check_every_element(case, found, truth)
    assert len(launcher.modules) >= 4


def check_cache(name: str, launcher: Any) -> None:
    ours, theirs = (test_rotary.arguments(BF16, paged=True) for _ in range(2))
    rotated, _ = kernels.append_kv(**ours)
    expected, _ = handtuned.reference.append_kv(**theirs)
    torch.testing.assert_close(rotated, expected)
    for name in ("key_cache", "value_cache"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)
    assert len(launcher.modules) == 1


def check_int8(name: str, launcher: Any) -> None:
    x, q = torch.randn(3, 70).to(BF16), torch.randint(-127, 128, (67, 70), dtype=torch.int8)
    scale, packed = torch.rand(67) / 1000, handtuned.reference.linear_int8_pack(q)
    found, _ = kernels.linear_int8(x, packed, scale, None, None, 0, 0.0, None, False, False)
    torch.testing.assert_close(found.double(), x.double() @ (q * scale[:, None]).double().T, rtol=1e-2, atol=1e-3)
    assert len(launcher.modules) == 1


@cache
def executed(function: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    ptx_tools.library()
    return ptx_triton.in_a_process(f"test_ptx_triton:{function}", names)


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    assert executed("check", tuple(CASES))[name]["wrong"] is None


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    assert executed("check_recurrent", tuple(RECURRENT))[name]["wrong"] is None


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    assert executed("check_attention", tuple(ATTENTION))[name]["wrong"] is None


@pytest.mark.parametrize("function", ["check_cache", "check_int8"])
def test_cache_and_int8(function: str) -> None:
    assert executed(function, ("bfloat16",))["bfloat16"]["wrong"] is None
