"""What a recurrent layer may differ in from torch's: keyword-only options, alike for functions and modules."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ...ops import CELLS, RATES


class Options(TypedDict, total=False):
    """Options by name; Variant says what each is."""

    activation: str
    recurrent_activation: str
    coupled_gates: bool
    peepholes: bool
    zoneout: float
    cell_zoneout: float
    recurrent_dropout: float
    weight_dropout: float
    layer_norm: bool
    return_cell_states: bool


@dataclass(frozen=True)
class Variant:
    """A recurrent layer's options; those of Variant() are torch's own.

    activation: "tanh", or "hardtanh", min(max(x, -1), 1). Not of the RNN with relu.
    recurrent_activation: of the gates, "sigmoid", or "hardsigmoid", min(max(x + 3, 0), 6) / 6. LSTM and GRU.
    coupled_gates: the LSTM's forget gate is 1 - i; its weights have rows of i, g, o alone.
    peepholes: the LSTM's gates see the cell state: i and f the old one, o the new one, each unit through a weight of
        its own (weight_ch: those of i, f, o one after the other; coupled: i, o).
    zoneout: probability of a unit of h to keep its old value in a step; outside training the expectation is taken.
    cell_zoneout: the same of the LSTM's c.
    recurrent_dropout: probability of dropping a unit of the h that W_hh multiplies, while training; one mask for all
        steps of a sequence.
    weight_dropout: probability of dropping an element of W_hh for a call, while training (DropConnect).
    layer_norm: layer normalisation in each step (Ba et al. 2016, equations 20 to 22; in haste likewise). Of the vectors
        W_ih x and W_hh h of all gates each is normalised as a whole, times a gain of its own (weight_ln_ih and
        weight_ln_hh, of weight_ih's rows), before its bias b_ih or b_hh is added; and the LSTM's h is
        o * tanh(weight_ln_c * LN(c) + bias_ln_c), without bias_ln_c where bias=False. LN(v) is (v - mean) /
        sqrt(variance + 1e-5). Peepholes see c as it is. Among a function's weights they come last, in this order.
    return_cell_states: the LSTM returns a third result, c after each step of the last layer, shaped as output with the
        width directions * H.
    """

    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    coupled_gates: bool = False
    peepholes: bool = False
    zoneout: float = 0.0
    cell_zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool = False
    return_cell_states: bool = False

    def given(self) -> dict[str, Any]:
        """The options that are not torch's."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def mode(self, name: str) -> str:
        """The ops' argument `mode` for a cell of torch's."""
        if self is PLAIN:
            return name
        words = {
            "coupled": self.coupled_gates,
            "peepholes": self.peepholes,
            "hardsigmoid": self.recurrent_activation == "hardsigmoid",
            "hardtanh": self.activation == "hardtanh",
            "layernorm": self.layer_norm,
        }
        return " ".join([name, *(word for word, given in words.items() if given)])

    def rates(self, training: bool) -> tuple[float, ...] | None:
        """The ops' argument `rates`."""
        if self is PLAIN:
            return None
        drops = (self.recurrent_dropout, self.weight_dropout) if training else (0.0, 0.0)
        found = (self.zoneout, self.cell_zoneout, *drops)
        return found if any(found) else None


PLAIN = Variant()
OPTIONS = tuple(f.name for f in fields(Variant))
_CHOICES = {"activation": ("tanh", "hardtanh"), "recurrent_activation": ("sigmoid", "hardsigmoid")}
_OF_THE_LSTM = ("coupled_gates", "peepholes", "cell_zoneout", "return_cell_states")
_OF_SEQUENCES = ("recurrent_dropout", "weight_dropout", "return_cell_states")


def variant_of(op: str, name: str, options: Any, one_step: bool = False) -> Variant:
    """The variant with these options, which the cell `name` must have. one_step: a cell, which has no sequence."""
    if not options:
        return PLAIN
    variant = Variant(**options)
    given = variant.given()
    for option, value in given.items():
        lacks = (
            (option in _OF_THE_LSTM and name != "LSTM")
            or (option == "recurrent_activation" and name.startswith("RNN"))
            or (option == "activation" and name == "RNN_RELU")
        )
        what = f"handtuned.{op}: {option} is {value!r}"
        if lacks:
            raise RuntimeError(f"{what}, which {name} does not have; leave it out")
        if one_step and option in _OF_SEQUENCES:
            raise RuntimeError(f"{what}, which is of a sequence and not of one step; leave it out")
        if option in _CHOICES and value not in _CHOICES[option]:
            raise RuntimeError(f"{what}, allowed are {_CHOICES[option][0]!r} and {_CHOICES[option][1]!r}")
        if option in RATES and not 0 <= value <= 1:
            raise RuntimeError(f"{what}, the limits are 0 and 1; pass a probability")
    assert variant.mode(name) in CELLS
    return variant if given else PLAIN
