"""Attention in Triton, in the interpreter: the cases of the CPU kernels against float64 with guard bands around every
buffer, NaNs where nothing may be read, any order of programs, paged keys split over programs, autograd and explain.

A sample of the cases runs here, all of them with HANDTUNED_EVERY_CASE=1. Budgets: test_triton_attention_budgets.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import attention_cases as ac
import attention_numerics as an
import numerics
import pytest
import torch
import triton_tools
from attention_cases import ALL, ALL_PACKED, BF16, F16, F32, F64, PACKED, Case
from handtuned.triton_kernels import attention as launchers
from handtuned.triton_kernels import attention_plan, common, tuning
from torch import Tensor

import handtuned
from handtuned.nn import functional as H

triton_tools.mend_bfloat16()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device Triton is not interpreted")

EVERY_CASE = "HANDTUNED_EVERY_CASE" in os.environ
SMALL = [case for case in ac.CASES if case.elements < 20_000]
# Small forms: the interpreter takes milliseconds for each line of each program. Every option at once, dense and packed.
PLAIN = Case((1, 2, 19, 35, 12))
EVERYTHING = ALL.with_(shape=(2, 2, 11, 21, 11), kv_heads=1, value_width=19, lengths=(21, 9), window=14)
EVERYTHING_PACKED = ALL_PACKED.with_(shape=(2, 2, 0, 0, 12), kv_heads=1, lengths=(11, 0, 3), window=7).with_(
    packed=((9, 0, 5), (12, 4, 4))
)
CHOSEN = [
    *(EVERYTHING.with_(dtype=dtype) for dtype in (F32, BF16)),
    *(EVERYTHING_PACKED.with_(dtype=dtype) for dtype in (F16, F64)),
    PLAIN.with_(causal=True, kv_heads=1, dtype=BF16),
    PLAIN.with_(mask="add", mask_dims="h1k", dtype=BF16, mask_dtype=F32),
    PLAIN.with_(mask="add_inf", mask_dims="1qk"),
    PLAIN.with_(mask="add_min", mask_dims="b11k", dtype=F16),
    PLAIN.with_(mask="add", mask_dims="1"),
    PLAIN.with_(scale=-0.4, sinks=F32),
    PLAIN.with_(dropout=1.0),
    PACKED.with_(packed=((0, 0), (0, 0))),
    Case((2, 2, 5, 0, 8), causal=True, grad_lse=True),
]
SAMPLE = SMALL if EVERY_CASE else list(dict.fromkeys(CHOSEN + [c for c in SMALL if c.elements < 3000][3::29]))


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with handtuned.backend("triton"):
        yield


@contextlib.contextmanager
def small_tiles(descriptors: int = 0) -> Iterator[None]:
    """Several tiles and several blocks of a row in small problems."""
    original = tuning.attention
    tuning.attention = lambda *_: tuning.AttentionConfig(16, 16, 4, 1, 16, descriptors)
    try:
        yield
    finally:
        tuning.attention = original


def fenced(t: ac.Tensors) -> ac.Tensors:
    """Every floating-point tensor between NaNs."""
    named = {name: getattr(t, name) for name in ("query", "key", "value", "grad_output", "grad_lse", "mask", "sinks")}
    floating = {n: x for n, x in named.items() if x is not None and x.is_floating_point() and x.numel()}
    return replace(t, **{n: triton_tools.fenced(x) for n, x in floating.items()})


def check(case: Case) -> dict[str, Tensor]:
    """Output, lse and gradients of one draw, each element within its bound; nothing touched beside a buffer."""
    t = ac.tensors(case)
    truth = an.exact(case, t, an.dropout_factor(case, t, numerics.draw_seed(0)))
    numerics.draw_seed(0)
    with triton_tools.guarded(common):
        found = ac.results(case, fenced(t))
    an.check_every_element(case, found, truth)
    return found


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_every_element(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 10, 35, 40), value_width=19, causal=True, kv_heads=1, dtype=BF16),
        Case((1, 1, 18, 21, 19), value_width=40, mask="add", mask_dims="qk", dropout=0.2),
        Case((1, 1, 18, 37, 16), window=(5, 3), softcap=3.0, dtype=F64),
    ],
    ids=lambda case: case.name,
)
def test_many_tiles_and_rows_by_blocks(case: Case) -> None:
    with small_tiles():
        check(case)


# Aligned rows; one case is not.
DESCRIBED = [
    Case((2, 4, 19, 35, 16), kv_heads=2, causal=True, dtype=BF16),
    EVERYTHING.with_(shape=(2, 2, 11, 21, 8), value_width=20),
    EVERYTHING_PACKED.with_(shape=(2, 2, 0, 0, 24), value_width=16, dtype=F16),
    Case((1, 3, 9, 18, 8), kv_heads=1),
    Case((1, 1, 9, 18, 7)),
]


@pytest.mark.parametrize("case", DESCRIBED, ids=lambda case: case.name)
def test_tensor_descriptors(case: Case) -> None:
    """Zeros behind a tensor's end; behind a sequence's end whatever is there; pointers where they cannot be had."""
    notes: list[str] = []
    with small_tiles(descriptors=1), tuning.noted(notes):
        check(case)
    through = [note for note in notes if " through " in note]
    assert len(through) == 3
    for note in through:
        assert ("tensor descriptors" in note) == (case.shape[4] != 7 and not (case.shape[1] == 3 and "keys" in note))
    assert any("not all multiples of 16 bytes" in note for note in through) == (case.shape[4] == 7)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 37, 40, 32)),
        Case((1, 2, 37, 40, 32), causal=True, dtype=BF16),
        Case((1, 2, 37, 40, 32), dtype=F16, kv_heads=1),
    ],
    ids=lambda case: case.name,
)
def test_numerics_contract(case: Case) -> None:
    an.check_contract(case)


@pytest.mark.parametrize("case", [PLAIN.with_(causal=True), EVERYTHING_PACKED], ids=lambda case: case.name)
def test_hidden_values_reach_nothing(case: Case) -> None:
    """A NaN that some queries see does not reach the others; the second try of a tile is exercised."""
    t = ac.tensors(case)
    torch.manual_seed(7)
    expected = ac.results(case, t)
    for where in ("key", "value"):
        spoiled = replace(t, **{where: getattr(t, where).clone()})
        seen = case.seen_key_lengths[0] // 2
        an.keys_of(case, getattr(spoiled, where), 0)[:, seen] = torch.nan
        torch.manual_seed(7)
        found = ac.results(case, spoiled)
        sees = an.visible(case, t.mask, 0)[..., seen]
        assert sees.any()
        assert not sees.all()
        for name, of in (("output", an.queries_of), ("grad_query", an.queries_of), ("lse", an.lse_of)):
            actual, clean = of(case, found[name], 0), of(case, expected[name], 0)
            torch.testing.assert_close(actual[~sees], clean[~sees], rtol=1e-5, atol=1e-6)
        if not case.dropout:
            assert an.queries_of(case, found["output"], 0)[sees].isnan().any(-1).all()


# ---- decoding --------------------------------------------------------------------------------------------------------

DECODING = [
    Case((3, 4, 1, 48, 24), kv_heads=2, lengths=(48, 17, 0), causal=True, alignment="bottom_right"),
    Case((2, 8, 1, 80, 40), kv_heads=2, lengths=(80, 33), value_width=24, dtype=BF16, sinks=F32),
    Case((2, 2, 3, 40, 16), lengths=(37, 20), causal=True, alignment="bottom_right", window=20, alibi="bh"),
    Case((2, 2, 2, 40, 16), lengths=(40, 1), mask="add", mask_dims="h1k", sinks=F16, softcap=4.0, dtype=F16),
]


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("case", DECODING, ids=lambda case: case.name)
def test_keys_split_over_programs(case: Case, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages in any order, unused ones NaN and their numbers out of bounds. The first two through descriptors."""
    t = ac.tensors(case)
    truth = an.exact(case, t)
    table, key, value = None, t.key, t.value
    assert t.key_lengths is not None
    if paged:
        size, batch = 16 if case.shape[3] % 16 == 0 else 8, case.shape[0]
        pages = case.shape[3] // size
        table = torch.randperm(batch * pages).reshape(batch, pages)
        key, value = (
            torch.full((batch * pages, x.shape[1], size, x.shape[3]), torch.nan, dtype=x.dtype) for x in (key, value)
        )
        for b in range(batch):
            for page in range(pages):
                rows = slice(page * size, (page + 1) * size)
                key[table[b, page]], value[table[b, page]] = t.key[b, :, rows], t.value[b, :, rows]
        table = torch.where(torch.arange(pages) * size < t.key_lengths[:, None], table, 2**31 - 1).int()
    left, right = case.window_sides
    options = (case.score_scale, case.alignment == "bottom_right", left, right, case.softcap, 0.0, None)
    described, notes = case in DECODING[:2], list[str]()
    monkeypatch.setattr(attention_plan, "LEAST_KEYS", 16)
    monkeypatch.setattr(launchers, "tuning", replace_attention((16, 16, 4, 1, 64, int(described))))
    with triton_tools.guarded(common), tuning.noted(notes):
        output, lse = launchers.attention(
            *(t.query, key, value, t.mask, None, None, t.key_lengths, table, t.alibi_slopes, t.sinks), *options
        )
    assert any(note.endswith("through tensor descriptors") for note in notes) == described
    an.check_every_element(case, {"output": output, "lse": lse}, truth)


