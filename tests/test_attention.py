"""Values of attention on every set of kernels: the numerics contract, who sees whom, values that must reach nothing,
layouts, and memory that is poisoned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import attention_cases as ac
import attention_numerics as an
import numpy as np
import pytest
import torch
from attention_cases import ALL, ALL_PACKED, BASE, BF16, CAUSAL, F16, F32, F64, PACKED, Case
from test_norm_properties import assert_same_bits, same_bits
from torch import Tensor

from handtuned import serving
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.cuda_alone]
FORMS = [BASE, CAUSAL.with_(kv_heads=1), PACKED.with_(causal=True), ALL, ALL_PACKED]
IN_BOTH_WIDTHS = [form.with_(dtype=dtype) for form in FORMS for dtype in (F32, BF16)]


def everything(case: Case, t: ac.Tensors) -> dict[str, Tensor]:
    """Output, lse and gradients of the kernels in force; dropout always with the same seed."""
    torch.manual_seed(7)
    return ac.results(case, t)


# ---- the tests' own tools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in ac.CASES if c.elements < 20_000][::3], ids=lambda c: c.name)
def test_the_bounds_formula_is_torchs(case: Case) -> None:
    """attention_numerics.exact agrees with torch's autograd in float64, far below any float32 rounding."""
    d = an.drawn(case.with_(dtype=F64, mask_dtype=None, sinks=F64 if case.sinks else None), 0)
    for name, truth in d.truth.values.items():
        np.testing.assert_allclose(d.torchs[name], truth.astype(np.float64), rtol=1e-10, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("dtype", ac.SHORT, ids=ac.SHORT.get)
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t * (1 + 6 * torch.finfo(t.dtype).eps), lambda t: t.index_fill(0, torch.tensor([1]), 0.0)],
    ids=["scaled_by_6_eps", "one_entry_lost"],
)
def test_the_bounds_catch(
    dtype: torch.dtype, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds must be able to fail: by six roundings of everything, or by one batch entry."""
    case = BASE.with_(dtype=dtype, sinks=dtype)
    for draw in range(an.MOST_DRAWS):
        an.drawn(case, draw)  # torch's results, unspoiled
    results = ac.results

    def spoiled(*args: Any) -> dict[str, Tensor]:
        return {name: spoil(t) for name, t in results(*args).items()}

    monkeypatch.setattr(ac, "results", spoiled)
    with pytest.raises(AssertionError, match="allowed"):
        an.check_contract(case)
    monkeypatch.setattr(an, "check_every_element", lambda *args: None)
    with pytest.raises(AssertionError, match=r"grad_query.*allowed") as caught:
        an.check_contract(case)
    for name in ("output", "grad_key", "grad_value"):
        assert name in str(caught.value)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.cases(ac.CASES, thinned=("generic", "emulated512", "simt"))
def test_numerics_contract(kernels: str, case: Case) -> None:
    an.check_contract(case)


@pytest.mark.cases(FORMS)
def test_same_bits_without_gradient_and_without_lse(kernels: str, case: Case) -> None:
    t = ac.tensors(case)
    recorded = everything(case, t)
    torch.manual_seed(7)
    with torch.no_grad():
        output, lse = ac.run(case, t)
    assert_same_bits({"output": output, "lse": lse}, {name: recorded[name] for name in ("output", "lse")})
    options = {"is_causal": case.causal, "dropout_p": 0.0}
    if not case.packed and case.groups == 1:
        alone = H.scaled_dot_product_attention(t.query, t.key, t.value, **options)
        assert isinstance(alone, Tensor)
        assert same_bits(alone, H.scaled_dot_product_attention(t.query, t.key, t.value, **options, return_lse=True)[0])


@pytest.mark.cases([form.with_(dtype=F64) for form in FORMS])
def test_gradients_of_some_arguments_only(kernels: str, case: Case) -> None:
    """Each alone is what it is among all, and the others get none."""
    t = ac.tensors(case)
    together = everything(case, t)
    for wanted in t.leaves():
        leaves = {name: leaf.requires_grad_(name == wanted) for name, leaf in t.leaves().items()}
        torch.manual_seed(7)
        outputs = ac.run(case, replace(t, **leaves))
        used = [(o, g) for o, g in zip(outputs, (t.grad_output, t.grad_lse), strict=True) if o.requires_grad]
        torch.autograd.backward(*zip(*(used if case.grad_lse else used[:1]), strict=True))
        torch.testing.assert_close(leaves[wanted].grad, together[f"grad_{wanted}"], rtol=1e-12, atol=1e-13)
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_only_the_lse_used(kernels: str) -> None:
    """The gradient of the lse alone is that of torch.logsumexp."""
    t = ac.tensors(BASE.with_(dtype=F64))
    leaves = t.leaves()
    lse = ac.run(BASE, replace(t, **leaves))[1]
    scores = leaves["query"] @ leaves["key"].mT * BASE.score_scale
    both = (leaves["query"], leaves["key"])
    for ours, torchs in zip(
        *(torch.autograd.grad(x.sin().sum(), both) for x in (lse, scores.logsumexp(-1))), strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


# ---- who sees whom ---------------------------------------------------------------------------------------------------

# (queries, options): one line a query, one sign a key.
PATTERNS: list[tuple[dict[str, Any], str]] = [
    ({}, "xxxxx xxxxx xxxxx"),
    ({"is_causal": True}, "x.... xx... xxx.."),
    ({"is_causal": True, "causal_alignment": "bottom_right"}, "xxx.. xxxx. xxxxx"),
    ({"window": 1}, "xx... xxx.. .xxx."),
    ({"window": 1, "is_causal": True}, "x.... xx... .xx.."),
    ({"window": (1, 1), "causal_alignment": "bottom_right"}, ".xxx. ..xxx ...xx"),
    ({"window": (0, 0), "causal_alignment": "bottom_right"}, "..x.. ...x. ....x"),
    ({"window": (-1, 2)}, "xxx.. xxxx. xxxxx"),
    ({"window": (None, 2)}, "xxx.. xxxx. xxxxx"),
    ({"window": (1, -1)}, "xxxxx xxxxx .xxxx"),
    ({"window": (0, 3), "key_lengths": [3]}, "xxx.. .xx.. ..x.."),
    ({"is_causal": True, "causal_alignment": "bottom_right", "key_lengths": [4]}, "xx... xxx.. xxxx."),
    ({"is_causal": True, "causal_alignment": "bottom_right", "key_lengths": [2]}, "..... x.... xx..."),
    ({"attn_mask": torch.tensor([1, 0, 0, 1, 1]).bool(), "is_causal": True}, "x.... x.... x...."),
    ({"attn_mask": torch.tensor([[0.0], [-ac.INF], [5.0]])}, "xxxxx ..... xxxxx"),
    ({"attn_mask": torch.eye(3, 5).bool(), "window": (0, -1)}, "x.... .x... ..x.."),
]


def weights_of(queries: int, keys: int, **options: Any) -> Tensor:
    """The weight of every key, by values that are the rows of the identity."""
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
    query, key = torch.randn(1, 1, queries, 7), torch.randn(1, 1, keys, 7)
    return H.scaled_dot_product_attention(query, key, torch.eye(keys)[None, None], **options)[0, 0]


@pytest.mark.parametrize(("options", "pattern"), PATTERNS, ids=lambda x: None if isinstance(x, dict) else x)
def test_visible_keys(kernels: str, options: dict[str, Any], pattern: str) -> None:
    lines = pattern.split()
    weights = weights_of(len(lines), len(lines[0]), **options)
    assert ["".join(".x"[int(w > 0)] for w in row) for row in weights] == lines
    for row, line in zip(weights, lines, strict=True):
        torch.testing.assert_close(row.sum(), torch.tensor(float("x" in line)))


@pytest.mark.parametrize("dtype", ac.SHORT, ids=ac.SHORT.get)
def test_rows_without_a_key(kernels: str, dtype: torch.dtype) -> None:
    """Output and gradients are 0, exactly, and the lse is -inf, or the sink."""
    for case in (
        BASE.with_(mask="bool_empty_row", dtype=dtype),
        BASE.with_(mask="add_inf", dtype=dtype, sinks=dtype),
        BASE.with_(lengths=(0, 51), dtype=dtype, kv_heads=1),
        Case((2, 2, 60, 20, 24), causal=True, alignment="bottom_right", dtype=dtype, sinks=F32),
        PACKED.with_(dtype=dtype, causal=True),
    ):
        t = ac.tensors(case)
        found = everything(case, t)
        empty = 0
        for b in range(len(case.query_lengths)):
            nothing = ~an.visible(case, t.mask, b).any(-1)
            empty += int(nothing.sum())
            for name in ("output", "grad_query"):
                assert (an.queries_of(case, found[name], b)[nothing] == 0).all(), (case.name, name)
            sinks = torch.full((case.shape[1],), -ac.INF) if t.sinks is None else t.sinks
            sinks = sinks.to(found["lse"].dtype)[:, None].expand_as(nothing)[nothing]
            torch.testing.assert_close(an.lse_of(case, found["lse"], b)[nothing], sinks)
        assert empty or case.packed, case.name


# ---- values that must reach nothing ----------------------------------------------------------------------------------

HIDING = [
    BASE.with_(lengths=(40, 0)),
    BASE.with_(mask="bool_empty_row"),
    BASE.with_(mask="add_inf", kv_heads=1),
    CAUSAL.with_(window=3),
    CAUSAL.with_(window=3, alignment="bottom_right", shape=(1, 2, 20, 300, 24)),
    PACKED.with_(window=(2, 1)),
    ALL,
    ALL_PACKED,
]
PLANTED = [float("nan"), ac.INF, -ac.INF]


def assert_nearly_same(actual: dict[str, Tensor], expected: dict[str, Tensor], where: dict[str, Tensor]) -> None:
    """But for a few roundings of the largest: a block that holds a NaN is added up in another order. Gradients are made
    from the output as it was rounded."""
    for name, want in expected.items():
        kept = where.get(name, torch.ones_like(want, dtype=torch.bool))
        finite = want[kept & want.isfinite()]
        output = expected.get("output", want) if name.startswith("grad") else want
        eps = max(torch.finfo(t.dtype).eps for t in (want, output))
        atol = 8 * eps * finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(actual[name][kept], want[kept], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def seen_by(case: Case, t: ac.Tensors, b: int) -> Tensor:
    """[kv heads, rows, keys]: whether any query head of the group sees the key."""
    seen = an.visible(case, t.mask, b)
    return seen.unflatten(0, (-1, case.groups)).any(1)


@pytest.mark.cases([form.with_(dtype=dtype) for form in HIDING for dtype in ac.SHORT], thinned=["simt"])
def test_what_nobody_sees_reaches_nothing(kernels: str, case: Case) -> None:
    """Nothing depends on keys and values that are hidden from every query, and their gradients are exactly 0."""
    t = ac.tensors(case)
    expected = everything(case, replace(t, key=t.key.nan_to_num(0), value=t.value.nan_to_num(0)))
    for planted in PLANTED:
        spoiled = replace(t, key=t.key.nan_to_num(planted), value=t.value.nan_to_num(planted))
        count = 0
        for b in range(len(case.query_lengths)):
            hidden = ~seen_by(case, t, b).any(1)
            count += int(hidden.sum())
            for x, grad in ((spoiled.key, "grad_key"), (spoiled.value, "grad_value")):
                an.keys_of(case, x, b)[hidden] = planted
                assert (an.keys_of(case, expected[grad], b)[hidden] == 0).all(), grad
        assert count or case.lengths, "the case hides nothing"
        found = everything(case, spoiled)
        assert_nearly_same(found, expected, {})
        for b in range(len(case.query_lengths)):
            hidden = ~seen_by(case, t, b).any(1)
            assert all((an.keys_of(case, found[g], b)[hidden] == 0).all() for g in ("grad_key", "grad_value"))


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.cases([form.with_(dtype=dtype) for form in (*HIDING[3:], CAUSAL) for dtype in (F32, BF16)])
def test_what_some_do_not_see_does_not_reach_them(kernels: str, case: Case, where: str) -> None:
    """A NaN in a key or value that some queries see does not reach the others, and is seen by those."""
    t = ac.tensors(case)
    expected = everything(case, t)
    spoiled = replace(t, **{where: getattr(t, where).clone(memory_format=torch.preserve_format)})
    for b in range(len(case.query_lengths)):
        if case.seen_key_lengths[b]:
            an.keys_of(case, getattr(spoiled, where), b)[:, case.seen_key_lengths[b] // 2] = torch.nan
    found = everything(case, spoiled)
    for b in range(len(case.query_lengths)):
        if not case.seen_key_lengths[b] or not case.query_lengths[b]:
            continue
        sees = an.visible(case, t.mask, b)[..., case.seen_key_lengths[b] // 2]
        assert not sees.all()
        for name, of in (("output", an.queries_of), ("grad_query", an.queries_of), ("lse", an.lse_of)):
            actual, clean = (of(case, x[name], b) for x in (found, expected))
            assert_nearly_same(
                {name: actual}, {name: clean}, {name: (~sees)[(...,) + (None,) * (clean.dim() - 2)].expand_as(clean)}
            )
        if not case.dropout:  # which may drop it
            assert an.queries_of(case, found["output"], b)[sees].isnan().any(-1).all()


# ---- paged keys ------------------------------------------------------------------------------------------------------

PAGED = [
    Case((3, 4, 1, 48, 24), kv_heads=2, lengths=(48, 17, 0), causal=True, alignment="bottom_right"),
    Case((3, 8, 1, 320, 40), kv_heads=2, lengths=(313, 160, 1), value_width=24, dtype=BF16),
    Case((2, 4, 5, 64, 16), lengths=(60, 33), causal=True, alignment="bottom_right", window=20, alibi="bh"),
    Case((2, 4, 3, 64, 16), lengths=(64, 33), mask="add", mask_dims="h1k", sinks=F32, softcap=4.0, dtype=F16),
    Case((1, 2, 2, 2048, 16), lengths=(2001,), kv_heads=1),
]


def attend(t: ac.Tensors, case: Case, **more: Any) -> tuple[Tensor, Tensor]:
    """The op itself on the kernels in force."""
    left, right = case.window_sides
    named: dict[str, Any] = dict(
        query=t.query, key=t.key, value=t.value, mask=t.mask, query_starts=None, key_starts=None
    )
    named |= dict(key_lengths=t.key_lengths, block_table=None, alibi_slopes=t.alibi_slopes, sinks=t.sinks)
    named |= dict(scale=case.score_scale, bottom_right=case.alignment == "bottom_right", window_left=left)
    named |= dict(window_right=right, softcap=case.softcap, dropout_p=0.0, seed=None)
    return serving.kernels("attention", t.query).attention(*(named | more).values())


def pages_of(dense: Tensor, lengths: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """(pages in some order among others that hold NaN, block table), NaN behind each length."""
    batch, heads, keys, width = dense.shape
    per_entry = keys // size
    order = torch.randperm(2 * batch * per_entry, generator=torch.Generator().manual_seed(1))[: batch * per_entry]
    pages = dense.new_full((2 * batch * per_entry, heads, size, width), torch.nan)
    pages[order] = dense.reshape(batch, heads, per_entry, size, width).transpose(1, 2).flatten(0, 1)
    table = order.view(batch, per_entry).int()
    for b, length in enumerate(lengths):
        table[b, -(-length // size) :] = -1  # never looked at
    return pages, table


@pytest.mark.parametrize("size", [1, 8, 16], ids=lambda s: f"page{s}")
@pytest.mark.cases(PAGED)
def test_paged_keys(kernels: str, case: Case, size: int) -> None:
    t = ac.tensors(case)
    (keys, table), (values, _) = (pages_of(x, case.lengths, size) for x in (t.key, t.value))
    output, lse = attend(replace(t, key=keys, value=values), case, block_table=table)
    an.check_every_element(case, {"output": output, "lse": lse}, an.exact(case, t))


@pytest.mark.cases([PAGED[0], PAGED[2]])
def test_packed_queries_with_paged_keys(kernels: str, case: Case) -> None:
    """Queries of several lengths against one cache."""
    rows, heads, width = case.shape[2], case.shape[1], case.shape[4]
    t = ac.tensors(case)
    (keys, table), (values, _) = (pages_of(x, case.lengths, 8) for x in (t.key, t.value))
    packed = t.query.transpose(1, 2).reshape(-1, heads, width)
    starts = torch.arange(case.shape[0] + 1, dtype=torch.int32) * rows
    spoiled = replace(t, query=packed, key=keys, value=values)
    output, lse = attend(spoiled, case, block_table=table, query_starts=starts)
    found = {"output": output.unflatten(0, (-1, rows)).transpose(1, 2)}
    found["lse"] = lse.unflatten(1, (-1, rows)).transpose(0, 1)
    an.check_every_element(case, found, an.exact(case, t))


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.cases(
    [form.with_(layout=layout) for form in IN_BOTH_WIDTHS for layout in list(ac.LAYOUTS)[1:] if layout != "expanded"],
    thinned=["simt"],
)
def test_strides_change_no_bit_and_nothing_is_written_to(kernels: str, case: Case) -> None:
    t, dense = ac.tensors(case), ac.tensors(case.with_(layout="contiguous"))
    found = everything(case, t)
    assert_same_bits(found, everything(case, dense))
    for name, tensor in vars(t).items():
        if tensor is not None:
            assert (
                same_bits(tensor, getattr(dense, name))
                if tensor.is_floating_point()
                else tensor.equal(getattr(dense, name))
            )


@pytest.mark.parametrize("layouts", [("contiguous", "rows_of_heads"), ("rows_of_heads", "contiguous")], ids="-".join)
def test_results_are_laid_out_like_their_arguments(isa: str, layouts: tuple[str, str]) -> None:
    """Heads inside rows where query (for the output) or the argument (for its gradient) has them so."""
    of_query, of_keys = (ac.tensors(BASE.with_(layout=layout)) for layout in layouts)
    found = everything(BASE, replace(of_query, key=of_keys.key, value=of_keys.value))
    for name, layout in zip(
        ("output", "grad_query", "grad_key", "grad_value"), (*layouts[:1] * 2, *layouts[1:] * 2), strict=True
    ):
        inside_rows = found[name].transpose(1, 2).is_contiguous()
        assert inside_rows == (layout == "rows_of_heads"), name
        assert inside_rows or found[name].is_contiguous(), name
    assert found["lse"].is_contiguous()
    packed = everything(PACKED, ac.tensors(PACKED.with_(layout="rows_of_heads")))
    assert all(packed[name].is_contiguous() for name in packed)
