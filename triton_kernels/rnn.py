"""Recurrent layers in Triton: the launchers, one for each op. Kernels: rnn_forward.py, rnn_backward.py.

Arguments are those of the op schemas, already checked. What the input gives to the gates and the gradients of weights
are torch's matrix products over all steps at once; steps are the kernels'. `packed` holds the weights as they are, of
all directions of a layer one behind the other. Lengths are waited for where packed rows need them to know the steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.cells import CELLS, RATES, Cell
from . import common, tuning
from .rnn_backward import backward_kernel, before_kernel
from .rnn_forward import drop_kernel, forward_kernel
from .rnn_tile import Backward, First, Forward, Grads, Places, Rows, Saved, Sizes, State, Weights, Widths

HEADER_BYTES = 64
ALIGNMENT = 16  # bytes, of each tensor in `packed`
Rates = list[float] | None
DROPOUT, RECURRENT_DROPOUT, WEIGHT_DROPOUT = 0, 3, 4  # kinds of masks


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weight_shapes(
    cell: Cell, inputs: int, hidden: int, width: int, layers: int, directions: int
) -> list[list[tuple[int, ...]]]:
    """Of each layer, all directions of a tensor together."""
    rows = cell.gates * hidden
    rest = [(directions, width, hidden)] if width != hidden else []
    rest += [(directions, cell.peephole_gates * hidden)] if cell.peepholes else []
    return [
        [
            (directions, rows, directions * width if layer else inputs),
            (directions, rows, width),
            *[(directions, rows)] * 2,
            *rest,
        ]
        for layer in range(layers)
    ]


def _views(packed: Tensor, dtype: torch.dtype, shapes: list[list[tuple[int, ...]]], cell: Cell) -> list[Weights]:
    if packed.device.type == "cpu" and bool(packed[:HEADER_BYTES].any()):
        raise RuntimeError(
            "handtuned.rnn: packed is of the CPU kernels, the Triton kernels have an order of their own; pack under "
            "handtuned.backend('triton')"
        )
    offset, found = HEADER_BYTES, []
    for layer in shapes:
        tensors: list[Tensor] = []
        for shape in layer:
            count = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(packed[offset : offset + count].view(dtype).view(shape))
            offset += triton.cdiv(count, ALIGNMENT) * ALIGNMENT
        peepholes = tensors.pop() if cell.peepholes else None
        found.append(Weights(*tensors[:4], tensors[4] if len(tensors) == 5 else None, peepholes))
    return found


def rnn_pack(
    weights: list[Tensor], mode: str, bidirectional: bool, bias: bool, weight_dropout: float, seed: Tensor | None
) -> Tensor:
    from .. import ops

    cell, first = CELLS[mode], weights[0]
    hidden, width = weights[1].shape[0] // cell.gates, weights[1].shape[1]
    each, directions = cell.weights(bias, width != hidden), 1 + bidirectional
    layers = len(weights) // each // directions
    packed = common.empty((ops.packed_bytes(weights, mode, bidirectional, bias),), first, torch.uint8).zero_()
    shapes = _weight_shapes(cell, first.shape[1], hidden, width, layers, directions)
    for layer, views in enumerate(_views(packed, first.dtype, shapes, cell)):
        there = [t for t in (views.w_ih, views.w_hh, views.w_hr, views.peepholes) if t is not None]
        there[2:2] = [views.b_ih, views.b_hh] if bias else []
        for d in range(directions):
            k = layer * directions + d
            for target, weight in zip(there, weights[k * each : (k + 1) * each], strict=True):
                target[d].copy_(weight.detach())
            if weight_dropout > 0:
                _drop(views.w_hh[d], views.w_hh[d], WEIGHT_DROPOUT, k * cell.gates * hidden, weight_dropout, seed)
    return packed


def _drop(source: Tensor, target: Tensor, kind: int, first: int, p: float, seed: Tensor | None) -> Tensor:
    """target, which may be the source: the source with a dropout's mask. Contiguous rows."""
    width = source.shape[-1]
    rows = source.numel() // max(width, 1)
    if source.numel() == 0:
        return target
    with common.on_device(source):
        drop_kernel[(triton.cdiv(rows, 8), triton.cdiv(width, 128))](
            *(source, target, seed, rows, width, first, *common.dropout_constants(p)),
            KIND=kind,
            BLOCK_ROWS=8,
            BLOCK_COLUMNS=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return target


# ---- a call ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What forward and backward know of a call."""

    cell: Cell
    input: Tensor
    seed: Tensor | None
    places: Places
    running: Tensor | None  # [T, B, 1], of padded input
    rates: dict[str, float]
    steps: int
    batch: int
    rows: int
    directions: int
    hidden: int
    width: int

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32

    @property
    def projected(self) -> bool:
        return self.width != self.hidden

    @property
    def kept(self) -> int:
        return self.cell.kept(self.rates["zoneout"])

    def sizes(self, layer: int) -> Sizes:
        return Sizes(self.steps, self.batch, self.rows, self.directions, layer * self.directions)

    @property
    def widths(self) -> Widths:
        return Widths(self.hidden, self.width)

    def numbers(self) -> list[float]:
        """Threshold and scale of zoneout, zoneout of cells and dropout of states; without a seed the expectation."""
        found: list[float] = []
        for name in ("zoneout", "cell_zoneout", "recurrent_dropout"):
            threshold, scale = common.dropout_constants(self.rates[name])
            found += [threshold, scale if self.seed is not None else 1.0 - self.rates[name]]
        return found

    def form(self, part: str) -> dict[str, Any]:
        """Constexpr arguments."""
        return {
            "NAME": self.cell.name,
            "GATES": self.cell.gates,
            "HARD": self.cell.hardsigmoid,
            "HARD_TANH": self.cell.hardtanh,
            "ZONEOUT": self.rates["zoneout"] > 0,
            "CELL_ZONEOUT": self.rates["cell_zoneout"] > 0,
            "STATE_DROPOUT": self.rates["recurrent_dropout"] > 0,
            "PART": part,
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return common.empty(shape, self.input, dtype)

    def of_rows(self, tensor: Tensor | None) -> Rows:
        """A tensor of the input's rows, where they are."""
        if tensor is None:
            return Rows(None)
        tensor = tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
        return Rows(tensor, 0 if tensor.dim() == 2 else tensor.stride(0), tensor.stride(-2))

    def first(self, state: Tensor | None, layer: int, width: int) -> Tensor:
        """A layer's first states, wide and contiguous."""
        found = self.empty(self.directions, self.batch, width, dtype=self.wide)
        begin = layer * self.directions
        return found.zero_() if state is None else found.copy_(state[begin : begin + self.directions])

    def shaped(self, width: int) -> Tensor:
        """A result of the input's rows, a batch entry's together where the input's are."""
        return _empty_like(self.input, (*self.input.shape[:-1], width))


def _empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 3 and tensor.stride(0) < tensor.stride(1):
        return common.empty((shape[1], shape[0], shape[2]), tensor).transpose(0, 1)
    return common.empty(shape, tensor)


def _plan(
    op: str, input: Tensor, lengths: Tensor | None, mode: str, hidden: int, width: int, directions: int, rates: Rates,
    seed: Tensor | None,
) -> Plan:  # fmt: skip
    named = dict(zip(RATES, rates or (0.0,) * len(RATES), strict=True))
    starts = running = None
    if input.dim() == 2:
        assert lengths is not None
        counts = lengths.cpu()
        steps, batch = int(counts.max()) if counts.numel() else 0, counts.numel()
        of_step = (counts > torch.arange(steps)[:, None]).sum(1)
        right = int(of_step.sum()) == input.shape[0] and bool((counts.diff() <= 0).all())
        if not right:
            raise RuntimeError(
                f"handtuned.{op}: lengths do not fall or add up to {int(of_step.sum())}, input has {input.shape[0]} "
                "rows; pass those of the packed rows"
            )
        starts = torch.cat([of_step.new_zeros(1), of_step.cumsum(0)]).to(input.device)
    else:
        steps, batch = input.shape[:2]
    if lengths is not None:
        lengths = lengths.to(input.device).contiguous()
        if input.dim() == 3:
            running = (torch.arange(steps, device=input.device)[:, None] < lengths)[..., None]
    rows = input.shape[:-1].numel()
    places = Places(lengths, starts)
    return Plan(CELLS[mode], input, seed, places, running, named, steps, batch, rows, directions, hidden, width)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, 16 bits summed and returned in float32."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _steps(kernel: Any, name: str, plan: Plan, call: Any, layer: int, parts: tuple[str, ...], forward: bool) -> None:
    """Launches a layer's steps: all at once, or one by one. The backward has one more, step -1."""
    drawn = plan.seed is not None and any(plan.rates[rate] > 0 for rate in RATES[:3])
    rows, units, depth, warps, stages = tuning.rnn(name + "_options" * drawn, plan.input)
    rows = min(rows, 16) if plan.batch <= 16 else rows
    tile = {"BLOCK_ROWS": rows, "BLOCK_UNITS": units, "BLOCK_DEPTH": depth, "STAGES": stages}
    tile |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    persistent = tuning.one_program(plan.cell.gates, plan.hidden, plan.width, plan.input.element_size())
    order = range(plan.steps) if forward else range(plan.steps - 1, -2, -1)
    for step in order[:1] if persistent else order:
        for part in parts:
            if part == "cell" and step < 0:
                continue
            width = plan.width if part == "state" else plan.hidden
            of_program = width if persistent else units
            grid = (triton.cdiv(plan.batch, rows), plan.directions, triton.cdiv(width, of_program))
            kernel[grid](
                *(call, plan.sizes(layer), plan.widths, step, len(order) if persistent else 1, of_program),
                *plan.numbers(),
                **plan.form(part),
                **tile,
            )


# ---- forward ---------------------------------------------------------------------------------------------------------


def _parts(plan: Plan, saved: Tensor | None, layer: int, layers: int) -> Saved:
    """A layer's share of what the forward saves."""
    if saved is None:
        return Saved(None, None, None)
    lead = plan.rows * plan.directions
    of_layer = saved.view(layers, -1)[layer]
    h, rest = of_layer[: lead * plan.width], of_layer[lead * plan.width :]
    if not plan.kept:
        return Saved(h, None, None)
    gates = lead * plan.hidden * (plan.cell.gates if plan.cell.is_lstm else plan.kept)
    return Saved(h, rest[:gates], rest[gates:] if plan.cell.is_lstm else None)


def _layer_input(plan: Plan) -> Tensor:
    """[rows, inputs]; what stands in the padding reaches nothing."""
    x = plan.input if plan.running is None else torch.where(plan.running, plan.input, 0.0)
    return x.reshape(plan.rows, x.shape[-1])


def _forward_layer(
    plan: Plan, layer: int, x: Tensor, weights: Weights, first: First, saved: Saved, output: Tensor, cells: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(h, c) after the last step."""
    dims, lead = plan.directions * plan.cell.gates * plan.hidden, (plan.directions, plan.batch)
    from_input = product(x, weights.w_ih.view(dims, -1).t())
    seen = plan.empty(2, *lead, plan.width)
    seen[0].copy_(first.h)
    if plan.rates["recurrent_dropout"] > 0:
        rows = layer * plan.directions * plan.batch
        _drop(first.h, seen[0], RECURRENT_DROPOUT, rows, plan.rates["recurrent_dropout"], plan.seed)
    below = plan.empty(*lead, plan.hidden) if plan.projected else None
    state = State(first.h.clone(), None if first.c is None else first.c.clone(), seen, below)
    call = Forward(
        from_input, weights, plan.places, state, saved, plan.of_rows(output), plan.of_rows(cells), plan.seed
    )
    if plan.batch and plan.steps:
        parts = ("cell", "state") if plan.projected else ("whole",)
        _steps(forward_kernel, "forward", plan, call, layer, parts, True)
    return state.h, state.c


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
    """(output, hn, cn, cells, saved)."""
    directions, width = 1 + bidirectional, proj_size or hidden_size
    plan = _plan("rnn", input, lengths, mode, hidden_size, width, directions, rates, seed)
    cell, stacked = plan.cell, num_layers * directions
    shapes = _weight_shapes(cell, input.shape[-1], hidden_size, width, num_layers, directions)
    numbers = num_layers * plan.rows * directions * (width + plan.kept * hidden_size)
    saved = plan.empty(numbers if need_saved else 0, dtype=plan.wide)
    if plan.running is not None:
        saved.zero_()  # rows without a step: equal calls give equal results
    cells = plan.shaped(directions * hidden_size) if need_cells else plan.empty(0)
    hn = plan.empty(stacked, plan.batch, width)
    cn = plan.empty(stacked, plan.batch, hidden_size) if cell.is_lstm else plan.empty(0)
    x = _layer_input(plan)
    with common.on_device(input):
        for layer, weights in enumerate(_views(packed, input.dtype, shapes, cell)):
            last, now = layer == num_layers - 1, slice(layer * directions, (layer + 1) * directions)
            if layer and dropout_p > 0:
                x = _drop(x, plan.empty(*x.shape), DROPOUT, (layer - 1) * plan.rows, dropout_p, seed)
            output = plan.shaped(directions * width) if last else plan.empty(*input.shape[:-1], directions * width)
            first = First(plan.first(h0, layer, width), plan.first(c0, layer, hidden_size) if cell.is_lstm else None)
            parts = _parts(plan, saved if need_saved else None, layer, num_layers)
            h, c = _forward_layer(
                plan, layer, x, weights, first, parts, output, cells if need_cells and last else None
            )
            hn[now] = h
            if c is not None:
                cn[now] = c
            x = output.reshape(plan.rows, -1)
    return output, hn, cn, cells, saved


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


# ---- backward --------------------------------------------------------------------------------------------------------


def _before(plan: Plan, layer: int, saved: Tensor, first: Tensor, target: Tensor, dropped: bool) -> Tensor:
    """target [rows, D, width]: the state that each step started from."""
    if plan.batch and plan.steps:
        before_kernel[(plan.steps, triton.cdiv(plan.batch, 16), plan.directions)](
            *(saved, first, target, plan.places, plan.seed, plan.sizes(layer), target.shape[-1]),
            *common.dropout_constants(plan.rates["recurrent_dropout"]),
            STATE_DROPOUT=dropped,
            BLOCK_ROWS=16,
            BLOCK_UNITS=64,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return target


def _peephole_gradient(plan: Plan, layer: int, saved: Saved, first: First, gates: Tensor) -> Tensor:
    """[D, those gates * hidden]: i and f see c before the step, o the one after, before its zoneout."""
    assert saved.gates is not None and saved.c is not None and first.c is not None
    lead, count = (plan.rows, plan.directions), plan.cell.gates
    c = _before(plan, layer, saved.c, first.c, plan.empty(*lead, plan.hidden, dtype=plan.wide), False)
    kept = saved.gates.view(*lead, count, plan.hidden)
    i, g = kept[:, :, 0], kept[:, :, -2]
    new = (1 - i if plan.cell.coupled else kept[:, :, 1]) * c + i * g
    grads = gates.view(*lead, count, plan.hidden)
    parts = [(grads[:, :, n] * c).sum(0) for n in range(count - 2)]
    return torch.cat([*parts, (grads[:, :, -1] * new).sum(0)], -1)


def _weight_gradients(
    plan: Plan, layer: int, x: Tensor, call: Backward, bias: bool
) -> list[Tensor]:
    """Of all directions of each tensor, in torch's order, wide."""
    grads, lead = call.grads, (plan.rows, plan.directions)
    assert call.saved.h is not None
    of_input, of_state = (g.view(*lead, -1) for g in (grads.of_input, grads.of_state))
    dropped = plan.rates["recurrent_dropout"] > 0
    seen = _before(plan, layer, call.saved.h, call.first.h, plan.empty(*lead, plan.width), dropped)

    def of_each(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([product(a[:, d].t(), b[:, d]) for d in range(plan.directions)])

    w_hh = of_each(of_state, seen)
    if plan.rates["weight_dropout"] > 0:
        rows = layer * plan.directions * plan.cell.gates * plan.hidden
        _drop(w_hh, w_hh, WEIGHT_DROPOUT, rows, plan.rates["weight_dropout"], plan.seed)
    found = [product(of_input.view(plan.rows, -1).t(), x).view(plan.directions, -1, x.shape[-1]), w_hh]
    found += [of.sum(0, dtype=plan.wide) for of in (of_input, of_state)] if bias else []
    if grads.projected is not None and grads.below is not None:
        found.append(of_each(grads.projected, grads.below))
    if plan.cell.peepholes:
        found.append(_peephole_gradient(plan, layer, call.saved, call.first, of_input))
    return found


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
    """(grad_input, grad_h0, grad_c0, gradients of the weights one behind the other)."""
    cell, directions = CELLS[mode], 1 + bidirectional
    hidden, width = weights[1].shape[0] // cell.gates, weights[1].shape[1]
    plan = _plan("rnn_backward", input, lengths, mode, hidden, width, directions, rates, seed)
    each = cell.weights(bias, plan.projected)
    layers = len(weights) // each // directions
    packed = rnn_pack(weights, mode, bidirectional, bias, plan.rates["weight_dropout"], seed)
    views = _views(
        packed, input.dtype, _weight_shapes(cell, input.shape[-1], hidden, width, layers, directions), cell
    )
    grad_h0 = plan.empty(*((layers * directions, plan.batch, width) if need_h0 else (0,)))
    grad_c0 = plan.empty(*((layers * directions, plan.batch, hidden) if need_c0 else (0,)))
    flat = plan.empty(sum(w.numel() for w in weights) if need_weights else 0)
    parts = flat.split([w.numel() for w in weights]) if need_weights else ()
    asked = grad_output
    with common.on_device(input):
        for layer in reversed(range(layers)):
            below = _parts(plan, saved, layer - 1, layers).h if layer else None
            x = _layer_input(plan) if below is None else below.view(plan.rows, -1).to(input.dtype)
            if layer and dropout_p > 0:
                x = _drop(x, plan.empty(*x.shape), DROPOUT, (layer - 1) * plan.rows, dropout_p, seed)
            call = _backward_call(
                plan, layer, asked, grad_cells if layer == layers - 1 else None, (grad_hn, grad_cn), (h0, c0),
                views[layer], _parts(plan, saved, layer, layers),
            )  # fmt: skip
            if plan.batch:
                order = ("state", "cell") if plan.projected else ("whole",)
                _steps(backward_kernel, "backward", plan, call, layer, order, False)
            now = slice(layer * directions, (layer + 1) * directions)
            if need_h0:
                grad_h0[now] = call.grads.h
            if need_c0:
                grad_c0[now] = call.grads.c
            if need_weights:
                of_layer = parts[layer * directions * each : (layer + 1) * directions * each]
                for n, grad in enumerate(_weight_gradients(plan, layer, x, call, bias)):
                    for d in range(directions):
                        of_layer[d * each + n].copy_(grad[d].reshape(-1))
            if layer or need_input:
                of_input = call.grads.of_input.view(plan.rows, -1)
                asked = product(of_input, views[layer].w_ih.view(of_input.shape[1], -1))
            if layer and dropout_p > 0 and asked is not None:
                _drop(asked, asked, DROPOUT, (layer - 1) * plan.rows, dropout_p, seed)
            if layer and asked is not None:
                asked = asked.view(*input.shape[:-1], -1)
    if not need_input or asked is None:
        return plan.empty(0), grad_h0, grad_c0, flat
    return plan.shaped(input.shape[-1]).copy_(asked.view(input.shape)), grad_h0, grad_c0, flat


def _backward_call(
    plan: Plan, layer: int, grad_output: Tensor | None, grad_cells: Tensor | None,
    final: tuple[Tensor | None, Tensor | None], initial: tuple[Tensor | None, Tensor | None], weights: Weights,
    saved: Saved,
) -> Backward:  # fmt: skip
    lead, cell = (plan.rows, plan.directions), plan.cell

    def states(of: tuple[Tensor | None, Tensor | None]) -> First:
        c = plan.first(of[1], layer, plan.hidden) if cell.is_lstm else None
        return First(plan.first(of[0], layer, plan.width), c)

    of_input = plan.empty(*lead, cell.gates * plan.hidden)
    of_state = plan.empty(*lead, cell.gates * plan.hidden) if cell.name == "GRU" else of_input
    projected = plan.empty(*lead, plan.width) if plan.projected else None
    below = plan.empty(*lead, plan.hidden) if plan.projected else None
    asked = states(final)
    grads = Grads(
        plan.of_rows(grad_output), plan.of_rows(grad_cells), asked.h, asked.c, of_input, of_state, projected, below
    )
    return Backward(grads, weights, plan.places, states(initial), saved, plan.seed)
