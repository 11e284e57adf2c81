"""The one list of cases of the attention family, shared by tests and benchmarks.

A Case says what is computed; ``tensors`` draws the arguments, ``run`` calls handtuned and ``results`` adds every
gradient. CASES is the list of the tests. torch's operators on the same tensors, and the formulas in float64 that both
are held against, are in attention_numerics.py. What no query may see holds NaN from the start: keys behind a length
and packed rows behind the last sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import cases
import torch
from cases import SEED, SHORT
from torch import Tensor

from handtuned.nn import functional as H

INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One attention. shape: batch, heads, query rows, key rows, width (of packed ones: heads and width count)."""

    shape: tuple[int, int, int, int, int]
    kv_heads: int | None = None  # None: as many as heads
    value_width: int | None = None  # None: width
    dtype: torch.dtype = torch.float32
    causal: bool = False
    alignment: str = "top_left"
    window: int | tuple[int, int] | None = None
    mask: str = ""  # a key of MASKS
    mask_dims: str = "bhqk"  # its trailing dims: b, h, q, k of full size, 1 broadcast; "h1k" is [heads, 1, key rows]
    mask_dtype: torch.dtype | None = None  # None: dtype
    lengths: tuple[int, ...] = ()  # key_lengths
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # lengths of the query and of the key sequences
    alibi: str = ""  # "h" or "bh": the dims of the slopes
    sinks: torch.dtype | None = None
    softcap: float = 0.0
    scale: float | None = None
    dropout: float = 0.0
    grad_lse: bool = False  # whether the lse has an incoming gradient too
    layout: str = "contiguous"  # a key of LAYOUTS: strides of everything of more than two dims
    spread: float = 1.0  # standard deviation of queries

    @property
    def name(self) -> str:
        parts = [SHORT[self.dtype], "x".join(map(str, self.shape))]
        shown: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("shape", "dtype")
        }
        for f in fields(self)[1:]:
            value = shown.get(f.name, f.default)
            if value != f.default and not (f.name == "mask_dims" and not self.mask):
                text = SHORT[value] if isinstance(value, torch.dtype) else str(value).replace(" ", "")
                parts.append(f.name if value is True else f"{f.name}_{text}")
        return "-".join(parts)

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)

    @property
    def groups(self) -> int:
        """Query heads that share a kv head."""
        heads = self.shape[1]
        return heads // self.kv_heads if self.kv_heads else 1

    @property
    def query_lengths(self) -> tuple[int, ...]:
        return self.packed[0] if self.packed else (self.shape[2],) * self.shape[0]

    @property
    def stored_key_lengths(self) -> tuple[int, ...]:
        return self.packed[1] if self.packed else (self.shape[3],) * self.shape[0]

    @property
    def seen_key_lengths(self) -> tuple[int, ...]:
        return self.lengths or self.stored_key_lengths

    @property
    def sizes(self) -> dict[str, int]:
        """Batch, heads, longest sequence of queries and of keys."""
        batch = len(self.query_lengths)
        longest = {"q": max(self.query_lengths, default=0), "k": max(self.stored_key_lengths, default=0)}
        dense = {"q": self.shape[2], "k": self.shape[3]}
        return {"b": batch, "h": self.shape[1], "1": 1, **(longest if self.packed else dense)}

    @property
    def elements(self) -> int:
        kv_heads = self.shape[1] if self.kv_heads is None else self.kv_heads
        widths = self.shape[4] + (self.value_width or self.shape[4])
        return widths * (sum(self.query_lengths) * self.shape[1] + sum(self.stored_key_lengths) * kv_heads)

    @property
    def window_sides(self) -> tuple[int, int]:
        """(left, right), -1 where unbounded."""
        window = (-1, -1) if self.window is None else self.window
        left, right = (window, window) if isinstance(window, int) else window
        return left, 0 if self.causal else right

    @property
    def score_scale(self) -> float:
        return self.shape[4] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class Tensors:
    """What a case is computed on; shapes as nn.functional takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    grad_lse: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_lengths: Tensor | None = None
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable arguments by name, as new leaves that require grad; strides stay."""
        named = {name: getattr(self, name) for name in ("query", "key", "value", "mask", "sinks")}
        floating = {name: t for name, t in named.items() if t is not None and t.is_floating_point()}
        return {name: t.detach().requires_grad_() for name, t in floating.items()}


# ---- layouts and masks -----------------------------------------------------------------------------------------------


