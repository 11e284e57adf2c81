"""Twins of torch.nn's modules: the same constructors, parameters and state_dict; only forward differs."""

from . import functional
from .linear import Linear
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "Linear", "RMSNorm", "functional"]
