"""Multi-head attention as a function: projections, the fused attention on views of them, and the projection back.

Heads are split and merged by strides: q, k and v of a self-attention are views of one projection (rows, 3 * E), and the
attention writes its output with the heads inside the rows, where the projection back reads it. Only three things are
copied: rows of (L, N, E) when heads are merged (the output is contiguous, as torch's), keys and values to which bias_k
and bias_v are appended, and masks that are combined or inverted.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention import scaled_dot_product_attention
from .attention_tools import attention_weights
from .linear import linear

_OP = "multi_head_attention_forward"
Project = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]  # (which, input, weight, bias) -> output


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"handtuned.{_OP}: {message}")


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_inputs(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int) -> None:
    """RuntimeError if the shapes before the projections do not go together."""
    dims = query.dim()
    _require(
        not query.is_nested,
        "query is a nested tensor, expected a padded one; pass it with key_padding_mask, or its values to "
        "attention_varlen",
    )
    _require(dims in (2, 3), f"query has {dims} dims, expected 3, or 2 without a batch; reshape it")
    for name, tensor in (("key", key), ("value", value)):
        _require(
            tensor.dim() == dims,
            f"{name} has {tensor.dim()} dims, query has {dims}; pass all three with a batch, or all without",
        )
    _require(
        query.shape[-1] == embed_dim,
        f"query has width {query.shape[-1]}, expected the embedding width {embed_dim}; project it first",
    )
    _require(
        num_heads > 0 and embed_dim % num_heads == 0,
        f"the embedding width is {embed_dim} and the number of heads {num_heads}; the first must be a multiple of the "
        "second",
    )
    _require(
        key.shape[:-1] == value.shape[:-1],
        f"value has shape {list(value.shape)}, key has {list(key.shape)}; all but the last dim must be equal",
    )


def _check_mask(name: str, mask: Tensor, *allowed: list[int]) -> None:
    _require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        f"{name} is {mask.dtype}, allowed are bool (True hides) and floating-point types (added to the scores); "
        "convert it with .to()",
    )
    if list(mask.shape) not in allowed:  # only then, since dynamo cannot write a list of symbols
        shapes = " or ".join(map(str, allowed))
        _require(False, f"{name} has shape {list(mask.shape)}, expected {shapes}; reshape it")


def _given(name: str, weight: Tensor | None) -> Tensor:
    if weight is None:
        raise RuntimeError(f"handtuned.{_OP}: {name} is None; pass it, or the other form of the weights")
    return weight


# ---- projections ----------------------------------------------------------------------------------------------------


def project_packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, project: Project
) -> tuple[Tensor, ...]:
    """q, k and v (*, E) by one weight (3 * E, E): in as many products as there are different inputs."""
    if query is key and key is value:
        return project("qkv", query, weight, bias).chunk(3, -1)
    width = weight.shape[0] // 3
    if key is value:
        weights, biases = weight.split([width, 2 * width]), _split(bias, [width, 2 * width])
        return (project("q", query, weights[0], biases[0]), *project("kv", key, weights[1], biases[1]).chunk(2, -1))
    return project_separately(query, key, value, weight.chunk(3), bias, project)


def project_separately(
    query: Tensor, key: Tensor, value: Tensor, weights: Sequence[Tensor], bias: Tensor | None, project: Project
) -> tuple[Tensor, ...]:
    """q, k and v (*, E) by weights (E, E), (E, Ek) and (E, Ev); bias (3 * E,)."""
    biases = _split(bias, [weights[0].shape[0]] * 3)
    return tuple(project(*part) for part in zip("qkv", (query, key, value), weights, biases, strict=True))


def _project(which: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(input, weight, bias)


def _split(bias: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if bias is None else bias.split(sizes)


# ---- masks ----------------------------------------------------------------------------------------------------------


def _attention_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks in one, as the attention takes it: bool, True where a query may attend, or added to the scores.

    From attn_mask (L, S) or (N * heads, L, S) and key_padding_mask (N, S), both True where hidden, to a shape that
    broadcasts to (N, heads, L, S). One mask alone is not expanded.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    added = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask.to(dtype)
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


# ---- heads ----------------------------------------------------------------------------------------------------------


def _split_heads(rows: Tensor, heads: int, batch_first: bool) -> Tensor:
    """(N, L, E) or (L, N, E) -> (N, heads, L, E / heads), a view."""
    split: Tensor = rows.unflatten(-1, (heads, -1))
    return split.transpose(1, 2) if batch_first else split.permute(1, 2, 0, 3)


def _merge_heads(output: Tensor, batch_first: bool) -> Tensor:
    """The way back: (N, heads, L, D) -> (N, L, heads * D), a view of the attention's output, or (L, N, heads * D)."""
    return (output.transpose(1, 2) if batch_first else output.permute(2, 0, 1, 3)).flatten(2)


