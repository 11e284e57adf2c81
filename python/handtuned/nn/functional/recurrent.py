"""What the recurrent functions and modules run: arguments made canonical, autograd only where a gradient is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from ... import ops, reference
from ...autograd import apply, backward_op, kernels_for, wants_grad
from .norm import _draw_seed, _dropout, _or_none
from .variants import Variant

Input = Tensor | PackedSequence
Spent = Callable[[], None]
Result = Any  # (output, final states) with output as input is: a tensor or a PackedSequence


class _Rnn(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        spent: Spent | None,
        input: Tensor,
        lengths: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        seed: Tensor | None,
        packed: Tensor,
        sizes: tuple[Any, ...],
        bias: bool,
        need_cells: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output, hn, cn, cells, saved = kernels.rnn(input, lengths, h0, c0, packed, *sizes, seed, True, need_cells)
        mode, _, _, _, bidirectional, dropout_p, rates = sizes
        ctx.kernels, ctx.spent, ctx.options = kernels, spent, (mode, bidirectional, bias, dropout_p, rates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, lengths, h0, c0, seed, saved, *weights)
        ctx.has = (ops.CELLS[mode].is_lstm, need_cells)
        ctx.mark_non_differentiable(*(t for t, has in zip((cn, cells), ctx.has, strict=True) if not has))
        return output, hn, cn, cells

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_hn: Tensor | None,
        grad_cn: Tensor | None,
        grad_cells: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        input, lengths, h0, c0, seed, saved, *weights = ctx.saved_tensors
        _, _, need_input, _, need_h0, need_c0, _, _, _, _, _, *need_each = ctx.needs_input_grad
        if ctx.spent is not None:
            ctx.spent()
        has_cn, has_cells = ctx.has
        grad_input, grad_h0, grad_c0, flat = backward_op(
            "rnn_backward",
            ctx.kernels,
            *(grad_output, grad_hn, grad_cn if has_cn else None, grad_cells if has_cells else None),
            *(input, lengths, h0, c0, list(weights), saved, *ctx.options, seed),
            *(need_input, need_h0, need_c0, any(need_each)),
        )
        grads: list[Tensor | None] = [None] * len(weights)
        if any(need_each):
            parts = flat.split([w.numel() for w in weights])
            each = zip(need_each, parts, weights, strict=True)
            grads = [part.view(w.shape) if need else None for need, part, w in each]
        return (
            *(None, None, _or_none(need_input, grad_input), None, _or_none(need_h0, grad_h0)),
            *(_or_none(need_c0, grad_c0), None, None, None, None, None, *grads),
        )


def _recur(
    packed: Tensor | None,
    spent: Spent | None,
    input: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    mode: str,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    dropout_p: float,
    variant: Variant,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hn, cn, cells) of the op rnn, differentiable, on whatever kernel serves it. A seed is drawn here."""
    mode = variant.mode(mode)
    kernels = kernels_for("rnn", input, mode)
    hidden, state = weights[1].shape[0] // ops.CELLS[mode].gates, weights[1].shape[1]
    rates, need_cells = variant.rates(training), variant.return_cell_states
    sizes = (mode, hidden, state if state != hidden else 0, num_layers, bidirectional, dropout_p, rates)
    seed = _draw_seed(input) if dropout_p > 0 or (training and rates is not None) else None
    weight_dropout = 0.0 if rates is None else rates[-1]
    drops = (weight_dropout, seed if weight_dropout > 0 else None)
    if kernels is not ops and kernels.is_formula:
        kernels.note("rnn_pack", (weights, mode, bidirectional, bias, *drops))
        kernels.note("rnn", (input, lengths, h0, c0, None, *sizes, seed, False, need_cells))
        return reference.recur(input, lengths, h0, c0, weights, mode, bidirectional, bias, dropout_p, rates, seed)
    if packed is None or weight_dropout > 0:
        packed = kernels.rnn_pack(weights, mode, bidirectional, bias, *drops)
    if torch.is_grad_enabled() and wants_grad(kernels, input, h0, c0, *weights):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = apply(
            _Rnn, kernels, spent, input, lengths, h0, c0, seed, packed, sizes, bias, need_cells, *weights
        )
        return found
    if seed is None and rates is None and not need_cells:
        output, hn, cn = kernels.rnn_inference(input, lengths, h0, c0, packed, *sizes[:-2])
        return output, hn, cn, cn
    output, hn, cn, cells, _ = kernels.rnn(input, lengths, h0, c0, packed, *sizes, seed, False, need_cells)
    return output, hn, cn, cells