def _rows_of_heads(t: Tensor) -> Tensor:
    """Heads and rows swapped in memory: [B, L, H, D] seen as [B, H, L, D]."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "rows_of_heads": _rows_of_heads,
    "rows_of_heads_sliced": lambda t: cases.LAYOUTS["sliced"](t.transpose(-3, -2)).transpose(-3, -2),
    **{name: cases.LAYOUTS[name] for name in ("sliced", "every_other", "expanded", "scattered", "offset")},
}


def _hidden(drawn: Tensor, fraction: float) -> Tensor:
    hidden: Tensor = drawn < torch.special.ndtri(torch.tensor(fraction, dtype=torch.float64))
    return hidden


def _with_empty_row(hidden: Tensor) -> Tensor:
    """One query that sees nothing, one key that nobody sees."""
    hidden = hidden.clone()
    if hidden.dim() > 1:
        hidden[..., 1:2, :] = True
    hidden[..., 2:3] = True
    return hidden


# What becomes of standard normal values: True or a number added where a query may attend.
MASKS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "bool": lambda t, dtype: ~_hidden(t, 0.2),
    "bool_empty_row": lambda t, dtype: ~_with_empty_row(_hidden(t, 0.3)),
    "add": lambda t, dtype: t.to(dtype),
    "add_inf": lambda t, dtype: t.masked_fill(_with_empty_row(_hidden(t, 0.3)), -INF).to(dtype),
    # Padding as many models write it: a number so large that nothing is left of the score.
    "add_min": lambda t, dtype: torch.zeros_like(t, dtype=dtype).masked_fill(_hidden(t, 0.3), torch.finfo(dtype).min),
}

# ---- drawing and running ---------------------------------------------------------------------------------------------

TAIL = 2  # packed rows behind the last sequence


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tensors(case: Case, draw: int = 0) -> Tensors:
    """Draw number `draw` of the case's tensors."""
    generator = torch.Generator().manual_seed(SEED + draw)
    batch, heads, queries, keys, width = case.shape
    kv_heads, value_width = heads if case.kv_heads is None else case.kv_heads, case.value_width or width
    lay_out = LAYOUTS[case.layout]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rows(lengths: tuple[int, ...], count: int, heads: int, width: int, spread: float = 1.0) -> Tensor:
        shape = (sum(lengths) + TAIL, heads, width) if case.packed else (batch, heads, count, width)
        drawn = (normal(*shape) * spread).to(case.dtype)
        if case.packed:
            drawn[sum(lengths) :] = torch.nan
        return drawn

    query = rows(case.query_lengths, queries, heads, width, case.spread)
    key, value = (rows(case.stored_key_lengths, keys, kv_heads, w) for w in (width, value_width))
    for b, seen in enumerate(case.lengths):
        first = sum(case.stored_key_lengths[:b])
        for t in (key, value):
            if case.packed:
                t[first + seen : first + case.stored_key_lengths[b]] = torch.nan
            else:
                t[b, :, seen:] = torch.nan
    more = 1 if case.packed else 0  # a mask may be larger than the longest sequence
    sizes = {name: size + more * (name in "qk") for name, size in case.sizes.items()}
    mask = (
        MASKS[case.mask](normal(*(sizes[d] for d in case.mask_dims)), case.mask_dtype or case.dtype)
        if case.mask
        else None
    )
    if mask is not None and case.layout != "contiguous" and mask.dim() > 1:
        mask = mask.mT.contiguous().mT
    slopes = {
        "": None,
        "h": 0.5 ** torch.arange(1.0, heads + 1),
        "bh": torch.rand(sizes["b"], heads, generator=generator) / 4,
    }
    rows_of_lse = (heads, query.shape[0]) if case.packed else (batch, heads, queries)
    return Tensors(
        query=lay_out(query),
        key=lay_out(key),
        value=lay_out(value),
        grad_output=lay_out(rows(case.query_lengths, queries, heads, value_width)),
        grad_lse=normal(*rows_of_lse).to(torch.float64 if case.dtype == torch.float64 else torch.float32),
        mask=mask,
        sinks=normal(heads).to(case.sinks) if case.sinks else None,
        alibi_slopes=slopes[case.alibi],
        key_lengths=torch.tensor(case.lengths) if case.lengths else None,
        query_starts=_starts(case.packed[0]) if case.packed else None,
        key_starts=_starts(case.packed[1]) if case.packed else None,
    )


def run(case: Case, t: Tensors) -> tuple[Tensor, Tensor]:
    """handtuned.nn.functional: (output, lse)."""
    options: dict[str, Any] = dict(is_causal=case.causal, causal_alignment=case.alignment, window=case.window)
    options |= dict(scale=case.scale, softcap=case.softcap, dropout_p=case.dropout, return_lse=True)
    options |= dict(attn_mask=t.mask, sinks=t.sinks, alibi_slopes=t.alibi_slopes, key_lengths=t.key_lengths)
    result: tuple[Tensor, Tensor]
    if case.packed:
        assert t.query_starts is not None
        assert t.key_starts is not None
        result = H.attention_varlen(t.query, t.key, t.value, t.query_starts, t.key_starts, **options)
    else:
        result = H.scaled_dot_product_attention(t.query, t.key, t.value, enable_gqa=case.groups != 1, **options)
    return result


