"""Every op that has a Triton kernel, by its name."""

from .attention import attention, attention_backward
from .cross_entropy import linear_cross_entropy, linear_cross_entropy_backward
from .kv_cache import append_kv
from .linear import linear, linear_backward, linear_inference, linear_pack
from .linear_int8 import linear_int8, linear_int8_pack
from .norm import (
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
    layer_norm,
    layer_norm_backward,
    layer_norm_inference,
    rms_norm,
    rms_norm_backward,
    rms_norm_inference,
)
from .rnn import rnn, rnn_backward, rnn_cell, rnn_inference, rnn_pack
from .rotary import rotary

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "append_kv",
    "attention",
    "attention_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_inference",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_inference",
    "linear_int8",
    "linear_int8_pack",
    "linear_pack",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_inference",
    "rnn",
    "rnn_backward",
    "rnn_cell",
    "rnn_inference",
    "rnn_pack",
    "rotary",
]
