"""How the ops are split over processes: the sharding rules that torch.distributed.tensor asks for.

A rule says of one dim of the mesh which placements of the arguments give which placements of the results without a
word between the processes; torch moves what is placed otherwise to the rule that costs least. R is replicated, S(d)
split along dim d, P a sum still to be taken.

    linear          rows      input S(d), weight R                  ->  output S(d)
                    columns   input R, weight S(0), bias S(0)       ->  output S(-1)
                    sums      input S(-1), weight S(1), bias P      ->  output P, where no activation follows
    linear_int8     rows      input S(d), packed, scale, bias R     ->  output S(d)
    cross-entropy   rows      input S(d), target S(d), weight R     ->  loss S(d), of reduction "sum" P
    norms           rows      input S(d), weight R                  ->  output S(d)
    attention       batch     query, key, value S(0)                ->  output, lse S(0)
                    heads     query, key, value S(1)                ->  output, lse S(1)
    rotary          any dim   input S(d), cos, sin S(d), or R where they are the same for all  ->  output S(d)
    append_kv       batch, heads   as attention, where the caches are
    recurrent       batch     input, h0, c0 S(1), lengths S(0), weights R  ->  output, hn, cn S(1)
    packing                   weights R                             ->  packed R

Importing torch.distributed.tensor takes about as long as torch itself, so this module is imported when the first
DTensor comes along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from . import ops
from .ops.cross_entropy import REDUCTIONS

Given = dict[
    str, Any
]  # arguments by name; a tensor is its spec (shape, ndim, mesh, placements), a list a tuple of them
Rule = tuple[list[Placement], dict[str, Placement]]  # results in order; tensor arguments by name, R if not there
R, P = Replicate(), Partial()


def _where(wanted: bool, placement: Placement) -> Placement:
    """Of a result that has shape [0] unless it is wanted."""
    return placement if wanted else R


def _followed(op: str, given: Given, name: str, dims: Iterable[int]) -> Placement:
    """How the argument is split along one of these dims. Where an op writes into an argument, or keeps numbers of each
    row for the backward, the only rule there is follows this: such an argument is never moved, and the rows of what is
    kept, those of each process one after the other, are found as they were left."""
    spec = given[name]
    found = {p if type(p) is Shard and p.dim in dims else R for p in spec.placements}
    if len(found) > 1:
        raise RuntimeError(
            f"handtuned.{op}: {name} is placed as {list(spec.placements)}, the limit is one way to split its rows; "
            "use a mesh of one dim"
        )
    return found.pop()


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


def _linear_int8(given: Given) -> Iterator[Rule]:
    saved = given["activation"] != 0 and given["need_preactivation"]
    yield [R, R], {}
    for dim in range(given["input"].ndim - 1):
        yield [Shard(dim), _where(saved, Shard(dim))], {"input": Shard(dim), "residual": Shard(dim)}


def _cross_entropy_rows(op: str, given: Given) -> tuple[Placement, dict[str, Placement]]:
    """(rows, what goes with them). A mean over rows is no sum of means over parts of them: the function takes a sum and
    divides."""
    reduction = REDUCTIONS[given["reduction"]]
    rows = R if reduction == "mean" else _followed(op, given, "input", range(given["input"].ndim - 1))
    inputs = {"input": rows, "target": rows, "grad_loss": _where(reduction == "none", rows)}
    return rows, inputs | {"stats": _where(rows != R, Shard(1)), "kept": _where(rows != R, Shard(0))}


def _cross_entropy(given: Given) -> Iterator[Rule]:
    rows, inputs = _cross_entropy_rows("linear_cross_entropy", given)
    loss = rows if REDUCTIONS[given["reduction"]] == "none" else _where(rows != R, P)
    yield [loss, inputs["stats"], inputs["kept"]], inputs


def _cross_entropy_backward(given: Given) -> Iterator[Rule]:
    rows, inputs = _cross_entropy_rows("linear_cross_entropy_backward", given)
    needs = (given["need_linear_weight"], given["need_linear_bias"])
    of_weights = (_where(rows != R and need, P) for need in needs)
    yield [_where(given["need_input"], rows), *of_weights], inputs


# ---- norms -----------------------------------------------------------------------------------------------------------


def _rows(op: str, given: Given, name: str) -> Placement:
    return _followed(op, given, name, range(given[name].ndim - given["normalized_ndim"]))


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
    if not packed and not paged:  # which rows read a page, no process knows
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


def _rotary(given: Given) -> Iterator[Rule]:
    x, tables = given["input"], given["cos"]
    yield [R], {}
    for dim in range(x.ndim - 1):
        at = dim - x.ndim + tables.ndim
        table = _where(at >= 0 and tables.shape[at] > 1, Shard(at))
        yield [Shard(dim)], {"input": Shard(dim), "cos": table, "sin": table}


def _append_kv(given: Given) -> Iterator[Rule]:
    paged, caches = given["block_table"] is not None, ("key_cache", "value_cache")
    placed = [given[name].placements for name in caches]
    ways = {R, Shard(1)} if paged else {R, Shard(0), Shard(1)}
    if placed[0] != placed[1] or not ways.issuperset(placed[0]):
        raise RuntimeError(
            f"handtuned.append_kv: key_cache is placed as {list(placed[0])}, value_cache as {list(placed[1])}, allowed "
            f"are both replicated or split by heads{'' if paged else ' or batch entries'}; they are written where they "
            "are, so distribute them so"
        )
    way = _followed("append_kv", given, "key_cache", (0, 1))
    batch = _where(way == Shard(0), way)
    rows = dict.fromkeys(("query", "key", "value", *caches), way) | {"cache_lengths": batch}
    yield [_where(given["cos"] is not None, way), batch], rows


# ---- recurrent layers ------------------------------------------------------------------------------------------------


def _rnn(op: str) -> Callable[[Given], list[Rule]]:
    """Batch entries have nothing to do with each other, but all with all of the weights."""
    at = 0 if op == "rnn_cell" else 1

    def rules(given: Given) -> list[Rule]:
        packed_rows = op != "rnn_cell" and given["input"].ndim == 2
        batch = R if packed_rows else _followed(op, given, "input", (at,))
        split, is_lstm = batch != R, given["mode"].startswith("LSTM")
        numbers = _where(split, Shard(0))
        names = ("input", "h0", "c0", "grad_output", "grad_hn", "grad_cn", "grad_cells")
        inputs = dict.fromkeys(names, batch) | {"lengths": numbers, "saved": numbers}
        if op == "rnn_backward":
            grads = [_where(given[f"need_{name}"], batch) for name in ("input", "h0", "c0")]
            return [([*grads, _where(split and given["need_weights"], P)], inputs)]
        states = [batch, _where(is_lstm, batch)]
        if op == "rnn_cell":
            return [(states, inputs)]
        kept = [_where(given["need_cells"], batch), _where(given["need_saved"], numbers)] if op == "rnn" else []
        return [([batch, *states, *kept], inputs)]

    return rules


# ---- registration ----------------------------------------------------------------------------------------------------

_RULES: dict[str, Callable[[Given], Any]] = {
    "linear": _linear,
    "linear_inference": _linear_inference,
    "linear_backward": _linear_backward,
    "linear_int8": _linear_int8,
    "linear_cross_entropy": _cross_entropy,
    "linear_cross_entropy_backward": _cross_entropy_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "rotary": _rotary,
    "append_kv": _append_kv,
    **{op: _norm_backward(op) if op.endswith("_backward") else _norm(op) for op in ops.NORM_OPS},
    **{op: _rnn(op) for op in ops.RNN_OPS},
    **dict.fromkeys(("linear_pack", "linear_int8_pack", "rnn_pack"), lambda given: [([R], {})]),
}


def _check_dropout(op: str, given: Given) -> None:
    rates = {name: given.get(name) for name in ("dropout_p", "weight_dropout")}
    rates |= dict(zip(ops.RATES, given.get("rates") or (), strict=False)) if given.get("seed") is not None else {}
    for name, rate in rates.items():
        if rate:
            raise RuntimeError(
                f"handtuned.{op}: {name} is {rate} beside DTensors, the limit is 0: a process does not know which "
                "elements of the mask are its own; use torch.nn.Dropout"
            )


def _placements(value: Any, placement: Placement) -> list[Placement | None]:
    """Of an argument: one for a tensor, None for what is none; lists are laid open."""
    each = value if isinstance(value, tuple) else (value,)
    return [placement if hasattr(spec, "placements") else None for spec in each]


def _register(op: str) -> None:
    names = [argument.name for argument in ops.OPS[op]._schema.arguments]
    kinds = [str(argument.type) for argument in ops.OPS[op]._schema.arguments]

    def offered(*args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        given = dict(zip(names, args, strict=True))
        _check_dropout(op, given)
        return [
            (outputs, [p for name, value in given.items() for p in _placements(value, inputs.get(name, R))])
            for outputs, inputs in _RULES[op](given)
        ]

    register_sharding(ops.OPS[op])(offered)
    # torch asks a rule once for equal arguments, which to it are tensors, and the others from the first integer on. A
    # mode and a need_* say as much: from the first that is no tensor.
    first = next((i for i, kind in enumerate(kinds) if "Tensor" not in kind), len(names))
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[ops.OPS[op]]
    known.static_argnum = min(known.static_argnum, first)


for _op in ops.OPS:
    _register(_op)
