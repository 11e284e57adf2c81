"""Every op that has a Triton kernel, by its name."""

from .attention import attention, attention_backward
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

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_inference",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_inference",
    "rnn",
    "rnn_backward",
    "rnn_cell",
    "rnn_inference",
    "rnn_pack",
]
