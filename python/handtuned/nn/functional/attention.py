"""Attention as functions: arguments made canonical, autograd only where a gradient is wanted.

Everything is computed in float32 (float64 for float64 tensors) and rounded once. Nothing of size queries x keys is
stored. Gradients are an op of their own and can be differentiated again. On CPU any strides are read in place as long
as the last is 1, else the tensor is copied once. Query row i and key j stand (j - i - offset) apart; offset is 0 with
causal_alignment="top_left" and keys - queries, of each sequence by itself, with "bottom_right".

A query that sees no key gets 0, gradients of 0 and an lse of -inf. Keys and values that no query sees are not computed
with: what is planted there reaches nothing.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import Function

from ...autograd import apply, backward_op, kernels_for, wants_grad
from .norm import _draw_seed, _or_none

Window = int | tuple[int | None, int | None] | None
Result = Any  # Tensor, or (Tensor, Tensor) with return_lse=True; a union would ask every caller which it was


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query_starts: Tensor | None,
        key_starts: Tensor | None,
        key_lengths: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        bottom_right: bool,
        window_left: int,
        window_right: int,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = kernels.attention(
            *(query, key, value, mask, query_starts, key_starts, key_lengths, None, alibi_slopes, sinks, scale),
            *(bottom_right, window_left, window_right, softcap, dropout_p, seed),
        )
        ctx.kernels = kernels
        ctx.options = (scale, bottom_right, window_left, window_right, softcap, dropout_p)
        ctx.set_materialize_grads(False)
        indices = (query_starts, key_starts, key_lengths, alibi_slopes)
        ctx.save_for_backward(query, key, value, *result, mask, *indices, sinks, seed)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        output = saved[3]
        if grad_output is None:  # only the lse was used
            grad_output = torch.zeros_like(output)
        _, need_query, need_key, need_value, need_mask, _, _, _, _, need_sinks, *_ = ctx.needs_input_grad
        grad_query, grad_key, grad_value, grad_mask, grad_sinks = backward_op(
            "attention_backward",
            ctx.kernels,
            *(grad_output, grad_lse, *saved, *ctx.options, seed),
            *(need_query, need_key, need_value, need_mask, need_sinks),
        )
        return (
            None,
            _or_none(need_query, grad_query),
            _or_none(need_key, grad_key),
            _or_none(need_value, grad_value),
            _or_none(need_mask, grad_mask),
            *(None, None, None, None),
            _or_none(need_sinks, grad_sinks),
            *(None, None, None, None, None, None, None),
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of the op attention, differentiable, on whatever kernel serves it. A dropout seed is drawn here."""
    kernels = kernels_for("attention", query)
    seed = _draw_seed(query) if dropout_p > 0 else None
    if torch.is_grad_enabled():
        if alibi_slopes is not None and alibi_slopes.requires_grad:
            raise RuntimeError(
                "handtuned.attention: alibi_slopes requires a gradient, which is not computed; "
                "pass alibi_slopes.detach(), or the bias as an additive mask"
            )
        if wants_grad(kernels, query, key, value, mask, sinks):
            pair: tuple[Tensor, Tensor] = apply(
                _Attention,
                *(kernels, query, key, value, mask, query_starts, key_starts, key_lengths, alibi_slopes, sinks),
                *(scale, bottom_right, window_left, window_right, softcap, dropout_p, seed),
            )
            return pair
    pair = kernels.attention(
        *(query, key, value, mask, query_starts, key_starts, key_lengths, None, alibi_slopes, sinks),
        *(scale, bottom_right, window_left, window_right, softcap, dropout_p, seed),
    )
    return pair


# ---- arguments made canonical ---------------------------------------------------------------------------------------


def visible_window(op: str, is_causal: bool, causal_alignment: str, window: Window) -> tuple[bool, int, int]:
    """(bottom_right, window_left, window_right) as the op takes them; -1 is unbounded."""
    if causal_alignment not in ("top_left", "bottom_right"):
        raise RuntimeError(
            f"handtuned.{op}: causal_alignment is {causal_alignment!r}, allowed are 'top_left' and 'bottom_right'"
        )
    bottom_right = causal_alignment == "bottom_right"
    if window is None:
        return bottom_right, -1, 0 if is_causal else -1
    left, right = (window, window) if isinstance(window, int) else (-1 if w is None else w for w in window)
    if left < -1 or right < -1:
        raise RuntimeError(
            f"handtuned.{op}: window is {window}, the limit is -1, which is unbounded; pass how many keys to the left "
            "and to the right of its own position a query sees"
        )
    return bottom_right, left, 0 if is_causal else right


def _scale(query: Tensor) -> float:
    width = query.size(-1) if query.dim() else 0
    return 1.0 / math.sqrt(width or 1)  # a width of 0, or none, is an error of the op's


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast float32 and 16-bit tensors in its dtype, as torch's own attention takes them."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value))
    return query, key, value


