"""LayerNorm and RMSNorm in Triton, plain and as dropout -> add -> norm: the launchers, one for each op.

Arguments are those of the op schemas, already checked. No nn, no autograd. The kernels are in norm_kernels.py.

Inputs may have any strides. Elements of a row must lie side by side and the rows at one common distance; an input for
which that does not hold is copied once by `.contiguous()`.
"""

import math

import torch
import triton
from torch import Tensor

from . import common, tuning
from .norm_kernels import backward_kernel, forward_kernel, partials_kernel, row_sums_kernel

# Rows of partial sums that the backward leaves at most: enough programs to fill any device, little enough to add up.
MAX_PARTIALS = 512


# ---- launchers: shape and stride arithmetic, outputs, grid -----------------------------------------------------------


def _forward(
    input: Tensor,
    residual: Tensor | None,
    normalized_ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h, stats): h is the new residual, and the input itself in the plain forms."""
    split = input.dim() - normalized_ndim
    rows, cols = math.prod(input.shape[:split]), math.prod(input.shape[split:])
    out = common.empty(input.shape, input)
    new_residual = None if residual is None else common.empty(input.shape, input)
    hidden = input if new_residual is None else new_residual
    stats_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    stats = common.empty((2, rows) if centred else (rows,), input, stats_dtype)
    if rows == 0:
        return out, hidden, stats
    x, x_stride = common.as_rows(input, normalized_ndim)
    res, res_stride = (None, 0) if residual is None else common.as_rows(residual, normalized_ndim)
    gamma, beta = (None if t is None else t.contiguous() for t in (weight, bias))
    threshold, scale = common.dropout_constants(dropout_p)
    config = tuning.lookup("forward", cols, input.element_size(), input.device)
    with common.on_device(input):
        forward_kernel[(triton.cdiv(rows, config.rows),)](
            x,
            res,
            new_residual,
            gamma,
            beta,
            seed if dropout_p > 0.0 else None,
            out,
            stats,
            rows,
            cols,
            x_stride,
            res_stride,
            eps,
            threshold,
            scale,
            CENTRED=centred,
            ONE_TILE=cols <= config.tile,
            **common.meta(config),
        )
    return out, hidden, stats


def _backward(
    grad_output: Tensor,
    grad_extra: Tensor | None,
    hidden: Tensor,
    normalized_ndim: int,
    stats: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_hidden: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_input, grad_weight, grad_bias): grad_hidden is dh, grad_input is dh through the dropout."""
    split = hidden.dim() - normalized_ndim
    rows, cols = math.prod(hidden.shape[:split]), math.prod(hidden.shape[split:])
    like = hidden if weight is None else weight
    grad_hidden = common.empty(hidden.shape if need_hidden else (0,), hidden)
    grad_input = common.empty(hidden.shape if need_input else (0,), hidden)
    grad_weight = common.empty(hidden.shape[split:] if need_weight else (0,), like)
    grad_bias = common.empty(hidden.shape[split:] if need_bias else (0,), like)
    if rows == 0:
        return grad_hidden, grad_input, grad_weight.zero_(), grad_bias.zero_()
    config = tuning.lookup("backward", cols, hidden.element_size(), hidden.device)
    dy, dy_stride = common.as_rows(grad_output, normalized_ndim)
    h, h_stride = common.as_rows(hidden, normalized_ndim)
    extra, extra_stride = (None, 0) if grad_extra is None else common.as_rows(grad_extra, normalized_ndim)
    gamma, stats = None if weight is None else weight.contiguous(), stats.contiguous()
    # Deals the rows out by shape and tile only: the same partial sums whatever the device's size.
    rows_per_program = config.rows * triton.cdiv(triton.cdiv(rows, config.rows), MAX_PARTIALS)
    chunks = triton.cdiv(rows, rows_per_program)
    partial_weight = common.empty((chunks, cols), stats) if need_weight else None
    partial_bias = common.empty((chunks, cols), stats) if need_bias else None
    threshold, scale = common.dropout_constants(dropout_p)
    with common.on_device(hidden):
        sums = None
        if cols > config.tile and (need_hidden or need_input):
            sums = _row_sums(dy, dy_stride, h, h_stride, gamma, stats, rows, cols, centred)
        backward_kernel[(chunks, triton.cdiv(cols, config.tile))](
            dy,
            extra,
            h,
            gamma,
            stats,
            sums,
            seed if need_input else None,
            grad_hidden if need_hidden else None,
            grad_input if need_input else None,
            partial_weight,
            partial_bias,
            rows,
            cols,
            dy_stride,
            extra_stride,
            h_stride,
            rows_per_program,
            threshold,
            scale,
            CENTRED=centred,
            **common.meta(config),
        )
        for partial, grad in ((partial_weight, grad_weight), (partial_bias, grad_bias)):
            if partial is not None:
                sum_partials(partial, grad, chunks, cols)
    return grad_hidden, grad_input, grad_weight, grad_bias


