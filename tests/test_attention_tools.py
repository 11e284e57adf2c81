"""merge_attention, attention_weights and attention_with_kv_cache, against a loop over rows in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import naive_attention
import pytest
import torch
from torch import Tensor

import handtuned
from handtuned.nn import functional as H

pytestmark = pytest.mark.usefixtures("poison")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with handtuned.backend(request.param):
        yield request.param


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# ---- merge_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merging_parts_is_attention_over_all_keys(dtype: torch.dtype, packed: bool) -> None:
    """In three parts, one of them without a key."""
    if packed:
        q, k, v = draw(9, 4, 7, dtype=dtype), draw(12, 2, 7, dtype=dtype), draw(12, 2, 5, dtype=dtype)
        starts = torch.tensor([0, 4, 9])

        def attend(lo: int, hi: int) -> tuple[Tensor, Tensor]:
            part = torch.tensor([0, hi - lo, 2 * (hi - lo)])
            rows = torch.cat([torch.arange(lo, hi), torch.arange(lo, hi) + 6])
            return H.attention_varlen(q, k[rows], v[rows], starts, part, return_lse=True)
    else:
        q, k, v = draw(2, 4, 5, 7, dtype=dtype), draw(2, 2, 6, 7, dtype=dtype), draw(2, 2, 6, 3, dtype=dtype)

        def attend(lo: int, hi: int) -> tuple[Tensor, Tensor]:
            return H.scaled_dot_product_attention(q, k[:, :, lo:hi], v[:, :, lo:hi], enable_gqa=True, return_lse=True)

    merged = attend(0, 2)
    for lo, hi in ((2, 2), (2, 6)):
        merged = H.merge_attention(*merged, *attend(lo, hi))
    output, lse = attend(0, 6)
    assert merged[0].dtype == dtype
    assert merged[0].shape == output.shape
    check(merged[0], output.double(), dtype)
    check(merged[1], lse.double(), torch.float32 if dtype != torch.float64 else dtype)


def test_a_part_without_keys_counts_for_nothing() -> None:
    """Even if it holds NaN; two such parts give 0, and no gradient of theirs is NaN."""
    out, lse = draw(2, 3, 4, 5).requires_grad_(), draw(2, 3, 4).requires_grad_()
    unset, never = torch.full((2, 3, 4, 5), math.nan), torch.full((2, 3, 4), -math.inf)
    for merged in (H.merge_attention(out, lse, unset, never), H.merge_attention(unset, never, out, lse)):
        assert merged[0].equal(out)
        assert merged[1].equal(lse)
        grads = torch.autograd.grad(merged[0].sum() + 2 * merged[1].sum(), (out, lse))
        assert grads[0].equal(torch.ones_like(out))
        check(grads[1], torch.full_like(lse, 2).double())
    leaves = [t.clone().requires_grad_() for t in (unset, never, unset, never)]
    nothing = H.merge_attention(*leaves)
    assert nothing[0].equal(torch.zeros_like(out))
    assert nothing[1].equal(never)
    for grad in torch.autograd.grad(nothing[0].sum() + nothing[1].masked_fill(never == -math.inf, 0).sum(), leaves):
        assert grad.equal(torch.zeros_like(grad))


def test_merging_is_safe_from_overflow() -> None:
    out1, out2 = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    for low, high in ((-300.0, 300.0), (3e38, 3e38), (-3e38, -3e38)):
        out, lse = H.merge_attention(out1, torch.full((1, 1, 1), low), out2, torch.full((1, 1, 1), high))
        assert out.isfinite().all()
        assert lse.item() == pytest.approx(high, rel=1e-6)
        assert out[0, 0, 0, 0].item() == (1.0 if low < high else 0.5)


def test_merging_is_differentiable_twice() -> None:
    leaves = [draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((1, 2, 3, 2), (1, 2, 3)) * 2]
    assert torch.autograd.gradcheck(H.merge_attention, leaves)
    assert torch.autograd.gradgradcheck(H.merge_attention, leaves)


def test_gradients_run_through_the_parts() -> None:
    """A ring: each part attends on its own, and query, key and value get the gradients of the whole."""
    q, k, v = (draw(1, 2, 6, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    parts = [
        H.scaled_dot_product_attention(q, k[:, :, lo : lo + 3], v[:, :, lo : lo + 3], return_lse=True) for lo in (0, 3)
    ]
    weight = draw(1, 2, 6, 4, dtype=torch.float64)
    merged = H.merge_attention(*parts[0], *parts[1])[0]
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (merged, whole)), strict=True):
        check(a, b, torch.float64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out2": draw(2, 3, 5, 5)}, r"out2 is .* of shape \[2, 3, 5, 5\], out1 is .*\[2, 3, 4, 5\]; pass two"),
        ({"out2": draw(2, 3, 4, 5).double()}, r"out2 is torch.float64"),
        ({"lse1": draw(2, 4, 3)}, r"lse1 has shape \[2, 4, 3\], expected \[2, 3, 4\].*return_lse=True"),
        ({"lse2": draw(3, 4)}, r"lse2 has shape \[3, 4\], expected \[2, 3, 4\]"),
    ],
)
def test_merging_refuses_what_does_not_match(changed: dict[str, Tensor], message: str) -> None:
    parts = {"out1": draw(2, 3, 4, 5), "lse1": draw(2, 3, 4), "out2": draw(2, 3, 4, 5), "lse2": draw(2, 3, 4)}
    with pytest.raises(RuntimeError, match=message):
        H.merge_attention(**{**parts, **changed})


# ---- attention_weights ----------------------------------------------------------------------------------------------


def _scoring(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the library, the same for the loop), for 2 x 4 heads, 5 queries, 7 keys."""
    slopes = torch.rand(4)
    masks = torch.rand(2, 1, 5, 7) > 0.3
    bias = draw(4, 1, 7).masked_fill(torch.rand(4, 1, 7) < 0.2, -math.inf)
    both: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "scale": ({"scale": 0.7}, {"scale": 0.7}),
        "causal": ({"is_causal": True}, {"causal": True, "bottom_right": False}),
        "bottom_right": ({"is_causal": True, "causal_alignment": "bottom_right"}, {"causal": True}),
        "window": ({"window": (1, 2)}, {"window": (1, 2), "bottom_right": False}),
        "softcap": ({"softcap": 1.5}, {"softcap": 1.5}),
        "alibi": ({"alibi_slopes": slopes}, {"slopes": slopes.expand(2, 4), "bottom_right": False}),
        "bool_mask": ({"attn_mask": masks}, {"masks": masks.expand(2, 4, 5, 7)}),
        "additive_mask": ({"attn_mask": bias}, {"masks": bias.expand(2, 4, 5, 7)}),
        "lengths": (
            {"key_lengths": torch.tensor([0, 4]), "window": 2, "causal_alignment": "bottom_right"},
            {"key_lengths": torch.tensor([0, 4]), "window": (2, 2)},
        ),
    }
    return both[name]


