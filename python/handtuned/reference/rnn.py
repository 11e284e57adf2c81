"""Recurrent family in plain PyTorch, with the op schemas' arguments and results.

Of each layer and direction, with x_t its input at a step and h, c the state (both biases apart):
    LSTM      i, f, o = sigmoid, g = tanh of  W_ih x_t + b_ih + W_hh h + b_hh;   c' = f * c + i * g;   h' = o * tanh(c')
              with a projection  h' = W_hr (o * tanh(c'))
    GRU       r, z = sigmoid(W_ih x_t + b_ih + W_hh h + b_hh);   n = tanh(W_in x_t + b_in + r * (W_hn h + b_hn));
              h' = (1 - z) * n + z * h
    RNN       h' = tanh or relu of  W_ih x_t + b_ih + W_hh h + b_hh
Variants: the LSTM's gates coupled, f = 1 - i, and with peepholes, p_i * c, p_f * c and p_o * c' added to what i, f and
o are of; hard sigmoid and tanh; zoneout, h and c become w * new + (1 - w) * old with w drawn from {0, 1}, or without a
seed 1 - p; dropout of the h that W_hh multiplies, by one mask for all steps, and of W_hh. With layer norms
    g_ih * LN(W_ih x_t) + b_ih  and  g_hh * LN(W_hh h) + b_hh,  each LN over the row of all gates, stand for
    W_ih x_t + b_ih  and  W_hh h + b_hh,  and the LSTM's  h' = o * tanh(g_c * LN(c') + b_c),  where
    LN(v) = (v - mean(v)) / sqrt(var(v) + 1e-5).
A row's state stands still at the steps past its length: going forward it ends there, going backward it starts there.

``recur`` takes the weights themselves and is differentiable as it stands; the ops take them packed.
Sources: Hochreiter and Schmidhuber 1997, Gers et al. 2000, Sak et al. 2014 (arXiv:1402.1128, the projection), Cho et
al. 2014 (arXiv:1406.1078) in the form of torch.nn.GRU, Elman 1990, torch.nn.LSTM, GRU and RNN; Gers and Schmidhuber
2000 (peepholes), Greff et al. 2017 (arXiv:1503.04069, coupled gates), Krueger et al. 2017 (arXiv:1606.01305, zoneout),
Gal and Ghahramani 2016 (arXiv:1512.05287, dropout of states), Merity et al. 2018 (arXiv:1708.02182, of weights), Ba et
al. 2016 (arXiv:1607.06450, equations 20 to 22, layer norms; the GRU's and RNN's likewise, as in haste).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.cells import CELLS, RATES
from .norm import _wide
from .rnn_cells import STEPS, Direction, Noise, State, mask, share, zone

HEADER_BYTES = 64
Rates = Sequence[float] | None


# ---- a sequence ------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor, running: Tensor | None, w: Direction, state: State, noise: Noise, reverse: bool
) -> tuple[Tensor, Tensor | None, State]:
    """One direction over x [T, B, width]; running [T, B, 1] is where a row has a step. h and c there, else 0."""
    from_inputs = w.from_input(x)
    steps = range(x.shape[0])
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        seen = state[0] if noise.states is None else state[0] * noise.states
        h, c = STEPS[w.cell.name](from_inputs[t], w.from_state(seen), w, state)
        h = zone(None if noise.share_h is None else noise.share_h[t], h, state[0])
        if c is not None and state[1] is not None:
            c = zone(None if noise.share_c is None else noise.share_c[t], c, state[1])
        if running is None:
            state = h, c
            outputs.append(h)
            cells += [] if c is None else [c]
            continue
        here = running[t]
        kept = None if c is None or state[1] is None else torch.where(here, c, state[1])
        state = torch.where(here, h, state[0]), kept
        outputs.append(torch.where(here, h, 0.0))
        cells += [] if c is None else [torch.where(here, c, 0.0)]
    if not outputs:  # empty, and with a gradient
        c = state[1]
        return from_inputs[..., : state[0].shape[-1]], None if c is None else from_inputs[..., : c.shape[-1]], state
    turn = slice(None, None, -1 if reverse else 1)
    return torch.stack(outputs[turn]), torch.stack(cells[turn]) if cells else None, state


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
    rates: Rates,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, hn, cn, cells) of the op rnn, from the weights in torch's order."""
    cell, rows = CELLS[mode], _Rows.of(lengths) if input.dim() == 2 and lengths is not None else None
    x = _wide(input if rows is None else rows.unpack(input))
    steps, batch, directions = x.shape[0], x.shape[1], 2 if bidirectional else 1
    running = None
    if lengths is not None:
        running = (torch.arange(steps, device=x.device)[:, None] < lengths.to(x.device))[..., None]
        x = torch.where(running, x, 0.0)  # what stands in the padding reaches nothing, gradients included
    stack = _directions(weights, mode, bias)
    hidden, width = weights[1].shape[0] // cell.gates, weights[1].shape[1]
    count, layers = len(stack), len(stack) // directions
    zoneout, cell_zoneout, state_dropout, weight_dropout = rates or (0.0,) * len(RATES)

    def each(noise: Tensor | None) -> list[Tensor | None]:
        """Of each layer (and direction) [T, B, width], from what is drawn for input's rows."""
        if noise is None:
            return [None] * count
        return [part if rows is None or part.dim() != 2 else rows.unpack(part) for part in noise]

    lead = input.shape[:-1]
    drop = each(
        mask("dropout", (layers - 1, *lead, directions * width), dropout_p if layers > 1 else 0.0, seed, x.dtype)
    )
    shares_h = each(share("zoneout", (count, *lead, width), zoneout, seed, x))
    shares_c = each(share("cell_zoneout", (count, *lead, hidden), cell_zoneout, seed, x))
    states = mask("recurrent_dropout", (count, batch, width), state_dropout, seed, x.dtype)
    dropped = mask("weight_dropout", (count, cell.gates * hidden, width), weight_dropout, seed, x.dtype)
    h_first = x.new_zeros(count, batch, width) if h0 is None else _wide(h0)
    c_first = None
    if cell.is_lstm:
        c_first = x.new_zeros(count, batch, hidden) if c0 is None else _wide(c0)
    finals: list[State] = []
    cells: list[Tensor | None] = []
    for layer in range(layers):
        factor = drop[layer - 1] if layer else None
        x = x if factor is None else x * factor
        outputs, cells = [], []
        for d in range(directions):
            k = layer * directions + d
            w = stack[k] if dropped is None else replace(stack[k], w_hh=stack[k].w_hh * dropped[k])
            noise = Noise(shares_h[k], shares_c[k], None if states is None else states[k])
            first = (h_first[k], None if c_first is None else c_first[k])
            y, c, state = _run(x, running, w, first, noise, reverse=d == 1)
            outputs.append(y)
            cells.append(c)
            finals.append(state)
        x = torch.cat(outputs, -1)

    def given(dense: Tensor) -> Tensor:
        return _laid_out_like(input, (dense if rows is None else rows.pack(dense)).to(input.dtype))

    hn = torch.stack([h for h, _ in finals]).to(input.dtype)
    if not cell.is_lstm:
        return given(x), hn, input.new_empty(0), input.new_empty(0)
    cn = torch.stack([c for _, c in finals if c is not None]).to(input.dtype)
    return given(x), hn, cn, given(torch.cat([c for c in cells if c is not None], -1))


