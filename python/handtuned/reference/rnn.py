"""Recurrent family in plain PyTorch, with the op schemas' arguments and results.

Of each layer and direction, with x_t its input at a step and h, c the state (both biases apart):
    LSTM      i, f, o = sigmoid, g = tanh of  W_ih x_t + b_ih + W_hh h + b_hh;   c' = f * c + i * g;   h' = o * tanh(c')
              with a projection  h' = W_hr (o * tanh(c'))
    GRU       r, z = sigmoid(W_ih x_t + b_ih + W_hh h + b_hh);   n = tanh(W_in x_t + b_in + r * (W_hn h + b_hn));
              h' = (1 - z) * n + z * h
    RNN       h' = tanh or relu of  W_ih x_t + b_ih + W_hh h + b_hh
A row's state stands still at the steps past its length: going forward it ends there, going backward it starts there.

``recur`` takes the weights themselves and is differentiable as it stands; the ops take them packed.
Sources: Hochreiter and Schmidhuber 1997, Gers et al. 2000, Sak et al. 2014 (arXiv:1402.1128, the projection), Cho et
al. 2014 (arXiv:1406.1078) in the form of torch.nn.GRU, Elman 1990, torch.nn.LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .norm import _wide, dropout_factor

HEADER_BYTES = 64
State = tuple[Tensor, Tensor | None]  # h, and c of the LSTM
Cell = Callable[[Tensor, Tensor, "Direction", State], State]


@dataclass
class Direction:
    """The wide weights of one layer and direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


# ---- a step: gates' pre-activations from below, from the state -------------------------------------------------------


def _lstm(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    i, f, g, o = (from_input + from_state).chunk(4, -1)
    assert state[1] is not None
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w.w_hr is None else linear(h, w.w_hr)), c