# ---- arguments made canonical ---------------------------------------------------------------------------------------


def _require(op: str, ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(f"handtuned.{op}: {message}")


def _states(op: str, mode: str, hx: Any) -> tuple[Tensor | None, Tensor | None]:
    """(h0, c0) of what a caller passed as hx."""
    if hx is None:
        return None, None
    if mode != "LSTM":
        _require(op, isinstance(hx, Tensor), f"hx is a {type(hx).__name__}, expected a tensor, the state h")
        return hx, None
    ok = isinstance(hx, (tuple, list)) and len(hx) == 2
    _require(op, ok, f"hx is a {type(hx).__name__}, expected a tuple of two tensors, (h, c)")
    return hx[0], hx[1]


def _autocast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Under autocast float32 and 16-bit tensors in its dtype."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _check(op: str, input: Tensor, weights: Sequence[Tensor], num_layers: int, each: int) -> None:
    expected = num_layers * each
    _require(
        op,
        len(weights) == expected and num_layers >= 1,
        f"weights has {len(weights)} tensors, expected {expected} for num_layers {num_layers}; pass torch's flat "
        "weights, w_ih, w_hh, then b_ih, b_hh if bias, then w_hr if projected, of each layer and direction",
    )
    _require(
        op,
        input.dtype == weights[0].dtype,
        f"input is {input.dtype}, the weights are {weights[0].dtype}; convert one with .to()",
    )
    _require(
        op,
        weights[0].dim() == 2 == weights[1].dim(),
        f"w_ih and w_hh have shapes {list(weights[0].shape)} and {list(weights[1].shape)}; pass matrices",
    )
    _require(
        op,
        input.shape[-1:] == weights[0].shape[1:],
        f"input has shape {list(input.shape)}, expected input_size {weights[0].shape[1]} as its last dim; pass an "
        "input of that width",
    )


def _lengths(op: str, input: Tensor, lengths: Any) -> Tensor | None:
    if lengths is None:
        return None
    _require(op, input.dim() == 3, f"lengths is given but input has {input.dim()} dims; unsqueeze the batch dim")
    moved: Tensor = torch.as_tensor(lengths).to("meta" if input.is_meta else "cpu", torch.int64)
    return moved


def _sorted_lengths(batch_sizes: Tensor) -> Tensor:
    """How many steps each row has, falling, from how many rows each step has."""
    rows = torch.arange(int(batch_sizes[0]) if batch_sizes.numel() else 0)
    return (batch_sizes > rows[:, None]).sum(1)


def _permuted(state: Tensor | None, order: Tensor | None) -> Tensor | None:
    return state if state is None or order is None else state.index_select(1, order)


def _tensors(op: str, weights: Sequence[Any]) -> list[Tensor]:
    kinds = sorted({type(w).__name__ for w in weights if not isinstance(w, Tensor)})
    _require(op, not kinds, f"weights has {', '.join(kinds)}, expected tensors alone; pass the parameters themselves")
    return list(weights)


def run(
    op: str,
    mode: str,
    input: Input,
    hx: Any,
    weights: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any,
    packed: Tensor | None,
    variant: Variant,
    spent: Spent | None = None,
) -> Result:
    """Any of the functions below, and the modules'. spent: what a backward calls, after which weights may change."""
    sequence = input if isinstance(input, PackedSequence) else None
    x: Tensor = input if sequence is None else sequence.data  # type: ignore[assignment]
    h0, c0 = _states(op, mode, hx)
    ws = _tensors(op, weights)
    if _any_autocast():
        x, h0, c0, *ws = _autocast([x, h0, c0, *ws])  # type: ignore[assignment]
        packed = packed if ws[0].dtype == weights[0].dtype else None
    cell = ops.CELLS[variant.mode(mode)]
    projected = len(ws) > 1 and ws[1].dim() == 2 and ws[1].shape[1] * cell.gates != ws[1].shape[0]
    _check(op, x, ws, num_layers, cell.weights(bias, projected) * (1 + bidirectional))
    p = _dropout(op, dropout, training) if num_layers > 1 else 0.0
    options = (ws, mode, num_layers, bidirectional, bias, p, variant, training)
    if sequence is not None:
        _require(op, lengths is None, "lengths is given beside a PackedSequence, which has its own; leave them out")
        rows = _sorted_lengths(sequence.batch_sizes)
        h0, c0 = (_permuted(t, sequence.sorted_indices) for t in (h0, c0))
        output, hn, cn, cells = _recur(packed, spent, x, rows, h0, c0, *options)
        hn, cn = (_permuted(t, sequence.unsorted_indices) for t in (hn, cn if mode == "LSTM" else None))  # type: ignore[assignment]
        return _result(mode, variant, sequence._replace(data=output), hn, cn, sequence._replace(data=cells))
    _require(op, x.dim() in (2, 3), f"input has {x.dim()} dims, expected 3, or 2 without a batch; reshape it")
    batched = x.dim() == 3
    for name, state in (("h0", h0), ("c0", c0)):
        same = state is None or state.dim() == x.dim()
        _require(
            op, same, f"{name} has {0 if state is None else state.dim()} dims, input has {x.dim()}; they must be equal"
        )
    steps = _lengths(op, x, lengths)
    if not batched:
        x, h0, c0 = (None if t is None else t.unsqueeze(1) for t in (x, h0, c0))  # type: ignore[assignment]
    elif batch_first:
        x = x.transpose(0, 1)
    output, hn, cn, cells = _recur(packed, spent, x, steps, h0, c0, *options)
    if not batched:
        output, hn, cn, cells = (t.squeeze(1) if t.dim() > 1 else t for t in (output, hn, cn, cells))
    elif batch_first:
        output, cells = (t.transpose(0, 1) if t.dim() > 1 else t for t in (output, cells))
    return _result(mode, variant, output, hn, cn, cells)


def _result(mode: str, variant: Variant, output: Input, hn: Tensor, cn: Tensor, cells: Input) -> Result:
    states = (hn, cn) if mode == "LSTM" else hn
    return (output, states, cells) if variant.return_cell_states else (output, states)


def run_cell(
    op: str,
    mode: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    packed: Tensor | None,
    variant: Variant,
    training: bool = False,
    spent: Spent | None = None,
) -> Any:
    """One step of one layer: the same op over a sequence of one."""
    h0, c0 = _states(op, mode, hx)
    ws = _tensors(op, weights)
    if _any_autocast():
        input, h0, c0, *ws = _autocast([input, h0, c0, *ws])  # type: ignore[assignment]
        packed = packed if ws[0].dtype == weights[0].dtype else None
    dims = input.dim()
    _require(op, dims in (1, 2), f"input has {dims} dims, expected 2, or 1 without a batch; reshape it")
    cell = ops.CELLS[variant.mode(mode)]
    bias = len(ws) >= cell.weights(True, False)
    _check(op, input, ws, 1, cell.weights(bias, False))
    for name, state in (("h", h0), ("c", c0)):
        same = state is None or state.dim() == dims
        _require(
            op, same, f"{name} has {0 if state is None else state.dim()} dims, input has {dims}; they must be equal"
        )
    lift = (None, None) if dims == 1 else (None,)
    x, h0, c0 = (None if t is None else t[lift] for t in (input, h0, c0))
    assert x is not None
    _, hn, cn, _ = _recur(packed, spent, x, None, h0, c0, ws, mode, 1, False, bias, 0.0, variant, training)
    drop = (0, 0) if dims == 1 else (0,)
    return (hn[drop], cn[drop]) if mode == "LSTM" else hn[drop]