def results(
    case: Case, t: Tensors, function: Callable[[Case, Tensors], tuple[Tensor, Tensor]] = run
) -> dict[str, Tensor]:
    """Output, lse and the gradient of every leaf, by name."""
    leaves = t.leaves()
    outputs = function(case, replace(t, **leaves))
    with_gradient = outputs if case.grad_lse else outputs[:1]
    incoming = (t.grad_output, t.grad_lse)[: len(with_gradient)]
    grads = torch.autograd.grad(with_gradient, list(leaves.values()), incoming)
    named = dict(zip(("output", "lse"), (o.detach() for o in outputs), strict=True))
    return named | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


# ---- the list --------------------------------------------------------------------------------------------------------

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BASE = Case((2, 2, 37, 51, 24))
CAUSAL = BASE.with_(causal=True)
PACKED = Case((4, 4, 0, 0, 24), kv_heads=2, packed=((17, 0, 33, 5), (21, 9, 0, 40)), alignment="bottom_right")
# Everything at once, dense and packed.
ALL = Case((3, 4, 21, 40, 19), kv_heads=2, value_width=27, causal=True, alignment="bottom_right", window=25).with_(
    mask="add_inf", lengths=(40, 0, 33), alibi="bh", sinks=F32, softcap=3.0, scale=0.3, dropout=0.2, grad_lse=True
)
ALL_PACKED = PACKED.with_(causal=True, window=20, mask="add_inf", mask_dims="hqk", alibi="bh", sinks=F32).with_(
    softcap=3.0, dropout=0.2, grad_lse=True, lengths=(20, 9, 0, 31), value_width=17
)
MASK_DIMS = (
    "1",
    "k",
    "q1",
    "qk",
    "1k",
    "hqk",
    "h11",
    "h1k",
    "hq1",
    "1qk",
    "bhqk",
    "b11k",
    "b1q1",
    "b1qk",
    "bh11",
    "1hqk",
)


