"""A step of the recurrent cells in plain PyTorch, and what is drawn at random for it: the parts of rnn.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardtanh, layer_norm, linear

from ..ops.cells import RATES, Cell
from .norm import dropout_factor

EPSILON = 1e-5
State = tuple[Tensor, Tensor | None]  # h, and c of the LSTM
Step = Callable[[Tensor, Tensor, "Direction", State], State]


@dataclass
class Direction:
    """The wide weights of one layer and direction."""

    cell: Cell
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    peepholes: Tensor | None = None
    gains: tuple[Tensor, ...] = ()  # of layer norms: of W_ih x, of W_hh h; of c', bias of c'

    def from_input(self, x: Tensor) -> Tensor:
        return self._normed(x, self.w_ih, self.b_ih, 0)

    def from_state(self, h: Tensor) -> Tensor:
        return self._normed(h, self.w_hh, self.b_hh, 1)

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor | None, which: int) -> Tensor:
        if not self.gains:
            return linear(x, weight, bias)
        return layer_norm(linear(x, weight), weight.shape[:1], self.gains[which], bias, EPSILON)

    def bend(self, c: Tensor) -> Tensor:
        if self.gains:
            c = layer_norm(c, c.shape[-1:], self.gains[2], self.gains[3] if len(self.gains) == 4 else None, EPSILON)
        return self.tanh(c)

    def sigmoid(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6 if self.cell.hardsigmoid else x.sigmoid()

    def tanh(self, x: Tensor) -> Tensor:
        return hardtanh(x) if self.cell.hardtanh else x.tanh()

    def peep(self, gate: int, c: Tensor) -> Tensor | float:
        return 0.0 if self.peepholes is None else self.peepholes.chunk(self.cell.peephole_gates)[gate] * c


# ---- a step: gates' pre-activations from below, from the state -------------------------------------------------------


def _lstm(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    c = state[1]
    assert c is not None
    i, *f, g, o = (from_input + from_state).chunk(w.cell.gates, -1)
    i = w.sigmoid(i + w.peep(0, c))
    c = (w.sigmoid(f[0] + w.peep(1, c)) if f else 1 - i) * c + i * w.tanh(g)
    h = w.sigmoid(o + w.peep(-1, c)) * w.bend(c)
    return (h if w.w_hr is None else linear(h, w.w_hr)), c


def _gru(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    (ri, zi, ni), (rh, zh, nh) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    z = w.sigmoid(zi + zh)
    n = w.tanh(ni + w.sigmoid(ri + rh) * nh)
    return (1 - z) * n + z * state[0], None


def _tanh(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    return w.tanh(from_input + from_state), None


def _relu(from_input: Tensor, from_state: Tensor, w: Direction, state: State) -> State:
    return (from_input + from_state).relu(), None


STEPS: dict[str, Step] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


# ---- what is drawn at random (csrc/cpu/rnn_noise.h) ------------------------------------------------------------------

KINDS = ("dropout", *RATES)


def mask(kind: str, shape: Sequence[int], p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Factors of the dropout of a kind, or None where there is none."""
    if p == 0:
        return None
    assert seed is not None
    return dropout_factor(torch.Size(shape), 1, p, seed, dtype, KINDS.index(kind) << 48)


def share(kind: str, shape: Sequence[int], p: float, seed: Tensor | None, like: Tensor) -> Tensor | None:
    """The share of the new state under zoneout, or None where it is all."""
    if seed is None:
        return None if p == 0 else like.new_tensor(1 - p).expand(*shape)
    factor = mask(kind, shape, p, seed, like.dtype)
    return None if factor is None else (factor != 0).to(like.dtype)


def zone(share: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if share is None else share * new + (1 - share) * old


@dataclass
class Noise:
    """Of one layer and direction; shares are [T, B, width], the mask of states is [B, width]."""

    share_h: Tensor | None
    share_c: Tensor | None
    states: Tensor | None
