"""LayerNorm and RMSNorm in Triton, plain and as dropout -> add -> norm: the kernels. norm.py launches them.

Maths, for one row of `cols` elements (mean stays 0 for RMSNorm):

    h = round(keep * scale * x + residual)             plain forms: h = x
    mean = sum(h) / cols,  var = sum((h - mean)^2) / cols,  rstd = 1 / sqrt(var + eps)
    y = (h - mean) * rstd * gamma + beta

    xhat = (h - mean) * rstd,  g = dy * gamma
    dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh_extra      RMSNorm: without mean(g)
    dx = dh * keep * scale,  dgamma = sum over rows of dy * xhat,  dbeta = sum over rows of dy

Tiles:

    forward    one program owns ROWS rows. A row of at most TILE columns is read once and stays in registers; a longer
               one is walked twice, first for its moments (two-pass in a tile, Chan's merge between them), then for y.
    backward   one program owns `rows_per_program` rows of one column tile: it writes dx and keeps dgamma and dbeta in
               registers, then stores them as one row of partial sums. A row longer than TILE needs mean(g) and
               mean(g * xhat) before: `row_sums_kernel` brings them.
    partials   sums the rows of partial sums, always in the same order.

dgamma and dbeta have the same bits at every run: no atomics, and how rows are dealt out depends on the shape and on the
tile alone, never on the device's size. Rows and strides are 64 bit, all sizes are run-time numbers.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import triton
import triton.language as tl

from .common import keep_factor, reciprocal_sqrt, scalar

# ---- pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _hidden(
    x,
    residual,
    new_residual,
    seed,
    row,
    start,
    rows,
    cols,
    x_stride,
    residual_stride,
    threshold,
    scale,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """h [ROWS, TILE] in ACC, 0 outside; the add forms store it, rounded, and go on with the rounded value."""
    lane = tl.arange(0, TILE)[None, :]
    inside = (row < rows)[:, None] & (lane < cols - start)
    h = tl.load(x + (row * x_stride + start)[:, None] + lane, mask=inside, other=0.0).to(ACC)
    if residual is not None:
        if seed is not None:
            h *= keep_factor(seed, row, start, threshold, scale, ROWS, TILE, ACC)
        h += tl.load(residual + (row * residual_stride + start)[:, None] + lane, mask=inside, other=0.0).to(ACC)
        rounded = h.to(new_residual.dtype.element_ty)
        tl.store(new_residual + (row * cols + start)[:, None] + lane, rounded, mask=inside)
        h = rounded.to(ACC)
    return h


@triton.jit
def _finish(h, mean, rstd, weight, bias, out, row, start, rows, cols, TILE: tl.constexpr, ACC: tl.constexpr):
    """out = (h - mean) * rstd * weight + bias for one tile."""
    lane = tl.arange(0, TILE)
    inside = lane < cols - start
    y = (h - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y *= tl.load(weight + start + lane, mask=inside, other=0.0).to(ACC)[None, :]
    if bias is not None:
        y += tl.load(bias + start + lane, mask=inside, other=0.0).to(ACC)[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    tl.store(out + (row * cols + start)[:, None] + lane[None, :], y.to(out.dtype.element_ty), mask=mask)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x,
    residual,
    new_residual,
    weight,
    bias,
    seed,
    out,
    stats,
    rows: tl.int64,
    cols: tl.int64,
    x_stride: tl.int64,
    residual_stride: tl.int64,
    eps: tl.float64,
    threshold: tl.int64,
    scale: tl.float64,
    CENTRED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    ACC: tl.constexpr = stats.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, TILE)[None, :]
    count = cols.to(ACC)
    mean = tl.zeros((ROWS,), ACC)
    if ONE_TILE:
        h = _hidden(
            x,
            residual,
            new_residual,
            seed,
            row,
            0,
            rows,
            cols,
            x_stride,
            residual_stride,
            threshold,
            scale,
            ROWS,
            TILE,
            ACC,
        )
        if CENTRED:
            mean = tl.sum(h, axis=1) / count
            # What is left of the mean after its own rounding, so that a constant row comes out as bias.
            mean += tl.sum(tl.where(lane < cols, h - mean[:, None], 0.0), axis=1) / count
        d = tl.where(lane < cols, h - mean[:, None], 0.0)
        rstd = reciprocal_sqrt(tl.sum(d * d, axis=1) / count + scalar(eps, ACC))
        _finish(h, mean, rstd, weight, bias, out, row, 0, rows, cols, TILE, ACC)
    else:
        m2 = tl.zeros((ROWS,), ACC)
        for start in tl.range(0, cols, TILE, num_stages=STAGES):
            h = _hidden(
                x,
                residual,
                new_residual,
                seed,
                row,
                start,
                rows,
                cols,
                x_stride,
                residual_stride,
                threshold,
                scale,
                ROWS,
                TILE,
                ACC,
            )
            if CENTRED:  # Chan: moments of the tile, then of the columns so far
                n = tl.minimum(cols - start, TILE).to(ACC)
                tile_mean = tl.sum(h, axis=1) / n
                d = tl.where(lane < cols - start, h - tile_mean[:, None], 0.0)
                delta = tile_mean - mean
                share = n / (n + start)
                m2 += tl.sum(d * d, axis=1) + delta * delta * (share * start)
                mean += delta * share
            else:
                m2 += tl.sum(h * h, axis=1)
        rstd = reciprocal_sqrt(m2 / count + scalar(eps, ACC))
        tl.debug_barrier()  # h is read back from new_residual, maybe by another thread than the one that stored it
        for start in tl.range(0, cols, TILE, num_stages=STAGES):
            mask = (row < rows)[:, None] & (lane < cols - start)
            if residual is not None:
                h = tl.load(new_residual + (row * cols + start)[:, None] + lane, mask=mask, other=0.0).to(ACC)
            else:
                h = tl.load(x + (row * x_stride + start)[:, None] + lane, mask=mask, other=0.0).to(ACC)
            _finish(h, mean, rstd, weight, bias, out, row, start, rows, cols, TILE, ACC)
    if CENTRED:
        tl.store(stats + row, mean, mask=row < rows)
        tl.store(stats + rows + row, rstd, mask=row < rows)
    else:
        tl.store(stats + row, rstd, mask=row < rows)


@triton.jit
def _row_stats(stats, row, rows, CENTRED: tl.constexpr):
    """mean and rstd, [ROWS, 1] each."""
    inside = row < rows
    if CENTRED:
        mean = tl.load(stats + row, mask=inside, other=0.0)
        rstd = tl.load(stats + rows + row, mask=inside, other=0.0)
    else:
        rstd = tl.load(stats + row, mask=inside, other=0.0)
        mean = tl.zeros_like(rstd)
    return mean[:, None], rstd[:, None]


@triton.jit
def _xhat_and_g(
    hidden,
    grad_output,
    w,
    mean,
    rstd,
    row,
    start,
    rows,
    cols,
    hidden_stride,
    grad_stride,
    TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """xhat, dy and g = dy * gamma of one tile; outside, dy and g are 0, so that sums over the tile need no mask."""
    lane = tl.arange(0, TILE)[None, :]
    inside = (row < rows)[:, None] & (lane < cols - start)
    h = tl.load(hidden + (row * hidden_stride + start)[:, None] + lane, mask=inside, other=0.0).to(ACC)
    dy = tl.load(grad_output + (row * grad_stride + start)[:, None] + lane, mask=inside, other=0.0).to(ACC)
    return (h - mean) * rstd, dy, dy * w


@triton.jit
def _gamma(weight, start, cols, TILE: tl.constexpr, ACC: tl.constexpr):
    """gamma [1, TILE] of one column tile, 1 where there is none."""
    lane = tl.arange(0, TILE)
    if weight is not None:
        return tl.load(weight + start + lane, mask=lane < cols - start, other=0.0).to(ACC)[None, :]
    else:
        return tl.full((1, TILE), 1.0, ACC)


@triton.jit(do_not_specialize=["rows"])
def row_sums_kernel(
    grad_output,
    hidden,
    weight,
    stats,
    sums,
    rows: tl.int64,
    cols: tl.int64,
    grad_stride: tl.int64,
    hidden_stride: tl.int64,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums[0] = mean(g * xhat), sums[1] = mean(g) of each row; only for rows longer than the backward's tile."""
    ACC: tl.constexpr = stats.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean, rstd = _row_stats(stats, row, rows, CENTRED)
    sum_gx = tl.zeros((ROWS, TILE), ACC)
    sum_g = tl.zeros((ROWS, TILE), ACC)
    for start in tl.range(0, cols, TILE, num_stages=STAGES):
        w = _gamma(weight, start, cols, TILE, ACC)
        xhat, _, g = _xhat_and_g(
            hidden, grad_output, w, mean, rstd, row, start, rows, cols, hidden_stride, grad_stride, TILE, ACC
        )
        sum_gx += g * xhat
        sum_g += g
    count = cols.to(ACC)
    tl.store(sums + row, tl.sum(sum_gx, axis=1) / count, mask=row < rows)
    if CENTRED:
        tl.store(sums + rows + row, tl.sum(sum_g, axis=1) / count, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def backward_kernel(
    grad_output,
    grad_extra,
    hidden,
    weight,
    stats,
    sums,
    seed,
    grad_hidden,
    grad_input,
    partial_weight,
    partial_bias,
    rows: tl.int64,
    cols: tl.int64,
    grad_stride: tl.int64,
    extra_stride: tl.int64,
    hidden_stride: tl.int64,
    rows_per_program: tl.int64,
    threshold: tl.int64,
    scale: tl.float64,
    CENTRED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What is None is not wanted: grad_hidden, grad_input, partial_*. sums is None where a row fits into one tile."""
    ACC: tl.constexpr = stats.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * TILE
    lane = tl.arange(0, TILE)
    count = cols.to(ACC)
    w = _gamma(weight, start, cols, TILE, ACC)
    dgamma = tl.zeros((ROWS, TILE), ACC)
    dbeta = tl.zeros((ROWS, TILE), ACC)
    for first in tl.range(0, rows_per_program, ROWS, num_stages=STAGES):
        row = chunk * rows_per_program + first + tl.arange(0, ROWS)
        mean, rstd = _row_stats(stats, row, rows, CENTRED)
        xhat, dy, g = _xhat_and_g(
            hidden, grad_output, w, mean, rstd, row, start, rows, cols, hidden_stride, grad_stride, TILE, ACC
        )
        dgamma += dy * xhat
        dbeta += dy
        if (grad_hidden is not None) or (grad_input is not None):
            if sums is None:
                mean_gx = (tl.sum(g * xhat, axis=1) / count)[:, None]
            else:
                mean_gx = tl.load(sums + row, mask=row < rows, other=0.0)[:, None]
            dh = g - xhat * mean_gx
            if CENTRED:
                if sums is None:
                    dh -= (tl.sum(g, axis=1) / count)[:, None]
                else:
                    dh -= tl.load(sums + rows + row, mask=row < rows, other=0.0)[:, None]
            dh *= rstd
            inside = (row < rows)[:, None] & (lane < cols - start)[None, :]
            at = (row * cols + start)[:, None] + lane[None, :]
            if grad_extra is not None:
                extra = grad_extra + (row * extra_stride + start)[:, None] + lane[None, :]
                dh += tl.load(extra, mask=inside, other=0.0).to(ACC)
            if grad_hidden is not None:
                tl.store(grad_hidden + at, dh.to(grad_hidden.dtype.element_ty), mask=inside)
            if grad_input is not None:
                dx = dh * keep_factor(seed, row, start, threshold, scale, ROWS, TILE, ACC)
                tl.store(grad_input + at, dx.to(grad_input.dtype.element_ty), mask=inside)
    at = chunk * cols + start + lane
    if partial_weight is not None:
        tl.store(partial_weight + at, tl.sum(dgamma, axis=0), mask=lane < cols - start)
    if partial_bias is not None:
        tl.store(partial_bias + at, tl.sum(dbeta, axis=0), mask=lane < cols - start)


@triton.jit(do_not_specialize=["count"])
def partials_kernel(
    partial, grad, count: tl.int64, cols: tl.int64, TILE: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr
):
    """grad[cols] = sum of partial[count, cols] over its rows."""
    col = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((ROWS, TILE), partial.dtype.element_ty)
    for first in tl.range(0, count, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row * cols + col, mask=(row < count) & (col < cols), other=0.0)
    col = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(grad + col, tl.sum(total, axis=0).to(grad.dtype.element_ty), mask=col < cols)