def _broadcast(tensors: dict[str, Tensor], dims: int) -> torch.Size:
    """The common shape of all dims but the last `dims`."""
    try:
        common: torch.Size = torch.broadcast_shapes(*(t.shape[:-dims] for t in tensors.values()))
        return common
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise RuntimeError(
            f"handtuned.scaled_dot_product_attention: the shapes are {shapes}, whose leading dims do not broadcast; "
            "expand them, or pass enable_gqa=True if only the numbers of heads (dim -3) differ"
        ) from error


def _flat_mask(mask: Tensor, batch: torch.Size, heads: bool) -> Tensor:
    """A mask over (*batch, heads, rows, keys), or without heads, as one of four dims at most."""
    if not heads and mask.dim() >= 3:
        mask = mask.unsqueeze(-3)
    if len(batch) <= 1 or mask.dim() <= 3:
        return mask
    if mask.shape[:-3].numel() == 1:  # the same for all
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch, *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _any_dims(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    enable_gqa: bool,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Attention over any leading dims: broadcast together as matmul does, and flattened into batch and heads."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 + enable_gqa:
            raise RuntimeError(
                f"handtuned.scaled_dot_product_attention: {name} has shape {list(tensor.shape)}, expected at least "
                f"{2 + enable_gqa} dims; unsqueeze it"
            )
    if enable_gqa:  # dim -3 is heads, and of another size in key and value
        batch, heads = _broadcast(tensors, 3), True
        inner = [t.shape[-3:] for t in tensors.values()]
    else:
        lead = _broadcast(tensors, 2)
        heads = len(lead) >= 2  # (N, L, E) has none
        batch = lead[:-1] if heads else lead
        inner = [torch.Size((lead[-1] if heads else 1, *t.shape[-2:])) for t in tensors.values()]
        if not heads:
            tensors = {name: t.unsqueeze(-3) for name, t in tensors.items()}
    q, k, v = (
        t.expand(*batch, *shape).reshape(batch.numel(), *shape)
        for t, shape in zip(tensors.values(), inner, strict=True)
    )
    if mask is not None:
        mask = _flat_mask(mask, batch, heads)
    if key_lengths is not None and len(batch) != 1:
        key_lengths = key_lengths.expand(batch).reshape(-1)
    output, lse = attend(q, k, v, mask, None, None, key_lengths, *options)
    shape = (*batch, *lse.shape[1:]) if heads else (*batch, lse.shape[2])
    return output.reshape(*shape, output.shape[-1]), lse.reshape(shape)


# ---- torch.jagged ---------------------------------------------------------------------------------------------------


def _packed_rows(name: str, tensor: Tensor) -> Tensor:
    """The rows [T, H, D] of a nested tensor (B, H, j, D), or of (B, j, D) with one head."""
    if not tensor.is_nested or tensor.layout != torch.jagged:
        found = "strided" if tensor.is_nested else "not nested"
        raise RuntimeError(
            f"handtuned.scaled_dot_product_attention: {name} is {found}, expected query, key and value to be nested "
            "alike, with layout torch.jagged; make it with torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    ragged: int = tensor._ragged_idx  # type: ignore[attr-defined]
    if tensor.dim() not in (3, 4) or ragged != tensor.dim() - 2:
        raise RuntimeError(
            f"handtuned.scaled_dot_product_attention: {name} has {tensor.dim()} dims, ragged in dim {ragged}, "
            "expected (batch, heads, ragged, width) or (batch, ragged, width); transpose it"
        )
    rows: Tensor = tensor.values()
    return rows.transpose(0, 1) if tensor.dim() == 4 else rows.unsqueeze(1)


def _jagged(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, key_lengths: Tensor | None, options: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Nested tensors through the packed form; the results are nested like query."""
    q, k, v = (_packed_rows(name, t) for name, t in (("query", query), ("key", key), ("value", value)))
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "handtuned.scaled_dot_product_attention: key and value are nested with different offsets; make both with "
            "the same ones"
        )
    if query.lengths() is not None:  # type: ignore[attr-defined]
        raise RuntimeError(
            "handtuned.scaled_dot_product_attention: query is nested with holes between its sequences; "
            "call contiguous() on it"
        )
    if key_lengths is None:
        key_lengths = key.lengths()  # type: ignore[attr-defined]
    starts: Tensor = query.offsets()  # type: ignore[attr-defined]
    output, lse = attend(q, k, v, mask, starts, key.offsets(), key_lengths, *options)  # type: ignore[attr-defined]
    nested = torch.nested.nested_tensor_from_jagged
    if query.dim() == 3:
        return nested(output.squeeze(1), starts), nested(lse.squeeze(0), starts)
    return nested(output, starts).transpose(1, 2), nested(lse.transpose(0, 1), starts).transpose(1, 2)


# ---- the functions --------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: Window = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """torch.nn.functional.scaled_dot_product_attention: softmax(scale * query @ key^T + attn_mask) @ value.

    In two things it differs from torch: attn_mask beside is_causal means both, and a query that sees no key gives 0.

    Args:
        query: (*, H, Lq, D), or (N, Lq, D) without heads; float32, float64, bfloat16 or float16, D in 1..512.
        key: (*, Hk, Lk, D).   value: (*, Hk, Lk, Dv), Dv in 1..512. Leading dims broadcast as in matmul. Or all three
            nested with layout torch.jagged, (B, H, j, D): each sequence attends to its own keys alone.
        attn_mask: bool (True: may attend) or additive, in query's dtype or float32; broadcastable to (*, H, Lq, Lk).
            Read by its strides, never expanded; an additive one gets its gradient.
        dropout_p: probability of dropping a weight, in [0, 1], in steps of 2^-16, applied whenever it is > 0. The mask
            comes from Philox4x32-10 keyed by a seed drawn from torch's generator: the same on any thread count, ISA
            and backend, made again in the backward.
        is_causal: query i sees the keys j <= i + offset.
        scale: None is 1 / sqrt(D).
        enable_gqa: H is a multiple of Hk, and head h reads key head h // (H / Hk). Without it H = Hk.
        causal_alignment: "top_left" (offset 0) or "bottom_right" (offset Lk - Lq), for is_causal, window and slopes.
        window: (left, right): how far from its own position a query sees, None or -1 for any distance; w is (w, w), or
            (w, 0) with is_causal.
        key_lengths: (B,) int32 or int64: only the first key_lengths[b] keys of batch entry b exist.
        alibi_slopes: (H,) or (B, H), float32: slope_h * |i + offset - j| is subtracted from the scores. No gradient.
        softcap: scores become softcap * tanh(scores / softcap) before the mask is added; 0 switches it off.
        sinks: (H,), query's dtype or float32: one more score a head in the softmax, without a value. Gets its gradient.
        return_lse: also return log(sum(exp(scores))) of each row, sink included.

    Returns:
        (*, H, Lq, Dv) in query's dtype; in memory with heads inside the rows if query (of 4 dims) has them there, else
        contiguous. With return_lse also (*, H, Lq), float32 (float64 for float64), differentiable.
    """
    bottom_right, left, right = visible_window("scaled_dot_product_attention", is_causal, causal_alignment, window)
    if _any_autocast():
        query, key, value = _autocast(query, key, value)
    if scale is None:
        scale = _scale(query)
    if query.is_nested or key.is_nested or value.is_nested:
        output, lse = _jagged(
            *(query, key, value, attn_mask, key_lengths),
            (alibi_slopes, sinks, scale, bottom_right, left, right, softcap, dropout_p),
        )
        return (output, lse) if return_lse else output
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and (enable_gqa or q[1] == k[1] == v[1]):
        output, lse = attend(
            *(query, key, value, attn_mask, None, None, key_lengths, alibi_slopes, sinks),
            *(scale, bottom_right, left, right, softcap, dropout_p),
        )
    else:
        output, lse = _any_dims(
            *(query, key, value, attn_mask, key_lengths, enable_gqa),
            (alibi_slopes, sinks, scale, bottom_right, left, right, softcap, dropout_p),
        )
    return (output, lse) if return_lse else output


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    max_query_length: int | None = None,
    max_key_length: int | None = None,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window: Window = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Result:
    """Attention over sequences of any lengths packed one after the other, each attending to its own keys alone.

    Args:
        query: (T, H, D), float32, float64, bfloat16 or float16, D in 1..512.
        key: (Tk, Hk, D).   value: (Tk, Hk, Dv), Dv in 1..512; H a multiple of Hk.
        query_starts: (N + 1,) int32 or int64, from 0, nondecreasing: sequence b is the rows
            query_starts[b]..query_starts[b + 1], none where they are equal.   key_starts: likewise.
        max_query_length, max_key_length: accepted for other libraries' sake; nothing depends on them.
        causal_alignment: "bottom_right" or "top_left", by the lengths of each sequence.
        attn_mask: as in scaled_dot_product_attention, broadcastable to (N, H, rows, keys) with rows and keys at least
            the longest sequence; indexed within each sequence.
        key_lengths: (N,): only the first key_lengths[b] keys of sequence b exist.
        others: as in scaled_dot_product_attention; alibi_slopes (H,) or (N, H).

    Returns:
        (T, H, Dv), contiguous, 0 in rows at and behind query_starts[-1]. With return_lse also (H, T), there -inf.
    """
    bottom_right, left, right = visible_window("attention_varlen", is_causal, causal_alignment, window)
    if _any_autocast():
        query, key, value = _autocast(query, key, value)
    output, lse = attend(
        *(query, key, value, attn_mask, query_starts, key_starts, key_lengths, alibi_slopes, sinks),
        *(_scale(query) if scale is None else scale, bottom_right, left, right, softcap, dropout_p),
    )
    return (output, lse) if return_lse else output