def test_packed_queries_against_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a row, rows behind the last sequence, and sinks that must not reach those."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(9, 2, 8, generator=generator)
    key, value = (torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2))
    starts, lengths = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([23, 5, 32])
    table, sinks = torch.randperm(12, generator=generator).reshape(3, 4) % 8, torch.tensor([0.3, -1.0])
    slopes = torch.rand(3, 2, generator=generator)
    given = (query, key, value, None, starts, None, lengths, table, slopes, sinks, 0.4, True, 25, 0, 0.0, 0.0, None)
    monkeypatch.setattr(attention_plan, "LEAST_KEYS", 16)
    monkeypatch.setattr(launchers, "tuning", replace_attention((16, 16, 4, 1, 64)))
    with triton_tools.guarded(common):
        output, lse = launchers.attention(*given)
    want, log = handtuned.reference.attention(*given)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, log, rtol=1e-5, atol=1e-6)
    assert torch.equal(output[7:], torch.zeros(2, 2, 8))
    assert (lse[:, 7:] == -ac.INF).all()


def replace_attention(config: tuple[int, ...]) -> Any:
    class Tuning:
        attention = staticmethod(lambda *_: tuning.AttentionConfig(*config))
        careful, careful_rows = staticmethod(tuning.careful), staticmethod(tuning.careful_rows)

    return Tuning


