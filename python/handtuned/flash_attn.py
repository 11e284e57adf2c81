"""flash-attn 2's functions, for code that changes its import: ``from handtuned.flash_attn import flash_attn_func``.

Signatures, layouts and meanings are those of flash_attn.flash_attn_interface (version 2.8), served by the op behind
nn.functional.scaled_dot_product_attention on any device and in float32 and float64 too. Tensors (batch, length, heads,
width) are read as transposed views, never copied, and outputs come back contiguous in that layout.

Common arguments:
    dropout_p: dropout of the weights, applied whenever it is > 0.   softmax_scale: None is 1 / sqrt(width).
    causal: aligned with the bottom right, so the last query sees every key.
    window_size: (left, right) keys around a query's own position that it sees; negative is unbounded.
    softcap: softcap * tanh(scores / softcap) where it is > 0.
    alibi_slopes: (heads,) or (batch, heads), float32; adds -slope * |i + seqlen_k - seqlen_q - j|.
    deterministic: nothing to switch, the same input gives the same bits here at any number of threads.
    return_attn_probs: returns (out, softmax_lse, S_dmask). S_dmask is empty without dropout, as in flash-attn; with
        dropout it holds every weight, negative where it was dropped, and costs memory of seqlen_q * seqlen_k.
Query heads may be a multiple of the key and value heads (GQA). The width of v may differ from that of q and k.

Two things differ: softmax_lse of a query that sees no key is -inf (flash-attn says +inf), and a query that asks for a
gradient through a cache or a block_table is an error instead of a missing gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import kernels_for
from .nn import functional as F
from .nn.functional.attention import _scale, attend, visible_window
from .nn.functional.kv_cache import refuse_gradients
from .nn.functional.norm import _draw_seed
from .reference.attention import _Options as _Formula
from .reference.attention import _per_row, _problem, _weights

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]
Results = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """Attention of q (B, Lq, H, D) over k (B, Lk, Hk, D) and v (B, Lk, Hk, Dv).

    Returns:
        (B, Lq, H, Dv); with return_attn_probs also the lse (B, H, Lq) and S_dmask (B, H, Lq, Lk).
    """
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attend("flash_attn_func", q, k, v, None, None, options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """flash_attn_func with keys and values in one tensor kv (B, Lk, 2, Hk, D)."""
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    k, v = _unpacked("flash_attn_kvpacked_func", "kv", kv, 2, 5)
    return _attend("flash_attn_kvpacked_func", q, k, v, None, None, options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """flash_attn_func with queries, keys and values in one tensor qkv (B, L, 3, H, D)."""
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    q, k, v = _unpacked("flash_attn_qkvpacked_func", "qkv", qkv, 3, 5)
    return _attend("flash_attn_qkvpacked_func", q, k, v, None, None, options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Results:
    """Attention of packed sequences: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of q (Tq, H, D) and k, v.

    k is (Tk, Hk, D) and v (Tk, Hk, Dv), or with block_table (B, max_pages) pages (P, page, Hk, D) and (P, page, Hk, Dv)
    of any size, where cu_seqlens_k gives only the lengths (inference, no dropout). max_seqlen_q and max_seqlen_k are
    accepted and not needed.

    Returns:
        (Tq, H, Dv); with return_attn_probs also the lse (H, Tq) and S_dmask (B, H, longest q, longest k).
    """
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    if block_table is not None:
        return _attend_to_pages(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, options)
    return _attend("flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """flash_attn_varlen_func with keys and values in one tensor kv (Tk, 2, Hk, D)."""
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    k, v = _unpacked("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 4)
    return _attend("flash_attn_varlen_kvpacked_func", q, k, v, cu_seqlens_q, cu_seqlens_k, options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """flash_attn_varlen_func with queries, keys and values in one tensor qkv (T, 3, H, D)."""
    options = _Options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    q, k, v = _unpacked("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 4)
    return _attend("flash_attn_varlen_qkvpacked_func", q, k, v, cu_seqlens, cu_seqlens, options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, Lq, H, D) over a cache, after the new k and v were written into it; inference only.

    k_cache: (Bc, Lmax, Hk, D), or with block_table (B, max_pages) pages (P, page, Hk, D) of any size; v_cache likewise.
    k, v: (B, Lnew, Hk, D), written in place at cache_seqlens, which is then required.
    rotary_cos, rotary_sin: (Lro, R / 2) with R <= D: rotate the first R elements of k and q at their positions in the
        cache before use: pairs (0, 1), (2, 3), ... if rotary_interleaved, else (0, R/2), (1, R/2 + 1), ... Without
        causal and window all of q is at position cache_seqlens.
    cache_seqlens: (B,) or one number, the keys in the cache before the new ones; None: the whole cache is filled.
    cache_batch_idx: (B,) the row of the cache that each sequence uses; not with block_table.
    cache_leftpad: (B,) where the keys of each sequence begin in its cache.
    num_splits: accepted and not needed; how work is split over the keys depends on the shapes alone.

    Returns:
        (B, Lq, H, Dv); with return_softmax_lse also the lse (B, H, Lq).
    """
    op = "flash_attn_with_kvcache"
    pages = "(Bc, Lmax, Hk, D)" if block_table is None else "pages (P, page, Hk, D)"
    _require_dims(op, "(B, L, H, D)", q=q, k=k, v=v)
    _require_dims(op, pages, k_cache=k_cache, v_cache=v_cache)
    _require_dims(op, "(B, max_pages)", block_table=block_table)
    _require_dims(op, "(B,)", cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad)
    if cache_batch_idx is not None:
        _require(
            block_table is None,
            op,
            "cache_batch_idx and block_table are both given; the latter says where each sequence is, pass it alone",
        )
        block_table = cache_batch_idx.to(torch.int32)[:, None]  # a row of the cache is a page
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        _require(k is None, op, "k is given without cache_seqlens; pass where k goes")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full(q.shape[:1], cache_seqlens, dtype=torch.int32, device=q.device)
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(q, k, rotary_cos, rotary_sin, capacity)
    mask = None
    if cache_leftpad is not None:
        mask = torch.arange(capacity, device=q.device) >= cache_leftpad[:, None, None, None]
    results = F.attention_with_kv_cache(
        *(x.transpose(1, 2) for x in (q, k_cache, v_cache)),
        *(None if x is None else x.transpose(1, 2) for x in (k, v)),
        cache_lengths=cache_seqlens,
        block_table=block_table,
        attn_mask=mask,
        is_causal=causal,
        window=_window(window_size),
        scale=softmax_scale,
        alibi_slopes=alibi_slopes,
        softcap=max(softcap, 0.0),
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        return_lse=True,
    )
    output = results[0].transpose(1, 2)
    return (output, results[1]) if return_softmax_lse else output


