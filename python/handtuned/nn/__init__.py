"""Twins of torch.nn's modules: the same constructors, parameters and state_dict; only forward differs."""

from . import functional
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm", "functional"]
