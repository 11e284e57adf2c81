"""Recurrent modules: torch.nn's LSTM, GRU, RNN and their cells with another forward.

They add no parameter, buffer or attribute to torch's, so state_dict, pickle, deepcopy and class swapping work both
ways; only the options that torch does not have, keyword-only, add an attribute `variant` and parameters of their own.
What kernels read instead of the weights (the same numbers in another order) is kept beside the module: packing.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._C import straight_cell, straight_layer
from ..ops import CELLS, Cell
from .functional.recurrent import Input, Result, run, run_cell
from .functional.rnn import pack_rnn_weights
from .functional.variants import OPTIONS, PLAIN, Variant, variant_of
from .packing import KeepsPacked, kept
from .twins import twin

NORMS = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # parameters of layer norms, in this order


class _Recurrent(KeepsPacked):
    """What all six share: the variant's options in the constructor, and its parameters."""

    variant: Variant = PLAIN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        super().__init__(*args, **kwargs)
        one_step = isinstance(self, torch.nn.RNNCellBase)
        variant = variant_of(type(self).__name__, self._mode(), options, one_step)
        if variant is not PLAIN:
            self.variant = variant
            _add_parameters(self, CELLS[variant.mode(self._mode())])

    def _mode(self) -> str:
        """torch's name of the cell."""
        mode: str = self.mode  # type: ignore[assignment]
        return mode

    def reset_parameters(self) -> None:
        """torch's initialisation; gains of layer norms are 1, their bias 0."""
        super().reset_parameters()  # type: ignore[misc]
        for name, parameter in self.named_parameters(recurse=False):
            if "_ln_" in name:
                torch.nn.init.constant_(parameter, float(name.startswith("weight")))

    def extra_repr(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.variant.given().items()]
        return ", ".join([super().extra_repr(), *options])


def _add_parameters(module: Any, cell: Cell) -> None:
    """Gives a module of torch's the parameters of a variant: weights without the rows of f, peepholes, layer norms'."""
    one_step = isinstance(module, torch.nn.RNNCellBase)
    first = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    for names in [first] if one_step else module._all_weights:
        like = getattr(module, names[0])
        if cell.coupled:
            for name in names:
                if not name.startswith("weight_hr"):
                    shape = getattr(module, name).shape
                    setattr(
                        module, name, torch.nn.Parameter(like.new_empty(cell.gates * module.hidden_size, *shape[1:]))
                    )
        if cell.peepholes:
            name = names[0].replace("weight_ih", "weight_ch")
            setattr(module, name, torch.nn.Parameter(like.new_empty(cell.peephole_gates * module.hidden_size)))
            names.append(name)
        rows = cell.gates * module.hidden_size
        for kind, size in zip(NORMS, (rows, rows, *(module.hidden_size,) * 2), strict=True):
            if NORMS.index(kind) < cell.gains(module.bias):
                name = names[0].replace("weight_ih", kind)
                setattr(module, name, torch.nn.Parameter(like.new_empty(size)))
                names.append(name)
    if not one_step:
        module._flat_weights_names = [name for names in module._all_weights for name in names]
        module._init_flat_weights()
    module.reset_parameters()


def _packed(module: _Recurrent, weights: list[Tensor], bias: bool, bidirectional: bool) -> Any:
    """What run and run_cell take at last: the weights packed, and what a backward calls.

    They are kept in training too, until the backward: a cell is called many times before it.
    """
    variant, mode = module.variant, module._mode()
    if variant.weight_dropout > 0 and module.training:  # other weights in each call
        return None, None
    pack = lambda *ws: pack_rnn_weights(variant.mode(mode), ws, bias, bidirectional)  # noqa: E731
    packed = kept(module, "stack", weights, pack, in_training=True)
    return packed, None if packed is None else module.drop_packed


def _run(module: Any, input: Input, hx: Any, lengths: Any) -> Result:
    module._update_flat_weights()
    weights = module._flat_weights
    packed, spent = _packed(module, weights, module.bias, module.bidirectional)
    return run(
        *(type(module).__name__, module.mode, input, hx, weights, module.bias, module.num_layers, module.dropout),
        *(module.training, module.bidirectional, module.batch_first, lengths, packed, module.variant, spent),
    )


def _run_cell(module: Any, input: Tensor, hx: Any) -> Any:
    weights = [module.weight_ih, module.weight_hh]
    if module.bias_ih is not None:
        weights += [module.bias_ih, module.bias_hh]
    if module.variant.peepholes:
        weights.append(module.weight_ch)
    if module.variant.layer_norm:
        weights += [getattr(module, name) for name in NORMS if hasattr(module, name)]
    packed, spent = _packed(module, weights, module.bias_ih is not None, False)
    return run_cell(
        *(type(module).__name__, module._mode(), input, hx, weights, packed, module.variant, module.training, spent)
    )


@twin
class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence.

    Keyword-only options beside torch's: functional.variants.Variant.
    """

    def forward(
        self, input: Input, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Tensor | None = None
    ) -> Result:
        """(output, (hn, cn)) as torch.nn.LSTM's; lengths as functional.lstm's."""
        straight = lengths is None and not is_compiling()
        found = straight_layer(self, self.mode, input, hx) if straight else None
        return _run(self, input, hx, lengths) if found is None else found


@twin
class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence.

    Keyword-only options beside torch's: functional.variants.Variant.
    """

    def forward(self, input: Input, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> Result:
        """(output, hn) as torch.nn.GRU's; lengths as functional.gru's."""
        straight = lengths is None and not is_compiling()
        found = straight_layer(self, self.mode, input, hx) if straight else None
        return _run(self, input, hx, lengths) if found is None else found


@twin
class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN: same constructor, same initial weights, same state_dict; lengths= beside PackedSequence.

    Keyword-only options beside torch's: functional.variants.Variant.
    """

    def forward(self, input: Input, hx: Tensor | None = None, *, lengths: Tensor | None = None) -> Result:
        """(output, hn) as torch.nn.RNN's; lengths as functional.rnn's."""
        straight = lengths is None and not is_compiling()
        found = straight_layer(self, self.mode, input, hx) if straight else None
        return _run(self, input, hx, lengths) if found is None else found


@twin
class LSTMCell(_Recurrent, torch.nn.LSTMCell):
    """torch.nn.LSTMCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,).

    Keyword-only options beside torch's: functional.variants.Variant's, but those of whole sequences.
    """

    def _mode(self) -> str:
        return "LSTM"

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] | None = None if is_compiling() else straight_cell(self, "LSTM", input, hx)
        return _run_cell(self, input, hx) if found is None else found


@twin
class GRUCell(_Recurrent, torch.nn.GRUCell):
    """torch.nn.GRUCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,).

    Keyword-only options beside torch's: functional.variants.Variant's, but those of whole sequences.
    """

    def _mode(self) -> str:
        return "GRU"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found: Tensor | None = None if is_compiling() else straight_cell(self, self._mode(), input, hx)
        return _run_cell(self, input, hx) if found is None else found


@twin
class RNNCell(_Recurrent, torch.nn.RNNCell):
    """torch.nn.RNNCell: same constructor, same initial weights, same state_dict. Input (B, I) or (I,).

    Keyword-only options beside torch's: functional.variants.Variant's, but those of whole sequences.
    """

    def _mode(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        found: Tensor | None = None if is_compiling() else straight_cell(self, self._mode(), input, hx)
        return _run_cell(self, input, hx) if found is None else found
