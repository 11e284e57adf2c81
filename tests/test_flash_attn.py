"""handtuned.flash_attn: flash-attn's signatures and layouts, against a loop over rows in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import naive_attention
import pytest
import torch
from torch import Tensor

import handtuned
from handtuned import flash_attn as fa

pytestmark = pytest.mark.usefixtures("poison")

# flash-attn 2.8, as a caller meets them: names and defaults.
SCORING = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None"
ENDING = f"{SCORING}, deterministic=False, return_attn_probs=False"
STARTS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {ENDING}",
    "flash_attn_kvpacked_func": f"q, kv, {ENDING}",
    "flash_attn_qkvpacked_func": f"qkv, {ENDING}",
    "flash_attn_varlen_func": f"q, k, v, {STARTS}, {ENDING}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {STARTS}, {ENDING}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {ENDING}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}
SLOPES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (1, 2)},
    "window_left": {"window_size": (2, -1)},
    "causal_window": {"causal": True, "window_size": (2, 3)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES},
    "all": {"causal": True, "window_size": (4, 0), "softcap": 1.5, "alibi_slopes": SLOPES, "deterministic": True},
}


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with handtuned.backend(request.param):
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


def expected_of(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """(output [B, L, H, D], lse [B, H, L], weights) for tensors in flash-attn's layout."""
    naive = {
        "causal": options.get("causal", False),
        "window": options.get("window_size", (-1, -1)),
        "scale": options.get("softmax_scale"),
        "softcap": options.get("softcap", 0.0),
        "slopes": options.get("alibi_slopes"),
        "masks": options.get("masks"),
    }
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    output, lse, weights = naive_attention.every_head(q, k, v, key_lengths=key_lengths, **naive)
    return output.transpose(1, 2), lse, weights


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attns(name: str) -> None:
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert ", ".join(found) == SIGNATURES[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert name in fa.__all__
    assert len(fa.__all__) == len(SIGNATURES)


# ---- dense ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (2, 7), (7, 2)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_func(name: str, rows: int, keys: int) -> None:
    """Bottom-right everywhere, queries without a key give 0 and -inf, results lie in memory as flash-attn's do."""
    q, k, v = draw(2, rows, 4, 6), draw(2, keys, 2, 6), draw(2, keys, 2, 3)
    output, lse, _ = expected_of(q, k, v, **OPTIONS[name])
    found = fa.flash_attn_func(q, k, v, **OPTIONS[name], return_attn_probs=True)
    check(found[0], output)
    check(found[1], lse)
    assert found[2].numel() == 0
    assert found[0].is_contiguous()
    assert fa.flash_attn_func(q, k, v, **OPTIONS[name]).equal(found[0])


def test_inputs_are_read_in_place() -> None:
    """No layout of flash-attn's asks for a copy, and explain() agrees."""
    qkv = draw(2, 5, 3, 4, 6)
    calls = handtuned.explain(fa.flash_attn_qkvpacked_func, qkv).calls
    assert [call.op for call in calls] == ["attention"]
    assert not [note for note in calls[0].notes if "copied" in note]


@pytest.mark.parametrize("name", ["plain", "all"])
def test_packed_forms_and_their_gradients(name: str) -> None:
    q, kv = draw(2, 5, 4, 6).requires_grad_(), draw(2, 7, 2, 2, 6).requires_grad_()
    qkv = draw(2, 5, 3, 4, 6).requires_grad_()
    weight = draw(2, 5, 4, 6)
    for packed, plain, leaves in (
        (fa.flash_attn_kvpacked_func(q, kv, **OPTIONS[name]), (q, *kv.unbind(2)), (q, kv)),
        (fa.flash_attn_qkvpacked_func(qkv, **OPTIONS[name]), qkv.unbind(2), (qkv,)),
    ):
        expected = fa.flash_attn_func(*plain, **OPTIONS[name])
        assert packed.equal(expected)
        check(packed, expected_of(*(x.detach() for x in plain), **OPTIONS[name])[0])
        for a, b in zip(
            torch.autograd.grad((packed * weight).sum(), leaves),
            torch.autograd.grad((expected * weight).sum(), leaves),
            strict=True,
        ):
            assert a.equal(b)


def test_gradients_are_torchs() -> None:
    q, k, v = (draw(2, 5, 4, 6, dtype=torch.float64).requires_grad_() for _ in range(3))
    ours = fa.flash_attn_func(q, k, v, causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_attn_probs_show_the_dropout() -> None:
    """S_dmask's signs are the mask that was applied, its values the weights; the generator moves on as without it."""
    q, k, v = draw(2, 5, 4, 6), draw(2, 7, 2, 6), draw(2, 7, 2, 3)
    torch.manual_seed(3)
    plain = fa.flash_attn_func(q, k, v, 0.4, causal=True)
    after = torch.rand(1)
    torch.manual_seed(3)
    output, _, probs = fa.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    assert torch.rand(1).equal(after)
    assert output.equal(plain)
    check(probs.abs(), expected_of(q, k, v, causal=True)[2])
    kept = probs.clamp(min=0) / 0.6
    check(output, torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2)))
    assert 0.2 < (probs < 0).sum() / (probs != 0).sum() < 0.6


