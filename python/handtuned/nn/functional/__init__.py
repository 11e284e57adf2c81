"""Twins of torch.nn.functional's functions, with its signatures."""

from .attention import attention_varlen, scaled_dot_product_attention
from .attention_tools import attention_weights, merge_attention
from .kv_cache import attention_with_kv_cache
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rnn import PackedWeights, gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell

__all__ = [
    "PackedWeights",
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "gru",
    "gru_cell",
    "layer_norm",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]
