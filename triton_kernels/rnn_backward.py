"""Recurrent layers in Triton: the backward. rnn.py launches it; what the two directions share: rnn_tile.py.

backward   gates' gradients of every step, and the gradient of the first state
before     the state that each step started from, as W_hh saw it: the other factor of W_hh's gradient
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import triton
import triton.language as tl

from .common import keep_factor
from .rnn_cells import bend, bend_slope, gru_slopes, lstm_slopes
from .rnn_tile import addresses, drawn_rows, peephole, product, put, rows_at, share_of, sizes_of


@triton.jit
def _state_before(saved, first, places, sizes, d, s, b, u, mask, width):
    """h or c before step s: saved after the one before, or the first."""
    _t, row, ran = rows_at(places, sizes, d, s - 1, b)
    at = (row * sizes.directions + d)[:, None] * width + u[None, :]
    there = tl.load(saved + at, mask=mask & ran[:, None], other=0.0)
    at = (d.to(tl.int64) * sizes.batch + b)[:, None] * width + u[None, :]
    return there + tl.load(first + at, mask=mask & (ran == 0)[:, None], other=0.0)


@triton.jit
def _lstm(
    call, sizes, widths, tile, dh, s, t, start, cell_threshold, cell_zone, GATES: tl.constexpr, HARD: tl.constexpr,
    HARD_TANH: tl.constexpr, CELL_ZONEOUT: tl.constexpr,
):  # fmt: skip
    """Gates' gradients; the gradient of c stays in call.grads.c."""
    ACC: tl.constexpr = call.grads.h.dtype.element_ty
    COUPLED: tl.constexpr = GATES == 3
    grads = call.grads
    d, b, u, row, _runs, mask = tile
    at_row = (row * sizes.directions + d)[:, None]
    gates = at_row * (GATES * widths.hidden) + u[None, :]
    i = tl.load(call.saved.gates + gates, mask=mask, other=0.0)
    f = 1.0 - i
    if not COUPLED:
        f = tl.load(call.saved.gates + gates + widths.hidden, mask=mask, other=0.0)
    g = tl.load(call.saved.gates + gates + (GATES - 2) * widths.hidden, mask=mask, other=0.0)
    o = tl.load(call.saved.gates + gates + (GATES - 1) * widths.hidden, mask=mask, other=0.0)
    c = _state_before(call.saved.c, call.first.c, call.places, sizes, d, s, b, u, mask, widths.hidden)
    bent = bend(f * c + i * g, HARD_TANH)
    at_state = (d.to(tl.int64) * sizes.batch + b)[:, None] * widths.hidden + u[None, :]
    dc = tl.load(grads.c + at_state, mask=mask, other=0.0)
    if grads.cells.data is not None:
        at = addresses(grads.cells, call.places, t, b, row)[:, None] + (d * widths.hidden + u)[None, :]
        dc += tl.load(grads.cells.data + at, mask=mask, other=0.0).to(ACC)
    stays = tl.zeros_like(dc)
    if CELL_ZONEOUT:
        drawn = drawn_rows(2, (sizes.stacked + d).to(tl.int64) * sizes.rows) + row
        share = share_of(call.seed, drawn, start, cell_threshold, cell_zone, b.shape[0], u.shape[0], ACC)
        stays = (1.0 - share) * dc
        dc = share * dc
    peep_o = peephole(call.weights, widths, d, GATES - 2, u, GATES - 1, ACC)
    di, df, dg, do, dc = lstm_slopes(i, f, g, o, c, bent, dh, dc, peep_o, COUPLED, HARD, HARD_TANH)
    dc = stays + dc * f + di * peephole(call.weights, widths, d, 0, u, GATES - 1, ACC)
    put(grads.of_input, call.places, sizes, gates, b, u, di, mask, widths.hidden)
    if not COUPLED:
        dc += df * peephole(call.weights, widths, d, 1, u, GATES - 1, ACC)
        put(grads.of_input, call.places, sizes, gates + widths.hidden, b, u, df, mask, widths.hidden)
    put(grads.of_input, call.places, sizes, gates + (GATES - 2) * widths.hidden, b, u, dg, mask, widths.hidden)
    put(grads.of_input, call.places, sizes, gates + (GATES - 1) * widths.hidden, b, u, do, mask, widths.hidden)
    tl.store(grads.c + at_state, dc, mask=mask)
    if grads.below is not None:
        put(grads.below, call.places, sizes, at_row * widths.hidden + u[None, :], b, u, o * bent, mask, widths.hidden)


