"""Linear layer and cross-entropy in Triton. Maths: csrc/cross_entropy.h.

Logits are torch's matrix product of some rows at a time, CHUNK elements, so nothing of the size of rows x classes is
ever stored. One program makes the loss of a row; the backward makes the logits again, turns them into their
gradient tile by tile, and multiplies that twice. Nobody waits for the device: a target outside the classes is no error
there, its loss is NaN.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import LOG2_E, scalar, tanh

LN_2 = tl.constexpr(0.6931471805599453)
CHUNK = 2**24  # logits at once
NONE, MEAN = 0, 1  # reductions by number


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(logits, bias, row, column, classes, softcap, CAP: tl.constexpr):
    """(z, slope of the softcap) of a block; -inf behind the last class."""
    ACC: tl.constexpr = logits.dtype.element_ty
    inside = column < classes
    z = tl.load(logits + row * classes + column, mask=inside, other=0.0)
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(ACC)
    slope = tl.full(z.shape, 1.0, ACC)
    if CAP:
        cap = scalar(softcap, ACC)
        t = tanh(z / cap)
        z, slope = cap * t, 1.0 - t * t
    return tl.where(inside, z, float("-inf")), slope


@triton.jit(do_not_specialize=["first", "rows", "ignore_index"])
def loss_kernel(
    logits,
    bias,
    target,
    weight,
    loss,
    own,
    stats,
    first,
    rows,
    classes,
    ignore_index,
    smoothing: tl.float64,
    softcap: tl.float64,
    z_loss: tl.float64,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of rows first, first + 1, ... loss, weight of the class, and in stats [2, rows] largest logit and sum."""
    ACC: tl.constexpr = logits.dtype.element_ty
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    t = tl.load(target + row)
    if t == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(own + row, 0.0)
        tl.store(stats + row, 0.0)
        tl.store(stats + rows + row, 0.0)
    else:
        # Each place of a block has a maximum and a sum of its own until the end.
        top = tl.full((BLOCK,), float("-inf"), ACC)
        total = tl.zeros((BLOCK,), ACC)
        of_target = tl.full((BLOCK,), float("-inf"), ACC)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z, _slope = _logits(logits, bias, local, column, classes, softcap, CAP)
            new = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp2((top - base) * LOG2_E) + tl.exp2((z - base) * LOG2_E)
            of_target = tl.where(column == t, z, of_target)
            top = new
        broken = tl.sum(tl.where(top != top, 1, 0), 0) > 0
        most = tl.where(broken, float("nan"), tl.max(top, 0))
        base = tl.where(most == float("-inf"), 0.0, most)
        mass = tl.sum(total * tl.exp2((top - base) * LOG2_E), 0)
        log = tl.log2(mass) * LN_2
        there = (t >= 0) & (t < classes)
        w = scalar(1.0, ACC)
        if weight is not None:
            w = tl.load(weight + t, mask=there, other=0.0).to(ACC)
        z_t = tl.sum(tl.where(of_target == float("-inf"), 0.0, of_target), 0)
        z_t = tl.where(tl.max(of_target, 0) == float("-inf"), tl.where(broken, float("nan"), float("-inf")), z_t)
        share = scalar(smoothing, ACC)
        value = (1.0 - share) * w * ((most - z_t) + log)
        if SMOOTH:
            spread = tl.zeros((BLOCK,), ACC)
            for start in range(0, classes, BLOCK):
                column = start + tl.arange(0, BLOCK)
                z, _slope = _logits(logits, bias, local, column, classes, softcap, CAP)
                below = (most - z) + log
                if weight is not None:
                    below *= tl.load(weight + column, mask=column < classes, other=0.0).to(ACC)
                spread += tl.where(column < classes, below, 0.0)
            value += share / classes * tl.sum(spread, 0)
        lse = most + log
        value += tl.where(scalar(z_loss, ACC) == 0.0, 0.0, scalar(z_loss, ACC) * lse * lse)
        tl.store(loss + row, tl.where(there, value, float("nan")))
        tl.store(own + row, w)
        tl.store(stats + row, most)
        tl.store(stats + rows + row, mass)


