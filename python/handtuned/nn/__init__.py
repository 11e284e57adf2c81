"""Twins of torch.nn's modules: the same constructors, parameters and state_dict; only forward differs."""

from . import cross_entropy as _cross_entropy
from . import functional
from .attention import MultiheadAttention
from .feed_forward import GEGLU, SwiGLU
from .linear import Linear
from .linear_int8 import Int8Linear
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .positional import SinusoidalPositionalEncoding
from .rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GEGLU",
    "GRU",
    "LSTM",
    "RNN",
    "AddLayerNorm",
    "AddRMSNorm",
    "GRUCell",
    "Int8Linear",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "SinusoidalPositionalEncoding",
    "SwiGLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]

if hasattr(_cross_entropy, "LinearCrossEntropyLoss"):  # torch 2.13 and newer
    LinearCrossEntropyLoss = _cross_entropy.LinearCrossEntropyLoss
    __all__ += ["LinearCrossEntropyLoss"]
