"""LSTM, GRU and RNN as functions.

State and sums are float32 (float64 for float64 tensors). A whole stack of layers is one op; its gradient is an op of
its own and can be differentiated again. On CPU the input is read by its strides as long as the last is 1, else copied
once.

With lengths, or packed rows, a row's output past its length is 0, its final state is that of its last step, and the
reverse direction starts there; what stands in the padding reaches nothing. Weights come as in torch, of each layer and
direction w_ih, w_hh, then b_ih, b_hh if bias, then w_hr if the state is projected, then peepholes, then those of layer
norms. Kernels read them in a layout of their own, made in each call unless it is passed in: pack_rnn_weights.

Errors: RuntimeError naming the argument, its value, the limit and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...autograd import kernels_for
from .recurrent import Input, Result, _require, run, run_cell
from .variants import Options, variant_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def pack_rnn_weights(
    mode: str,
    weights: Sequence[Tensor],
    bias: bool = True,
    bidirectional: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """Weights in the order in which the kernels read them, for the argument `packed` of the functions below.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        weights: torch's flat weights, as the functions take them; one layer's for a cell.
        bias, bidirectional: what the weights are of.
        options: the variant that they are of; only coupled_gates, peepholes and layer_norm make a difference.

    Returns:
        Bytes (uint8), about as many as the weights', for the instruction set in use. A copy: it does not follow later
        changes of the weights, and carries no gradient.
    """
    mode = variant_of("pack_rnn_weights", mode, options).mode(mode)
    if not weights:
        raise RuntimeError(
            "handtuned.pack_rnn_weights: weights has 0 tensors, expected 1 layer's or more; pass torch's flat weights"
        )
    with torch.no_grad():
        kernels = kernels_for("rnn_pack", weights[0], mode)
        packed: Tensor = kernels.rnn_pack(list(weights), mode, bidirectional, bias, 0.0, None)
    return packed


def lstm(
    input: Input,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    packed: Tensor | None = None,
    **options: Unpack[Options],
) -> Result:
    """torch.nn.LSTM as a function: layers of i, f, o = sigmoid, g = tanh; c' = f c + i g; h' = o tanh(c').

    Args:
        input: (T, B, I), or (B, T, I) with batch_first, (T, I) without a batch, or a PackedSequence; float32, float64,
            bfloat16 or float16. T and B may be 0.
        hx: (h0, c0) of shapes (layers * directions, B, R) and (layers * directions, B, H), without B if input has none;
            None for zeros. R is proj_size, or H without a projection.
        weights: torch's flat weights, all in input's dtype.
        bias, num_layers, bidirectional: what the weights are of.
        dropout: probability of dropping an element of the inputs of layers above the first while training, in [0, 1],
            in steps of 2^-16. The mask comes from Philox4x32-10 keyed by a seed drawn from torch's generator.
        lengths: (B,) integers from 0 to T in any order: the steps of each row; read on the CPU.
        packed: what pack_rnn_weights made of these very weights, for weights that are used more than once; without it
            they are packed in each call. Ignored where autocast takes the weights in another dtype.

        options: what differs from torch's LSTM: see variants.Variant. Outside training zoneout is its expectation and
            nothing is dropped. With peepholes, then with layer_norm, weights has theirs as the last of each layer and
            direction.

    Returns:
        output (T, B, directions * R), batch first, unbatched or packed as input is, and (hn, cn) like hx;
        with return_cell_states the last layer's c after each step (T, B, directions * H) besides.
    """
    return run(
        "lstm",
        "LSTM",
        *(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, lengths, packed),
        variant_of("lstm", "LSTM", options),
    )


def gru(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    packed: Tensor | None = None,
    **options: Unpack[Options],
) -> Result:
    """torch.nn.GRU as a function: h' = (1 - z) n + z h with n = tanh(W_in x + b_in + r (W_hn h + b_hn)).

    Arguments and results as lstm's; hx and hn are one tensor, h (layers * directions, B, H).
    """
    return run(
        "gru",
        "GRU",
        *(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, lengths, packed),
        variant_of("gru", "GRU", options),
    )


def rnn(
    input: Input,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    packed: Tensor | None = None,
    **options: Unpack[Options],
) -> Result:
    """torch.nn.RNN as a function: h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh.

    Arguments and results as gru's; nonlinearity is "tanh" or "relu".
    """
    mode = _mode("rnn", nonlinearity)
    return run(
        "rnn",
        mode,
        *(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, lengths, packed),
        variant_of("rnn", mode, options),
    )


def _mode(op: str, nonlinearity: str) -> str:
    ok = nonlinearity in ("tanh", "relu")
    _require(op, ok, f"nonlinearity is {nonlinearity!r}, allowed are 'tanh' and 'relu'")
    return f"RNN_{nonlinearity.upper()}"


def _given(*weights: Tensor | None) -> list[Tensor]:
    return [w for w in weights if w is not None]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_ch: Tensor | None = None,
    w_ln: Sequence[Tensor] = (),
    training: bool = False,
    packed: Tensor | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: (h, c) from input (B, I) and hx ((B, H), (B, H)), or without B; None for zeros.

    w_ch: the peepholes' weights, with peepholes=True. w_ln: those of layer norms, with layer_norm=True. training:
    zoneout draws, else takes its expectation.
    """
    variant = variant_of("lstm_cell", "LSTM", options, one_step=True)
    weights = _given(w_ih, w_hh, b_ih, b_hh, w_ch, *w_ln)
    found: tuple[Tensor, Tensor] = run_cell("lstm_cell", "LSTM", input, hx, weights, packed, variant, training)
    return found


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_ln: Sequence[Tensor] = (),
    training: bool = False,
    packed: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """One step of a GRU: h from input (B, I) and hx (B, H), or without B; None for zeros."""
    variant = variant_of("gru_cell", "GRU", options, one_step=True)
    weights = _given(w_ih, w_hh, b_ih, b_hh, *w_ln)
    found: Tensor = run_cell("gru_cell", "GRU", input, hx, weights, packed, variant, training)
    return found


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    w_ln: Sequence[Tensor] = (),
    training: bool = False,
    nonlinearity: str = "tanh",
    packed: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """One step of an RNN: h from input (B, I) and hx (B, H), or without B; None for zeros."""
    mode = _mode("rnn_cell", nonlinearity)
    variant = variant_of("rnn_cell", mode, options, one_step=True)
    weights = _given(w_ih, w_hh, b_ih, b_hh, *w_ln)
    found: Tensor = run_cell("rnn_cell", mode, input, hx, weights, packed, variant, training)
    return found
