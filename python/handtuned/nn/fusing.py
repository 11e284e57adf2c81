"""Chains of modules as one call where each of them is what its class says; else module by module.

A child that has been exchanged, patched or hooked is called as the module that it is, so it is always what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Module

from . import functional as F
from .norm import LayerNorm


def plain(module: Any, *kinds: type[Module]) -> bool:
    """Whether the module is of exactly one of these classes and nobody listens to it."""
    if type(module) not in kinds:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def _linear(module: Any) -> Callable[..., Tensor] | None:
    """functional.linear of a plain linear, one of torch's or any twin with a method `run`; None for other modules."""
    if plain(module, torch.nn.Linear):
        return lambda x, **options: F.linear(x, module.weight, module.bias, **options)
    return module.run if hasattr(module, "run") and plain(module, type(module)) else None


def _rate(dropout: Any) -> float:
    """The probability that a plain dropout drops with."""
    return float(dropout.p) if dropout.training else 0.0


def activation_name(activation: Any) -> str | None:
    """What functional.linear calls an activation, function or module; None for one that it does not have."""
    if activation is torch.nn.functional.relu or activation is torch.relu or plain(activation, torch.nn.ReLU):
        return "relu"
    if activation is torch.nn.functional.gelu:
        return "gelu"
    if plain(activation, torch.nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if activation is torch.nn.functional.silu or plain(activation, torch.nn.SiLU):
        return "silu"
    return None


def activated(x: Tensor, linear: Any, activation: Any, dropout: Any, name: str | None) -> Tensor:
    """dropout(activation(linear(x))); name: what functional.linear calls the activation; dropout may be None."""
    run = _linear(linear)
    if run is None or name is None or not (dropout is None or plain(dropout, Dropout)):
        result: Tensor = activation(linear(x))
        return result if dropout is None else dropout(result)
    return run(x, activation=name, dropout_p=0.0 if dropout is None else _rate(dropout))


def add_projected(x: Tensor, residual: Tensor, linear: Any, dropout: Any) -> Tensor:
    """residual + dropout(linear(x))."""
    run = _linear(linear)
    if run is None or not plain(dropout, Dropout) or x.dtype != residual.dtype:
        total: Tensor = residual + dropout(linear(x))
        return total
    return run(x, residual=residual, dropout_p=_rate(dropout))


def add_norm(x: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of sum = residual + dropout(x)."""
    if not (plain(dropout, Dropout) and plain(norm, torch.nn.LayerNorm, LayerNorm) and norm.eps > 0):
        total = residual + dropout(x)
        return norm(total), total
    x, residual = _same_dtype(x, residual)
    return F.add_layer_norm(x, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, _rate(dropout))


def _same_dtype(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype; under autocast they differ."""
    if x.dtype == residual.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)
