"""One attention as each side writes it: handtuned, torch as a user calls it, torch's unfused kernel, flex_attention.

Masks and whatever else does not depend on query, key and value are made before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attention_cases as ac
import attention_numerics as an
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import handtuned.nn.functional as H

from .peers import Function, Tensors

PAGE = 16  # tokens


@dataclass(frozen=True)
class Form:
    """Functions of `inputs`, or of query, key, value (and mask) where it is empty."""

    ours: Function
    eager: Function
    math: Function | str = "has no such op"
    flex: Function | str = "has no such op"
    inputs: Tensors = ()


def padding_mask(case: ac.Case, kind: str) -> Tensor:
    """[batch, 1, 1, keys], bool or float, that hides the last eighth of the keys."""
    keys = case.shape[3]
    seen = (torch.arange(keys) < keys - keys // 8).expand(case.shape[0], 1, 1, keys).contiguous()
    return seen if kind == "bool" else torch.zeros(seen.shape, dtype=case.dtype).masked_fill(~seen, -torch.inf)


# ---- dense -----------------------------------------------------------------------------------------------------------


def dense(case: ac.Case, t: ac.Tensors) -> Form:
    ours: dict[str, Any] = dict(is_causal=case.causal, window=case.window, key_lengths=t.key_lengths)
    ours |= dict(alibi_slopes=t.alibi_slopes, softcap=case.softcap, dropout_p=case.dropout, enable_gqa=case.groups > 1)
    prepared = _torch_mask(case, t)
    causal = case.causal and prepared is None

    def handtuned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = t.mask) -> Tensors:
        return (H.scaled_dot_product_attention(q, k, v, mask, **ours),)

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = prepared) -> Tensors:
        return (
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=case.dropout, is_causal=causal, enable_gqa=case.groups > 1
            ),
        )

    # Behind F.scaled_dot_product_attention the unfused kernel gets bool masks made additive.
    additive = prepared
    if prepared is not None and prepared.dtype == torch.bool:
        additive = torch.zeros(prepared.shape, dtype=case.dtype).masked_fill(~prepared, -torch.inf)

    def math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = additive) -> Tensors:
        kernel = torch.ops.aten._scaled_dot_product_attention_math
        return (kernel(q, k, v, mask, case.dropout, causal, None, enable_gqa=case.groups > 1)[0],)

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        scores = case.softcap * torch.tanh(q @ k.mT * (case.score_scale / case.softcap))
        return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v,)

    if case.softcap:
        return Form(handtuned, capped, flex=_flex(case, t))
    return Form(handtuned, eager, math, _flex(case, t))


def _torch_mask(case: ac.Case, t: ac.Tensors) -> Tensor | None:
    """What torch needs as a mask where handtuned has an argument; None where is_causal says it."""
    if t.mask is not None:
        return t.mask
    if t.key_lengths is not None:
        return torch.arange(case.shape[3]) < t.key_lengths[:, None, None, None]
    if t.alibi_slopes is not None:
        bias = -t.alibi_slopes[:, None, None] * an.distance(case, 0).abs()
        return bias.masked_fill(~an.visible(case, None, 0), -torch.inf).to(case.dtype)[None]
    return None if case.window is None else an.visible(case, None, 0)[0].contiguous()


def _flex(case: ac.Case, t: ac.Tensors) -> Function | str:
    if case.dropout or t.mask is not None:
        return "has no dropout" if case.dropout else "would need the mask as a function"
    if case.shape[2] == 1:
        return "left out for decode"
    batch, _, queries, keys, _ = case.shape
    left, right = case.window_sides
    slopes, lengths, cap = t.alibi_slopes, t.key_lengths, case.softcap

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j < (keys if lengths is None else lengths[b])
        seen = seen & (j >= i - left) if left >= 0 else seen
        return seen & (j <= i + right) if right >= 0 else seen

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = cap * torch.tanh(s / cap) if cap else s
        return s if slopes is None else s - slopes[h] * (i - j).abs()

    masked = left >= 0 or right >= 0 or lengths is not None
    of_batch = batch if lengths is not None else None
    blocks = create_block_mask(visible, of_batch, None, queries, keys, device="cpu") if masked else None
    modified: Callable[..., Tensor] | None = score if cap or slopes is not None else None

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return (flex_attention(q, k, v, score_mod=modified, block_mask=blocks, enable_gqa=case.groups > 1),)

    return flex


# ---- packed and paged ------------------------------------------------------------------------------------------------


def packed(case: ac.Case, t: ac.Tensors) -> Form:
    """torch's side is a loop over the sequences: no padding is computed, as in handtuned."""
    lengths, starts, key_starts = case.query_lengths, t.query_starts, t.key_starts
    assert starts is not None
    assert key_starts is not None
    rest = t.query.shape[0] - sum(lengths)

    def handtuned(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return (H.attention_varlen(q, k, v, starts, key_starts, is_causal=case.causal),)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        sequences = zip(*(x.transpose(0, 1).split([*lengths, rest], 1)[:-1] for x in (q, k, v)), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=case.causal) for q, k, v in sequences]
        return (torch.cat([*(output.transpose(0, 1) for output in outputs), q.new_zeros(rest, *q.shape[1:])]),)

    return Form(handtuned, eager, flex="left out for packed sequences")


def paged(case: ac.Case, t: ac.Tensors) -> Form:
    """Decode from shuffled pages; torch gathers them first."""
    batch, _, _, keys, _ = case.shape
    order = torch.randperm(batch * keys // PAGE, generator=torch.Generator().manual_seed(0))
    table = order.argsort().reshape(batch, -1).to(torch.int32)
    lengths = torch.full((batch,), keys, dtype=torch.int32)

    def pages(x: Tensor) -> Tensor:
        whole = x.reshape(batch, x.shape[1], -1, PAGE, x.shape[3]).transpose(1, 2).flatten(0, 1)
        return whole[order].contiguous()

    def gathered(x: Tensor) -> Tensor:
        return x[table].transpose(1, 2).flatten(2, 3)

    def handtuned(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        out = H.attention_with_kv_cache(q, k, v, cache_lengths=lengths, block_table=table, is_causal=False)
        return (torch.as_tensor(out),)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        return (F.scaled_dot_product_attention(q, gathered(k), gathered(v), enable_gqa=case.groups > 1),)

    return Form(handtuned, eager, flex="left out for decode", inputs=(t.query, pages(t.key), pages(t.value)))
