"""LSTM, GRU and RNN as functions: arguments made canonical, autograd only where a gradient is wanted.

State and sums are float32 (float64 for float64 tensors). A whole stack of layers is one op; its gradient is an op of
its own and can be differentiated again. On CPU the input is read by its strides as long as the last is 1, else copied
once.

With lengths, or packed rows, a row's output past its length is 0, its final state is that of its last step, and the
reverse direction starts there; what stands in the padding reaches nothing. Weights come as in torch, of each layer and
direction w_ih, w_hh, then b_ih, b_hh if bias, then w_hr if the state is projected. Kernels read them in a layout of
their own, made in each call unless it is passed in: pack_rnn_weights.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from ... import ops, reference
from ...autograd import backward_op, kernels_for, wants_grad
from .norm import _draw_seed, _dropout, _or_none

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
        sizes: tuple[str, int, int, int, bool, float],
        bias: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, hn, cn, saved = kernels.rnn(input, lengths, h0, c0, packed, *sizes, seed, True)
        mode, _, _, _, bidirectional, dropout_p = sizes
        ctx.kernels, ctx.spent, ctx.options = kernels, spent, (mode, bidirectional, bias, dropout_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, lengths, h0, c0, seed, saved, *weights)
        if mode != "LSTM":
            ctx.mark_non_differentiable(cn)
        return output, hn, cn

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_hn: Tensor | None, grad_cn: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, lengths, h0, c0, seed, saved, *weights = ctx.saved_tensors
        _, _, need_input, _, need_h0, need_c0, _, _, _, _, *need_each = ctx.needs_input_grad
        if ctx.spent is not None:
            ctx.spent()
        grad_input, grad_h0, grad_c0, flat = backward_op(
            "rnn_backward",
            ctx.kernels,
            *(grad_output, grad_hn, grad_cn if ctx.options[0] == "LSTM" else None),
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
            *(_or_none(need_c0, grad_c0), None, None, None, None, *grads),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, hn, cn) of the op rnn, differentiable, on whatever kernel serves it. A dropout seed is drawn here."""
    kernels = kernels_for("rnn", input)
    hidden, state = weights[1].shape[0] // ops.GATES[mode], weights[1].shape[1]
    sizes = (mode, hidden, state if state != hidden else 0, num_layers, bidirectional, dropout_p)
    seed = _draw_seed(input) if dropout_p > 0 else None
    if kernels is not ops and kernels.is_formula:
        kernels.note("rnn_pack", (weights, mode, bidirectional, bias))
        kernels.note("rnn", (input, lengths, h0, c0, None, *sizes, seed, False))
        return reference.recur(input, lengths, h0, c0, weights, mode, bidirectional, bias, dropout_p, seed)
    if packed is None:
        packed = kernels.rnn_pack(weights, mode, bidirectional, bias)
    if torch.is_grad_enabled() and wants_grad(kernels, input, h0, c0, *weights):
        if torch.compiler.is_compiling() and c0 is not None:  # dynamo takes no tensor twice
            c0 = c0.view_as(c0)
        found: tuple[Tensor, Tensor, Tensor] = _Rnn.apply(  # type: ignore[no-untyped-call]
            kernels, spent, input, lengths, h0, c0, seed, packed, sizes, bias, *weights
        )
        return found
    output, hn, cn, _ = kernels.rnn(input, lengths, h0, c0, packed, *sizes, seed, False)
    return output, hn, cn


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


def _check(op: str, mode: str, input: Tensor, weights: Sequence[Tensor], num_layers: int, each: int) -> None:
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
        input.shape[-1] == weights[0].shape[1],
        f"input has shape {list(input.shape)}, expected input_size {weights[0].shape[1]} as its last dim; pass an "
        "input of that width",
    )


def _lengths(op: str, input: Tensor, lengths: Any) -> Tensor | None:
    if lengths is None:
        return None
    _require(op, input.dim() == 3, f"lengths is given but input has {input.dim()} dims; unsqueeze the batch dim")
    moved: Tensor = torch.as_tensor(lengths).to(input.device, torch.int64)
    return moved


