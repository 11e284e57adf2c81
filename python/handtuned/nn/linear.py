"""Linear: torch.nn's with another forward. It adds no parameter, buffer or attribute to torch's, so state_dict, pickle,
deepcopy and class swapping work both ways: packed weights are kept beside the modules, not in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.linear import FEW_ROWS
from . import functional as F


class _Packed:
    """A packed weight, and what it was made of."""

    def __init__(self, weight: Tensor) -> None:
        self.key = _key(weight)
        # Without it an address could come back as another weight's after this one is freed.
        self.storage = StorageWeakRef(weight.untyped_storage())
        self.packed = F.pack_linear_weight(weight)

    def is_of(self, weight: Tensor) -> bool:
        return self.key == _key(weight) and not self.storage.expired()


def _key(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride()


_kept: WeakKeyDictionary[torch.nn.Module, _Packed] = WeakKeyDictionary()


class Linear(torch.nn.Linear):
    """torch.nn.Linear: same constructor, same initial weights, same state_dict. Input (*, in_features).

    Outside training the weight is packed once, which takes as much memory again, and packed anew when it has changed:
    by an optimizer, load_state_dict or any other operation that autograd sees, by a move or a conversion. A write
    through weight.data or a NumPy view is seen by nobody: call drop_packed() after one. In training mode with grad
    enabled, under torch.compile, for inference tensors and for inputs of few rows, nothing is kept.

    keep_packed: set it to False, on an instance or on the class, to save the memory and pack in each call.
    """

    keep_packed: bool = True

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias, packed=self.packed_for(input))

    def packed_for(self, input: Tensor) -> Tensor | None:
        """The packed weight for a call with this input; None where linear should be given the weight alone."""
        if torch.compiler.is_compiling() or not self.keep_packed:
            return None
        if self.training and torch.is_grad_enabled():
            self.drop_packed()
            return None
        weight = self.weight
        if input.numel() <= FEW_ROWS * weight.shape[-1] or not _can_be_kept(weight):
            return None
        found = _kept.get(self)
        if found is None or not found.is_of(weight):
            found = _kept[self] = _Packed(weight)
        return found.packed

    def drop_packed(self) -> None:
        """Frees the packed weight; the next call that wants one packs again."""
        _kept.pop(self, None)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.drop_packed()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.drop_packed()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]


def _can_be_kept(weight: Tensor) -> bool:
    """Inference tensors have no version, tensor subclasses may have no memory of their own."""
    plain = type(weight) in (torch.nn.Parameter, Tensor)
    return plain and weight.device.type == "cpu" and not weight.is_inference()
