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
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch.autograd import forward_ad

from .. import backends, ops
from .functional.rnn import Input, PackedWeights, Result, run, run_cell
from .twins import twin

_packs: WeakKeyDictionary[torch.nn.Module, PackedWeights] = WeakKeyDictionary()


def _packs_of(module: torch.nn.Module) -> PackedWeights:
    found = _packs.get(module)
    if found is None:
        found = _packs[module] = PackedWeights()
    return found


# ---- the straight way -------------------------------------------------------------------------------------------------
# Of a streaming step, what lies between the caller and the kernel takes longer than the kernel. A plain call (no gradient,
# no switch, nothing traced) of packed weights that are still those of the module is one op; whatever is not as expected
# goes the general way, which also says what is wrong.

_rnn_inference, _rnn_cell = ops.rnn_inference._op, ops.rnn_cell._op  # the ops without OpOverload's frame in Python


def _still_packed(module: torch.nn.Module, input: Any) -> Tensor | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(input) is not Tensor or not backends.plain:
        return None
    if _any_autocast() or _transforms_active() or forward_ad._current_level >= 0 or not input.is_cpu:
        return None
    packs = _packs.get(module)
    return None if packs is None else packs.still(module._parameters.values())


def _states(mode: str, hx: Any) -> tuple[Any, Any] | None:
    """(h, c) of what may be passed on."""
    if mode != "LSTM":
        return hx, None
    if hx is None:
        return None, None
    return hx if type(hx) is tuple and len(hx) == 2 else None


def _run_straight(module: Any, input: Any, hx: Any) -> Result | None:
    packed = _still_packed(module, input)
    if packed is None or input.ndim != 3 or input.shape[2] != module.input_size or module.dropout and module.training:
        return None
    mode, states = module.mode, _states(module.mode, hx)
    if states is None:
        return None
    sizes = (module.hidden_size, module.proj_size, module.num_layers, module.bidirectional)
    x = input.transpose(0, 1) if module.batch_first else input
    output, hn, cn = _rnn_inference(x, None, *states, packed, mode, *sizes)
    if module.batch_first:
        output = output.transpose(0, 1)
    return output, ((hn, cn) if mode == "LSTM" else hn)


def _run_cell_straight(module: Any, mode: str, input: Any, hx: Any) -> Any:
    packed, states = _still_packed(module, input), _states(mode, hx)
    if packed is None or states is None or input.ndim != 2 or input.shape[1] != module.input_size:
        return None
    found = _rnn_cell(input, *states, packed, mode, module.hidden_size)
    return found if mode == "LSTM" else found[0]


# ---- the general way --------------------------------------------------------------------------------------------------


def _run(module: torch.nn.RNNBase, input: Input, hx: Any, lengths: Any) -> Result:
    if lengths is None:
        found = _run_straight(module, input, hx)
        if found is not None:
            return found
    module._update_flat_weights()
    packs = None if torch.compiler.is_compiling() else _packs_of(module)
    return run(
        *(type(module).__name__, module.mode, input, hx, module._flat_weights, module.bias, module.num_layers),  # type: ignore[arg-type]
        *(module.dropout, module.training, module.bidirectional, module.batch_first, lengths, packs),
    )


def _run_cell(module: torch.nn.RNNCellBase, mode: str, input: Tensor, hx: Any) -> Any:
    found = _run_cell_straight(module, mode, input, hx)
    if found is not None:
        return found
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
