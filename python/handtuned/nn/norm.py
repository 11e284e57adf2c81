"""Norm modules: torch.nn's LayerNorm and RMSNorm with another forward, and both with the residual add in front.

They add no parameter, buffer or attribute to torch's, so state_dict, pickle and class swapping work both ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import functional as F
from .twins import twin


@twin
class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm: same constructor, same initial weights, same state_dict. Input (*, *normalized_shape)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@twin
class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm: same constructor, same initial weights, same state_dict. Input (*, *normalized_shape)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddLayerNorm(torch.nn.LayerNorm):
    """new_residual = dropout(input) + residual; output = LayerNorm(new_residual). Returns (output, new_residual).

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as torch.nn.LayerNorm.
        dropout: probability of dropping an element of input while training, in [0, 1].
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = _probability("AddLayerNorm", dropout)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, self.dropout, self.training
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class AddRMSNorm(torch.nn.RMSNorm):
    """new_residual = dropout(input) + residual; output = RMSNorm(new_residual). Returns (output, new_residual).

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as torch.nn.RMSNorm.
        dropout: probability of dropping an element of input while training, in [0, 1].
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout = _probability("AddRMSNorm", dropout)

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps, self.dropout, self.training
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def _probability(module: str, dropout: float) -> float:
    if not 0 <= dropout <= 1:
        raise ValueError(f"handtuned.nn.{module}: dropout is {dropout}, the limits are 0 and 1; pass a probability")
    return dropout
