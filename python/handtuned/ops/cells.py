"""The recurrent cells by the ops' argument `mode`: torch's name, then a word for each thing that differs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product


@dataclass(frozen=True)
class Cell:
    """What follows from a mode. The flags are the words after the name, in this order."""

    name: str
    coupled: bool = False  # the LSTM's f = 1 - i
    peepholes: bool = False
    hardsigmoid: bool = False
    hardtanh: bool = False
    layernorm: bool = False

    @property
    def mode(self) -> str:
        return " ".join([self.name, *(f.name for f in fields(self)[1:] if getattr(self, f.name))])

    @property
    def is_lstm(self) -> bool:
        """Whether there is a cell state."""
        return self.name == "LSTM"

    @property
    def gates(self) -> int:
        return {"LSTM": 4, "GRU": 3}.get(self.name, 1) - self.coupled

    @property
    def peephole_gates(self) -> int:
        return self.gates - 1 if self.peepholes else 0

    def kept(self, zoneout: float) -> int:
        """Rows of hidden numbers that a step leaves for the backward, beside its output."""
        return self.gates + 1 if self.name in ("LSTM", "GRU") else int(zoneout > 0)

    def weights(self, bias: bool, projected: bool) -> int:
        """Tensors of a layer and direction."""
        return 2 + 2 * bias + projected + self.peepholes + self.gains(bias)

    def gains(self, bias: bool) -> int:
        """Those of its layer norms: gains of W_ih x, of W_hh h; the LSTM's of its cell state, and the bias."""
        return 2 + self.is_lstm * (1 + bias) if self.layernorm else 0

    def normed(self, hidden: int) -> int:
        """Numbers that the layer norms of a step leave for the backward."""
        return 2 * self.gates * hidden + (4 if self.is_lstm else 2) if self.layernorm else 0


def _words(name: str) -> list[bool]:
    """Which words a name allows."""
    lstm = name == "LSTM"
    return [lstm, lstm, lstm or name == "GRU", name != "RNN_RELU", True]


CELLS = {
    cell.mode: cell
    for name in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
    for cell in (Cell(name, *flags) for flags in product(*((False, True)[: 1 + ok] for ok in _words(name))))
}
MODES = (
    "allowed are LSTM, GRU, RNN_TANH and RNN_RELU, and then, after a space each and in this order, coupled and "
    "peepholes (LSTM), hardsigmoid (LSTM and GRU), hardtanh (all but RNN_RELU) and layernorm"
)
RATES = ("zoneout", "cell_zoneout", "recurrent_dropout", "weight_dropout")
