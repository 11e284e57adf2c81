"""Attention the slow way, a loop over sequences, heads and rows in float64: what other tests compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def one_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    bottom_right: bool = True,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slope: float = 0.0,
    sink: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, lse, weights) of query [Lq, D], key [Lk, D], value [Lk, Dv], mask [Lq, Lk]."""
    query, key, value = query.double(), key.double(), value.double()
    rows, keys = query.shape[0], key.shape[0]
    output, lse = torch.zeros(rows, value.shape[1]).double(), torch.full((rows,), -math.inf).double()
    weights = torch.zeros(rows, keys).double()
    left, right = window[0], 0 if causal else window[1]
    for i in range(rows):
        centre = i + (keys - rows if bottom_right else 0)
        visible = [
            j
            for j in range(keys)
            if (left < 0 or j >= centre - left)
            and (right < 0 or j <= centre + right)
            and (mask is None or mask.dtype != torch.bool or mask[i, j])
        ]
        score = key[visible] @ query[i] * (query.shape[1] ** -0.5 if scale is None else scale)
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        if mask is not None and mask.dtype != torch.bool:
            score = score + mask[i, visible].double()
        score = score - slope * (centre - torch.tensor(visible, dtype=torch.float64)).abs()
        terms = score if sink is None else torch.cat([score, torch.tensor([sink]).double()])
        if len(terms):
            lse[i] = terms.logsumexp(0)
            weights[i, visible] = torch.exp(score - lse[i])
            output[i] = weights[i, visible] @ value[visible]
    return output, lse, weights


def every_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    masks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of query [B, H, Lq, D], key and value [B, Hk, Lk, *], slopes [B, H], masks [B, H, Lq, Lk]."""
    batch, heads, rows, _ = query.shape
    output = query.new_zeros(batch, heads, rows, value.shape[3], dtype=torch.float64)
    lse = output.new_zeros(batch, heads, rows)
    weights = output.new_zeros(batch, heads, rows, key.shape[2])
    for b in range(batch):
        n = key.shape[2] if key_lengths is None else int(key_lengths[b])
        for h in range(heads):
            kv = h // (heads // key.shape[1])
            output[b, h], lse[b, h], weights[b, h, :, :n] = one_head(
                *(query[b, h], key[b, kv, :n], value[b, kv, :n]),
                slope=0.0 if slopes is None else float(slopes[b, h]),
                sink=None if sinks is None else float(sinks[h]),
                mask=None if masks is None else masks[b, h, :, :n],
                **options,  # type: ignore[arg-type]
            )
    return output, lse, weights
