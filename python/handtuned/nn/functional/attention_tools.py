"""What is done with an attention's log-sum-exp: results over parts of the keys merged, weights looked at.

Both are plain torch code, differentiable to any order, on any device. The fused attention stores no weights; it
returns the log-sum-exp (lse) of each row's scores, and that is all these functions need besides its arguments.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Window, _scale, visible_window

MOST_WEIGHTS = 2**24  # computed at once; more are worked through in blocks of rows


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys from the attentions over each: for rings and split caches.

    lse = log(exp(lse1) + exp(lse2)),   out = exp(lse1 - lse) * out1 + exp(lse2 - lse) * out2, in lse's dtype

    A part that saw no key (lse -inf) counts for nothing, whatever its out holds; two of them give 0 and -inf. So a
    loop over parts may start from torch.empty and -inf. Merging is associative up to rounding. Dropout in the parts
    is kept; a sink belongs to one part alone. Differentiable in all four.

    Args:
        out1, out2: (*, L, Dv), or packed (T, H, Dv) where out is 3-d; one shape and dtype.
        lse1, lse2: (*, L), or packed (H, T); float32 (float64 for float64), as return_lse=True gives.

    Returns:
        (out, lse), shaped like out1 and lse1.
    """
    packed = out1.dim() == 3
    expected = [out1.shape[1], out1.shape[0]] if packed else list(out1.shape[:-1])
    if out2.shape != out1.shape or out2.dtype != out1.dtype:
        raise RuntimeError(
            f"handtuned.merge_attention: out2 is {out2.dtype} of shape {list(out2.shape)}, out1 is {out1.dtype} of "
            f"shape {list(out1.shape)}; pass two attentions of the same queries"
        )
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if list(lse.shape) != expected:
            raise RuntimeError(
                f"handtuned.merge_attention: {name} has shape {list(lse.shape)}, expected {expected} beside an out of "
                f"shape {list(out1.shape)}; pass what return_lse=True gave"
            )
    # The larger lse is taken out before exp. Where neither part saw a key it is -inf, and 0 is taken out instead.
    largest = torch.maximum(lse1, lse2).detach()
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    part1, part2 = torch.exp(lse1 - largest), torch.exp(lse2 - largest)
    total = part1 + part2
    empty = total == 0
    total = total.masked_fill(empty, 1.0)  # keeps log and quotient, and their gradients, finite
    lse = (largest + total.log()).masked_fill(empty, -math.inf)
    out = _weighted(out1, lse1, part1 / total, packed) + _weighted(out2, lse2, part2 / total, packed)
    return out.to(out1.dtype), lse


def _weighted(out: Tensor, lse: Tensor, weight: Tensor, packed: bool) -> Tensor:
    """weight * out in weight's dtype, 0 where the part saw no key."""
    unseen = lse == -math.inf
    if packed:
        weight, unseen = weight.T, unseen.T
    return out.masked_fill(unseen[..., None], 0.0) * weight[..., None]


def _chosen(name: str, count: int, choice: int | slice | Sequence[int] | Tensor | None, device: torch.device) -> Tensor:
    """The chosen indices of `count` as a tensor, negative ones counted from the end."""
    every = torch.arange(count, device=device)
    if choice is None:
        return every
    try:
        return every[choice].reshape(-1)
    except IndexError as error:
        raise RuntimeError(
            f"handtuned.attention_weights: {name} is {choice}, the limits are {-count} and {count - 1}; pass indices "
            f"of the {count} {name} of query"
        ) from error