def _directions(weights: list[Tensor], mode: str, bias: bool) -> list[Direction]:
    cell = CELLS[mode]
    projected = weights[1].shape[1] != weights[1].shape[0] // cell.gates
    each = cell.weights(bias, projected)
    found = []
    for first in range(0, len(weights), each):
        w = [_wide(t) for t in weights[first : first + each]]
        b_ih, b_hh = w[2:4] if bias else (None, None)
        w, gains = w[: each - cell.gains(bias)], tuple(w[each - cell.gains(bias) :])
        peepholes = w.pop() if cell.peepholes else None
        found.append(Direction(cell, w[0], w[1], b_ih, b_hh, w[-1] if projected else None, peepholes, gains))
    return found


def _laid_out_like(tensor: Tensor, result: Tensor) -> Tensor:
    """Rows of a batch entry together in memory if those of `tensor` are."""
    if tensor.dim() == 3 and tensor.stride(0) < tensor.stride(1):
        return result.transpose(0, 1).contiguous().transpose(0, 1)
    return result.contiguous()


# ---- the ops ---------------------------------------------------------------------------------------------------------


def rnn_pack(
    weights: list[Tensor], mode: str, bidirectional: bool, bias: bool, weight_dropout: float, seed: Tensor | None
) -> Tensor:
    """Bytes of the size that the kernels' are: a header of zeros, then the weights as they are, zeros for no biases."""
    from .. import ops

    packed = weights[0].new_zeros(ops.packed_bytes(weights, mode, bidirectional, bias), dtype=torch.uint8)
    offset, stack = HEADER_BYTES, _directions(weights, mode, bias)
    dropped = mask("weight_dropout", (len(stack), *stack[0].w_hh.shape), weight_dropout, seed, stack[0].w_hh.dtype)
    for k, w in enumerate(stack):
        rows, w_hh = w.w_ih.shape[0], w.w_hh if dropped is None else w.w_hh * dropped[k]
        biases = [w.w_ih.new_zeros(rows) if b is None else b for b in (w.b_ih, w.b_hh)]
        gains = list(w.gains)
        if len(gains) == 3:  # no bias of c'
            gains.append(torch.zeros_like(gains[2]))
        for tensor in (w.w_ih, w_hh, *biases, w.w_hr, w.peepholes, *gains):
            if tensor is not None:
                data = tensor.detach().to(weights[0].dtype).reshape(-1).view(torch.uint8)
                packed[offset : offset + data.numel()] = data
                offset += data.numel()
    return packed


