"""The numerics contract of attention: the formulas in float64 and the bounds that are taken from them.

There are two bounds. That of numerics.py: no tensor's error may exceed 1.5 times torch's own on the same inputs. And
one for each single element, which needs no peer: a few roundings of everything that is added up to make it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import attention_cases as ac
import numerics
import numpy as np
import simt_tools
import torch
import torch.nn.functional as F
from numerics import Array, wide
from torch import Tensor

import handtuned
from handtuned import reference

ROUNDINGS = 16  # that an element may be off, in the dtype of sums
MOST_DRAWS = 16  # before torch's bound counts as exceeded
Index = tuple[Any, ...]


@dataclass
class Exact:
    """Results by name, and for each element the sum of the absolute values of what it is made of."""

    values: dict[str, Array]
    magnitudes: dict[str, Array]


# ---- where a batch entry is, and what it sees ------------------------------------------------------------------------


def entry(t: Tensor, lengths: tuple[int, ...], b: int, seen: int, packed: bool) -> Tensor:
    """The first `seen` rows of batch entry b: [heads, seen, width], a view."""
    first = sum(lengths[:b])
    return t[first : first + seen].transpose(0, 1) if packed else t[b, :, :seen]


def queries_of(case: ac.Case, t: Tensor, b: int) -> Tensor:
    return entry(t, case.query_lengths, b, case.query_lengths[b], case.packed is not None)


def keys_of(case: ac.Case, t: Tensor, b: int) -> Tensor:
    return entry(t, case.stored_key_lengths, b, case.seen_key_lengths[b], case.packed is not None)


def lse_of(case: ac.Case, t: Tensor, b: int) -> Tensor:
    """[heads, rows] of an lse, [batch, heads, rows] or packed [heads, rows]."""
    first = sum(case.query_lengths[:b])
    return t[:, first : first + case.query_lengths[b]] if case.packed else t[b]


def mask_of(case: ac.Case, mask: Tensor, b: int) -> Tensor:
    """Expanded to [heads, rows, keys], a view."""
    sizes = (case.shape[1], case.query_lengths[b], case.seen_key_lengths[b])
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[b if mask.shape[0] > 1 else 0]
    for dim, size in enumerate(sizes):  # a packed mask may be larger than the sequence
        mask = mask if mask.shape[dim] == 1 else mask.narrow(dim, 0, size)
    return mask.expand(sizes)


def distance(case: ac.Case, b: int) -> Tensor:
    """i + offset - j: [rows, keys]."""
    rows, keys = case.query_lengths[b], case.seen_key_lengths[b]
    offset = keys - rows if case.alignment == "bottom_right" else 0
    return torch.arange(rows)[:, None] + offset - torch.arange(keys)


def visible(case: ac.Case, mask: Tensor | None, b: int) -> Tensor:
    """[heads, rows, keys]: which keys each query attends to."""
    (left, right), away = case.window_sides, distance(case, b)
    seen = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        seen &= away <= left
    if right >= 0:
        seen &= away >= -right
    if mask is None:
        return seen.expand(case.shape[1], -1, -1)
    local = mask_of(case, mask.detach(), b)
    return seen & (local if mask.dtype == torch.bool else local > -ac.INF)


def _query_index(case: ac.Case, b: int, h: int) -> Index:
    first = sum(case.query_lengths[:b])
    return (slice(first, first + case.query_lengths[b]), h) if case.packed else (b, h)


def _key_index(case: ac.Case, b: int, h: int) -> Index:
    first, seen, kv_head = sum(case.stored_key_lengths[:b]), case.seen_key_lengths[b], h // case.groups
    return (slice(first, first + seen), kv_head) if case.packed else (b, kv_head, slice(0, seen))


def _lse_index(case: ac.Case, b: int, h: int) -> Index:
    first = sum(case.query_lengths[:b])
    return (h, slice(first, first + case.query_lengths[b])) if case.packed else (b, h)


def _mask_index(case: ac.Case, shape: torch.Size, b: int, h: int) -> Index:
    whole = (b, h, slice(0, case.query_lengths[b]), slice(0, case.seen_key_lengths[b]))
    one = (0, 0, slice(0, 1), slice(0, 1))
    dims = len(shape)
    return tuple(w if size > 1 else o for w, o, size in zip(whole[4 - dims :], one[4 - dims :], shape, strict=True))


# ---- the textbook ----------------------------------------------------------------------------------------------------


def exact(case: ac.Case, t: ac.Tensors, factor: Tensor | None = None) -> Exact:
    """Output, lse and every gradient, one head of one batch entry after the other, without an intermediate rounding.

    factor: of dropout, 0 or 1 / (1 - p), [*lse.shape, longest keys].
    """
    shapes = {"output": t.grad_output.shape, "lse": t.grad_lse.shape}
    shapes |= {f"grad_{name}": leaf.shape for name, leaf in t.leaves().items()}
    dtype = wide(t.query).dtype
    values = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
    values["lse"] -= np.inf
    magnitudes = {name: np.zeros(shape, dtype) for name, shape in shapes.items()}
    for b in range(len(case.query_lengths)):
        for h in range(case.shape[1]):
            places: dict[str, Index] = {"output": _query_index(case, b, h), "lse": _lse_index(case, b, h)}
            places |= {"grad_query": places["output"], "grad_sinks": (h,)}
            places |= dict.fromkeys(("grad_key", "grad_value"), _key_index(case, b, h))
            if "grad_mask" in shapes:
                places["grad_mask"] = _mask_index(case, shapes["grad_mask"], b, h)
            found = _head(case, t, factor, b, h)
            for into, results in zip((values, magnitudes), found, strict=True):
                into["lse"][places["lse"]] = 0
                for name in shapes:  # kv heads, masks and sinks are shared, so their gradients add up
                    here = into[name][places[name]]
                    into[name][places[name]] = here + _sum_to(results[name], here.shape)
    return Exact(values, magnitudes)


def _sum_to(array: Array, shape: tuple[int, ...]) -> Array:
    """Summed over the dims that are 1 in shape, or missing on its left."""
    array = array.sum(tuple(range(array.ndim - len(shape))))
    axes = tuple(dim for dim, size in enumerate(shape) if size == 1 and array.shape[dim] != 1)
    total: Array = array.sum(axes, keepdims=True)
    return total


def _head(case: ac.Case, t: ac.Tensors, factor: Tensor | None, b: int, h: int) -> tuple[dict[str, Array], ...]:
    """(values, magnitudes) of one head: q [rows, width], k [keys, width], v [keys, value_width]."""
    rows, columns, statistics = _query_index(case, b, h), _key_index(case, b, h), _lse_index(case, b, h)
    q, grad = wide(t.query)[rows], wide(t.grad_output)[rows]
    k, v = (np.where(np.isnan(x), 0, x) for x in (wide(t.key)[columns], wide(t.value)[columns]))
    one = q.dtype.type(1)
    scale, cap = one * case.score_scale, one * case.softcap
    keep = one if factor is None else wide(factor.double())[statistics][:, : len(k)] * one
    seen, away = visible(case, t.mask, b)[h].numpy(), abs(distance(case, b).numpy())

    # The scores, and how much was added up to make them.
    capped = scale * (q @ k.T)
    size = abs(scale) * (abs(q) @ abs(k).T)
    if cap:
        capped = cap * np.tanh(capped / cap)
    s = capped
    if t.mask is not None and t.mask.is_floating_point():
        added = wide(t.mask)[_mask_index(case, t.mask.shape, b, h)]
        s, size = s + added, size + np.where(seen, abs(added), 0)
    if t.alibi_slopes is not None:
        slope = wide(t.alibi_slopes)[h if t.alibi_slopes.ndim == 1 else (b, h)]
        s, size = s - slope * away, size + slope * away
    s = np.where(seen, s, -np.inf)

    # The softmax. A row that sees nothing has weights of 0.
    sink = -np.inf * one if t.sinks is None else wide(t.sinks)[h] * one
    top = np.maximum(s.max(-1, initial=-np.inf), sink)
    with np.errstate(divide="ignore"):
        safe = np.where(np.isneginf(top), 0, top)
        lse = safe + np.log(np.exp(s - safe[:, None]).sum(-1) + np.exp(sink - safe))
    p = np.where(seen, np.exp(s - np.where(np.isneginf(lse), 0, lse)[:, None]), 0)
    output = (p * keep) @ v

    # The gradients.
    grad_lse = wide(t.grad_lse)[statistics] if case.grad_lse else np.zeros_like(lse)
    delta = (grad * output).sum(-1) - grad_lse
    ds = p * (keep * (grad @ v.T) - delta[:, None])
    of_sink = np.exp(sink - lse) if np.isfinite(sink) else np.zeros_like(lse)
    through_cap = 1 - (capped / cap) ** 2 if cap else one
    values = {
        "output": output,
        "lse": lse,
        "grad_query": scale * (ds * through_cap) @ k,
        "grad_key": scale * (ds * through_cap).T @ q,
        "grad_value": (p * keep).T @ grad,
        "grad_mask": ds,
        "grad_sinks": -(of_sink * delta).sum(),
    }
    # A weight is off by as much, relatively, as its score and its row's lse are absolutely.
    off = np.where(seen, 1 + size + (p * size).sum(-1, keepdims=True), 0)
    weight, output = p * off, (p * off * keep) @ abs(v)
    delta = (abs(grad) * output).sum(-1) + abs(grad_lse)
    ds = weight * (keep * (abs(grad) @ abs(v).T) + delta[:, None])
    magnitudes = {
        "output": output,
        "lse": np.where(np.isfinite(lse), 1 + abs(lse) + (p * size).sum(-1), 0),
        "grad_query": abs(scale) * ds @ abs(k),
        "grad_key": abs(scale) * ds.T @ abs(q),
        "grad_value": (weight * keep).T @ abs(grad),
        "grad_mask": ds,
        "grad_sinks": (of_sink * delta).sum() * (1 + abs(sink) + abs(lse).max(initial=0))
        if np.isfinite(sink)
        else 0 * one,
    }
    return values, magnitudes


# ---- torch's own operators -------------------------------------------------------------------------------------------


def run_torch(case: ac.Case, t: ac.Tensors, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(output, lse). `factor` replaces the random factor of dropout: 0 or 1 / (1 - p), [*lse.shape, longest keys].

    F.scaled_dot_product_attention where it knows every option and every query sees a key (else it gives NaN), else
    what models write by hand: products in the dtype of query, softmax in float32.
    """
    t = replace(t, key=t.key.nan_to_num(0), value=t.value.nan_to_num(0), query=t.query.nan_to_num(0))
    beyond = case.packed or case.softcap or case.sinks or case.alibi or case.dropout or case.grad_lse
    batch = len(case.query_lengths)
    seen = [visible(case, t.mask, b) for b in range(batch)]
    if beyond or not batch or case.lengths or not all(s.any(-1).all() for s in seen):
        return _by_hand(case, t, factor)
    options: dict[str, Any] = dict(scale=case.scale, enable_gqa=case.groups != 1)
    if t.mask is not None and t.mask.is_floating_point():
        hidden = torch.stack(seen).logical_not()
        options["attn_mask"] = t.mask if case.window_sides == (-1, -1) else t.mask.masked_fill(hidden, -ac.INF)
    elif case.causal and case.alignment == "top_left" and case.window is None and t.mask is None:
        options["is_causal"] = True
    elif t.mask is not None or case.window_sides != (-1, -1):
        options["attn_mask"] = torch.stack(seen)
    with torch.no_grad():
        dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
        lse = _by_hand(case, replace(t, **{n: getattr(t, n).to(dtype) for n in ("query", "key", "value")}), None)[1]
    return F.scaled_dot_product_attention(t.query, t.key, t.value, **options), lse


