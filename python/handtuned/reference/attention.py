"""Attention in plain PyTorch, with the op schemas' arguments and results.

Of batch b and query head h, with query rows i and keys j (offset = keys - queries if bottom_right, else 0):
    s_ij  = scale * q_i . k_j;   s = softcap * tanh(s / softcap);   s += mask_ij;   s -= slope_h * |i + offset - j|
    lse_i = log(sum_j exp(s_ij) + exp(sink_h)),   p_ij = exp(s_ij - lse_i),   out_i = sum_j p_ij * keep_ij / (1-p) * v_j
over the visible keys alone: those that the length, the window and the mask leave. Backward:
    dp = keep / (1-p) * (dout_i . v_j),   delta_i = dout_i . out_i - dlse_i,   ds = p * (dp - delta_i)
    dmask = ds,   dsink_h = -sum_i exp(sink_h - lse_i) * delta_i,   dq, dk through the softcap

Packed sequences are padded, paged keys gathered, and everything is then one dense problem. A value that no visible
pair uses is replaced by 0 before it is multiplied, so a NaN there reaches nothing, whatever the derivative.

The backward takes output and lse as inputs like the others: their own dependence on query, key and value runs through
the forward's node, so derivatives of any order are exact.
Sources: Vaswani et al. 2017 (arXiv:1706.03762), Dao 2023 (arXiv:2307.08691), Press et al. 2022 (arXiv:2108.12409).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .norm import _wanted, _wide, dropout_factor


class _Options(NamedTuple):
    mask: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    key_lengths: Tensor | None
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale: float
    bottom_right: bool
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    seed: Tensor | None


# ---- any form as a dense one ----------------------------------------------------------------------------------------


def _pad(rows: Tensor, starts: Tensor) -> Tensor:
    """Packed rows [T, ...] as [N, L, ...], L the longest sequence, zeros behind the end of each."""
    longest = int(starts.diff().max()) if starts.numel() > 1 else 0
    index = starts[:-1, None] + torch.arange(longest, device=rows.device)
    index = torch.where(index < starts[1:, None], index, rows.shape[0])
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[index]


def _unpad(padded: Tensor, starts: Tensor, total: int, fill: float = 0.0) -> Tensor:
    """The inverse: [N, L, ...] as `total` packed rows, `fill` in those that belong to no sequence."""
    row = torch.arange(total, device=padded.device, dtype=starts.dtype)
    entry = torch.searchsorted(starts, row, right=True) - 1
    index = torch.where(row < starts[-1], entry * padded.shape[1] + row - starts[entry], padded.shape[:2].numel())
    rows = padded.flatten(0, 1)
    return torch.cat([rows, rows.new_full((1, *rows.shape[1:]), fill)])[index]


def _dense(tensor: Tensor, starts: Tensor | None) -> Tensor:
    """A packed tensor [T, H, D] as [N, H, L, D]; a dense one as it is."""
    return tensor if starts is None else _pad(tensor, starts).transpose(1, 2)


def _paged(pages: Tensor, block_table: Tensor) -> Tensor:
    """[num_pages, Hk, page_size, D] as [B, Hk, max_pages * page_size, D]; a page behind a length may be any number."""
    chosen = pages[block_table.long().clamp(0, pages.shape[0] - 1)]
    return chosen.transpose(1, 2).flatten(2, 3)


def _per_head(tensor: Tensor, heads: int) -> Tensor:
    """Every query head's own keys: head h reads kv head h // (heads / kv_heads)."""
    return tensor.repeat_interleave(heads // max(tensor.shape[1], 1), 1)


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy with the strides of a fresh tensor, also where sizes of 0 or 1 leave others possible."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _like(result: Tensor, tensor: Tensor) -> Tensor:
    """In `tensor`'s dtype, and with its heads inside the rows if it has them there; else contiguous."""
    result = result.to(tensor.dtype)
    if tensor.dim() == 4 and tensor.stride(1) < tensor.stride(2):
        return _contiguous(result.transpose(1, 2)).transpose(1, 2)
    return _contiguous(result)


def _to_form(result: Tensor, tensor: Tensor, starts: Tensor | None) -> Tensor:
    """A dense result [B, H, L, D] in the form, dtype and layout of `tensor`."""
    if starts is not None:
        result = _unpad(result.transpose(1, 2), starts, tensor.shape[0])
    return _like(result, tensor)


# ---- products that a hidden NaN cannot pass through ------------------------------------------------------------------


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0.0)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """a_i . b_j. A NaN or infinity reaches its own pairs alone, and none of their derivatives."""
    finite_a, finite_b = a.isfinite().all(-1), b.isfinite().all(-1)
    finite = finite_a[..., :, None] & finite_b[..., None, :]
    return torch.where(finite, _finite(a) @ _finite(b).mT, (a @ b.mT).detach())