def _append(rows: Tensor, row: Tensor, batch_first: bool) -> Tensor:
    """rows with one more row, (1, 1, E), at the end of each sequence."""
    dim = 1 if batch_first else 0
    shape = list(rows.shape)
    shape[dim] = 1
    return torch.cat([rows, row.to(rows.dtype).expand(shape)], dim)


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
    batch_first: bool,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What lies between the projections; arguments and results as in multi_head_attention_forward, E wide."""
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value, batch_first = query[None], key[None], value[None], True
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    batch, rows = query.shape[:2] if batch_first else query.shape[1::-1]
    keys = key.shape[1 if batch_first else 0] if static_k is None else static_k.shape[1]
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, [rows, keys], [batch * num_heads, rows, keys])
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [batch, keys])

    if is_causal and not need_weights:  # the hint is believed
        attn_mask = None
    causal = is_causal and attn_mask is None
    if causal and bias_k is not None:  # the key that is appended is seen by every query
        attn_mask, causal = torch.ones(rows, keys, dtype=torch.bool, device=query.device).triu(1), False
    mask = _attention_mask(attn_mask, key_padding_mask, num_heads, query.dtype)
    if bias_k is not None and bias_v is not None:
        _require(static_k is None and static_v is None, "both static_k or static_v and bias_k are given; pass one")
        key, value = _append(key, bias_k, batch_first), _append(value, bias_v, batch_first)
        mask = None if mask is None else pad(mask, (0, 1), value=float(mask.dtype == torch.bool))

    q, k, v = (_split_heads(rows_of, num_heads, batch_first) for rows_of in (query, key, value))
    k = k if static_k is None else static_k.unflatten(0, (batch, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (batch, num_heads))
    sinks = q.new_zeros(num_heads) if add_zero_attn else None  # a key of zeros has score 0 and no value
    output, lse = scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout_p, is_causal=causal, sinks=sinks, return_lse=True
    )
    merged = _merge_heads(output, batch_first)
    weights = None
    if need_weights:
        found = attention_weights(q, k, lse, average=average_attn_weights, attn_mask=mask, is_causal=causal)
        assert isinstance(found, Tensor)  # a pair is for top_k
        weights = (_with_zero_key(found, lse, average_attn_weights) if add_zero_attn else found).to(output.dtype)
    if unbatched:
        return merged[0], None if weights is None else weights[0]
    return merged, weights


def _with_zero_key(weights: Tensor, lse: Tensor, average: bool) -> Tensor:
    """Weights (N, [heads,] L, S) with the column of the key of zeros, which is exp(0 - lse)."""
    column = (-lse).exp()
    return torch.cat([weights, (column.mean(1) if average else column)[..., None]], -1)


# ---- the function ---------------------------------------------------------------------------------------------------


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward: softmax(q k^T / sqrt(D) + masks) v by heads, projected.

    It differs from torch in this: the returned weights are without dropout; a query that sees no key gives 0 (torch:
    NaN, or 0 without weights); is_causal needs no attn_mask; keys that bias_k and add_zero_attn append are always seen,
    also beside is_causal.

    Args:
        query: (L, N, E), or (L, E) without a batch.   key: (S, N, Ek).   value: (S, N, Ev).
        embed_dim_to_check: E.   num_heads: divides E.
        in_proj_weight: (3 * E, E).   in_proj_bias: (3 * E,).
        bias_k, bias_v: (1, 1, E), one more key and value of every sequence.
        add_zero_attn: one more key and value of zeros; it costs nothing, being a sink of score 0.
        dropout_p: probability of dropping a weight, while training.
        key_padding_mask: (N, S), bool (True: hidden) or added to the scores. A bool one that only hides the end costs
            nothing: it is read as lengths.
        need_weights: also return the weights, averaged over the heads with average_attn_weights. They are computed
            again, after the fused attention.
        attn_mask: (L, S) or (N * num_heads, L, S), bool (True: hidden) or added to the scores.
        use_separate_proj_weight: take q_proj_weight (E, E), k_proj_weight (E, Ek) and v_proj_weight (E, Ev).
        static_k, static_v: (N * num_heads, S, E / num_heads), in place of the projected keys and values.
        is_causal: the hint that attn_mask is causal. Believed, and attn_mask not read, unless need_weights is set.

    Returns:
        (output (L, N, E), None or the weights (N, L, S') or (N, num_heads, L, S')), S' with the appended keys.
    """
    check_inputs(query, key, value, embed_dim_to_check, num_heads)
    if use_separate_proj_weight:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        separate = [_given(*pair) for pair in zip(names, (q_proj_weight, k_proj_weight, v_proj_weight), strict=True)]
        q, k, v = project_separately(query, key, value, separate, in_proj_bias, _project)
    else:
        q, k, v = project_packed(query, key, value, _given("in_proj_weight", in_proj_weight), in_proj_bias, _project)
    merged, weights = attend_heads(
        *(q, k, v, num_heads),
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout_p=dropout_p if training else 0.0,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        batch_first=False,
        static_k=static_k,
        static_v=static_v,
    )
    return linear(merged, out_proj_weight, out_proj_bias), weights
