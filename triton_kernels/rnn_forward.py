"""Recurrent layers in Triton: the forward. rnn.py launches it; what the two directions share: rnn_tile.py."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import triton
import triton.language as tl

from .common import keep_factor
from .rnn_cells import bend, sigmoid
from .rnn_tile import addresses, drawn_rows, keep, peephole, product, put, rows_at, share_of, sizes_of


@triton.jit
def _gate(
    call, sizes, widths, tile, seen, h_rows, gate, GATES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """(W_ih x + b_ih, W_hh h + b_hh) of a gate's units."""
    ACC: tl.constexpr = call.state.h.dtype.element_ty
    d, b, u, row, _runs, mask = tile
    first = (d * GATES + gate) * widths.hidden
    w = call.weights.w_hh + first.to(tl.int64) * widths.width
    real = u < widths.hidden
    s = product(seen, h_rows, b < sizes.batch, w, u, real, widths.width, widths.width, True, BLOCK, STAGES, ACC)
    at = (row * sizes.directions * GATES * widths.hidden)[:, None] + (first + u)[None, :]
    x = tl.load(call.from_input + at, mask=mask, other=0.0)
    x += tl.load(call.weights.b_ih + first + u, mask=real, other=0.0).to(ACC)[None, :]
    return x, s + tl.load(call.weights.b_hh + first + u, mask=real, other=0.0).to(ACC)[None, :]