# ---- what they share ------------------------------------------------------------------------------------------------


def _require(ok: bool, function: str, message: str) -> None:
    if not ok:
        raise RuntimeError(f"handtuned.{function}: {message}")


def _require_dims(function: str, form: str, **tensors: Tensor | None) -> None:
    """Each has one dim for each name in form."""
    dims = form.count(",") + (not form.endswith(",)"))
    for name, x in tensors.items():
        if x is not None:
            _require(x.dim() == dims, function, f"{name} has shape {list(x.shape)}, expected {form}; reshape it first")


def _window(window_size: Window) -> Window:
    """Any negative number is unbounded."""
    if len(window_size) != 2:
        raise RuntimeError(f"handtuned.flash_attn: window_size is {window_size}; pass (left, right)")
    return max(window_size[0], -1), max(window_size[1], -1)


def _unpacked(op: str, name: str, packed: Tensor, parts: int, dims: int) -> tuple[Tensor, ...]:
    """The views of a tensor (..., parts, heads, width)."""
    form = f"({'T' if dims == 4 else 'B, L'}, {parts}, H, D)"
    _require(
        packed.dim() == dims and packed.shape[-3] == parts,
        op,
        f"{name} has shape {list(packed.shape)}, expected {form}; stack {', '.join(name)} on dim -3",
    )
    return packed.unbind(-3)


