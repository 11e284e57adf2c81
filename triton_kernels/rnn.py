"""Recurrent layers in Triton: the launchers, one for each op. Kernels: rnn_forward.py, rnn_backward.py.

Arguments are those of the op schemas, already checked. What the input gives to the gates and the gradients of weights
are torch's matrix products over all steps at once; steps are the kernels'. `packed` holds the weights as they are, of
all directions of a layer one behind the other. Lengths are waited for where packed rows need them to know the steps.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from handtuned.ops.cells import CELLS, RATES

from . import common, tuning
from .rnn_backward import backward_kernel, before_kernel
from .rnn_forward import forward_kernel
from .rnn_plan import (
    DROPOUT,
    RECURRENT_DROPOUT,
    WEIGHT_DROPOUT,
    Plan,
    Rates,
    drop,
    plan_of,
    rnn_pack,
    views_of,
    weight_shapes,
)
from .rnn_tile import Backward, First, Forward, Grads, Saved, State, Weights

__all__ = ["rnn", "rnn_backward", "rnn_cell", "rnn_inference", "rnn_pack"]


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
    plan: Plan,
    layer: int,
    x: Tensor,
    weights: Weights,
    first: First,
    saved: Saved,
    output: Tensor,
    cells: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(h, c) after the last step."""
    dims, lead = plan.directions * plan.cell.gates * plan.hidden, (plan.directions, plan.batch)
    from_input = common.product(x, weights.w_ih.view(dims, -1).t())
    seen = plan.empty(2, *lead, plan.width)
    seen[0].copy_(first.h)
    if plan.rates["recurrent_dropout"] > 0:
        rows = layer * plan.directions * plan.batch
        drop(first.h, seen[0], RECURRENT_DROPOUT, rows, plan.rates["recurrent_dropout"], plan.seed)
    below = plan.empty(*lead, plan.hidden) if plan.projected else None
    state = State(first.h.clone(), None if first.c is None else first.c.clone(), seen, below)
    call = Forward(from_input, weights, plan.places, state, saved, plan.of_rows(output), plan.of_rows(cells), plan.seed)
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
    plan = plan_of("rnn", input, lengths, mode, hidden_size, width, directions, rates, seed)
    cell, stacked = plan.cell, num_layers * directions
    shapes = weight_shapes(cell, input.shape[-1], hidden_size, width, num_layers, directions)
    numbers = num_layers * plan.rows * directions * (width + plan.kept * hidden_size)
    saved = plan.empty(numbers if need_saved else 0, dtype=plan.wide)
    if plan.running is not None:
        saved.zero_()  # rows without a step: equal calls give equal results
    cells = plan.shaped(directions * hidden_size) if need_cells else plan.empty(0)
    hn = plan.empty(stacked, plan.batch, width)
    cn = plan.empty(stacked, plan.batch, hidden_size) if cell.is_lstm else plan.empty(0)
    x = _layer_input(plan)
    with common.on_device(input):
        for layer, weights in enumerate(views_of(packed, input.dtype, shapes, cell)):
            last, now = layer == num_layers - 1, slice(layer * directions, (layer + 1) * directions)
            if layer and dropout_p > 0:
                x = drop(x, plan.empty(*x.shape), DROPOUT, (layer - 1) * plan.rows, dropout_p, seed)
            output = plan.shaped(directions * width) if last else plan.empty(*input.shape[:-1], directions * width)
            first = First(plan.first(h0, layer, width), plan.first(c0, layer, hidden_size) if cell.is_lstm else None)
            parts = _parts(plan, saved if need_saved else None, layer, num_layers)
            h, c = _forward_layer(plan, layer, x, weights, first, parts, output, cells if need_cells and last else None)
            hn[now] = h
            if c is not None:
                cn[now] = c
            x = output.reshape(plan.rows, directions * width)
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
    assert saved.gates is not None
    assert saved.c is not None
    assert first.c is not None
    lead, count = (plan.rows, plan.directions), plan.cell.gates
    c = _before(plan, layer, saved.c, first.c, plan.empty(*lead, plan.hidden, dtype=plan.wide), False)
    kept = saved.gates.view(*lead, count, plan.hidden)
    i, g = kept[:, :, 0], kept[:, :, -2]
    new = (1 - i if plan.cell.coupled else kept[:, :, 1]) * c + i * g
    grads = gates.view(*lead, count, plan.hidden)
    parts = [(grads[:, :, n] * c).sum(0) for n in range(count - 2)]
    return torch.cat([*parts, (grads[:, :, -1] * new).sum(0)], -1)