@triton.jit(do_not_specialize=["first", "rows", "ignore_index"])
def logits_backward_kernel(
    logits,
    bias,
    target,
    weight,
    weight_sum,
    grad,
    stats,
    grad_logits,
    first,
    rows,
    classes,
    ignore_index,
    smoothing: tl.float64,
    softcap: tl.float64,
    z_loss: tl.float64,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of the logits before bias and softcap; grad [rows] is that of each row's loss."""
    ACC: tl.constexpr = logits.dtype.element_ty
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    t = tl.load(target + row)
    at = grad_logits + local * classes + column
    if t == ignore_index:
        tl.store(at, tl.zeros((BLOCK,), grad_logits.dtype.element_ty), mask=inside)
    else:
        there = (t >= 0) & (t < classes)
        z, slope = _logits(logits, bias, local, column, classes, softcap, CAP)
        top, total = tl.load(stats + row), tl.load(stats + rows + row)
        share = scalar(smoothing, ACC)
        own = 1.0 - share
        each = share / classes
        of_all = each * classes
        spread = tl.full((BLOCK,), 1.0, ACC) * each
        if weight is not None:
            own *= tl.load(weight + t, mask=there, other=float("nan")).to(ACC)
            of_all = each * tl.load(weight_sum)
            spread *= tl.load(weight + column, mask=inside, other=0.0).to(ACC)
        of_p = own + of_all + 2.0 * scalar(z_loss, ACC) * (top + tl.log2(total) * LN_2)
        dz = of_p / total * tl.exp2((z - top) * LOG2_E) - spread - tl.where(column == t, own, 0.0)
        dz = dz * slope * tl.load(grad + row)
        tl.store(at, dz.to(grad_logits.dtype.element_ty), mask=inside)


# ---- launchers -------------------------------------------------------------------------------------------------------


def _block(classes: int) -> int:
    return min(2048, max(128, int(triton.next_power_of_2(classes))))


def _rows(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(input [rows, in_features], target [rows]); what rows that do not count hold reaches nothing."""
    target = target.reshape(-1).contiguous()
    x = input.reshape(target.numel(), input.shape[-1])
    return torch.where((target != ignore_index)[:, None], x, 0.0), target


def _keeps_nothing(keep: int) -> None:
    if keep:
        raise RuntimeError(
            f"handtuned.linear_cross_entropy: keep is {keep}, the limit of the Triton kernels is 0, they make the "
            "logits again; pass 0"
        )


def _chunks(rows: int, classes: int) -> list[slice]:
    step = max(16, CHUNK // classes)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, stats, kept [rows, 0])."""
    _keeps_nothing(keep)
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    x, t = _rows(input, target, ignore_index)
    rows, classes = t.numel(), linear_weight.shape[0]
    loss, own = common.empty((rows,), input, wide), common.empty((rows,), input, wide)
    stats, kept = common.empty((2, rows), input, wide), common.empty((rows, 0), input)
    bias, of_class = (None if v is None else v.contiguous() for v in (linear_bias, weight))
    with common.on_device(input):
        for chunk in _chunks(rows, classes):
            logits = common.product(x[chunk], linear_weight.t())
            loss_kernel[(logits.shape[0],)](
                *(logits, bias, t, of_class, loss, own, stats, chunk.start, rows, classes, ignore_index),
                *(label_smoothing, softcap, z_loss),
                CAP=softcap > 0,
                SMOOTH=label_smoothing > 0,
                BLOCK=_block(classes),
                num_warps=8,
                enable_fp_fusion=True,
            )
    if reduction == NONE:
        return loss.view(target.shape), stats, kept
    return loss.sum() / own.sum() if reduction == MEAN else loss.sum(), stats, kept


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    kept: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    need_input: bool,
    need_linear_weight: bool,
    need_linear_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_linear_weight, grad_linear_bias); what is not needed has shape (0,)."""
    _keeps_nothing(kept.shape[1])
    x, t = _rows(input, target, ignore_index)
    rows, (classes, features) = t.numel(), linear_weight.shape
    grad = grad_loss.reshape(-1).expand(rows) if reduction else grad_loss.reshape(rows)
    if reduction == MEAN:
        own = torch.ones_like(grad) if weight is None else weight.to(grad.dtype)[t.clamp(0, classes - 1)]
        grad = grad / torch.where(t != ignore_index, own, 0.0).sum()
    grad, stats = grad.contiguous(), stats.contiguous()
    bias, of_class = (None if v is None else v.contiguous() for v in (linear_bias, weight))
    weight_sum = None if of_class is None else of_class.sum(dtype=grad.dtype)
    grad_input = common.empty((rows, features) if need_input else (0,), input)
    of_weight = torch.zeros((classes, features) if need_linear_weight else (0,), dtype=grad.dtype, device=input.device)
    of_bias = torch.zeros((classes,) if need_linear_bias else (0,), dtype=grad.dtype, device=input.device)
    block = _block(classes)
    with common.on_device(input):
        for chunk in _chunks(rows, classes):
            logits = common.product(x[chunk], linear_weight.t())
            grad_logits = common.empty((logits.shape[0], classes), input)
            logits_backward_kernel[(logits.shape[0], triton.cdiv(classes, block))](
                *(logits, bias, t, of_class, weight_sum, grad, stats, grad_logits, chunk.start, rows, classes),
                *(ignore_index, label_smoothing, softcap, z_loss),
                CAP=softcap > 0,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
            if need_input:
                grad_input[chunk] = common.product(grad_logits, linear_weight)
            if need_linear_weight:
                of_weight += common.product(grad_logits.t(), x[chunk])
            if need_linear_bias:
                of_bias += grad_logits.sum(0, dtype=grad.dtype)
    return (
        grad_input.view(input.shape) if need_input else grad_input,
        of_weight.to(input.dtype),
        of_bias.to(input.dtype),
    )