SCORING = ["plain", "scale", "causal", "bottom_right", "window", "softcap", "alibi", "bool_mask", "additive_mask"]


@pytest.mark.parametrize("name", [*SCORING, "lengths"])
def test_weights_are_those_of_the_attention(name: str) -> None:
    q, k, v = draw(2, 4, 5, 6), draw(2, 2, 7, 6), draw(2, 2, 7, 3)
    options, naive = _scoring(name)
    output, lse = H.scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True, **options)
    expected_output, expected_lse, expected = naive_attention.every_head(q, k, v, **naive)
    weights = H.attention_weights(q, k, lse, **options)
    check(output, expected_output)
    check(lse, expected_lse)
    check(weights, expected)
    check(weights @ v.repeat_interleave(2, 1), expected_output)


@pytest.mark.parametrize("most", [2**24, 100, 1], ids=["one_block", "blocks", "rows"])
def test_chosen_weights(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, heads, mean and the largest are parts of all weights, however many rows are worked on at once."""
    monkeypatch.setattr(H.attention_tools, "MOST_WEIGHTS", most)
    q, k, v = draw(2, 4, 5, 6), draw(2, 2, 7, 6), draw(2, 2, 7, 3)
    options, _ = _scoring("additive_mask")
    _, lse = H.scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True, **options)

    def weights(**chosen: Any) -> Any:
        return H.attention_weights(q, k, lse, **options, **chosen)

    everything = weights()
    assert everything.shape == (2, 4, 5, 7)
    for rows, heads in (([3, 0], None), (-1, [1, 3]), (slice(1, 4), 2), (torch.tensor([2, 2]), slice(None)), ([], [0])):
        expected = everything[:, torch.arange(4)[slice(None) if heads is None else heads].reshape(-1)]
        expected = expected[:, :, torch.arange(5)[rows].reshape(-1)]
        torch.testing.assert_close(weights(rows=rows, heads=heads), expected)
        torch.testing.assert_close(weights(rows=rows, heads=heads, average=True), expected.mean(1))
        values, keys = weights(rows=rows, heads=heads, top_k=3)
        torch.testing.assert_close(values, expected.topk(3)[0])
        torch.testing.assert_close(expected.gather(-1, keys), values)
    values, keys = weights(average=True, top_k=2)
    assert values.shape == keys.shape == (2, 5, 2)
    torch.testing.assert_close(everything.mean(1).gather(-1, keys), values)


def test_weights_beside_sinks_sum_to_less_than_one() -> None:
    q, k, sinks = draw(1, 2, 3, 4), draw(1, 2, 5, 4), torch.tensor([0.5, 2.0])
    _, lse = H.scaled_dot_product_attention(q, k, k, sinks=sinks, return_lse=True)
    missing = 1 - H.attention_weights(q, k, lse).sum(-1)
    check(missing, torch.exp(sinks[:, None] - lse).double())


def test_weights_of_hidden_keys_are_zero_whatever_they_hold() -> None:
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 5, 4), draw(1, 1, 5, 4)
    k[:, :, 3:] = math.nan
    options: dict[str, Any] = {"key_lengths": torch.tensor([3]), "causal_alignment": "bottom_right", "window": (0, 0)}
    _, lse = H.scaled_dot_product_attention(q, k, v, return_lse=True, **options)
    weights: Any = H.attention_weights(q, k, lse, **options)
    assert weights[0, 0].equal(torch.eye(3, 5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": draw(4, 5, 6)}, r"query has shape \[4, 5, 6\], expected 4 dims"),
        ({"key": draw(2, 3, 7, 6)}, r"key has shape \[2, 3, 7, 6\], expected \[2, Hk, Lk, 6\].*4 heads a multiple"),
        ({"lse": draw(2, 5, 4)}, r"lse has shape \[2, 5, 4\], expected \[2, 4, 5\].*return_lse=True"),
        ({"top_k": 8}, r"top_k is 8, the limits are 1 and the 7 keys"),
        ({"rows": 5}, r"rows is 5, the limits are -5 and 4; pass indices of the 5 rows"),
        ({"heads": [0, 4]}, r"heads is \[0, 4\], the limits are -4 and 3"),
    ],
)
def test_weights_refuse_what_does_not_match(changed: dict[str, Any], message: str) -> None:
    arguments = {"query": draw(2, 4, 5, 6), "key": draw(2, 2, 7, 6), "lse": draw(2, 4, 5)}
    with pytest.raises(RuntimeError, match=message):
        H.attention_weights(**{**arguments, **changed})


# ---- attention_with_kv_cache ----------------------------------------------------------------------------------------


def _caches(paged: bool, batch: int, heads: int, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """(key cache, value cache, block table or None), all NaN, pages in no order."""
    size, table = 4, None
    rows = (batch, heads, longest)
    if paged:
        count = longest // size
        table = torch.randperm(batch * count + 2)[: batch * count].reshape(batch, count).int()
        rows = (batch * count + 2, heads, size)
    return torch.full((*rows, 6), math.nan, dtype=dtype), torch.full((*rows, 3), math.nan, dtype=dtype), table


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {"causal": True}),
    "everything": ({"is_causal": False}, {}),
    "window": ({"window": 2}, {"causal": True, "window": (2, 0)}),
    "window_both": ({"is_causal": False, "window": (2, 1)}, {"window": (2, 1)}),
    "softcap_scale": ({"softcap": 1.5, "scale": 0.7}, {"causal": True, "softcap": 1.5, "scale": 0.7}),
    "alibi": ({"alibi_slopes": torch.full((2, 4), 0.3)}, {"causal": True, "slopes": torch.full((2, 4), 0.3)}),
    "sinks": ({"sinks": torch.arange(4.0)}, {"causal": True, "sinks": torch.arange(4.0)}),
}


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_over_a_cache_are_attention_over_all_keys(name: str, paged: bool) -> None:
    """A prefill of unequal lengths, then three tokens, then one, then one; the cache is NaN where nothing was put."""
    key_cache, value_cache, table = _caches(paged, 2, 2, 12, torch.float32)
    k, v = draw(2, 2, 12, 6), draw(2, 2, 12, 3)
    options, naive = OPTIONS[name]
    lengths = torch.tensor([0, 4])
    for cache, whole in ((key_cache, k), (value_cache, v)):  # what the second sequence has before
        for j in range(4):
            place = (1, slice(None), j) if table is None else (table[1, j // 4], slice(None), j % 4)
            cache[place] = whole[1, :, j]
    for new in (3, 3, 1, 1):
        q = draw(2, 4, new, 6)
        rows = lengths[:, None] + torch.arange(new)
        new_k, new_v = (x[torch.arange(2)[:, None], :, rows].transpose(1, 2) for x in (k, v))
        output, lse = H.attention_with_kv_cache(
            *(q, key_cache, value_cache, new_k, new_v),
            **{"cache_lengths": lengths, "block_table": table, "return_lse": True, **options},
        )
        lengths = lengths + new
        expected, expected_lse, _ = naive_attention.every_head(q, k, v, key_lengths=lengths, **naive)
        check(output, expected)
        check(lse, expected_lse)
    used = 2 * 2 * int(lengths.sum())
    assert int(key_cache.isfinite().sum()) == used * 6 // 2
    assert int(value_cache.isfinite().sum()) == used * 3 // 2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_cache_that_is_only_read(dtype: torch.dtype) -> None:
    """Of each dtype, one length for all, a mask over the capacity, the cache laid out (B, Lmax, Hk, D)."""
    q, mask = draw(2, 4, 2, 6, dtype=dtype), torch.rand(2, 1, 1, 9) > 0.3
    k, v = (draw(2, 9, 2, width, dtype=dtype).transpose(1, 2) for width in (6, 3))
    before = k.clone(), v.clone()
    output = H.attention_with_kv_cache(q, k, v, cache_lengths=7, attn_mask=mask)
    expected, _, _ = naive_attention.every_head(
        *(q, k, v), causal=True, key_lengths=torch.tensor([7, 7]), masks=mask.expand(2, 4, 2, 9)
    )
    check(output, expected, dtype)
    assert k.equal(before[0])
    assert v.equal(before[1])


def test_nothing_is_written_when_the_new_keys_do_not_fit() -> None:
    for paged in (False, True):
        key_cache, value_cache, table = _caches(paged, 2, 2, 12, torch.float32)
        arguments = (draw(2, 4, 3, 6), key_cache, value_cache, draw(2, 2, 3, 6), draw(2, 2, 3, 3))
        for lengths, message in (
            (torch.tensor([0, 10]), r"cache_lengths\[1\] is 10, the limits are 0 and 9 \(3 new keys .* of 12\)"),
            (torch.tensor([-1, 2]), r"cache_lengths\[0\] is -1, the limits are 0 and 9"),
        ):
            with pytest.raises(RuntimeError, match=message):
                H.attention_with_kv_cache(*arguments, cache_lengths=lengths, block_table=table)
        if paged:
            table[1, 0] = -1
            with pytest.raises(RuntimeError, match=r"block_table\[1\]\[0\] is -1, the limits are 0 and 7"):
                H.attention_with_kv_cache(*arguments, cache_lengths=0, block_table=table)
        assert not key_cache.isfinite().any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": None}, r"of key and value one is None; pass both"),
        ({"key": draw(2, 2, 1, 5)}, r"key has shape \[2, 2, 1, 5\], expected \[2, 2, 1, 6\] beside a key_cache"),
        ({"value": draw(2, 2, 2, 3)}, r"value has shape \[2, 2, 2, 3\], expected \[2, 2, 1, 3\]"),
        ({"key": draw(2, 2, 1, 6).double()}, r"key is (torch\.)?float64, query is (torch\.)?float32; convert"),
        ({"cache_lengths": torch.tensor([1])}, r"cache_lengths has shape \[1\], expected \[2\]"),
        ({"query": draw(4, 1, 6)}, r"query has shape \[4, 1, 6\], expected 4 dims; unsqueeze it"),
        ({"query": draw(2, 4, 1, 6).requires_grad_()}, r"query requires a gradient.*torch.no_grad\(\)"),
        ({"sinks": torch.zeros(4).requires_grad_()}, r"sinks requires a gradient"),
    ],
)
def test_a_cache_refuses_what_does_not_match(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": draw(2, 4, 1, 6),
        "key_cache": draw(2, 2, 9, 6),
        "value_cache": draw(2, 2, 9, 3),
        "key": draw(2, 2, 1, 6),
        "value": draw(2, 2, 1, 3),
        "cache_lengths": torch.tensor([1, 3]),
    }
    with pytest.raises(RuntimeError, match=message):
        H.attention_with_kv_cache(**{**arguments, **changed})
    with torch.no_grad():
        H.attention_with_kv_cache(**arguments)


def test_an_empty_batch_and_an_empty_cache() -> None:
    empty = H.attention_with_kv_cache(
        draw(0, 4, 1, 6), draw(0, 2, 9, 6), draw(0, 2, 9, 3), cache_lengths=torch.zeros(0, dtype=torch.int32)
    )
    assert empty.shape == (0, 4, 1, 3)
    output, lse = H.attention_with_kv_cache(
        draw(2, 4, 1, 6), draw(2, 2, 9, 6), draw(2, 2, 9, 3), cache_lengths=0, return_lse=True
    )
    assert output.equal(torch.zeros(2, 4, 1, 3))
    assert (lse == -math.inf).all()


def test_decode_compiles_without_a_graph_break(backend: str) -> None:
    if backend == "reference":
        return  # a switch that compiled code does not see

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, caches: tuple[Tensor, Tensor]) -> Any:
        return H.attention_with_kv_cache(q, *caches, k, v, cache_lengths=lengths)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = draw(2, 4, 1, 6), draw(2, 2, 1, 6), draw(2, 2, 1, 3), torch.tensor([1, 3])
    caches = draw(2, 2, 9, 6), draw(2, 2, 9, 3)
    copies = caches[0].clone(), caches[1].clone()
    torch.testing.assert_close(compiled(*arguments, copies), step(*arguments, caches))
    assert copies[0].equal(caches[0])
    assert copies[1].equal(caches[1])