def _size_cases() -> list[Case]:
    """Rows, keys and widths around the sizes of vectors, tiles and blocks."""
    dtypes, cases = (F32, BF16, F16), []
    for i, rows in enumerate((1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 200)):
        for j, keys in enumerate((1, 7, 32, 65, 127, 128, 129, 300)):
            if (i + j) % 3 == 0:
                cases.append(Case((1, 2, rows, keys, 16), dtype=dtypes[(i + j // 2) % 3], causal=i % 2 == 0))
    for i, width in enumerate(
        (1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 40, 63, 64, 65, 80, 96, 127, 128, 129, 192, 256, 257)
    ):
        cases += [
            Case((1, 2, 19, 35, width), dtype=dtypes[i % 3]),
            Case((2, 1, 67, 45, width), dtype=dtypes[(i + 1) % 3]),
        ]
    cases += [Case((1, 2, 9, 20, width), dtype=dtype) for width in (384, 511, 512) for dtype in (F32, BF16)]
    for i, (width, value_width) in enumerate(((64, 32), (33, 65), (1, 512), (512, 1), (192, 128), (16, 24), (24, 16))):
        cases.append(Case((1, 2, 21, 33, width), value_width=value_width, dtype=dtypes[i % 3], causal=i % 2 == 1))
    return cases


def _mask_cases() -> list[Case]:
    cases = []
    for i, dims in enumerate(MASK_DIMS):
        hidden = "add_inf" if dims[-2:] == "qk" else "add"
        cases += [BASE.with_(mask="bool_empty_row" if dims[-2:] == "qk" else "bool", mask_dims=dims, causal=i % 3 == 0)]
        cases += [BASE.with_(mask="add", mask_dims=dims), BASE.with_(mask=hidden, mask_dims=dims, dtype=BF16)]
        cases += [BASE.with_(mask=hidden, mask_dims=dims, mask_dtype=F32, dtype=(BF16, F16)[i % 2], kv_heads=1)]
        if i % 3 == 0:
            cases += [BASE.with_(mask="add_inf", mask_dims=dims, window=(9, 4), dtype=F64)]
    # Many batch entries share a mask, so pieces take several of them.
    cases += [
        Case((70, 3, 9, 20, 8), mask="add", mask_dims="hqk", softcap=cap, dtype=dtype)
        for cap, dtype in ((5.0, F32), (0.0, BF16))
    ]
    for mask in ("add_min", "add_inf"):
        cases += [BASE.with_(mask=mask, mask_dims="b11k", dtype=dtype) for dtype in (F32, BF16, F16)]
    return cases


def _cases() -> list[Case]:
    cases = [form.with_(dtype=dtype) for form in (BASE, CAUSAL, ALL, PACKED, ALL_PACKED) for dtype in SHORT]
    cases += [form.with_(dtype=dtype, sinks=dtype) for form in (ALL, ALL_PACKED) for dtype in (BF16, F16)]
    cases += _size_cases() + _mask_cases()
    for alignment in ("top_left", "bottom_right"):  # fewer and more keys than queries
        for shape in ((2, 2, 37, 51, 24), (2, 2, 51, 37, 24), (1, 2, 1, 40, 16), (1, 1, 150, 140, 8)):
            aligned = Case(shape, alignment=alignment)
            cases += [aligned.with_(causal=True), aligned.with_(causal=True, window=6, dtype=BF16)]
            cases += [aligned.with_(window=window) for window in (0, 3, (5, -1), (-1, 5), (70, 2), (0, 200))]
            cases += [aligned.with_(window=(3, 11), dtype=F16), aligned.with_(window=(-1, 0), dtype=F64)]
    for i, (heads, kv_heads) in enumerate(((4, 2), (8, 1), (6, 3), (5, 1), (16, 2))):
        for rows in (1, 5, 37):
            grouped = Case((2, heads, rows, 51, 24), kv_heads=kv_heads, causal=i % 2 == 0, alignment="bottom_right")
            cases += [grouped, grouped.with_(dtype=(BF16, F16)[i % 2], window=9)]
    for dtype in (F32, BF16):
        base, causal = BASE.with_(dtype=dtype), CAUSAL.with_(dtype=dtype)
        cases += [
            base.with_(softcap=2.0),
            causal.with_(softcap=30.0),
            base.with_(sinks=dtype),
            causal.with_(sinks=F32 if dtype == BF16 else dtype),
        ]
        cases += [base.with_(alibi="h"), causal.with_(alibi="bh", alignment="bottom_right"), base.with_(grad_lse=True)]
        cases += [base.with_(scale=0.0), base.with_(scale=1.5), base.with_(scale=-0.4), base.with_(spread=12.0)]
        cases += [base.with_(dropout=0.3), causal.with_(dropout=0.1, kv_heads=1), base.with_(dropout=1.0)]
        cases += [base.with_(lengths=(51, 17)), causal.with_(lengths=(0, 44), alignment="bottom_right", grad_lse=True)]
        cases += [base.with_(mask="bool_empty_row", sinks=dtype, grad_lse=True), causal.with_(dropout=0.5, mask="add")]
        packed = PACKED.with_(dtype=dtype)
        cases += [
            packed.with_(causal=True),
            packed.with_(window=(7, 3)),
            packed.with_(alignment="top_left", causal=True),
        ]
        cases += [packed.with_(mask="add", mask_dims=dims) for dims in ("k", "b11k", "hqk", "qk", "b1q1")]
        cases += [packed.with_(mask="bool", lengths=(21, 0, 0, 13)), packed.with_(dropout=0.4), packed.with_(alibi="h")]
        cases += [packed.with_(softcap=3.0, grad_lse=True), packed.with_(sinks=dtype), packed.with_(kv_heads=4)]
    for layout in list(LAYOUTS)[1:]:
        cases += [BASE.with_(layout=layout), CAUSAL.with_(layout=layout, dtype=BF16, mask="add_inf", kv_heads=1)]
        cases += [
            PACKED.with_(layout=layout, dtype=F16),
            BASE.with_(layout=layout, dtype=F64, mask="bool", mask_dims="qk"),
        ]
    cases += [
        Case(shape, causal=True, grad_lse=True)
        for shape in ((0, 2, 5, 7, 8), (2, 0, 5, 7, 8), (2, 2, 0, 7, 8), (2, 2, 5, 0, 8))
    ]
    cases += [PACKED.with_(packed=((), ())), PACKED.with_(packed=((0, 0), (0, 0))), PACKED.with_(packed=((3,), (0,)))]
    cases += [Case((1, 70, 5, 7, 4), sinks=dtype, grad_lse=True, dtype=dtype) for dtype in SHORT]
    # Many keys for few queries, and several tiles and blocks.
    cases += [
        Case((1, 4, rows, 2000, 32), kv_heads=kv, dtype=d) for rows, kv, d in ((1, 4, F32), (1, 1, BF16), (3, 2, F32))
    ]
    cases += [Case((1, 2, 300, 500, 64), dtype=d, causal=c) for d, c in ((F32, False), (F32, True), (BF16, True))]
    return cases


CASES = tuple(dict.fromkeys(_cases()))
