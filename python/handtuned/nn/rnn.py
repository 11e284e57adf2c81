"""Recurrent modules: torch.nn's LSTM, GRU, RNN and their cells with another forward.

They add no parameter, buffer or attribute to torch's, so state_dict, pickle, deepcopy and class swapping work both
ways. What kernels read instead of the weights (the same numbers in another order) is kept beside the module:
packing.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functional.rnn import Input, Result, pack_rnn_weights, run, run_cell
from .packing import KeepsPacked, kept
from .twins import twin


def _packed(module: KeepsPacked, mode: str, weights: list[Tensor], bias: bool, bidirectional: bool) -> Any:
    """What run and run_cell take at last: the weights packed, and what a backward calls.

    They are kept in training too, until the backward: a cell is called many times before it.
    """
    pack = lambda *ws: pack_rnn_weights(mode, ws, bias, bidirectional)  # noqa: E731
    packed = kept(module, "all", weights, pack, in_training=True)
    return packed, None if packed is None else module.drop_packed


def _run(module: Any, input: Input, hx: Any, lengths: Any) -> Result:
    module._update_flat_weights()
    weights = module._flat_weights
    return run(
        *(type(module).__name__, module.mode, input, hx, weights, module.bias, module.num_layers, module.dropout),
        *(module.training, module.bidirectional, module.batch_first, lengths),
        *_packed(module, module.mode, weights, module.bias, module.bidirectional),
    )


def _run_cell(module: Any, mode: str, input: Tensor, hx: Any) -> Any:
    weights = [module.weight_ih, module.weight_hh]
    if module.bias_ih is not None:
        weights += [module.bias_ih, module.bias_hh]
    packed = _packed(module, mode, weights, len(weights) == 4, False)
    return run_cell(type(module).__name__, mode, input, hx, weights, *packed)


@twin
class LSTM(KeepsPacked, torch.nn.LSTM):
    """torch.nn.LSTM: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence."""

    def forward(
        self, input: Input, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> Result:
        """(output, (hn, cn)) as torch.nn.LSTM's; lengths as functional.lstm's."""
        return _run(self, input, hx, lengths)


@twin
class GRU(KeepsPacked, torch.nn.GRU):
    """torch.nn.GRU: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence."""

    def forward(self, input: Input, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> Result:
        """(output, hn) as torch.nn.GRU's; lengths as functional.gru's."""
        return _run(self, input, hx, lengths)


@twin
class RNN(KeepsPacked, torch.nn.RNN):
    """torch.nn.RNN: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence."""

    def forward(self, input: Input, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> Result:
        """(output, hn) as torch.nn.RNN's; lengths as functional.rnn's."""
        return _run(self, input, hx, lengths)


@twin
class LSTMCell(KeepsPacked, torch.nn.LSTMCell):
    """torch.nn.LSTMCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,)."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _run_cell(self, "LSTM", input, hx)
        return found


@twin
class GRUCell(KeepsPacked, torch.nn.GRUCell):
    """torch.nn.GRUCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found: Tensor = _run_cell(self, "GRU", input, hx)
        return found


@twin
class RNNCell(KeepsPacked, torch.nn.RNNCell):
    """torch.nn.RNNCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found: Tensor = _run_cell(self, f"RNN_{self.nonlinearity.upper()}", input, hx)
        return found