def _check_weights(query: Tensor, key: Tensor, lse: Tensor, top_k: int | None) -> None:
    def require(ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"handtuned.attention_weights: {message}")

    require(
        query.dim() == 4,
        f"query has shape {list(query.shape)}, expected 4 dims (B, H, Lq, D); unsqueeze it, or take one sequence "
        "of a packed one",
    )
    batch, heads, _, width = query.shape
    together = key.dim() == 4 and (key.shape[0], key.shape[3]) == (batch, width)
    # A size in a message would bind torch.compile to its number, so where one can, it is written only for an error.
    if not (together and key.shape[1] > 0 and heads % key.shape[1] == 0):
        require(
            False,
            f"key has shape {list(key.shape)}, expected [{batch}, Hk, Lk, {width}] beside a query of shape "
            f"{list(query.shape)}, its {heads} heads a multiple of Hk; pass the key of the same attention",
        )
    require(
        lse.shape == query.shape[:-1],
        f"lse has shape {list(lse.shape)}, expected {list(query.shape[:-1])}; pass what return_lse=True gave",
    )
    if top_k is not None and not 1 <= top_k <= key.shape[2]:
        require(False, f"top_k is {top_k}, the limits are 1 and the {key.shape[2]} keys; pass a smaller number")


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: int | slice | Sequence[int] | Tensor | None = None,
    heads: int | slice | Sequence[int] | Tensor | None = None,
    average: bool = False,
    top_k: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    causal_alignment: str = "top_left",
    window: Window = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The weights exp(score - lse) of an attention that has run, all of them or those asked for; for looking.

    They are computed again from query, key and lse, so the attention itself stays on its fused kernel, and no more
    than the result and a block of rows is held in memory. They are without dropout. A row sums to 1, to less beside
    a sink (which is in lse), to 0 where no key is visible.

    Args:
        query: (B, H, Lq, D).   key: (B, Hk, Lk, D), H a multiple of Hk.   lse: (B, H, Lq), from return_lse=True.
        rows, heads: which query rows and heads: an index, a slice, a list or a tensor of them; None takes all.
        average: the mean over the chosen heads.
        top_k: only the largest top_k weights of each row, sorted, and the keys they belong to.
        attn_mask ... softcap: what the attention ran with, as in scaled_dot_product_attention.

    Returns:
        (B, heads, rows, Lk), without the dim of heads under average; with top_k (weights, keys) with top_k in place
        of Lk, keys int64. Weights have lse's dtype.
    """
    _check_weights(query, key, lse, top_k)
    picked_heads = _chosen("heads", query.shape[1], heads, query.device)
    picked_rows = _chosen("rows", query.shape[2], rows, query.device)
    bottom_right, left, right = visible_window("attention_weights", is_causal, causal_alignment, window)
    scores = _Scores(
        *(query, key, lse, picked_heads, attn_mask, key_lengths, alibi_slopes),
        *(_scale(query) if scale is None else scale, softcap, bottom_right, left, right),
    )
    per_row = max(1, query.shape[0] * len(picked_heads) * key.shape[2])
    blocks = []
    for block in picked_rows.split(max(1, MOST_WEIGHTS // per_row)):
        weights = scores.weights(block)
        if average:
            weights = weights.mean(1)
        blocks.append((weights,) if top_k is None else tuple(weights.topk(top_k, dim=-1)))
    results = [torch.cat(parts, dim=-2) for parts in zip(*blocks, strict=True)]
    return results[0] if top_k is None else (results[0], results[1])


class _Scores:
    """The chosen heads of an attention, ready to give the weights of any of its rows."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        heads: Tensor,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        slopes: Tensor | None,
        scale: float,
        softcap: float,
        bottom_right: bool,
        left: int,
        right: int,
    ) -> None:
        batch, all_heads, query_rows, _ = query.shape
        self.query, self.lse, self.heads = query, lse, heads
        self.key = key[:, heads // (all_heads // key.shape[1])].to(lse.dtype)
        self.scale, self.softcap, self.left, self.right = scale, softcap, left, right
        self.column = torch.arange(key.shape[2], device=query.device)
        lengths = torch.full((batch,), key.shape[2], device=query.device) if key_lengths is None else key_lengths
        self.lengths = lengths.reshape(-1, 1, 1, 1)
        self.offset = self.lengths - query_rows if bottom_right else torch.zeros_like(self.lengths)
        self.mask = None if mask is None else mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
        self.slopes = None if slopes is None else slopes.expand(batch, all_heads)[:, heads, None, None].to(lse.dtype)

    def weights(self, rows: Tensor) -> Tensor:
        """(B, heads, rows, Lk)."""
        scores = self.scale * (self._at(self.query, rows).to(self.lse.dtype) @ self.key.mT)
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        centre = rows[:, None] + self.offset
        visible = self.column < self.lengths
        if self.left >= 0:
            visible = visible & (self.column >= centre - self.left)
        if self.right >= 0:
            visible = visible & (self.column <= centre + self.right)
        if self.mask is not None:
            mask = self._at(self.mask, rows)
            visible, scores = (visible & mask, scores) if mask.dtype == torch.bool else (visible, scores + mask)
        if self.slopes is not None:
            scores = scores - self.slopes * (centre - self.column).abs()
        lse = self._at(self.lse[..., None], rows)
        scores = scores.masked_fill(~visible, -math.inf)
        return torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0))

    def _at(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """The chosen heads and these rows of a tensor [B or 1, H or 1, Lq or 1, *]."""
        if tensor.shape[1] > 1:
            tensor = tensor[:, self.heads]
        return tensor[:, :, rows] if tensor.shape[2] > 1 else tensor.expand(-1, -1, len(rows), -1)
