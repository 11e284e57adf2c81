"""Packed weights, kept beside the modules and not in them, so that twins add no parameter, buffer or attribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.linear import FEW_ROWS
from . import functional as F

if TYPE_CHECKING:
    from typing_extensions import Self


class _Kept:
    """What was made of a weight, and what weight that was."""

    def __init__(self, weight: Tensor, make: Callable[[Tensor], Tensor]) -> None:
        self.key = _key(weight)
        # Without it an address could come back as another weight's after this one is freed.
        self.storage = StorageWeakRef(weight.untyped_storage())
        with torch.inference_mode(False), torch.no_grad():  # it may serve calls with gradients later
            self.made = make(weight)

    def is_of(self, weight: Tensor) -> bool:
        return self.key == _key(weight) and not self.storage.expired()


def _key(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride()


def _can_be_kept(weight: Tensor) -> bool:
    """Inference tensors have no version, tensor subclasses may have no memory of their own."""
    plain = type(weight) in (torch.nn.Parameter, Tensor)
    return plain and weight.device.type == "cpu" and not weight.is_inference()


_kept: WeakKeyDictionary[torch.nn.Module, dict[str, _Kept]] = WeakKeyDictionary()


def kept(
    module: torch.nn.Module, name: str, weight: Tensor, make: Callable[[Tensor], Tensor] = F.pack_linear_weight
) -> Tensor | None:
    """What make(weight) gives, made anew when the weight has changed; None where nothing may be kept.

    name: of the weight among those that the module keeps something of.
    """
    if torch.compiler.is_compiling() or _transforms_active() or not getattr(module, "keep_packed", True):
        return None
    if module.training and torch.is_grad_enabled():
        drop(module)
        return None
    if not _can_be_kept(weight):
        return None
    mine = _kept.setdefault(module, {})
    found = mine.get(name)
    if found is None or not found.is_of(weight):
        found = mine[name] = _Kept(weight, make)
    return found.made


def packed_weight(module: torch.nn.Module, name: str, weight: Tensor, input: Tensor) -> Tensor | None:
    """weight (out_features, in_features) packed for a linear of input; None where it should have the weight alone."""
    if torch.compiler.is_compiling():  # nothing is kept then, and a traced comparison would bind the rows
        return None
    few = input.numel() <= FEW_ROWS * weight.shape[-1]
    return None if few else kept(module, name, weight)


def drop(module: torch.nn.Module) -> None:
    """Frees what is kept for the module; the next call that wants it makes it again."""
    _kept.pop(module, None)


class KeepsPacked(torch.nn.Module):
    """A module that keeps its weights packed, outside training.

    Packing takes as much memory again, once, and is done anew when a weight has changed: by an optimizer,
    load_state_dict or any other operation that autograd sees, by a move or a conversion. A write through weight.data
    or a NumPy view is seen by nobody: call drop_packed() after one. In training mode with grad enabled, under
    torch.compile, for inference tensors and for inputs of few rows, nothing is kept.

    keep_packed: set it to False, on an instance or on the class, to save the memory and pack in each call.
    """

    keep_packed: bool = True

    def drop_packed(self) -> None:
        """Frees the packed weights; the next call that wants them packs again."""
        drop(self)

    def train(self, mode: bool = True) -> Self:
        if mode:
            drop(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        drop(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