@triton.jit
def _gru(call, sizes, widths, tile, dh, s, HARD: tl.constexpr, HARD_TANH: tl.constexpr):
    """Gates' gradients; returns what of the gradient goes past them to h."""
    grads = call.grads
    d, b, u, row, _runs, mask = tile
    hidden = widths.hidden
    at_row = (row * sizes.directions + d)[:, None]
    kept = call.saved.gates + at_row * (4 * hidden) + u[None, :]
    r = tl.load(kept, mask=mask, other=0.0)
    z = tl.load(kept + hidden, mask=mask, other=0.0)
    n = tl.load(kept + 2 * hidden, mask=mask, other=0.0)
    s_n = tl.load(kept + 3 * hidden, mask=mask, other=0.0)
    h = _state_before(call.saved.h, call.first.h, call.places, sizes, d, s, b, u, mask, hidden)
    dr, dz, dn = gru_slopes(r, z, n, s_n, h, dh, HARD, HARD_TANH)
    gates = at_row * (3 * hidden) + u[None, :]
    put(grads.of_input, call.places, sizes, gates, b, u, dr, mask, hidden)
    put(grads.of_input, call.places, sizes, gates + hidden, b, u, dz, mask, hidden)
    put(grads.of_input, call.places, sizes, gates + 2 * hidden, b, u, dn, mask, hidden)
    put(grads.of_state, call.places, sizes, gates, b, u, dr, mask, hidden)
    put(grads.of_state, call.places, sizes, gates + hidden, b, u, dz, mask, hidden)
    put(grads.of_state, call.places, sizes, gates + 2 * hidden, b, u, dn * r, mask, hidden)
    return dh * z


@triton.jit
def _rnn(call, sizes, widths, tile, dh, RELU: tl.constexpr, HARD_TANH: tl.constexpr, ZONEOUT: tl.constexpr):
    d, b, u, row, _runs, mask = tile
    at = (row * sizes.directions + d)[:, None] * widths.hidden + u[None, :]
    y = tl.load((call.saved.gates if ZONEOUT else call.saved.h) + at, mask=mask, other=0.0)
    slope = tl.where(y > 0.0, 1.0, 0.0).to(y.dtype) if RELU else bend_slope(y, HARD_TANH)
    put(call.grads.of_input, call.places, sizes, at, b, u, dh * slope, mask, widths.hidden)


