"""Linear layer and cross-entropy in plain PyTorch, with the op schemas' arguments and results.

z = cap(input linear_weight^T + linear_bias),   lse = ln sum e^z,   s = label_smoothing,   t the row's target
loss = (1-s) w_t (lse - z_t) + s/V sum_v w_v (lse - z_v) + z_loss lse^2,   0 in rows whose target is ignore_index
mean: their sum by that of w_t

Sources: torch.nn.functional.cross_entropy; label smoothing: Szegedy et al. 2016 (arXiv:1512.00567); soft cap: Gemma 2
(arXiv:2408.00118); z-loss: PaLM (arXiv:2204.02311).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


class _Rows:
    """The rows that count, with their logits and what their losses are made of."""

    def __init__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        softcap: float,
    ) -> None:
        self.counts = target.flatten() != ignore_index
        self.target = target.flatten()[self.counts]
        classes = linear_weight.shape[0]
        wrong = (self.target < 0) | (self.target >= classes)
        if wrong.any():
            raise RuntimeError(
                f"handtuned.linear_cross_entropy: target {int(self.target[wrong][0])} is out of bounds, the limits are "
                f"0 and {classes - 1}; rows of class {ignore_index} (ignore_index) are left out"
            )
        self.x, self.w = (
            _wide(input).reshape(self.counts.shape[0], linear_weight.shape[1])[self.counts],
            _wide(linear_weight),
        )
        self.z = F.linear(self.x, self.w, None if linear_bias is None else _wide(linear_bias))
        self.cap_slope = torch.ones_like(self.z)
        if softcap:
            t = torch.tanh(self.z / softcap)
            self.z, self.cap_slope = softcap * t, 1 - t * t
        self.weights = self.z.new_ones(classes) if weight is None else _wide(weight)

    def divisor(self, reduction: int) -> Tensor:
        own = self.weights[self.target]
        return own.sum() if REDUCTIONS[reduction] == "mean" else own.new_ones(())

    def stats(self) -> tuple[Tensor, Tensor]:
        """The largest logit, as a constant (whatever it is, the loss is the same), and the sum of e^(z - largest)."""
        top = self.z.detach().amax(-1)
        shift = torch.where(top > -torch.inf, top, 0)
        return top, torch.exp(self.z - shift[:, None]).sum(-1)

    def spread(self, rows: Tensor) -> Tensor:
        """Values of the rows that count at their places among all, zeros elsewhere."""
        return rows.new_zeros(self.counts.shape[0], *rows.shape[1:]).index_put((self.counts,), rows)


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
    rows = _Rows(input, linear_weight, linear_bias, target, weight, ignore_index, softcap)
    top, total = rows.stats()
    lse = top + torch.log(total)
    below = (top[:, None] - rows.z) + torch.log(total)[:, None]  # lse - z, also where both are large
    loss = (1 - label_smoothing) * rows.weights[rows.target] * below.gather(1, rows.target[:, None])[:, 0]
    if label_smoothing:
        loss = loss + label_smoothing / rows.z.shape[1] * (below * rows.weights).sum(1)
    if z_loss:
        loss = loss + z_loss * lse * lse
    if REDUCTIONS[reduction] == "none":
        reduced = rows.spread(loss).reshape(target.shape)
    else:
        reduced = loss.sum() / rows.divisor(reduction)
    kept = rows.spread(torch.softmax(rows.z.detach(), -1)[:, :keep].to(input.dtype))
    return reduced, torch.stack([rows.spread(top), rows.spread(total)]), kept


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
    rows = _Rows(input, linear_weight, linear_bias, target, weight, ignore_index, softcap)
    each = label_smoothing / rows.z.shape[1]
    own = (1 - label_smoothing) * rows.weights[rows.target]
    if torch.is_grad_enabled():  # with their dependence on input, weight and bias
        top, total = rows.stats()
    else:
        top, total = stats[:, rows.counts]
    g = grad_loss.flatten()[rows.counts] if REDUCTIONS[reduction] == "none" else grad_loss / rows.divisor(reduction)
    of_p = own + each * rows.weights.sum() + 2 * z_loss * (top + torch.log(total))
    dz = (of_p / total)[:, None] * torch.exp(rows.z - top[:, None]) - each * rows.weights
    dz = dz - own[:, None] * F.one_hot(rows.target, rows.z.shape[1])
    dz = dz * rows.cap_slope * g[..., None]

    def wanted(need: bool, grad: Tensor) -> Tensor:
        return grad.to(input.dtype) if need else grad.new_empty(0, dtype=input.dtype)

    return (
        wanted(need_input, rows.spread(dz @ rows.w).reshape(input.shape)),
        wanted(need_linear_weight, dz.T @ rows.x),
        wanted(need_linear_bias, dz.sum(0)),
    )
