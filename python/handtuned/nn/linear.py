"""Linear: torch.nn's with another forward. It adds no parameter, buffer or attribute to torch's, so state_dict, pickle,
deepcopy and class swapping work both ways: packed weights are kept beside the modules, not in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional as F
from .packing import KeepsPacked, packed_weight
from .twins import twin


@twin
class Linear(KeepsPacked, torch.nn.Linear):
    """torch.nn.Linear: same constructor, same initial weights, same state_dict. Input (*, in_features).

    Outside training the weight is kept packed: see keep_packed and drop_packed().
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)

    def run(self, input: Tensor, **options: Any) -> Tensor:
        """functional.linear with its options: activation, residual, dropout_p."""
        weight = self.weight  # once: a parametrization computes it anew each time it is read
        return F.linear(input, weight, self.bias, packed=packed_weight(self, "weight", weight, input), **options)
