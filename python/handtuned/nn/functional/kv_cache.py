"""Attention of new queries over keys and values kept from earlier calls, contiguous or in pages; inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autograd import kernels_for
from .attention import Window, _scale, visible_window
from .rotary import as_table

_OP = "attention_with_kv_cache"


def _error(message: str) -> RuntimeError:
    return RuntimeError(f"handtuned.{_OP}: {message}")


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """An error if autograd would want a gradient that caches and pages do not have."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"handtuned.{op}: {name} requires a gradient, but a cache or a block_table serves inference only; call "
                "it under torch.no_grad(), or use scaled_dot_product_attention"
            )


def _append(query: Tensor, key: Tensor | None, value: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values behind the old ones, in place; query as it goes on, and the lengths after it."""
    (key_cache, value_cache, lengths, block_table, cos, sin, interleaved, in_order) = others
    if key is None or value is None:
        if key is not value:
            raise _error("of key and value one is None; pass both, or neither")
        if cos is not None or sin is not None:
            raise _error("rotary_cos or rotary_sin is given but key is None; rotate the query by rotary_embedding")
        return query, lengths
    if cos is not None and sin is not None:
        cos, sin = as_table(cos, query), as_table(sin, query)
    rotated, lengths = kernels_for("append_kv", query).append_kv(
        query, key, value, key_cache, value_cache, lengths, block_table, cos, sin, interleaved, in_order
    )
    return query if cos is None else rotated, lengths


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_lengths: int | Tensor,
    block_table: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = True,
    window: Window = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache: new keys and values are written into it in place, then the queries attend to all of it.

    With tables the new keys and the queries are rotated on the way, each at its position in the sequence: the op
    append_kv does that and the writing in one pass.

    Queries are aligned with the end of the keys: with is_causal the last query sees every key, the one before it all
    but the last. One call serves prefill (many queries), decode (one) and speculative decode (a few); with one query
    the work is split over the keys. Inference only.

    Args:
        query: (B, H, Lq, D), float32, float64, bfloat16 or float16.
        key_cache, value_cache: (B, Hk, Lmax, D) and (B, Hk, Lmax, Dv), or with block_table pages (P, Hk, page, D) and
            (P, Hk, page, Dv) of any size; H a multiple of Hk. Any strides, so a cache kept as (B, Lmax, Hk, D) is
            passed transposed.
        key, value: (B, Hk, Lnew, D) and (B, Hk, Lnew, Dv), written at cache_lengths; None: the cache has them already.
        cache_lengths: (B,) int32 or int64, or one number: how many keys each sequence has before the new ones. They
            are not changed; the caller adds Lnew.
        block_table: (B, max_pages) int32: key j of sequence b is in page block_table[b, j // page], slot j % page.
            Sequences may share pages that are only read.
        attn_mask: bool (True: may attend) or additive, broadcastable to (B, H, Lq, Lmax).
        is_causal, window, scale, alibi_slopes, softcap, sinks: as in scaled_dot_product_attention.
        rotary_cos, rotary_sin: (positions, R / 2) from rotary_tables, to rotate query and key as rotary_embedding does.
            New key t of a sequence stands at cache_lengths + t, and so does query t with is_causal or a window; else
            all queries stand at cache_lengths.
        rotary_interleaved: as in rotary_embedding.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        (B, H, Lq, Dv), in memory laid out as query is; with return_lse also (B, H, Lq), float32 (float64 for float64).

    Errors: a gradient is wanted, the new keys do not fit, shapes that do not go together.
    """
    refuse_gradients(_OP, query=query, key_cache=key_cache, value_cache=value_cache, key=key, value=value, sinks=sinks)
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.dim() != 4:
            raise _error(f"{name} has shape {list(tensor.shape)}, expected 4 dims; unsqueeze it")
    if isinstance(cache_lengths, int):
        cache_lengths = torch.full((query.shape[0],), cache_lengths, dtype=torch.int32, device=query.device)
    if cache_lengths.shape != query.shape[:1]:
        raise _error(
            f"cache_lengths has shape {list(cache_lengths.shape)}, expected [{query.shape[0]}], one per row of query's "
            "batch; pass the lengths before the new keys"
        )
    bottom_right, left, right = visible_window(_OP, is_causal, "bottom_right", window)
    in_order = max(left, right) >= 0
    query, lengths = _append(
        *(query, key, value, key_cache, value_cache, cache_lengths, block_table),
        *(rotary_cos, rotary_sin, rotary_interleaved, in_order),
    )
    kernels: Any = kernels_for("attention", query)
    output, lse = kernels.attention(
        *(query, key_cache, value_cache, attn_mask, None, None, lengths, block_table, alibi_slopes, sinks),
        *(_scale(query) if scale is None else scale, bottom_right, left, right, softcap, 0.0, None),
    )
    return (output, lse) if return_lse else output