def _weight_gradients(plan: Plan, layer: int, x: Tensor, call: Backward, bias: bool) -> list[Tensor]:
    """Of all directions of each tensor, in torch's order, wide."""
    grads, lead = call.grads, (plan.rows, plan.directions)
    assert call.saved.h is not None
    of_input, of_state = (grads.of_input, grads.of_state)
    dropped = plan.rates["recurrent_dropout"] > 0
    seen = _before(plan, layer, call.saved.h, call.first.h, plan.empty(*lead, plan.width), dropped)

    def of_each(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([common.product(a[:, d].t(), b[:, d]) for d in range(plan.directions)])

    w_hh = of_each(of_state, seen)
    if plan.rates["weight_dropout"] > 0:
        rows = layer * plan.directions * plan.cell.gates * plan.hidden
        drop(w_hh, w_hh, WEIGHT_DROPOUT, rows, plan.rates["weight_dropout"], plan.seed)
    found = [common.product(of_input.flatten(1).t(), x).view(plan.directions, -1, x.shape[-1]), w_hh]
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
    plan = plan_of("rnn_backward", input, lengths, mode, hidden, width, directions, rates, seed)
    each = cell.weights(bias, plan.projected)
    layers = len(weights) // each // directions
    packed = rnn_pack(weights, mode, bidirectional, bias, plan.rates["weight_dropout"], seed)
    stack = views_of(packed, input.dtype, weight_shapes(cell, input.shape[-1], hidden, width, layers, directions), cell)
    grad_h0 = plan.empty(*((layers * directions, plan.batch, width) if need_h0 else (0,)))
    grad_c0 = plan.empty(*((layers * directions, plan.batch, hidden) if need_c0 else (0,)))
    flat = plan.empty(sum(w.numel() for w in weights) if need_weights else 0)
    parts = flat.split([w.numel() for w in weights]) if need_weights else ()
    asked = grad_output
    with common.on_device(input):
        for layer in reversed(range(layers)):
            below = _parts(plan, saved, layer - 1, layers).h if layer else None
            x = _layer_input(plan) if below is None else below.view(plan.rows, directions * width).to(input.dtype)
            if layer and dropout_p > 0:
                x = drop(x, plan.empty(*x.shape), DROPOUT, (layer - 1) * plan.rows, dropout_p, seed)
            call = _backward_call(
                plan, layer, asked, grad_cells if layer == layers - 1 else None, (grad_hn, grad_cn), (h0, c0),
                stack[layer], _parts(plan, saved, layer, layers),
            )  # fmt: skip
            if plan.batch and plan.steps:
                order = ("state", "cell") if plan.projected else ("whole",)
                _steps(backward_kernel, "backward", plan, call, layer, order, False)
            now = slice(layer * directions, (layer + 1) * directions)
            if need_h0:
                grad_h0[now] = call.grads.h
            if need_c0 and call.grads.c is not None:
                grad_c0[now] = call.grads.c
            if need_weights:
                of_layer = parts[layer * directions * each : (layer + 1) * directions * each]
                for n, grad in enumerate(_weight_gradients(plan, layer, x, call, bias)):
                    for d in range(directions):
                        of_layer[d * each + n].copy_(grad[d].reshape(-1))
            if layer or need_input:
                of_input = call.grads.of_input.flatten(1)
                asked = common.product(of_input, stack[layer].w_ih.view(of_input.shape[1], -1))
            if layer and dropout_p > 0 and asked is not None:
                drop(asked, asked, DROPOUT, (layer - 1) * plan.rows, dropout_p, seed)
            if layer and asked is not None:
                asked = asked.view(*input.shape[:-1], directions * width)
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
