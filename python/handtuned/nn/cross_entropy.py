"""LinearCrossEntropyLoss: torch.nn's with another forward, in releases of torch that have it (2.13 and newer)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from . import functional as F
from .twins import twin

if hasattr(torch.nn, "LinearCrossEntropyLoss"):

    @twin
    class LinearCrossEntropyLoss(torch.nn.LinearCrossEntropyLoss):
        """torch.nn.LinearCrossEntropyLoss: same constructor, same initial weights, same state_dict.

        Input (in_features) or (N, in_features), targets () or (N). Probabilities as targets and losses of more dims
        (out_features) run as torch's own, with a FallbackWarning.
        """

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            if self.out_features or target.is_floating_point():
                what = "out_features are given" if self.out_features else "target holds probabilities"
                backends.fell_back("linear_cross_entropy", f"{what}, torch's own function is called")
                return super().forward(input, target)
            return F.linear_cross_entropy(
                input,
                self.linear.weight,
                target,
                linear_bias=self.linear.bias,
                weight=self.weight,
                reduction=self.reduction,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
