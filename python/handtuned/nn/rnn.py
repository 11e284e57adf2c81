"""Recurrent modules: torch.nn's LSTM, GRU, RNN and their cells with another forward.

They add no parameter, buffer or attribute to torch's, so state_dict, pickle, deepcopy and class swapping work both
ways. What kernels read instead of the weights (the same numbers in another order) is kept outside the module until a
weight changes; a change that no version counter sees (through .data) is told by flatten_parameters().
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .functional.rnn import Input, PackedWeights, Result, run, run_cell
from .twins import twin

_packs: WeakKeyDictionary[torch.nn.Module, PackedWeights] = WeakKeyDictionary()


def _packs_of(module: torch.nn.Module) -> PackedWeights:
    found = _packs.get(module)
    if found is None:
        found = _packs[module] = PackedWeights()
    return found


def _run(module: torch.nn.RNNBase, input: Input, hx: Any, lengths: Any) -> Result:
    module._update_flat_weights()
    packs = None if torch.compiler.is_compiling() else _packs_of(module)
    return run(
        *(type(module).__name__, module.mode, input, hx, module._flat_weights, module.bias, module.num_layers),  # type: ignore[arg-type]
        *(module.dropout, module.training, module.bidirectional, module.batch_first, lengths, packs),
    )


def _run_cell(module: torch.nn.RNNCellBase, mode: str, input: Tensor, hx: Any) -> Any:
    weights = [module.weight_ih, module.weight_hh]
    if module.bias_ih is not None:
        weights += [module.bias_ih, module.bias_hh]
    packs = None if torch.compiler.is_compiling() else _packs_of(module)
    return run_cell(type(module).__name__, mode, input, hx, weights, packs)


def _forget(module: torch.nn.Module) -> None:
    if module in _packs:
        _packs[module].forget()


@twin
class LSTM(torch.nn.LSTM):
    """torch.nn.LSTM: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence."""

    def forward(
        self, input: Input, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> Result:
        """(output, (hn, cn)) as torch.nn.LSTM's; lengths as functional.lstm's."""
        return _run(self, input, hx, lengths)

    def flatten_parameters(self) -> None:
        """torch's, and the weights' copy for the kernels is forgotten: the next call makes it anew."""
        super().flatten_parameters()
        _forget(self)


@twin
class GRU(torch.nn.GRU):
    """torch.nn.GRU: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence."""

    def forward(self, input: Input, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> Result:
        """(output, hn) as torch.nn.GRU's; lengths as functional.gru's."""
        return _run(self, input, hx, lengths)

    def flatten_parameters(self) -> None:
        """torch's, and the weights' copy for the kernels is forgotten: the next call makes it anew."""
        super().flatten_parameters()
        _forget(self)


@twin
class RNN(torch.nn.RNN):
    """torch.nn.RNN: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence."""

    def forward(self, input: Input, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> Result:
        """(output, hn) as torch.nn.RNN's; lengths as functional.rnn's."""
        return _run(self, input, hx, lengths)

    def flatten_parameters(self) -> None:
        """torch's, and the weights' copy for the kernels is forgotten: the next call makes it anew."""
        super().flatten_parameters()
        _forget(self)


@twin
class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,)."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _run_cell(self, "LSTM", input, hx)
        return found


@twin
class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found: Tensor = _run_cell(self, "GRU", input, hx)
        return found


@twin
class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found: Tensor = _run_cell(self, f"RNN_{self.nonlinearity.upper()}", input, hx)
        return found