@triton.jit
def _asked_for(
    call, sizes, widths, tile, s, t, start, zone_threshold, zone, drop_threshold, drop, GATES: tl.constexpr,
    ZONEOUT: tl.constexpr, STATE_DROPOUT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(gradient of the new h, what of it goes past the cell to the h before). Rows without the step: all goes past."""
    ACC: tl.constexpr = call.grads.h.dtype.element_ty
    d, b, u, row, _runs, mask = tile
    width = widths.width
    everyone = (b < sizes.batch)[:, None] & (u < width)[None, :]
    at_state = (d.to(tl.int64) * sizes.batch + b)[:, None] * width + u[None, :]
    dh = tl.load(call.grads.h + at_state, mask=everyone, other=0.0)
    _t, later, ran = rows_at(call.places, sizes, d, s + 1, b)
    gates = GATES * widths.hidden
    w = call.weights.w_hh + d.to(tl.int64) * gates * width
    through = product(
        call.grads.of_state, (later * sizes.directions + d) * gates, ran, w, u, u < width, gates, width, False, BLOCK,
        STAGES, ACC,
    )  # fmt: skip
    if STATE_DROPOUT:
        drawn = drawn_rows(3, (sizes.stacked + d).to(tl.int64) * sizes.batch) + b
        through *= keep_factor(call.seed, drawn, start, drop_threshold, drop, b.shape[0], u.shape[0], ACC)
    dh += through
    if call.grads.output.data is not None:
        at = addresses(call.grads.output, call.places, t, b, row)[:, None] + (d * width + u)[None, :]
        dh += tl.load(call.grads.output.data + at, mask=mask, other=0.0).to(ACC)
    past = tl.where(mask, 0.0, dh)
    if ZONEOUT:
        drawn = drawn_rows(1, (sizes.stacked + d).to(tl.int64) * sizes.rows) + row
        share = share_of(call.seed, drawn, start, zone_threshold, zone, b.shape[0], u.shape[0], ACC)
        past = tl.where(mask, (1.0 - share) * dh, dh)
        dh = share * dh
    return dh, past


@triton.jit(do_not_specialize=["first", "count"])
def backward_kernel(
    call,
    sizes,
    widths,
    first,
    count,
    units,
    zone_threshold: tl.int64,
    zone: tl.float64,
    cell_threshold: tl.int64,
    cell_zone: tl.float64,
    drop_threshold: tl.int64,
    drop: tl.float64,
    NAME: tl.constexpr,
    GATES: tl.constexpr,
    HARD: tl.constexpr,
    HARD_TANH: tl.constexpr,
    ZONEOUT: tl.constexpr,
    CELL_ZONEOUT: tl.constexpr,
    STATE_DROPOUT: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Steps first, first - 1, ... count of them. Step -1 is no step: it leaves the gradient of the first h."""
    ACC: tl.constexpr = call.grads.h.dtype.element_ty
    sizes = sizes_of(sizes)
    b = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1)
    width = widths.hidden if PART == "cell" else widths.width
    state_rows = d.to(tl.int64) * sizes.batch + b
    for back in range(0, count):
        s = first - back
        t, row, runs = rows_at(call.places, sizes, d, s, b)
        at_row = (row * sizes.directions + d)[:, None]
        for start in range(tl.program_id(2) * units, tl.minimum((tl.program_id(2) + 1) * units, width), BLOCK_UNITS):
            u = start + tl.arange(0, BLOCK_UNITS)
            mask = runs[:, None] & (u < width)[None, :]
            tile = (d, b, u, row, runs, mask)
            if PART == "cell":
                w = call.weights.w_hr + d.to(tl.int64) * widths.width * widths.hidden
                dh = product(
                    call.grads.projected, (row * sizes.directions + d) * widths.width, runs, w, u, u < width,
                    widths.width, widths.hidden, False, BLOCK_DEPTH, STAGES, ACC,
                )  # fmt: skip
                past = tl.zeros_like(dh)
            else:
                dh, past = _asked_for(
                    call, sizes, widths, tile, s, t, start, zone_threshold, zone, drop_threshold, drop, GATES, ZONEOUT,
                    STATE_DROPOUT, BLOCK_DEPTH, STAGES,
                )  # fmt: skip
            if s >= 0:
                if PART == "state":
                    put(call.grads.projected, call.places, sizes, at_row * width + u[None, :], b, u, dh, mask, width)
                elif NAME == "LSTM":
                    _lstm(
                        call, sizes, widths, tile, dh, s, t, start, cell_threshold, cell_zone, GATES, HARD, HARD_TANH,
                        CELL_ZONEOUT,
                    )  # fmt: skip
                elif NAME == "GRU":
                    past += tl.where(mask, _gru(call, sizes, widths, tile, dh, s, HARD, HARD_TANH), 0.0)
                else:
                    _rnn(call, sizes, widths, tile, dh, NAME == "RNN_RELU", HARD_TANH, ZONEOUT)
            if PART != "cell":
                everyone = (b < sizes.batch)[:, None] & (u < width)[None, :]
                tl.store(call.grads.h + state_rows[:, None] * width + u[None, :], past, mask=everyone)
        tl.debug_barrier()


@triton.jit
def before_kernel(
    saved,
    first,
    target,
    places,
    seed,
    sizes,
    width,
    drop_threshold: tl.int64,
    drop: tl.float64,
    STATE_DROPOUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """target [rows, D, width]: saved of the step before each, or first; 0 in rows without a step. A program a step."""
    ACC: tl.constexpr = saved.dtype.element_ty
    sizes = sizes_of(sizes)
    s = tl.program_id(0)
    b = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(2)
    _t, row, runs = rows_at(places, sizes, d, s, b)
    for start in range(0, width, BLOCK_UNITS):
        u = start + tl.arange(0, BLOCK_UNITS)
        mask = runs[:, None] & (u < width)[None, :]
        value = _state_before(saved, first, places, sizes, d, s, b, u, mask, width)
        if STATE_DROPOUT:
            drawn = drawn_rows(3, (sizes.stacked + d).to(tl.int64) * sizes.batch) + b
            value *= keep_factor(seed, drawn, start, drop_threshold, drop, BLOCK_ROWS, BLOCK_UNITS, ACC)
        at = (row * sizes.directions + d)[:, None] * width + u[None, :]
        put(target, places, sizes, at, b, u, value, mask, width)