def _sorted_lengths(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """How many steps each row has, falling, from how many rows each step has."""
    rows = torch.arange(int(batch_sizes[0]) if batch_sizes.numel() else 0)
    return (batch_sizes > rows[:, None]).sum(1).to(device)


def _permuted(state: Tensor | None, order: Tensor | None) -> Tensor | None:
    return state if state is None or order is None else state.index_select(1, order)


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
    spent: Spent | None = None,
) -> Result:
    """Any of the functions below, and the modules'. spent: what a backward calls, after which weights may change."""
    sequence = input if isinstance(input, PackedSequence) else None
    x: Tensor = input if sequence is None else sequence.data  # type: ignore[assignment]
    h0, c0 = _states(op, mode, hx)
    ws = list(weights)
    if _any_autocast():
        x, h0, c0, *ws = _autocast([x, h0, c0, *ws])  # type: ignore[assignment]
        packed = packed if ws[0].dtype == weights[0].dtype else None
    projected = len(ws) > 1 and ws[1].shape[1] * ops.GATES[mode] != ws[1].shape[0]
    _check(op, mode, x, ws, num_layers, (2 + 2 * bias + projected) * (1 + bidirectional))
    p = _dropout(op, dropout, training) if num_layers > 1 else 0.0
    options = (ws, mode, num_layers, bidirectional, bias, p)
    if sequence is not None:
        _require(op, lengths is None, "lengths is given beside a PackedSequence, which has its own; leave them out")
        rows = _sorted_lengths(sequence.batch_sizes, x.device)
        h0, c0 = (_permuted(t, sequence.sorted_indices) for t in (h0, c0))
        output, hn, cn = _recur(packed, spent, x, rows, h0, c0, *options)
        new = PackedSequence(output, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)
        h, c = (_permuted(t, sequence.unsorted_indices) for t in (hn, cn if mode == "LSTM" else None))
        return new, (h if c is None else (h, c))
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
    output, hn, cn = _recur(packed, spent, x, steps, h0, c0, *options)
    if not batched:
        output, hn = output.squeeze(1), hn.squeeze(1)
        cn = cn.squeeze(1) if mode == "LSTM" else cn
    elif batch_first:
        output = output.transpose(0, 1)
    return output, ((hn, cn) if mode == "LSTM" else hn)


def run_cell(
    op: str,
    mode: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    packed: Tensor | None,
    spent: Spent | None = None,
) -> Any:
    """One step of one layer: the same op over a sequence of one."""
    h0, c0 = _states(op, mode, hx)
    ws = list(weights)
    if _any_autocast():
        input, h0, c0, *ws = _autocast([input, h0, c0, *ws])  # type: ignore[assignment]
        packed = packed if ws[0].dtype == weights[0].dtype else None
    dims = input.dim()
    _require(op, dims in (1, 2), f"input has {dims} dims, expected 2, or 1 without a batch; reshape it")
    _check(op, mode, input, ws, 1, len(ws))
    for name, state in (("h", h0), ("c", c0)):
        same = state is None or state.dim() == dims
        _require(
            op, same, f"{name} has {0 if state is None else state.dim()} dims, input has {dims}; they must be equal"
        )
    lift = (None, None) if dims == 1 else (None,)
    x, h0, c0 = (None if t is None else t[lift] for t in (input, h0, c0))
    assert x is not None
    _, hn, cn = _recur(packed, spent, x, None, h0, c0, ws, mode, 1, False, len(ws) == 4, 0.0)
    drop = (0, 0) if dims == 1 else (0,)
    return (hn[drop], cn[drop]) if mode == "LSTM" else hn[drop]


# ---- the functions --------------------------------------------------------------------------------------------------


