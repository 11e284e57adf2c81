"""Twins of torch.nn.functional's functions, with its signatures."""

from .attention import attention_varlen, scaled_dot_product_attention
from .attention_tools import attention_weights, merge_attention
from .cross_entropy import linear_cross_entropy
from .kv_cache import attention_with_kv_cache
from .linear import linear, pack_linear_weight
from .linear_int8 import linear_int8, pack_int8_weight, quantize_linear_weight
from .multi_head_attention import multi_head_attention_forward
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rnn import gru, gru_cell, lstm, lstm_cell, pack_rnn_weights, rnn, rnn_cell
from .rotary import rotary_embedding, rotary_tables

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "gru",
    "gru_cell",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "multi_head_attention_forward",
    "pack_int8_weight",
    "pack_linear_weight",
    "pack_rnn_weights",
    "quantize_linear_weight",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "rotary_embedding",
    "rotary_tables",
    "scaled_dot_product_attention",
]
