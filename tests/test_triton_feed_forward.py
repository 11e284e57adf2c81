"""Linear layers with their epilogues (int8 weights too), rotary embedding, the key-value cache and linear cross-entropy
in Triton, in the interpreter: the CPU kernels' cases held to the contract, with guard bands around every buffer.
Budgets: test_triton_feed_forward_budgets.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import cross_entropy_cases as cc
import linear_cases as lc
import pytest
import test_linear_int8 as int8_tests
import test_rotary as rotary_tests
import torch
import triton_tools
from handtuned.triton_kernels import common, cross_entropy, kernels, kv_cache
from torch import Tensor

import handtuned
from handtuned import nn
from handtuned.nn import functional as H

triton_tools.mend_bfloat16()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device Triton is not interpreted")

EVERY_CASE = "HANDTUNED_EVERY_CASE" in os.environ
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MOST_ELEMENTS = 20_000 if EVERY_CASE else 4_000


def sample(cases: list[Any], step: int) -> list[Any]:
    small = [case for case in cases if case.elements < MOST_ELEMENTS]
    return small if EVERY_CASE else small[::step]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with handtuned.backend("triton"), triton_tools.guarded(common):
        yield


EPILOGUES = [lc.Case((6,), 10, 30, F32, name, residual=True, dropout=0.3) for name in lc.ACTIVATIONS]


@pytest.mark.parametrize("case", [*EPILOGUES, *sample(lc.CASES, 15)], ids=lambda case: case.name)
def test_linear(case: lc.Case) -> None:
    lc.check_contract(case)


@pytest.mark.parametrize("case", sample(cc.CASES, 9), ids=lambda case: case.name)
def test_cross_entropy(case: cc.Case) -> None:
    cc.check_contract(case)


def test_cross_entropy_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of rows x classes is stored: 16 rows at a time here."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    cc.check_contract(cc.Case((19,), 6, 30, BF16, bias=True, weighted=True, smoothing=0.1, softcap=3.0, ignored=0.3))


def test_cross_entropy_leaves_out_rows_and_says_nan_of_a_target_that_is_no_class() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        x[1] = torch.nan
    loss = H.linear_cross_entropy(x, w, torch.tensor([2, -100, 5]), reduction="none")
    assert loss.isnan().tolist() == [False, False, True]
    loss[:2].sum().backward()
    assert w.grad.isfinite().all()
    assert (x.grad[1] == 0).all()
    assert H.linear_cross_entropy(x[1:2], w, torch.tensor([-100])).isnan()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "table"), [(F64, F64), (BF16, BF16), (F16, F32)])
def test_rotary(dtype: torch.dtype, table: torch.dtype, interleaved: bool) -> None:
    rotary_tests.test_rotation_is_rounded_once("triton", dtype, table, interleaved)
    rotary_tests.test_any_layout_and_its_output("triton")


@pytest.mark.parametrize(("dtype", "paged", "rotary"), [(F32, True, True), (BF16, False, True), (F64, True, False)])
def test_what_is_written_into_the_cache(dtype: torch.dtype, paged: bool, rotary: bool) -> None:
    """The new places alone, whatever the order of programs; nothing for a sequence that is full or has no page."""
    ours, theirs = (rotary_tests.arguments(dtype, paged, rotary) for _ in range(2))
    caches = ("key_cache", "value_cache")
    ours |= {name: triton_tools.fenced(ours[name]) for name in ("query", "key", "value", *caches)}
    with triton_tools.shuffled_programs(1):
        rotated, lengths = kv_cache.append_kv(**ours)
    expected, _ = handtuned.reference.append_kv(**theirs)
    assert lengths.tolist() == [6, 2]
    if rotary:
        torch.testing.assert_close(rotated, expected)
    for name in caches:
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)
        before = ours[name].clone()
        lacking = torch.tensor([9, -3 if paged else 9])  # the page table of the second holds -1 there
        kv_cache.append_kv(**ours | {"cache_lengths": lacking})
        torch.testing.assert_close(ours[name], before, rtol=0, atol=0, equal_nan=True)


def test_cache_and_int8_are_reached() -> None:
    given = rotary_tests.arguments(rotary=False)
    names = ("query", "key_cache", "value_cache", "key", "value")
    found = handtuned.explain(H.attention_with_kv_cache, *(given[n] for n in names), cache_lengths=torch.tensor([4, 0]))
    assert [call.op for call in found.calls] == ["append_kv", "attention"]
    assert {call.served_by.backend for call in found.calls} == {"triton"}
    (call,) = handtuned.explain(nn.Int8Linear.from_linear(nn.Linear(5, 3)), torch.ones(2, 5)).calls
    assert (call.op, call.served_by.backend) == ("linear_int8", "triton")


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_compiled_function_reaches_them_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: torch's dispatcher calls the launchers. Here they stand in for the CPU's kernels."""
    given = rotary_tests.arguments(rotary=True)
    given = {name: given[name] for name in ("query", "key_cache", "value_cache", "key", "value", "cache_lengths")}
    x, linear = torch.randn(3, 5), nn.Int8Linear.from_linear(nn.Linear(5, 4), quantize_input=True)

    def step(x: Tensor, given: dict[str, Tensor]) -> tuple[Any, Any]:
        return H.attention_with_kv_cache(**given), linear(x)

    def copied() -> dict[str, Tensor]:
        return {name: tensor.nan_to_num() for name, tensor in given.items()}

    with handtuned.backend("auto"):
        expected = step(x, copied())
    launched: set[str] = set()
    with torch.library._scoped_library("handtuned", "IMPL") as library, handtuned.backend("auto"):
        for name in ("append_kv", "attention", "linear_int8"):

            def launch(*args: Any, name: str = name) -> Any:
                launched.add(name)
                return getattr(kernels, name)(*args)

            library.impl(name, launch, "CPU", allow_override=True)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(x, copied())
    assert launched == {"append_kv", "attention", "linear_int8"}
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


INT8 = [
    lc.EVERYTHING,
    lc.EVERYTHING.with_(dtype=BF16, activation="gelu"),
    lc.Case((5,), 70, 67, F16),
    lc.Case((2, 10), 9, 65, BF16, activation="silu"),
    lc.Case((4,), 0, 5),
]


@pytest.mark.parametrize("case", INT8, ids=lambda case: case.name)
def test_int8_weight(case: lc.Case) -> None:
    int8_tests.test_numerics_contract("triton", case)
    int8_tests.test_quantized_input_with_all_that_follows("triton", case)


def test_int8_sums_are_exact_and_odd_rows_stay_alone() -> None:
    int8_tests.test_integers_are_the_same_everywhere("triton", (4, 303, 70), BF16)
    int8_tests.test_rows_of_odd_values("triton")


def test_feed_forward_modules() -> None:
    """Every linear of SwiGLU, its activation an epilogue."""
    for module in (nn.SwiGLU(6, 10), nn.GEGLU(6, 10, bias=True)):
        x = torch.randn(3, 6)
        found = handtuned.explain(module, x)
        assert {call.served_by.backend for call in found.calls} == {"triton"}
        with handtuned.backend("reference"):
            torch.testing.assert_close(found.result, module(x), rtol=1e-5, atol=1e-6)
