"""Gated feed-forward blocks, SwiGLU and GEGLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fusing import activated, activation_name
from .linear import Linear


class SwiGLU(torch.nn.Module):
    """down_proj(dropout(silu(gate_proj(x)) * up_proj(x))): Shazeer 2020 (arXiv:2002.05202), as in Llama.

    The activation is the epilogue of gate_proj's product. Parameters have the names of Hugging Face's blocks.

    Args:
        d_model: width of input and output.
        d_hidden: width inside.
        bias: whether the three linears have one.
        dropout: probability of dropping an element inside, while training.
    """

    activation: Callable[..., Tensor] = staticmethod(torch.nn.functional.silu)

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_hidden, bias, device, dtype)
        self.up_proj = Linear(d_model, d_hidden, bias, device, dtype)
        self.down_proj = Linear(d_hidden, d_model, bias, device, dtype)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (*, d_model)."""
        gate = activated(x, self.gate_proj, self.activation, None, activation_name(self.activation))
        projected: Tensor = self.down_proj(self.dropout(gate * self.up_proj(x)))
        return projected


class GEGLU(SwiGLU):
    """SwiGLU with gelu, in its exact form, in place of silu."""

    activation: Callable[..., Tensor] = staticmethod(torch.nn.functional.gelu)