@triton.jit
def _lstm(
    call, sizes, widths, tile, seen, h_rows, t, start, cell_threshold, cell_zone, GATES: tl.constexpr,
    HARD: tl.constexpr, HARD_TANH: tl.constexpr, CELL_ZONEOUT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = call.state.h.dtype.element_ty
    COUPLED: tl.constexpr = GATES == 3
    d, b, u, row, _runs, mask = tile
    at_state = (d.to(tl.int64) * sizes.batch + b)[:, None] * widths.hidden + u[None, :]
    c = tl.load(call.state.c + at_state, mask=mask, other=0.0)
    x, s = _gate(call, sizes, widths, tile, seen, h_rows, 0, GATES, BLOCK, STAGES)
    i = sigmoid(x + s + peephole(call.weights, widths, d, 0, u, GATES - 1, ACC) * c, HARD)
    f = 1.0 - i
    if not COUPLED:
        x, s = _gate(call, sizes, widths, tile, seen, h_rows, 1, GATES, BLOCK, STAGES)
        f = sigmoid(x + s + peephole(call.weights, widths, d, 1, u, GATES - 1, ACC) * c, HARD)
    x, s = _gate(call, sizes, widths, tile, seen, h_rows, GATES - 2, GATES, BLOCK, STAGES)
    g = bend(x + s, HARD_TANH)
    new_c = f * c + i * g
    x, s = _gate(call, sizes, widths, tile, seen, h_rows, GATES - 1, GATES, BLOCK, STAGES)
    o = sigmoid(x + s + peephole(call.weights, widths, d, GATES - 2, u, GATES - 1, ACC) * new_c, HARD)
    new_h = o * bend(new_c, HARD_TANH)
    at_row = (row * sizes.directions + d)[:, None]
    gates = at_row * (GATES * widths.hidden) + u[None, :]
    keep(call.saved.gates, gates, i, mask)
    if not COUPLED:
        keep(call.saved.gates, gates + widths.hidden, f, mask)
    keep(call.saved.gates, gates + (GATES - 2) * widths.hidden, g, mask)
    keep(call.saved.gates, gates + (GATES - 1) * widths.hidden, o, mask)
    if CELL_ZONEOUT:
        drawn = drawn_rows(2, (sizes.stacked + d).to(tl.int64) * sizes.rows) + row
        share = share_of(call.seed, drawn, start, cell_threshold, cell_zone, b.shape[0], u.shape[0], ACC)
        new_c = share * new_c + (1.0 - share) * c
    tl.store(call.state.c + at_state, new_c, mask=mask)
    keep(call.saved.c, at_row * widths.hidden + u[None, :], new_c, mask)
    if call.cells.data is not None:
        at = addresses(call.cells, call.places, t, b, row)[:, None] + (d * widths.hidden + u)[None, :]
        put(call.cells.data, call.places, sizes, at, b, u, new_c, mask, widths.hidden)
    return new_h


@triton.jit
def _gru(
    call, sizes, widths, tile, seen, h_rows, h, GATES: tl.constexpr, HARD: tl.constexpr, HARD_TANH: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    d, _b, u, row, _runs, mask = tile
    x, s = _gate(call, sizes, widths, tile, seen, h_rows, 0, GATES, BLOCK, STAGES)
    r = sigmoid(x + s, HARD)
    x, s = _gate(call, sizes, widths, tile, seen, h_rows, 1, GATES, BLOCK, STAGES)
    z = sigmoid(x + s, HARD)
    x, s = _gate(call, sizes, widths, tile, seen, h_rows, 2, GATES, BLOCK, STAGES)
    n = bend(x + r * s, HARD_TANH)
    gates = (row * sizes.directions + d)[:, None] * (4 * widths.hidden) + u[None, :]
    keep(call.saved.gates, gates, r, mask)
    keep(call.saved.gates, gates + widths.hidden, z, mask)
    keep(call.saved.gates, gates + 2 * widths.hidden, n, mask)
    keep(call.saved.gates, gates + 3 * widths.hidden, s, mask)
    return (1.0 - z) * n + z * h


@triton.jit(do_not_specialize=["first", "count"])
def forward_kernel(
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
    """Steps first .. first + count of the units from program_id(2) * units on, as many."""
    ACC: tl.constexpr = call.state.h.dtype.element_ty
    sizes = sizes_of(sizes)
    b = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1)
    width = widths.width if PART == "state" else widths.hidden
    state_rows = d.to(tl.int64) * sizes.batch + b
    half = tl.full((), 1, tl.int64) * sizes.directions * sizes.batch * widths.width
    for s in range(first, first + count):
        t, row, runs = rows_at(call.places, sizes, d, s, b)
        seen = call.state.seen + s % 2 * half
        for start in range(tl.program_id(2) * units, tl.minimum((tl.program_id(2) + 1) * units, width), BLOCK_UNITS):
            u = start + tl.arange(0, BLOCK_UNITS)
            mask = runs[:, None] & (u < width)[None, :]
            tile = (d, b, u, row, runs, mask)
            at_state = state_rows[:, None] * widths.width + u[None, :]
            h_rows = state_rows * widths.width
            h = tl.zeros((BLOCK_ROWS, BLOCK_UNITS), ACC)
            if PART != "cell":
                h = tl.load(call.state.h + at_state, mask=(b < sizes.batch)[:, None] & (u < width)[None, :], other=0.0)
            if PART == "state":
                w = call.weights.w_hr + d.to(tl.int64) * widths.width * widths.hidden
                new = product(
                    call.state.below, state_rows * widths.hidden, runs, w, u, u < width, widths.hidden, widths.hidden,
                    True, BLOCK_DEPTH, STAGES, ACC,
                )  # fmt: skip
            elif NAME == "LSTM":
                new = _lstm(
                    call, sizes, widths, tile, seen, h_rows, t, start, cell_threshold, cell_zone, GATES, HARD,
                    HARD_TANH, CELL_ZONEOUT, BLOCK_DEPTH, STAGES,
                )  # fmt: skip
            elif NAME == "GRU":
                new = _gru(call, sizes, widths, tile, seen, h_rows, h, GATES, HARD, HARD_TANH, BLOCK_DEPTH, STAGES)
            else:
                x, from_state = _gate(call, sizes, widths, tile, seen, h_rows, 0, GATES, BLOCK_DEPTH, STAGES)
                if NAME == "RNN_RELU":
                    new = tl.maximum(x + from_state, 0.0, propagate_nan=tl.PropagateNan.ALL)
                else:
                    new = bend(x + from_state, HARD_TANH)
            if PART == "cell":
                keep(call.state.below, state_rows[:, None] * widths.hidden + u[None, :], new, mask)
            else:
                if ZONEOUT:
                    if NAME != "LSTM" and NAME != "GRU":
                        keep(call.saved.gates, (row * sizes.directions + d)[:, None] * width + u[None, :], new, mask)
                    drawn = drawn_rows(1, (sizes.stacked + d).to(tl.int64) * sizes.rows) + row
                    share = share_of(call.seed, drawn, start, zone_threshold, zone, BLOCK_ROWS, BLOCK_UNITS, ACC)
                    new = share * new + (1.0 - share) * h
                at_row = (row * sizes.directions + d)[:, None] * width + u[None, :]
                if call.saved.h is not None:
                    put(call.saved.h, call.places, sizes, at_row, b, u, new, mask, width)
                at = addresses(call.output, call.places, t, b, row)[:, None] + (d * width + u)[None, :]
                put(call.output.data, call.places, sizes, at, b, u, new, mask, width)
                now = tl.where(mask, new, h)
                everyone = (b < sizes.batch)[:, None] & (u < width)[None, :]
                tl.store(call.state.h + at_state, now, mask=everyone)
                if STATE_DROPOUT:
                    drawn = drawn_rows(3, (sizes.stacked + d).to(tl.int64) * sizes.batch) + b
                    now *= keep_factor(call.seed, drawn, start, drop_threshold, drop, BLOCK_ROWS, BLOCK_UNITS, ACC)
                keep(call.state.seen + (s + 1) % 2 * half, at_state, now, everyone)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "width", "first"])
def drop_kernel(
    source,
    target,
    seed,
    rows,
    width,
    first,
    threshold: tl.int64,
    scale: tl.float64,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """target = source * factor, contiguous [rows, width]; the mask's rows are from `first` on."""
    ACC: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(1) * BLOCK_COLUMNS
    column = start + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    value = tl.load(source + at, mask=inside, other=0.0).to(ACC)
    drawn = drawn_rows(KIND, row + first)
    value *= keep_factor(seed, drawn, start, threshold, scale, BLOCK_ROWS, BLOCK_COLUMNS, ACC)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=inside)
