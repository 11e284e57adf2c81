"""The straight way of the recurrent modules. Of a streaming step, what lies between the caller and the kernel can take
longer than the kernel: so a plain call (no gradient, no switch, nothing traced, weights packed by a call before and not
written since) is one op. Whatever is not as expected is None here and goes the general way, which says what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch._C import _is_any_autocast_enabled as _any_autocast
from torch._C import _is_tracing
from torch.autograd import forward_ad

from .. import backends, ops
from .functional.variants import PLAIN
from .packing import still_kept

STACK = "stack"  # the name under which a module's weights are kept

# What OpOverload's own __call__ calls: a frame of Python less.
_rnn_inference, _rnn_cell = ops.rnn_inference._op, ops.rnn_cell._op


def _packed(module: Any, input: Any, dims: int) -> Tensor | None:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(input) is not Tensor or not backends.plain:
        return None
    if _any_autocast() or _transforms_active() or forward_ad._current_level >= 0 or _is_tracing() or not input.is_cpu:
        return None
    if module.variant is not PLAIN or input.ndim != dims or input.shape[-1] != module.input_size:
        return None
    return still_kept(module, STACK, module._parameters, input.dtype)


def _states(mode: str, hx: Any) -> tuple[Any, Any] | None:
    """(h, c) of what may be passed on."""
    if mode != "LSTM":
        return hx, None
    if hx is None:
        return None, None
    return hx if type(hx) is tuple and len(hx) == 2 else None


def run_straight(module: Any, input: Any, hx: Any) -> Any:
    """What forward returns, of torch.nn.LSTM, GRU and RNN."""
    packed, mode = _packed(module, input, 3), module.mode
    states = _states(mode, hx)
    if packed is None or states is None or (module.training and module.dropout):
        return None
    sizes = (module.hidden_size, module.proj_size, module.num_layers, module.bidirectional)
    x = input.transpose(0, 1) if module.batch_first else input
    output, hn, cn = _rnn_inference(x, None, *states, packed, mode, *sizes)
    if module.batch_first:
        output = output.transpose(0, 1)
    return output, ((hn, cn) if mode == "LSTM" else hn)


def run_cell_straight(module: Any, input: Any, hx: Any) -> Any:
    """The same of the cells."""
    mode = module._mode()
    packed, states = _packed(module, input, 2), _states(mode, hx)
    if packed is None or states is None:
        return None
    found = _rnn_cell(input, *states, packed, mode, module.hidden_size)
    return found if mode == "LSTM" else found[0]
