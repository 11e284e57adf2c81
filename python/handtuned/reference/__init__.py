"""Every op once more in plain PyTorch: the formula that the kernels are proved against, and that serves double
backward and devices without a kernel. Differentiable, any dtype, any device, no speed claimed."""

from .attention import attention, attention_backward
from .cross_entropy import linear_cross_entropy, linear_cross_entropy_backward
from .linear import linear, linear_backward, linear_inference, linear_pack
from .linear_int8 import dequantize, linear_int8, linear_int8_pack, linear_int8_unpack, quantize_weight
from .norm import (
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
    dropout_factor,
    layer_norm,
    layer_norm_backward,
    layer_norm_inference,
    rms_norm,
    rms_norm_backward,
    rms_norm_inference,
)
from .rnn import recur, rnn, rnn_backward, rnn_cell, rnn_inference, rnn_pack
from .rotary import append_kv, rotary

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "append_kv",
    "attention",
    "attention_backward",
    "dequantize",
    "dropout_factor",
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
    "linear_int8_unpack",
    "linear_pack",
    "quantize_weight",
    "recur",
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
