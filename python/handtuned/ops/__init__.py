"""The ops as torch knows them: torch.ops.handtuned.<name>, schemas in csrc/ops.cpp.

A module a family: handles, checks in the words of the C++ skin, and fake kernels.
"""

from __future__ import annotations

from typing import Any

from .attention import ATTENTION_OPS, AttentionArguments, attention, attention_backward
from .cells import CELLS, RATES, Cell
from .common import Arguments
from .cross_entropy import (
    CROSS_ENTROPY_OPS,
    CrossEntropyArguments,
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from .linear import (
    LINEAR_OPS,
    LinearArguments,
    linear,
    linear_backward,
    linear_inference,
    linear_pack,
)
from .linear_int8 import LINEAR_INT8_OPS, MOST_QUANTIZED, LinearInt8Arguments, linear_int8, linear_int8_pack
from .norm import (
    NORM_OPS,
    NormArguments,
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
from .rnn import (
    RNN_OPS,
    RnnArguments,
    RnnCellArguments,
    packed_bytes,
    rnn,
    rnn_backward,
    rnn_cell,
    rnn_inference,
    rnn_pack,
)
from .rotary import ROTARY_OPS, RotaryArguments, append_kv, rotary

_LINEAR_OPS = {**LINEAR_OPS, **LINEAR_INT8_OPS, **CROSS_ENTROPY_OPS}
OPS = {**NORM_OPS, **ATTENTION_OPS, **_LINEAR_OPS, **ROTARY_OPS, **RNN_OPS}
_FAMILIES: tuple[tuple[dict[str, Any], type[Arguments]], ...] = (
    (NORM_OPS, NormArguments),
    (ATTENTION_OPS, AttentionArguments),
    (LINEAR_OPS, LinearArguments),
    (LINEAR_INT8_OPS, LinearInt8Arguments),
    ({"rnn_cell": rnn_cell}, RnnCellArguments),
    (CROSS_ENTROPY_OPS, CrossEntropyArguments),
    (ROTARY_OPS, RotaryArguments),
    (RNN_OPS, RnnArguments),
)

__all__ = [
    "ATTENTION_OPS",
    "CELLS",
    "CROSS_ENTROPY_OPS",
    "GATES",
    "LINEAR_INT8_OPS",
    "LINEAR_OPS",
    "MOST_QUANTIZED",
    "NORM_OPS",
    "OPS",
    "RATES",
    "RNN_OPS",
    "ROTARY_OPS",
    "Cell",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "append_kv",
    "arguments",
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
    "packed_bytes",
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


def arguments(op: str, args: tuple[Any, ...]) -> Arguments:
    """An op's positional arguments by name, checked: RuntimeError if they are not what it takes."""
    kind = next(kind for names, kind in _FAMILIES if op in names)
    found = kind(OPS[op], args)
    found.check()
    return found
