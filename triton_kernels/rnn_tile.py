"""Recurrent layers in Triton: what the kernels that walk over steps share. rnn.py launches them; maths: csrc/rnn.h.

forward    a program owns rows of the batch and units of one direction. At each step it adds W_hh h to what the input
           gives to its units' gates, which one matrix product made for all steps before, and makes h and c of them.
backward   the same from the last step to the first: the gradient of its units' h is what the output and the later steps
           ask for, plus W_hh^T times the gates' gradients of the step after; from it come the gates' gradients of this.

Both have two uses, of one compiled kernel. Persistent, a program owns all units and walks over all steps with a barrier
between two: the state of its rows is nobody else's. Else a launch does one step and programs share its units. Sums have
one order in both, so the bits are the same.

What a step reads of other units is rounded to the operands' dtype and comes from memory: `seen`, h as W_hh sees it
(dropout included), of which each step reads one half and writes the other, and the gates' gradients. Sums, h and c are
wide.

With a projection, h' = W_hr (o tanh(c')), a step is two launches: PART "cell" makes o tanh(c'), "state" projects it (in
the backward "state", then "cell"). "whole" is both where there is none.

saved, of each layer: h after each step; of LSTM and GRU the gates (GRU: r, z, n, and W_hn h + b_hn), of the LSTM c; of
the RNN with zoneout h' before it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of device functions have no Python types)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import keep_factor, number, scalar, stride_of

# ---- arguments -------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    steps: int  # all but the last are `hidden` (common.py) until a kernel takes sizes_of them
    batch: int
    rows: int  # T * B, or those of a packed input
    stacked: int  # directions of the layers below
    directions: int


class Widths(NamedTuple):
    """What a model fixes: the compiler may know that they are multiples of 16."""

    hidden: int
    width: int  # of h: hidden, or less with a projection


class Weights(NamedTuple):
    """Of all directions of a layer, one behind the other; contiguous."""

    w_ih: Tensor  # [D, gates * hidden, inputs]
    w_hh: Tensor  # [D, gates * hidden, width]
    b_ih: Tensor  # [D, gates * hidden]
    b_hh: Tensor
    w_hr: Tensor | None  # [D, width, hidden]
    peepholes: Tensor | None  # [D, those gates * hidden]


class Places(NamedTuple):
    lengths: Tensor | None
    starts: Tensor | None  # the first row of each step, if packed


class Rows(NamedTuple):
    """Row b of step t is at t * step + b * row, or number among the packed rows * row; columns are together."""

    data: Tensor | None
    step: int = 0  # hidden_strides()
    row: int = 0
    loose: int | None = None


class State(NamedTuple):
    """After the step before, wide: h, c [D, B, units]. In the operands' dtype: seen [2, D, B, width], and what is
    projected [D, B, hidden]."""

    h: Tensor
    c: Tensor | None
    seen: Tensor
    below: Tensor | None


class Saved(NamedTuple):
    h: Tensor | None  # [rows, D, width]
    gates: Tensor | None  # [rows, D, kept, hidden]
    c: Tensor | None  # [rows, D, hidden]


class First(NamedTuple):
    """States before the first step, wide [D, B, units]."""

    h: Tensor
    c: Tensor | None


class Forward(NamedTuple):
    from_input: Tensor  # wide [rows, D, gates, hidden], without bias
    weights: Weights
    places: Places
    state: State
    saved: Saved
    output: Rows
    cells: Rows
    seed: Tensor | None


class Grads(NamedTuple):
    output: Rows
    cells: Rows
    h: Tensor  # wide [D, B, width], of the state after the step at hand: at first grad_hn, at last grad_h0
    c: Tensor | None
    of_input: Tensor  # [rows, D, gates, hidden], of what the input gives
    of_state: Tensor  # of what the state gives: in all but the GRU the same tensor
    projected: Tensor | None  # [rows, D, width], of the projection
    below: Tensor | None  # [rows, D, hidden], no gradient: what is projected


class Backward(NamedTuple):
    grads: Grads
    weights: Weights
    places: Places
    first: First
    saved: Saved
    seed: Tensor | None


# ---- where a row is --------------------------------------------------------------------------------------------------


@triton.jit
def sizes_of(sizes):
    return Sizes(
        number(sizes.steps).to(tl.int32),
        number(sizes.batch).to(tl.int32),
        number(sizes.rows),
        number(sizes.stacked).to(tl.int32),
        sizes.directions,
    )


@triton.jit
def rows_at(places, sizes, d, s, b):
    """Of step s of direction d: (time, rows [b], which of them have a step there)."""
    t = tl.where(d == 0, s, sizes.steps - 1 - s)
    runs = b < tl.where((t >= 0) & (t < sizes.steps), sizes.batch, 0)
    if places.lengths is not None:
        runs = runs & (t < tl.load(places.lengths + b, mask=b < sizes.batch, other=0))
    if places.starts is not None:
        row = tl.load(places.starts + tl.minimum(tl.maximum(t, 0), sizes.steps - 1)) + b
    else:
        row = t.to(tl.int64) * sizes.batch + b
    return t, row, runs


@triton.jit
def addresses(rows, places, t, b, row):
    if places.starts is not None:
        return row * stride_of(rows.row, rows.loose)
    else:
        step, of_row = stride_of(rows.step, rows.loose), stride_of(rows.row, rows.loose)
        return t.to(tl.int64) * step + b.to(tl.int64) * of_row


@triton.jit
def drawn_rows(KIND: tl.constexpr, number):
    """Rows of the mask of a kind (csrc/cpu/rnn_noise.h)."""
    return (tl.full((), KIND, tl.int64) << 48) + number


# ---- what both directions use ----------------------------------------------------------------------------------------


@triton.jit
def product(
    a, a_rows, inside, w, u, real, depth, stride, BY_ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """[rows, units]: sum over k of a[row, k] w[u, k] BY_ROWS, else a[row, k] w[k, u]. stride: of the rows of w."""
    total = tl.zeros((inside.shape[0], u.shape[0]), ACC)
    for start in tl.range(0, depth, BLOCK, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK)
        there = k < depth
        left = tl.load(a + a_rows[:, None] + k[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        if BY_ROWS:
            at = w + u.to(tl.int64)[:, None] * stride + k[None, :]
            right = tl.trans(tl.load(at, mask=real[:, None] & there[None, :], other=0.0))
        else:
            at = w + k.to(tl.int64)[:, None] * stride + u[None, :]
            right = tl.load(at, mask=there[:, None] & real[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    return total


@triton.jit
def share_of(seed, row, start, threshold, number, ROWS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    """Of the new state under zoneout: drawn, 0 or 1, or without a seed its expectation."""
    if seed is not None:
        factor = keep_factor(seed, row, start, threshold, number, ROWS, TILE, ACC)
        return tl.where(factor != 0.0, 1.0, 0.0).to(ACC)
    else:
        return tl.zeros((ROWS, TILE), ACC) + scalar(number, ACC)


@triton.jit
def peephole(weights, widths, d, which, u, PEEPHOLES: tl.constexpr, ACC: tl.constexpr):
    """[1, units], 0 where there are none; which: among the gates that have one."""
    if weights.peepholes is not None:
        at = weights.peepholes + (d * PEEPHOLES + which) * widths.hidden + u
        return tl.load(at, mask=u < widths.hidden, other=0.0).to(ACC)[None, :]
    else:
        return tl.zeros((1, u.shape[0]), ACC)


@triton.jit
def keep(data, at, value, mask):
    if data is not None:
        tl.store(data + at, value.to(data.dtype.element_ty), mask=mask)


@triton.jit
def put(data, places, sizes, at, b, u, value, mask, width):
    """A result's elements; in rows that have no step 0, where there are such rows."""
    value = tl.where(mask, value, 0.0)
    if places.starts is None:
        mask = (b < sizes.batch)[:, None] & (u < width)[None, :]
    tl.store(data + at, value.to(data.dtype.element_ty), mask=mask)