class _Options(NamedTuple):
    """What every function has, as its caller gave it."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Window
    softcap: float
    alibi_slopes: Tensor | None
    return_attn_probs: bool

    def scoring(self, op: str, q: Tensor) -> tuple[float, bool, int, int, float]:
        """(scale, bottom_right, window_left, window_right, softcap) as the op attention takes them."""
        scale = _scale(q) if self.softmax_scale is None else self.softmax_scale
        window = visible_window(op, self.causal, "bottom_right", _window(self.window_size))
        return scale, *window, max(self.softcap, 0.0)


def _attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor | None, k_starts: Tensor | None, options: _Options
) -> Results:
    """Dense without starts, else packed."""
    _require_dims(op, "(B, L, H, D)" if q_starts is None else "(T, H, D)", q=q, k=k, v=v)
    dropout_p, slopes, scoring = options.dropout_p, options.alibi_slopes, options.scoring(op, q)
    if q_starts is None:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    seed = _next_seed(q) if options.return_attn_probs and dropout_p > 0 else None
    output, lse = attend(q, k, v, None, q_starts, k_starts, None, slopes, None, *scoring, dropout_p)
    if q_starts is None:
        output = output.transpose(1, 2)
    if not options.return_attn_probs:
        return output
    if seed is None:
        return output, lse, q.new_empty(0)
    formula = _Formula(None, q_starts, k_starts, None, None, slopes, None, *scoring, dropout_p, seed)
    return output, lse, _signed_weights(q, k, v, lse, formula)


@torch.no_grad()
def _signed_weights(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, formula: _Formula) -> Tensor:
    """Every weight, negative where it was dropped, from the formula that the kernels are tested with."""
    problem = _problem(q, k, v, formula)
    weights = _weights(problem, _per_row(lse, formula.query_starts)[..., 0])
    assert problem.keep is not None
    return torch.where(problem.keep == 0, -weights, weights).to(q.dtype)


def _next_seed(q: Tensor) -> Tensor:
    """The seed that the next dropout draws; the generator is left as it is."""
    with torch.random.fork_rng([] if q.device.type == "cpu" else None):
        return _draw_seed(q)


def _attend_to_pages(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, block_table: Tensor, options: _Options
) -> Results:
    op, p = "flash_attn_varlen_func", options.dropout_p
    refuse_gradients(op, q=q, k=k, v=v)
    _require(p == 0, op, f"dropout_p is {p}, with block_table the limit is 0; pages serve inference")
    _require_dims(op, "(T, H, D)", q=q)
    _require_dims(op, "pages (P, page, Hk, D)", k=k, v=v)
    output, lse = kernels_for("attention", q).attention(
        *(q, k.transpose(1, 2), v.transpose(1, 2), None, q_starts, None, k_starts.diff(), block_table),
        *(options.alibi_slopes, None, *options.scoring(op, q), 0.0, None),
    )
    return (output, lse, q.new_empty(0)) if options.return_attn_probs else output


def _check_rotary(q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, capacity: int) -> None:
    op = "flash_attn_with_kvcache"
    if cos is None or sin is None or k is None:
        raise RuntimeError(f"handtuned.{op}: of k, rotary_cos and rotary_sin some are None; rotary needs all three")
    width = q.shape[-1]
    _require(
        cos.dim() == 2 and cos.shape == sin.shape and cos.shape[0] >= capacity and 2 * cos.shape[1] <= width,
        op,
        f"rotary_cos has shape {list(cos.shape)} and rotary_sin {list(sin.shape)}, expected one shape (Lro, R / 2) "
        f"with Lro >= {capacity}, the length of the cache, and R <= {width}, the width of q; make them as large",
    )
