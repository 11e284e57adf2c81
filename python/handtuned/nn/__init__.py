"""Twins of torch.nn's modules: the same constructors, parameters and state_dict; only forward differs."""

from . import functional
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AddLayerNorm",
    "AddRMSNorm",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "RMSNorm",
    "RNNCell",
    "functional",
]