def _combine(weights: Tensor, b: Tensor, used: Tensor) -> Tensor:
    """sum_j weights_ij * b_j over the j that i uses; NaN where one of those is not finite."""
    bad = used.expand(weights.shape).to(b.dtype) @ (~b.isfinite()).to(b.dtype)
    return torch.where(bad > 0, torch.nan, weights @ _finite(b))


# ---- scores ---------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """Wide tensors [B, H, L, D]; `visible` and `keep` broadcast to the [B, H, Lq, Lk] of `score`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # four dims, cut to the longest sequences
    visible: Tensor
    score: Tensor  # after softcap, mask and slopes
    cap_slope: Tensor | None  # the derivative of the softcap
    keep: Tensor | None  # dropout: keep / (1-p)


def _lengths(starts: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.full((batch,), length, device=device) if starts is None else starts.diff()


def _positions(o: _Options, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """(distance j - i - offset, which keys exist and lie in the window), both [B, 1, Lq, Lk]."""
    batch, device = query.shape[0], query.device
    queries = _lengths(o.query_starts, batch, query.shape[2], device)
    keys = _lengths(o.key_starts, batch, key.shape[2], device) if o.key_lengths is None else o.key_lengths
    i, j = torch.arange(query.shape[2], device=device), torch.arange(key.shape[2], device=device)
    offset = (keys - queries)[:, None, None, None] if o.bottom_right else 0
    distance = j - i[:, None] - offset
    visible = (j < keys[:, None, None, None]) & (i[:, None] < queries[:, None, None, None])
    if o.window_left >= 0:
        visible = visible & (distance >= -o.window_left)
    if o.window_right >= 0:
        visible = visible & (distance <= o.window_right)
    return distance, visible


def _cut_mask(mask: Tensor | None, rows: int, keys: int) -> Tensor | None:
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    rows, keys = (n if size != 1 else 1 for n, size in zip((rows, keys), mask.shape[2:], strict=True))
    return mask[:, :, :rows, :keys]


def _problem(query: Tensor, key: Tensor, value: Tensor, o: _Options) -> _Problem:
    total = query.shape[0]
    q = _dense(_wide(query), o.query_starts)
    k, v = (
        _per_head(_paged(x, o.block_table) if o.block_table is not None else _dense(x, o.key_starts), q.shape[1])
        for x in (_wide(key), _wide(value))
    )
    distance, visible = _positions(o, q, k)
    score, cap_slope = _pairs(q, k) * o.scale, None
    if o.softcap > 0:
        tanh = torch.tanh(score / o.softcap)
        score, cap_slope = o.softcap * tanh, 1 - tanh**2
    mask = _cut_mask(o.mask, q.shape[2], k.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask != -torch.inf)
        score = score + mask.to(score.dtype)
    if o.alibi_slopes is not None:
        slopes = o.alibi_slopes.detach().to(score.dtype)
        score = score - slopes.reshape(-1, q.shape[1], 1, 1) * distance.abs()
    visible = visible & (score != -torch.inf)
    keep = None
    if o.dropout_p > 0:
        assert o.seed is not None
        packed = o.query_starts is not None
        shape = torch.Size([q.shape[1], total, k.shape[2]] if packed else score.shape)
        keep = dropout_factor(shape, 1, o.dropout_p, o.seed, score.dtype)
        keep = _dense(keep.transpose(0, 1), o.query_starts) if packed else keep
    return _Problem(q, k, v, mask, visible, score, cap_slope, keep)


def _logsumexp(p: _Problem, sinks: Tensor | None) -> Tensor:
    """lse [B, H, Lq]; -inf in a row that sees nothing, without a gradient."""
    score, visible = p.score, p.visible.expand(p.score.shape)
    if sinks is not None:
        sink = sinks.to(score.dtype)[:, None, None].expand(*score.shape[:3], 1)
        score, visible = torch.cat([score, sink], -1), torch.cat([visible, sink != -torch.inf], -1)
    some = visible.any(-1)
    # An empty row is summed as zeros: the derivative of the log of nothing would be NaN.
    score = torch.where(visible, score, torch.where(some[..., None], -torch.inf, 0.0).to(score.dtype))
    return torch.where(some, score.logsumexp(-1), -torch.inf)


def _weights(p: _Problem, lse: Tensor) -> Tensor:
    lse = torch.where(lse == -torch.inf, 0.0, lse)[..., None]
    return torch.where(p.visible, p.score - lse, -torch.inf).exp()


def _dropped(weights: Tensor, p: _Problem) -> Tensor:
    return weights if p.keep is None else weights * p.keep


# ---- gradients ------------------------------------------------------------------------------------------------------


def _per_row(rows: Tensor, starts: Tensor | None) -> Tensor:
    """lse or its gradient, [B, H, Lq] or packed [H, T], as [B, H, Lq, 1]."""
    return _dense(rows[..., None] if starts is None else rows.T[..., None], starts)


def _over_group(grad: Tensor, tensor: Tensor) -> Tensor:
    """The sum over the query heads that read the same key or value head."""
    heads = tensor.shape[1]
    return grad.reshape(grad.shape[0], heads, grad.shape[1] // max(heads, 1), *grad.shape[2:]).sum(2)


def _mask_gradient(ds: Tensor, cut: Tensor | None, mask: Tensor) -> Tensor:
    """ds summed over the dims that mask was broadcast along; 0 where mask is longer than the longest sequence."""
    assert cut is not None
    rows, keys = (1, 1, *mask.shape)[-2:]
    grad = pad(ds.sum_to_size(cut.shape), (0, keys - cut.shape[3], 0, rows - cut.shape[2]))
    return _contiguous(grad.reshape(mask.shape).to(mask.dtype))


def _nothing(query: Tensor, tensor: Tensor | None) -> Tensor:
    return query.new_empty(0, dtype=torch.float32 if tensor is None else tensor.dtype)


# ---- the ops --------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    block_table: Tensor | None,
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
    o = _Options(
        *(mask, query_starts, key_starts, key_lengths, block_table, alibi_slopes, sinks, scale),
        *(bottom_right, window_left, window_right, softcap, dropout_p, seed),
    )
    p = _problem(query, key, value, o)
    lse = _logsumexp(p, sinks)
    output = _combine(_dropped(_weights(p, lse), p), p.value, p.visible)
    if query_starts is not None:
        lse = _unpad(lse.transpose(1, 2), query_starts, query.shape[0], -torch.inf).transpose(0, 1)
    return _to_form(output, query, query_starts), _contiguous(lse)


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
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
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_mask: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = _Options(
        *(mask, query_starts, key_starts, key_lengths, None, alibi_slopes, sinks, scale),
        *(bottom_right, window_left, window_right, softcap, dropout_p, seed),
    )
    p = _problem(query, key, value, o)
    dout, out = _dense(_wide(grad_output), query_starts), _dense(_wide(output), query_starts)
    lse_rows = _per_row(lse, query_starts)
    delta = (dout * out).sum(-1, keepdim=True)  # what the softmax takes off every dp of a row
    if grad_lse is not None:
        delta = delta - _per_row(grad_lse, query_starts)
    weights = _weights(p, lse_rows[..., 0])
    ds = torch.where(p.visible, weights * (_dropped(_pairs(dout, p.value), p) - delta), 0.0)
    draw = scale * (ds if p.cap_slope is None else torch.where(p.visible, ds * p.cap_slope, 0.0))
    gradients = (
        (need_query, _combine(draw, p.key, p.visible), query, query_starts),
        (need_key, _over_group(_combine(draw.mT, p.query, p.visible.mT), key), key, key_starts),
        (need_value, _over_group(_combine(_dropped(weights, p).mT, dout, p.visible.mT), value), value, key_starts),
    )
    grad_query, grad_key, grad_value = (
        _to_form(grad, tensor, starts) if needed else _wanted(False, grad, tensor.dtype)
        for needed, grad, tensor, starts in gradients
    )
    grad_mask, grad_sinks = _nothing(query, mask), _nothing(query, sinks)
    if need_mask and mask is not None and mask.dtype != torch.bool:
        grad_mask = _mask_gradient(ds, p.mask, mask)
    if need_sinks and sinks is not None:
        share = (_wide(sinks)[:, None, None] - torch.where(lse_rows == -torch.inf, torch.inf, lse_rows)).exp()
        grad_sinks = -(share * delta).sum((0, 2, 3)).to(sinks.dtype)
    return grad_query, grad_key, grad_value, grad_mask, grad_sinks
