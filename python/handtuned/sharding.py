"""How the ops are split over processes: the sharding rules that torch.distributed.tensor asks for.

A rule says of one dim of the mesh which placements of the arguments give which placements of the results without a
word between the processes; torch moves what is placed otherwise to the rule that costs least. R is replicated, S(d)
split along dim d, P a sum still to be taken.

    linear       rows      input S(d), weight R                     ->  output S(d)
                 columns   input R, weight S(0), bias S(0)          ->  output S(-1)
                 sums      input S(-1), weight S(1), bias P         ->  output P, where no activation follows
    norms        rows      input S(d), weight R                     ->  output S(d)
    attention    batch     query, key, value S(0)                   ->  output, lse S(0)
                 heads     query, key, value S(1)                   ->  output, lse S(1)

Importing torch.distributed.tensor takes about as long as torch itself, so this module is imported when the first
DTensor comes along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from . import ops

Given = dict[str, Any]  # arguments by name; a tensor is its spec: shape, ndim, mesh, placements
Rule = tuple[list[Placement], dict[str, Placement]]  # results in order; tensor arguments by name, R if not there
R, P = Replicate(), Partial()


def _where(wanted: bool, placement: Placement) -> Placement:
    """Of a result that has shape [0] unless it is wanted."""
    return placement if wanted else R


# ---- linear ----------------------------------------------------------------------------------------------------------


def _linear(given: Given) -> Iterator[Rule]:
    last, active = given["input"].ndim - 1, given["activation"] != 0

    def outputs(placement: Placement) -> list[Placement]:
        return [placement, _where(active, placement)]

    yield outputs(R), {}
    for dim in range(last):
        yield outputs(Shard(dim)), {"input": Shard(dim), "residual": Shard(dim)}
    if given["packed"] is None:
        split = Shard(last)
        yield outputs(split), {"weight": Shard(0), "bias": Shard(0), "residual": split}
        if not active:
            yield outputs(P), {"input": split, "weight": Shard(1), "bias": P, "residual": P}


def _linear_inference(given: Given) -> Iterator[Rule]:
    for outputs, inputs in _linear(given):
        yield outputs[:1], inputs


def _linear_backward(given: Given) -> Iterator[Rule]:
    last, active = given["input"].ndim - 1, given["activation"] != 0

    def grads(input: Placement, weight: Placement, bias: Placement) -> list[Placement]:
        named = {"input": input, "weight": weight, "bias": bias}
        return [_where(given[f"need_{name}"], placement) for name, placement in named.items()]

    yield grads(R, R, R), {}
    for dim in range(last):
        rows = Shard(dim)
        yield grads(rows, P, P), {"grad_output": rows, "input": rows, "preactivation": _where(active, rows)}
    split = Shard(last)
    columns = {"grad_output": split, "weight": Shard(0), "bias": Shard(0), "preactivation": _where(active, split)}
    yield grads(P, Shard(0), Shard(0)), columns
    if not active:
        yield grads(split, Shard(1), R), {"input": split, "weight": Shard(1)}


# ---- norms -----------------------------------------------------------------------------------------------------------


def _rows(op: str, given: Given, name: str) -> Placement:
    """Where the rows of the argument are. The only rule there is follows it, so that the statistics, whose rows are
    those of each process one after the other, are found by the backward as the forward left them, and never moved."""
    spec = given[name]
    dims = spec.ndim - given["normalized_ndim"]
    found = {p if type(p) is Shard and p.dim < dims else R for p in spec.placements}
    if len(found) > 1:
        raise RuntimeError(
            f"handtuned.{op}: {name} is placed as {list(spec.placements)}, the limit is one way to split its rows; "
            "use a mesh of one dim"
        )
    return found.pop()


def _norm(op: str) -> Callable[[Given], list[Rule]]:
    """The rule of a norm, or of a residual add and a norm."""
    statistics = [] if op.endswith("_inference") else [Shard(1 if "layer_norm" in op else 0)]
    adds = op.startswith("add_")

    def rules(given: Given) -> list[Rule]:
        rows = _rows(op, given, "residual" if adds else "input")
        outputs = [rows, rows] if adds else [rows]
        return [([*outputs, *(_where(rows != R, s) for s in statistics)], {"input": rows, "residual": rows})]

    return rules


def _norm_backward(op: str) -> Callable[[Given], list[Rule]]:
    saved = Shard(1 if "layer_norm" in op else 0)
    adds = op.startswith("add_")
    parameters = ("weight", "bias") if "layer_norm" in op else ("weight",)

    def rules(given: Given) -> list[Rule]:
        rows = _rows(op, given, "new_residual" if adds else "input")
        moved = ("grad_output", "grad_new_residual", "new_residual", "input")
        inputs = {name: rows for name in moved} | {name: _where(rows != R, saved) for name in ("stats", "rstd")}
        sums = _where(rows != R, P)
        # without dropout, which is refused, the gradient of an input that is added is the residual's
        first = [R, _where(given["need_input"] or given["need_residual"], rows)] if adds else []
        grads = first or [_where(given["need_input"], rows)]
        return [([*grads, *(_where(given[f"need_{name}"], sums) for name in parameters)], inputs)]

    return rules


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention_inputs(given: Given) -> Iterator[tuple[Placement, Placement, dict[str, Placement]]]:
    """(rows of query, rows of lse, what else is split) of each way to split an attention."""
    query, key, mask, slopes = given["query"], given["key"], given["mask"], given["alibi_slopes"]
    packed, paged = given["query_starts"] is not None, given.get("block_table") is not None

    def of_mask(dim: int) -> Placement:
        """A mask has up to four dims, the last ones; one of size 1 is the same for all."""
        at = dim - 4 + (mask.ndim if mask is not None else 0)
        return Shard(at) if at >= 0 and mask.shape[at] > 1 else R

    yield R, R, {}
    if paged:
        return
    if not packed:
        batch = Shard(0)
        by_entry = {"mask": of_mask(0), "key_lengths": batch}
        yield batch, batch, by_entry | {"alibi_slopes": _where(slopes is not None and slopes.ndim == 2, batch)}
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads == kv_heads or all(kv_heads % size == 0 for size in query.mesh.shape):
        by_head = {"mask": of_mask(1), "sinks": Shard(0)}
        lse = Shard(0 if packed else 1)
        yield Shard(1), lse, by_head | {"alibi_slopes": Shard(slopes.ndim - 1) if slopes is not None else R}


def _attention(given: Given) -> Iterator[Rule]:
    for rows, lse, inputs in _attention_inputs(given):
        yield [rows, lse], {"query": rows, "key": rows, "value": rows, **inputs}


def _attention_backward(given: Given) -> Iterator[Rule]:
    for rows, lse, inputs in _attention_inputs(given):
        named = dict.fromkeys(("grad_output", "query", "key", "value", "output"), rows)
        grads = [_where(given[f"need_{name}"], rows) for name in ("query", "key", "value")]
        for name in ("mask", "sinks"):
            wanted = (
                given[f"need_{name}"] and given[name] is not None and given[name].tensor_meta.dtype.is_floating_point
            )
            whole = rows != R and inputs.get(name, R) == R  # every process has a part of the gradient of all of it
            grads.append(_where(wanted, P if whole else inputs.get(name, R)))
        yield grads, {**named, "grad_lse": lse, "lse": lse, **inputs}


# ---- registration ----------------------------------------------------------------------------------------------------

_RULES: dict[str, Callable[[Given], Any]] = {
    "linear": _linear,
    "linear_inference": _linear_inference,
    "linear_backward": _linear_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    **{op: _norm_backward(op) if op.endswith("_backward") else _norm(op) for op in ops.NORM_OPS},
}


def _check_dropout(op: str, given: Given) -> None:
    if given.get("dropout_p"):
        raise RuntimeError(
            f"handtuned.{op}: dropout_p is {given['dropout_p']} beside DTensors, the limit is 0: a process does not "
            "know which elements of the mask are its own; use torch.nn.Dropout"
        )


def _register(op: str) -> None:
    names = [argument.name for argument in ops.OPS[op]._schema.arguments]

    def offered(*args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        if op not in _RULES:
            raise RuntimeError(
                f"handtuned.{op}: no rule says how to split it over processes, so it takes no DTensor; "
                "pass to_local() or full_tensor()"
            )
        given = dict(zip(names, args, strict=True))
        _check_dropout(op, given)
        return [
            (outputs, [inputs.get(name, R) if hasattr(spec, "placements") else None for name, spec in given.items()])
            for outputs, inputs in _RULES[op](given)
        ]

    register_sharding(ops.OPS[op])(offered)


for _op in ops.OPS:
    _register(_op)
