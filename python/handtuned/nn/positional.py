"""SinusoidalPositionalEncoding: positions added to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as F


class SinusoidalPositionalEncoding(torch.nn.Module):
    """dropout(x + p), p[position, 2i] = sin(position / base^(2i / d_model)), p[position, 2i + 1] = cos(the same).

    Vaswani et al. 2017, section 3.5. The table is a buffer that state_dict leaves out.

    Args:
        d_model: width of the embeddings, even.
        dropout: probability of dropping a feature of the sum, while training.
        max_length: positions in the table.
        base: of the geometric row of wavelengths.
        batch_first: input is (N, L, d_model) instead of (L, N, d_model).
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.1,
        max_length: int = 5000,
        base: float = 10000.0,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 2 or d_model % 2:
            raise ValueError(
                f"handtuned.nn.SinusoidalPositionalEncoding: d_model is {d_model}, it must be even and at least 2"
            )
        self.d_model, self.max_length, self.base, self.batch_first = d_model, max_length, base, batch_first
        self.dropout = torch.nn.Dropout(dropout)
        cos, sin = F.rotary_tables(max_length, d_model, base, device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("table", torch.stack((sin, cos), -1).flatten(-2), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x: (N, L, d_model) with batch_first, else (L, N, d_model); or (L, d_model). offset: the first's position."""
        if x.dim() < 2:
            raise RuntimeError(
                f"handtuned.nn.SinusoidalPositionalEncoding: x has shape {list(x.shape)}, expected positions and "
                f"{self.d_model} features; reshape it"
            )
        dim = x.dim() - 2 if self.batch_first or x.dim() == 2 else 0
        length = x.shape[dim]
        if not 0 <= offset <= self.max_length - length:
            raise RuntimeError(
                f"handtuned.nn.SinusoidalPositionalEncoding: positions {offset} to {offset + length - 1} are asked "
                f"for, the limits are 0 and {self.max_length - 1}; construct it with a larger max_length"
            )
        rows = self.table[offset : offset + length].to(x.dtype)
        summed: Tensor = self.dropout(x + (rows if dim == x.dim() - 2 else rows[:, None]))
        return summed

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_length={self.max_length}, base={self.base}, batch_first={self.batch_first}"