def pack_rnn_weights(mode: str, weights: Sequence[Tensor], bias: bool = True, bidirectional: bool = False) -> Tensor:
    """Weights in the order in which the kernels read them, for the argument `packed` of the functions below.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        weights: torch's flat weights, as the functions take them; one layer's for a cell.
        bias, bidirectional: what the weights are of.

    Returns:
        Bytes (uint8), about as many as the weights', for the instruction set in use. A copy: it does not follow later
        changes of the weights, and carries no gradient.
    """
    with torch.no_grad():
        packed: Tensor = kernels_for("rnn_pack", weights[0]).rnn_pack(list(weights), mode, bidirectional, bias)
    return packed


def lstm(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    packed: Tensor | None = None,
) -> Result:
    """torch.nn.LSTM as a function: layers of i, f, o = sigmoid, g = tanh; c' = f c + i g; h' = o tanh(c').

    Args:
        input: (T, B, I), or (B, T, I) with batch_first, (T, I) without a batch, or a PackedSequence; float32, float64,
            bfloat16 or float16. T and B may be 0.
        hx: (h0, c0) of shapes (layers * directions, B, R) and (layers * directions, B, H), without B if input has none;
            None for zeros. R is proj_size, or H without a projection.
        weights: torch's flat weights, all in input's dtype.
        bias, num_layers, bidirectional: what the weights are of.
        dropout: probability of dropping an element of the inputs of layers above the first while training, in [0, 1],
            in steps of 2^-16. The mask comes from Philox4x32-10 keyed by a seed drawn from torch's generator.
        lengths: (B,) integers from 0 to T in any order: the steps of each row.
        packed: what pack_rnn_weights made of these very weights, for weights that are used more than once; without it
            they are packed in each call. Ignored where autocast takes the weights in another dtype.

    Returns:
        output (T, B, directions * R), batch first, unbatched or packed as input is, and (hn, cn) like hx.
    """
    return run(
        "lstm",
        "LSTM",
        *(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, lengths, packed),
    )


def gru(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    packed: Tensor | None = None,
) -> Result:
    """torch.nn.GRU as a function: h' = (1 - z) n + z h with n = tanh(W_in x + b_in + r (W_hn h + b_hn)).

    Arguments and results as lstm's; hx and hn are one tensor, h (layers * directions, B, H).
    """
    return run(
        "gru",
        "GRU",
        *(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, lengths, packed),
    )


def rnn(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    packed: Tensor | None = None,
) -> Result:
    """torch.nn.RNN as a function: h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh.

    Arguments and results as gru's; nonlinearity is "tanh" or "relu".
    """
    return run(
        "rnn",
        _mode("rnn", nonlinearity),
        *(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, lengths, packed),
    )


def _mode(op: str, nonlinearity: str) -> str:
    ok = nonlinearity in ("tanh", "relu")
    _require(op, ok, f"nonlinearity is {nonlinearity!r}, allowed are 'tanh' and 'relu'")
    return f"RNN_{nonlinearity.upper()}"


def _given(*weights: Tensor | None) -> list[Tensor]:
    return [w for w in weights if w is not None]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: (h, c) from input (B, I) and hx ((B, H), (B, H)), or without B; None for zeros."""
    found: tuple[Tensor, Tensor] = run_cell("lstm_cell", "LSTM", input, hx, _given(w_ih, w_hh, b_ih, b_hh), packed)
    return found


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    """One step of a GRU: h from input (B, I) and hx (B, H), or without B; None for zeros."""
    found: Tensor = run_cell("gru_cell", "GRU", input, hx, _given(w_ih, w_hh, b_ih, b_hh), packed)
    return found


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    packed: Tensor | None = None,
) -> Tensor:
    """One step of an RNN: h from input (B, I) and hx (B, H), or without B; None for zeros."""
    mode = _mode("rnn_cell", nonlinearity)
    found: Tensor = run_cell("rnn_cell", mode, input, hx, _given(w_ih, w_hh, b_ih, b_hh), packed)
    return found