def _row_sums(
    dy: Tensor,
    dy_stride: int,
    h: Tensor,
    h_stride: int,
    gamma: Tensor | None,
    stats: Tensor,
    rows: int,
    cols: int,
    centred: bool,
) -> Tensor:
    config = tuning.lookup("row_sums", cols, h.element_size(), h.device)
    sums = common.empty((2, rows), stats)
    row_sums_kernel[(triton.cdiv(rows, config.rows),)](
        dy, h, gamma, stats, sums, rows, cols, dy_stride, h_stride, CENTRED=centred, **common.meta(config)
    )
    return sums


def sum_partials(partial: Tensor, grad: Tensor, count: int, cols: int) -> None:
    """grad = the sum of partial's `count` rows, in one order."""
    config = tuning.lookup("partials", cols, partial.element_size(), partial.device)
    partials_kernel[(triton.cdiv(cols, config.tile),)](partial, grad, count, cols, **common.meta(config))


# ---- the ops, arguments in the schemas' order ------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(output, stats): stats is (2, rows), mean and rstd."""
    out, _, stats = _forward(input, None, normalized_ndim, weight, bias, eps, 0.0, None, True)
    return out, stats


def layer_norm_inference(
    input: Tensor,
    normalized_ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """output alone."""
    return layer_norm(input, normalized_ndim, weight, bias, eps)[0]


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_ndim: int,
    stats: Tensor,
    weight: Tensor | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias); what is not needed has shape (0,)."""
    dh, _, dw, db = _backward(
        grad_output,
        None,
        input,
        normalized_ndim,
        stats,
        weight,
        0.0,
        None,
        need_input,
        False,
        need_weight,
        need_bias,
        True,
    )
    return dh, dw, db


def rms_norm(input: Tensor, normalized_ndim: int, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(output, rstd): rstd is (rows,)."""
    out, _, rstd = _forward(input, None, normalized_ndim, weight, None, eps, 0.0, None, False)
    return out, rstd


def rms_norm_inference(input: Tensor, normalized_ndim: int, weight: Tensor | None, eps: float) -> Tensor:
    """output alone."""
    return rms_norm(input, normalized_ndim, weight, eps)[0]


def rms_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_ndim: int,
    rstd: Tensor,
    weight: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_input, grad_weight)."""
    dh, _, dw, _ = _backward(
        grad_output, None, input, normalized_ndim, rstd, weight, 0.0, None, need_input, False, need_weight, False, False
    )
    return dh, dw


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_ndim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, new_residual, stats)."""
    return _forward(input, residual, normalized_ndim, weight, bias, eps, dropout_p, seed, True)


def add_layer_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_ndim: int,
    stats: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_input, grad_residual, grad_weight, grad_bias); without dropout grad_residual serves for grad_input."""
    dh, dx, dw, db = _backward(
        grad_output,
        grad_new_residual,
        new_residual,
        normalized_ndim,
        stats,
        weight,
        dropout_p,
        seed,
        need_residual or need_input,
        need_input and dropout_p > 0.0,
        need_weight,
        need_bias,
        True,
    )
    return dx, dh, dw, db


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_ndim: int,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, new_residual, rstd)."""
    return _forward(input, residual, normalized_ndim, weight, None, eps, dropout_p, seed, False)


def add_rms_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_ndim: int,
    rstd: Tensor,
    weight: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_residual, grad_weight); without dropout grad_residual serves for grad_input."""
    dh, dx, dw, _ = _backward(
        grad_output,
        grad_new_residual,
        new_residual,
        normalized_ndim,
        rstd,
        weight,
        dropout_p,
        seed,
        need_residual or need_input,
        need_input and dropout_p > 0.0,
        need_weight,
        False,
        False,
    )
    return dx, dh, dw
