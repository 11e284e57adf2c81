"""Attention of new queries over keys and values kept from earlier calls, contiguous or in pages; inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...autograd import kernels_for
from .attention import Window, _scale, visible_window

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


def _numbers(index: Tensor) -> list[int]:
    """What the index says, for checks; nothing off the CPU or while compiling, where the write itself checks it."""
    return index.flatten().tolist() if index.device.type == "cpu" and not torch.compiler.is_compiling() else []


def _check_room(lengths: Tensor, new: int, capacity: int) -> None:
    numbers = _numbers(lengths)
    if numbers and not (min(numbers) >= 0 and max(numbers) + new <= capacity):
        raise _error(
            f"cache_lengths go from {min(numbers)} to {max(numbers)}, the limits are 0 and {capacity - new} ({new} new "
            f"keys in a cache of {capacity}); allocate a longer cache"
        )


def _places(cache: Tensor, lengths: Tensor, block_table: Tensor | None, new: int) -> tuple[Tensor, Tensor]:
    """Where the new keys go: (row of the cache or page, slot in it), both [B, Lnew] or [B, 1]."""
    position = lengths[:, None]
    if new != 1:
        position = position + torch.arange(new, device=cache.device)
    if block_table is None:
        return torch.arange(lengths.shape[0], device=cache.device)[:, None], position
    page_size = cache.shape[2]
    pages = block_table.gather(1, (position // page_size).long())
    numbers = _numbers(pages)
    if numbers and not (min(numbers) >= 0 and max(numbers) < cache.shape[0]):
        raise _error(
            f"the new keys go to the pages {min(numbers)} to {max(numbers)} of block_table, the limits are 0 and "
            f"{cache.shape[0] - 1}; give each sequence pages for its new keys"
        )
    return pages, position % page_size


def _check_new(name: str, new: Tensor, cache: Tensor, batch: int, count: int) -> None:
    if new.shape != (batch, cache.shape[1], count, cache.shape[3]):
        raise _error(
            f"{name} has shape {list(new.shape)}, expected {[batch, cache.shape[1], count, cache.shape[3]]} beside a "
            f"{name}_cache of shape {list(cache.shape)}; pass the new keys and values as (B, Hk, Lnew, D)"
        )
    if new.dtype != cache.dtype:
        raise _error(f"{name} is {new.dtype}, {name}_cache is {cache.dtype}; convert one with .to()")


def _append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
) -> Tensor:
    """Writes the new keys and values behind the old ones, in place; the lengths after it."""
    capacity = key_cache.shape[2] if block_table is None else block_table.shape[1] * key_cache.shape[2]
    if key is None or value is None:
        if key is not value:
            raise _error("of key and value one is None; pass both, or neither")
        _check_room(lengths, 0, capacity)
        return lengths
    new = key.shape[-2]
    _check_new("key", key, key_cache, lengths.shape[0], new)
    _check_new("value", value, value_cache, lengths.shape[0], new)
    _check_room(lengths, new, capacity)
    pages, slots = _places(key_cache, lengths, block_table, new)
    # Indices on either side of the heads put the dims that they make in front: [B, Lnew, Hk, D].
    key_cache[pages, :, slots] = key.transpose(1, 2)
    value_cache[pages, :, slots] = value.transpose(1, 2)
    return lengths + new


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache: new keys and values are written into it in place, then the queries attend to all of it.

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
    lengths = _append(key_cache, value_cache, key, value, cache_lengths, block_table)
    bottom_right, left, right = visible_window(_OP, is_causal, "bottom_right", window)
    kernels: Any = kernels_for("attention", query)
    output, lse = kernels.attention(
        *(query, key_cache, value_cache, attn_mask, None, None, lengths, block_table, alibi_slopes, sinks),
        *(_scale(query) if scale is None else scale, bottom_right, left, right, softcap, 0.0, None),
    )
    return (output, lse) if return_lse else output