def _unpacked(
    packed: Tensor, dtype: torch.dtype, mode: str, inputs: int, hidden: int, proj: int, layers: int, directions: int
) -> list[Tensor]:
    cell = CELLS[mode]
    rows, state = cell.gates * hidden, proj or hidden
    offset, weights = HEADER_BYTES, []
    for k in range(layers * directions):
        width = inputs if k < directions else directions * state
        shapes = [(rows, width), (rows, state), (rows,), (rows,), *([(proj, hidden)] if proj else [])]
        shapes += [(cell.peephole_gates * hidden,)] if cell.peepholes else []
        shapes += [(rows,), (rows,), (hidden,), (hidden,)][: cell.gains(True)]
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
    rates: Rates,
    seed: Tensor | None,
    need_saved: bool,
    need_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """saved is left at zero: the formula of the backward computes anew."""
    directions, state = 1 + bidirectional, proj_size or hidden_size
    weights = _unpacked(
        *(packed, input.dtype, mode, input.shape[-1], hidden_size, proj_size, num_layers, directions),
    )
    rates = None if rates is None else (*rates[:-1], 0.0)  # rnn_pack has dropped weights already
    *result, cells = recur(input, lengths, h0, c0, weights, mode, bidirectional, True, dropout_p, rates, seed)
    cell = CELLS[mode]
    each = state + cell.kept(rates[0] if rates else 0.0) * hidden_size + cell.normed(hidden_size)
    numbers = num_layers * directions * input.shape[:-1].numel() * each
    saved = _wide(input).new_zeros(numbers if need_saved else 0)
    return result[0], result[1], result[2], cells if need_cells else input.new_empty(0), saved


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
    return rnn(input, lengths, h0, c0, packed, *sizes, 0.0, None, None, False, False)[:3]


def rnn_cell(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, packed: Tensor, mode: str, hidden_size: int
) -> tuple[Tensor, Tensor]:
    h, c = (None if state is None else state[None] for state in (h0, c0))
    _, hn, cn = rnn_inference(input[None], None, h, c, packed, mode, hidden_size, 0, 1, False)
    return hn[0], cn[0] if CELLS[mode].is_lstm else cn


def rnn_backward(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    grad_cells: Tensor | None,
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
    rates: Rates,
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
        results = recur(x, lengths, h, c, ws, mode, bidirectional, bias, dropout_p, rates, seed)
        pairs = zip(results, (grad_output, grad_hn, grad_cn, grad_cells), strict=True)
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