def _by_hand(case: ac.Case, t: ac.Tensors, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs, logs = [], []
    for b in range(len(case.query_lengths)):
        local = None if factor is None else lse_of(case, factor, b)[..., : case.seen_key_lengths[b]]
        output, lse = _entry_by_hand(case, t, local, b)
        outputs.append(output)
        logs.append(lse)
    if not case.packed:
        if outputs:
            return torch.stack(outputs), torch.stack(logs)
        s = t.query @ t.key.mT  # no entry: nothing but the shapes
        return s @ t.value, s.sum(-1)
    rest = t.query[sum(case.query_lengths) :]
    width = t.value.shape[-1]
    graph = sum(x[:0].sum() for x in (t.query, t.key, t.value))  # leads back to them also where there is no sequence
    tail = rest.new_zeros(*rest.shape[:2], width) + graph
    nothing = t.grad_lse.new_full((case.shape[1], rest.shape[0]), -ac.INF)
    return torch.cat([*(o.transpose(0, 1) for o in outputs), tail]), torch.cat([*logs, nothing], -1)


def _entry_by_hand(case: ac.Case, t: ac.Tensors, factor: Tensor | None, b: int) -> tuple[Tensor, Tensor]:
    q = queries_of(case, t.query, b)
    k, v = (keys_of(case, x, b).repeat_interleave(case.groups, 0) for x in (t.key, t.value))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = q @ k.mT * case.score_scale
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    seen = visible(case, t.mask, b)
    if t.mask is not None and t.mask.is_floating_point():
        s = s + mask_of(case, t.mask, b).masked_fill(~seen, 0).to(s.dtype)
    if t.alibi_slopes is not None:
        slopes = t.alibi_slopes if t.alibi_slopes.dim() == 1 else t.alibi_slopes[b]
        s = s - (slopes.to(wide)[:, None, None] * distance(case, b).abs()).to(s.dtype)
    s = s.to(wide).masked_fill(~seen, -ac.INF)
    if t.sinks is not None:
        s = torch.cat([s, t.sinks.to(wide)[:, None, None].expand(-1, s.shape[1], 1)], -1)
    nothing = s.isneginf().all(-1, keepdim=True)  # also where there is no key
    safe = s.masked_fill(nothing, 0)
    lse = safe.logsumexp(-1).masked_fill(nothing[..., 0], -ac.INF)
    p = torch.softmax(safe, -1).masked_fill(nothing, 0)[..., : k.shape[1]].to(q.dtype)
    return (p if factor is None else p * factor.to(q.dtype)) @ v, lse


# ---- the bounds ------------------------------------------------------------------------------------------------------


def dropout_factor(case: ac.Case, t: ac.Tensors, seed: Tensor) -> Tensor | None:
    """0 or 1 / (1 - p) for every row of the lse and key; None without dropout."""
    if case.dropout == 0:
        return None
    shape = torch.Size((*t.grad_lse.shape, case.sizes["k"]))
    return reference.dropout_factor(shape, 1, case.dropout, seed, torch.float64)


def on_gpu(dtype: torch.dtype) -> bool:
    """Whether kernels for GPUs take operands of the dtype as they are, and not converted to float32."""
    return dtype in (torch.bfloat16, torch.float16)


def multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether the kernels in force do."""
    if simt_tools.running or handtuned.backends._state.backend == "triton":
        return on_gpu(dtype)
    isa = next(row for row in handtuned._C.isa_table() if row["name"] == handtuned._C.isa())
    return dtype == torch.bfloat16 and isa["multiplies_bf16"]


def check_every_element(case: ac.Case, ours: dict[str, Tensor], truth: Exact, pairs: bool | None = None) -> None:
    """Sums in float32 (float64), one rounding at the end; what needs delta = grad . output also meets output's.

    Where bf16 is multiplied as bf16 (pairs; None: as the kernels in force do), so are the weights and their gradients:
    they are rounded once more in between.
    """
    pairs = multiplies_pairs(case.dtype) if pairs is None else pairs
    for name, tensor in ours.items():
        value, magnitude = truth.values[name], truth.magnitudes[name]
        sums = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32)
        stored, narrow = torch.finfo(tensor.dtype), torch.finfo(case.dtype)
        allowed = ROUNDINGS * sums.eps * magnitude + stored.eps / 2 * abs(np.nan_to_num(value, neginf=0))
        if name in ("grad_query", "grad_key", "grad_mask", "grad_sinks") and narrow.bits == 16:
            allowed += narrow.eps / 2 * magnitude
        if name in ("output", "grad_query", "grad_key", "grad_value") and pairs:
            allowed += narrow.eps / 2 * magnitude
        allowed += stored.tiny * stored.eps + sums.tiny * 1000  # where numbers are subnormal
        actual = wide(tensor).astype(value.dtype)
        assert (np.isneginf(actual) == np.isneginf(value)).all(), f"{case.name}: {name} is -inf elsewhere"
        with np.errstate(invalid="ignore"):
            error = np.where(np.isneginf(value), 0, abs(actual - value))
        bad = ~(error <= allowed)  # also NaN
        where = np.argwhere(bad)[:3].tolist()
        assert not bad.any(), (
            f"{case.name}: {name} is off at {int(bad.sum())} of {bad.size} places, {where}: "
            f"{actual[bad][:3]}, expected {value[bad][:3]}, allowed {allowed[bad][:3]}"
        )


@dataclass
class Drawn:
    """One draw of a case with torch's results and the truth, which do not depend on the kernel under test."""

    tensors: ac.Tensors
    torchs: dict[str, Tensor]
    truth: Exact


_drawn: dict[tuple[ac.Case, int], Drawn] = {}


def drawn(case: ac.Case, draw: int) -> Drawn:
    """Draw `draw`; those of the last case are remembered, for the next kernels."""
    if (case, draw) not in _drawn:
        if any(case != other for other, _ in _drawn):
            _drawn.clear()
        t = ac.tensors(case, draw)
        factor = dropout_factor(case, t, numerics.draw_seed(draw))
        torchs = ac.results(case, t, lambda case, t: run_torch(case, t, factor))
        _drawn[case, draw] = Drawn(t, torchs, exact(case, t, factor))
    return _drawn[case, draw]


def draws(case: ac.Case) -> int:
    """How many draws are averaged: few rows say little about an error."""
    rows = sum(case.query_lengths) * case.shape[1]
    return max(1, min(4, 200 // max(rows, 1)))


def has_peer(tensor: Tensor, truth: Exact, name: str) -> bool:
    """Whether torch's error says how large ours may be: not for a few numbers, nor where all cancels out.

    (Softmax does not change when a row's scores all move, so a mask without a dim for keys has a gradient of 0.)
    """
    cancelled = abs(truth.values[name]).max(initial=0) < 1e-6 * truth.magnitudes[name].max(initial=0)
    return name == "lse" or (tensor.numel() >= 64 and not cancelled)


def check_contract(case: ac.Case) -> None:
    """Runs the case on the kernels in force and holds output, lse and every gradient to both bounds.

    The largest error of a few draws is luck, of torch's as of ours, so a bound that they exceed is looked at again with
    MOST_DRAWS: the averages decide. Gradients may be off by one thing more than numerics.py allows: the backward makes
    the weights anew from the saved lse, exp(s - lse), so that each weight of a row inherits, relatively, the rounding
    of its lse: eps / 2 * |lse|. (torch's formula for small tensors saves the weights themselves.)
    """
    errors: dict[str, numerics.Errors] = {}
    excess: dict[str, str] = {}
    for number in (draws(case), MOST_DRAWS):
        done = max((entry.draws for entry in errors.values()), default=0)
        for draw in range(done, number):
            _add_errors(case, draw, errors)
        excess = {name: text for name, entry in errors.items() if (text := entry.excess())}
        if not excess:
            return
    raise AssertionError(f"{case.name}: {excess}")


def _add_errors(case: ac.Case, draw: int, errors: dict[str, numerics.Errors]) -> None:
    d = drawn(case, draw)
    numerics.draw_seed(draw)
    ours = ac.results(case, d.tensors)
    assert ours.keys() == d.torchs.keys() == d.truth.values.keys()
    for name, tensor in ours.items():
        same = d.torchs[name]
        assert tensor.shape == same.shape, f"{name}: shape {tensor.shape}, torch's {same.shape}"
        assert tensor.dtype == same.dtype, f"{name}: {tensor.dtype}, torch's {same.dtype}"
    check_every_element(case, ours, d.truth)
    for name in [name for name in ours if has_peer(ours[name], d.truth, name)]:
        finite = np.isfinite(d.truth.values[name])
        # A wide mask's gradient is as exact as the output beside it: delta = grad . output, as output was rounded.
        dtype = case.dtype if name == "grad_mask" else ours[name].dtype
        entry = errors.setdefault(name, numerics.Errors(torch.finfo(dtype).eps))
        if name.startswith("grad_"):
            lse = d.torchs["lse"]
            largest = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
            entry.slack = max(entry.slack, torch.finfo(lse.dtype).eps / 2 * largest)
        kept = torch.from_numpy(finite)
        entry.add(ours[name][kept], d.torchs[name][kept], d.truth.values[name][finite])