def _gru(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    (ri, zi, ni), (rh, zh, nh) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    z = (zi + zh).sigmoid()
    n = (ni + (ri + rh).sigmoid() * nh).tanh()
    return (1 - z) * n + z * state[0], None


def _tanh(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    return (from_input + from_state).tanh(), None


def _relu(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    return (from_input + from_state).relu(), None


CELLS: dict[str, Cell] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


# ---- a sequence ------------------------------------------------------------------------------------------------------


def _run(
    mode: str, x: Tensor, running: Tensor | None, w: Direction, state: State, reverse: bool
) -> tuple[Tensor, State]:
    """One direction over x [T, B, width]; running [T, B, 1] is where a row has a step. Outputs there, else 0."""
    from_inputs = linear(x, w.w_ih, w.b_ih)
    steps = range(x.shape[0])
    outputs: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        new = CELLS[mode](from_inputs[t], linear(state[0], w.w_hh, w.b_hh), w, state)
        if running is None:
            state = new
            outputs.append(new[0])
            continue
        here, c = running[t], new[1]
        kept = None if c is None or state[1] is None else torch.where(here, c, state[1])
        state = torch.where(here, new[0], state[0]), kept
        outputs.append(torch.where(here, new[0], 0.0))
    if not outputs:
        return from_inputs[..., : state[0].shape[-1]], state  # empty, and with a gradient
    return torch.stack(outputs[::-1] if reverse else outputs), state


@dataclass
class _Rows:
    """Where packed rows stand among [T, B]."""

    time: Tensor
    place: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(lengths: Tensor) -> _Rows:
        steps = int(lengths.max()) if lengths.numel() else 0
        time, place = (torch.arange(steps, device=lengths.device)[:, None] < lengths).nonzero(as_tuple=True)
        return _Rows(time, place, (steps, lengths.numel()))

    def unpack(self, rows: Tensor) -> Tensor:
        empty = torch.zeros(*self.shape, rows.shape[-1], dtype=rows.dtype, device=rows.device)
        return empty.index_put((self.time, self.place), rows)

    def pack(self, dense: Tensor) -> Tensor:
        return dense[self.time, self.place]


def recur(
    input: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    mode: str,
    bidirectional: bool,
    bias: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, hn, cn) of the op rnn, from the weights in torch's order."""
    rows = _Rows.of(lengths) if input.dim() == 2 and lengths is not None else None
    x = _wide(input if rows is None else rows.unpack(input))
    steps, batch, directions = x.shape[0], x.shape[1], 2 if bidirectional else 1
    running = None
    if lengths is not None:
        running = (torch.arange(steps, device=x.device)[:, None] < lengths)[..., None]
        x = torch.where(running, x, 0.0)  # what stands in the padding reaches nothing, gradients included
    stack = _directions(weights, mode, bias)
    hidden, width = weights[1].shape[0] // GATES[mode], weights[1].shape[1]
    factor = None
    layers = len(stack) // directions
    if dropout_p > 0 and layers > 1:
        assert seed is not None
        shape = torch.Size((layers - 1, *input.shape[:-1], directions * width))
        factor = dropout_factor(shape, 1, dropout_p, seed, x.dtype)
    h_first = x.new_zeros(len(stack), batch, width) if h0 is None else _wide(h0)
    c_first = None
    if mode == "LSTM":
        c_first = x.new_zeros(len(stack), batch, hidden) if c0 is None else _wide(c0)
    finals: list[State] = []
    for layer in range(layers):
        if layer and factor is not None:
            x = x * (factor[layer - 1] if rows is None else rows.unpack(factor[layer - 1]))
        outputs = []
        for d in range(directions):
            k = layer * directions + d
            first = (h_first[k], None if c_first is None else c_first[k])
            y, state = _run(mode, x, running, stack[k], first, reverse=d == 1)
            outputs.append(y)
            finals.append(state)
        x = torch.cat(outputs, -1)
    hn = torch.stack([h for h, _ in finals]).to(input.dtype)
    cells = [c for _, c in finals if c is not None]
    cn = torch.stack(cells).to(input.dtype) if cells else input.new_empty(0)
    output = (x if rows is None else rows.pack(x)).to(input.dtype)
    return _laid_out_like(input, output), hn, cn


def _directions(weights: list[Tensor], mode: str, bias: bool) -> list[Direction]:
    projected = weights[1].shape[1] != weights[1].shape[0] // GATES[mode]
    each = 2 + 2 * bias + projected
    found = []
    for first in range(0, len(weights), each):
        w = [_wide(t) for t in weights[first : first + each]]
        b_ih, b_hh = w[2:4] if bias else (None, None)
        found.append(Direction(w[0], w[1], b_ih, b_hh, w[-1] if projected else None))
    return found


def _laid_out_like(tensor: Tensor, result: Tensor) -> Tensor:
    """Rows of a batch entry together in memory if those of `tensor` are."""
    if tensor.dim() == 3 and tensor.stride(0) < tensor.stride(1):
        return result.transpose(0, 1).contiguous().transpose(0, 1)
    return result.contiguous()


# ---- the ops ---------------------------------------------------------------------------------------------------------


def rnn_pack(weights: list[Tensor], mode: str, bidirectional: bool, bias: bool) -> Tensor:
    """Bytes of the size that the kernels' are: a header of zeros, then the weights as they are, zeros for no biases."""
    from .. import ops

    packed = weights[0].new_zeros(ops.packed_bytes(weights, mode, bidirectional, bias), dtype=torch.uint8)
    offset = HEADER_BYTES
    for w in _directions(weights, mode, bias):
        rows = w.w_ih.shape[0]
        biases = [w.w_ih.new_zeros(rows) if b is None else b for b in (w.b_ih, w.b_hh)]
        for tensor in (w.w_ih, w.w_hh, *biases, w.w_hr):
            if tensor is not None:
                data = tensor.detach().to(weights[0].dtype).reshape(-1).view(torch.uint8)
                packed[offset : offset + data.numel()] = data
                offset += data.numel()
    return packed


def _unpacked(
    packed: Tensor, dtype: torch.dtype, mode: str, inputs: int, hidden: int, proj: int, layers: int, directions: int
) -> list[Tensor]:
    rows, state = GATES[mode] * hidden, proj or hidden
    offset, weights = HEADER_BYTES, []
    for k in range(layers * directions):
        width = inputs if k < directions else directions * state
        shapes = [(rows, width), (rows, state), (rows,), (rows,), *([(proj, hidden)] if proj else [])]
        for shape in shapes:
            count = torch.Size(shape).numel() * dtype.itemsize
            weights.append(packed[offset : offset + count].view(dtype).reshape(shape))
            offset += count
    return weights


def rnn(
    input: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Tensor,
    mode: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    dropout_p: float,
    seed: Tensor | None,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """saved is left at zero: the formula of the backward computes anew."""
    from .. import ops

    directions, state = 1 + bidirectional, proj_size or hidden_size
    weights = _unpacked(
        *(packed, input.dtype, mode, input.shape[-1], hidden_size, proj_size, num_layers, directions),
    )
    result = recur(input, lengths, h0, c0, weights, mode, bidirectional, True, dropout_p, seed)
    numbers = num_layers * directions * input.shape[:-1].numel() * (state + ops.SAVED[mode] * hidden_size)
    return *result, _wide(input).new_zeros(numbers if need_saved else 0)


def rnn_inference(
    input: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Tensor,
    mode: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (mode, hidden_size, proj_size, num_layers, bidirectional)
    return rnn(input, lengths, h0, c0, packed, *sizes, 0.0, None, False)[:3]


def rnn_cell(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, packed: Tensor, mode: str, hidden_size: int
) -> tuple[Tensor, Tensor]:
    h, c = (None if state is None else state[None] for state in (h0, c0))
    _, hn, cn = rnn_inference(input[None], None, h, c, packed, mode, hidden_size, 0, 1, False)
    return hn[0], cn[0] if mode == "LSTM" else cn


def rnn_backward(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    input: Tensor,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    saved: Tensor,
    mode: str,
    bidirectional: bool,
    bias: bool,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_h0: bool,
    need_c0: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch's own derivative of ``recur``, computed anew; differentiable in every argument that requires it."""
    create_graph = torch.is_grad_enabled()

    def leaf(tensor: Tensor | None, needed: bool) -> Tensor | None:
        return (
            tensor.detach().requires_grad_() if tensor is not None and needed and not tensor.requires_grad else tensor
        )

    with torch.enable_grad():
        x, h, c = leaf(input, need_input), leaf(h0, need_h0), leaf(c0, need_c0)
        ws = [w for w in (leaf(weight, need_weights) for weight in weights) if w is not None]
        assert x is not None
        results = recur(x, lengths, h, c, ws, mode, bidirectional, bias, dropout_p, seed)
        pairs = zip(results, (grad_output, grad_hn, grad_cn), strict=True)
        used = [(result, grad) for result, grad in pairs if grad is not None and result.requires_grad]
        wanted = [t for t, need in ((x, need_input), (h, need_h0), (c, need_c0)) if need and t is not None]
        wanted += ws if need_weights else []
        found: list[Tensor] = []
        if used and wanted:
            grads = torch.autograd.grad(
                [result for result, _ in used],
                wanted,
                [grad for _, grad in used],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
            found = list(grads)
        else:
            found = [torch.zeros_like(t) for t in wanted]
    nothing = input.new_empty(0)
    given = iter(found)
    first = [
        next(given) if need and t is not None else nothing for t, need in ((x, need_input), (h, need_h0), (c, need_c0))
    ]
    flat = torch.cat([grad.reshape(-1) for grad in given]) if need_weights else nothing
    return _laid_out_like(input, first[0]) if need_input else nothing, first[1], first[2], flat