# ---- packed sequences ------------------------------------------------------------------------------------------------

Q_STARTS, K_STARTS = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 5, 7, 11], dtype=torch.int32)


def expected_varlen(q: Tensor, k: Tensor, v: Tensor, k_starts: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    slopes = options.pop("alibi_slopes", None)
    outputs, lses = [], []
    for b in range(3):
        part = [x[None, s[b] : s[b + 1]] for x, s in ((q, Q_STARTS), (k, k_starts), (v, k_starts))]
        output, lse, _ = expected_of(*part, **options, alibi_slopes=None if slopes is None else slopes[b : b + 1])
        outputs.append(output[0])
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, -1)


@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(name: str) -> None:
    """Three sequences, one without a query."""
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(3, 4)
    q, k, v = draw(8, 4, 6), draw(11, 2, 6), draw(11, 2, 3)
    output, lse = expected_varlen(q, k, v, K_STARTS, **options)
    found = fa.flash_attn_varlen_func(q, k, v, Q_STARTS, K_STARTS, 5, 5, **options, return_attn_probs=True)
    check(found[0], output)
    check(found[1], lse)
    assert found[2].numel() == 0
    # The same from pages, in no order and longer than the keys.
    table = torch.randperm(7)[:6].reshape(3, 2).int()
    k_pages, v_pages = (torch.full((7, 3, 2, x.shape[-1]), math.nan) for x in (k, v))
    for b in range(3):
        for j in range(int(K_STARTS[b + 1] - K_STARTS[b])):
            for page, x in ((k_pages, k), (v_pages, v)):
                page[table[b, j // 3], j % 3] = x[K_STARTS[b] + j]
    paged = fa.flash_attn_varlen_func(
        q, k_pages, v_pages, Q_STARTS, K_STARTS, 5, 5, **options, return_attn_probs=True, block_table=table
    )
    check(paged[0], output)
    check(paged[1], lse)


def test_packed_forms_of_varlen() -> None:
    q, kv, qkv = draw(8, 4, 6).requires_grad_(), draw(11, 2, 2, 6).requires_grad_(), draw(8, 3, 4, 6).requires_grad_()
    found = fa.flash_attn_varlen_kvpacked_func(q, kv, Q_STARTS, K_STARTS, 5, 5, causal=True)
    k, v = kv.detach().unbind(1)
    check(found, expected_varlen(q.detach(), k, v, K_STARTS, causal=True)[0])
    both = fa.flash_attn_varlen_qkvpacked_func(qkv, Q_STARTS, 5, causal=True)
    q2, k2, v2 = qkv.detach().unbind(1)
    check(both, expected_varlen(q2, k2, v2, Q_STARTS, causal=True)[0])
    for grad, leaf in zip(torch.autograd.grad(found.sum() + both.sum(), (q, kv, qkv)), (q, kv, qkv), strict=True):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()


def test_attn_probs_of_packed_sequences() -> None:
    q, k, v = draw(8, 4, 6), draw(11, 2, 6), draw(11, 2, 3)
    output, lse, probs = fa.flash_attn_varlen_func(q, k, v, Q_STARTS, K_STARTS, 5, 5, 0.3, return_attn_probs=True)
    assert probs.shape == (3, 4, 5, 5)
    check(lse, expected_varlen(q, k, v, K_STARTS)[1])
    for b in (0, 2):
        rows, keys = slice(*Q_STARTS[b : b + 2].tolist()), slice(*K_STARTS[b : b + 2].tolist())
        kept = probs[b].clamp(min=0)[:, : rows.stop - rows.start, : keys.stop - keys.start] / 0.7
        check(output[rows], torch.einsum("hij,jhd->ihd", kept, v[keys].repeat_interleave(2, 1)))


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", ["contiguous", "batch_idx", "paged"])
def test_flash_attn_with_kvcache(form: str, name: str) -> None:
    """New keys are written, what was there is read; rows of the cache by index, or pages by table."""
    options = {n: value for n, value in OPTIONS[name].items() if n != "deterministic"}
    lengths, places = torch.tensor([3, 6], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    k, v, q = draw(2, 9, 2, 6), draw(2, 9, 2, 3), draw(2, 2, 4, 6)
    caches = [draw(3, 9, 2, width) for width in (6, 3)]
    for b in range(2):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[places[b] if form == "batch_idx" else b, : lengths[b]] = x[b, : lengths[b]]
    where: dict[str, Any] = {"cache_batch_idx": places} if form == "batch_idx" else {}
    views = [cache if form == "batch_idx" else cache[:2] for cache in caches]
    if form == "paged":  # the same memory as pages of 3
        where = {"block_table": torch.arange(9, dtype=torch.int32).reshape(3, 3)[:2]}
        views = [cache.reshape(9, 3, *cache.shape[2:]) for cache in caches]
    rows = lengths[:, None].long() + torch.arange(2)
    new = [x[torch.arange(2)[:, None], rows] for x in (k, v)]
    output, lse = fa.flash_attn_with_kvcache(
        q, *views, *new, cache_seqlens=lengths, **where, **options, num_splits=3, return_softmax_lse=True
    )
    expected, expected_lse, _ = expected_of(q, k, v, key_lengths=lengths + 2, **options)
    check(output, expected)
    check(lse, expected_lse)
    again = fa.flash_attn_with_kvcache(q, *views, cache_seqlens=lengths + 2, **where, **options)
    assert again.equal(output)
    for b in range(2):
        for cache, x in zip(caches, (k, v), strict=True):
            assert cache[places[b] if form == "batch_idx" else b, : lengths[b] + 2].equal(x[b, : lengths[b] + 2])


def test_a_full_cache_and_a_left_pad() -> None:
    q, k, v = draw(2, 3, 4, 6), draw(2, 7, 2, 6), draw(2, 7, 2, 3)
    check(fa.flash_attn_with_kvcache(q, k, v, causal=True), expected_of(q, k, v, causal=True)[0])
    check(fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=5), expected_of(q, k[:, :5], v[:, :5])[0])
    k[0, :2], v[0, :2] = math.nan, math.nan
    found = fa.flash_attn_with_kvcache(
        q, k, v, cache_leftpad=torch.tensor([2, 0]), causal=True, window_size=(3, 0), alibi_slopes=SLOPES
    )
    for b, pad in ((0, 2), (1, 0)):
        expected = expected_of(
            *(q[b : b + 1], k[b : b + 1, pad:], v[b : b + 1, pad:]),
            **{"causal": True, "window_size": (3, 0), "alibi_slopes": SLOPES[b : b + 1]},
        )
        check(found[b : b + 1], expected[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8], ids=["part", "whole"])
def test_rotary(width: int, interleaved: bool, causal: bool) -> None:
    """As products of complex numbers: elements 2i and 2i+1, or i and i+R/2, are one of them."""
    lengths = torch.tensor([1, 4])
    angles = torch.rand(9, width // 2) * 6
    k, v, q = draw(2, 9, 2, 8), draw(2, 9, 2, 3), draw(2, 3, 4, 8)

    def turned(x: Tensor, position: Tensor) -> Tensor:
        parts = (x[..., :width:2], x[..., 1:width:2]) if interleaved else x[..., :width].chunk(2, -1)
        z = torch.complex(*parts) * torch.polar(torch.ones(()), angles[position])[:, :, None]
        pair = torch.stack([z.real, z.imag], -1 if interleaved else -2).flatten(-2)
        return torch.cat([pair, x[..., width:]], -1)

    position = lengths[:, None] + torch.arange(3)
    new = torch.arange(2)[:, None], position
    cache = k.clone(), v.clone()
    found = fa.flash_attn_with_kvcache(
        *(q, *cache, k[new], v[new], angles.cos(), angles.sin()),
        **{"cache_seqlens": lengths, "causal": causal, "rotary_interleaved": interleaved},
    )
    k[new] = turned(k[new], position)
    check(cache[0], k)
    at = position if causal else lengths[:, None].expand(-1, 3)
    check(found, expected_of(turned(q, at), k, v, key_lengths=lengths + 3, causal=causal)[0])


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fa.flash_attn_func(*(draw(5, 4, 6),) * 3), r"q has shape \[5, 4, 6\], expected \(B, L, H, D\)"),
        (lambda: fa.flash_attn_func(draw(), *(draw(1, 5, 2, 6),) * 2), r"q has shape \[\], expected \(B, L, H, D\)"),
        (
            lambda: fa.flash_attn_varlen_func(draw(6), *(draw(8, 4, 6),) * 2, Q_STARTS, K_STARTS, 5, 5),
            r"q has shape \[6\], expected \(T, H, D\); reshape it first",
        ),
        (lambda: fa.flash_attn_func(draw(1, 5, 3, 6), *(draw(1, 5, 2, 6),) * 2), r"query has 3 heads"),
        (
            lambda: fa.flash_attn_qkvpacked_func(draw(2, 5, 2, 4, 6)),
            r"qkv has shape .*\(B, L, 3, H, D\); stack q, k, v",
        ),
        (lambda: fa.flash_attn_varlen_kvpacked_func(draw(5, 4, 6), draw(5, 4, 6), *(Q_STARTS,) * 2, 5, 5), r"kv has"),
        (
            lambda: fa.flash_attn_varlen_func(
                *(draw(8, 4, 6), *(draw(4, 3, 4, 6),) * 2, Q_STARTS, K_STARTS, 5, 5, 0.1),
                block_table=torch.zeros(3, 2, dtype=torch.int32),
            ),
            r"dropout_p is 0.1, with block_table the limit is 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": draw(2, 1, 4, 6).requires_grad_()}, "query requires a gradient"),
        ({"q": draw(4, 6)}, r"q has shape \[4, 6\], expected \(B, L, H, D\); reshape it first"),
        ({"v": draw()}, r"v has shape \[\], expected \(B, L, H, D\)"),
        ({"k_cache": draw(6)}, r"k_cache has shape \[6\], expected \(Bc, Lmax, Hk, D\)"),
        (
            {"v_cache": draw(6), "block_table": torch.zeros(2, 1).int()},
            r"v_cache has shape \[6\], expected pages \(P, page, Hk, D\)",
        ),
        ({"block_table": torch.zeros(2).int()}, r"block_table has shape \[2\], expected \(B, max_pages\)"),
        ({"cache_batch_idx": torch.tensor(0)}, r"cache_batch_idx has shape \[\], expected \(B,\)"),
        ({"cache_leftpad": torch.tensor(0)}, r"cache_leftpad has shape \[\], expected \(B,\)"),
        ({"cache_seqlens": None}, "k is given without cache_seqlens"),
        ({"cache_batch_idx": torch.tensor([0, 1]), "block_table": torch.zeros(2, 1).int()}, "both given"),
        ({"rotary_cos": torch.ones(9, 3)}, "of k, rotary_cos and rotary_sin some are None"),
        ({"rotary_cos": torch.ones(9, 4), "rotary_sin": torch.ones(9, 4)}, r"rotary_cos has .* R <= 6, the width of q"),
        ({"rotary_cos": torch.ones(8, 3), "rotary_sin": torch.ones(8, 3)}, r"Lro >= 9, the length of the cache"),
        ({"cache_seqlens": 9}, r"cache_lengths\[0\] is 9, the limits are 0 and 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_cache_refuses(changed: dict[str, Any], message: str) -> None:
    arguments = {
        **{"q": draw(2, 1, 4, 6), "k_cache": draw(2, 9, 2, 6), "v_cache": draw(2, 9, 2, 6)},
        **{"k": draw(2, 1, 2, 6), "v": draw(2, 1, 2, 6), "cache_seqlens": 3},
    }
    fa.flash_attn_with_kvcache(**arguments)
    with pytest.raises(RuntimeError, match=message):
        fa.flash_attn_with_kvcache(**{**arguments, **changed})