# ---- what is the same whatever the order -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [EVERYTHING, EVERYTHING_PACKED.with_(dtype=BF16)], ids=lambda case: case.name)
def test_same_bits_in_any_order_of_programs(case: Case) -> None:
    """A program that read what another writes would give other bits in some order."""
    t = ac.tensors(case)
    torch.manual_seed(7)
    expected = ac.results(case, t)
    torch.manual_seed(7)
    with triton_tools.shuffled_programs(1):
        found = ac.results(case, t)
    for name, want in expected.items():
        assert torch.equal(found[name].nan_to_num(), want.nan_to_num()), name


# ---- how it is reached -----------------------------------------------------------------------------------------------


def test_explain_names_it() -> None:
    t = ac.tensors(PLAIN)
    query = t.query.requires_grad_()
    explanation = handtuned.explain(lambda: H.scaled_dot_product_attention(query, t.key, t.value).sum().backward())
    assert [call.op for call in explanation.calls] == ["attention", "attention_backward"]
    assert all(call.served_by.backend == "triton" for call in explanation.calls)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, 2, dtype=F64, generator=generator, requires_grad=True) for n in (2, 3, 3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return H.scaled_dot_product_attention(q, k, v, is_causal=True, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)


def test_only_what_is_wanted_is_computed() -> None:
    t = ac.tensors(PLAIN)
    query, key, value = t.query, t.key.requires_grad_(), t.value
    H.scaled_dot_product_attention(query, key, value).sum().backward()
    both = ac.results(PLAIN, replace(t, grad_output=torch.ones_like(t.grad_output)))
    assert torch.equal(key.grad, both["grad_key"])
    assert query.grad is None
    assert value.grad is None
