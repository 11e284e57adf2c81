"""Packed weights, kept beside the modules and not in them, so that twins add no parameter, buffer or attribute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch._C import _is_tracing

from .. import _C, backends
from ..ops.linear import FEW_ROWS
from . import functional as F

if TYPE_CHECKING:
    from typing_extensions import Self


class _Kept:
    """What was made of some weights, and which weights those were."""

    __slots__ = ("held", "key", "made", "marks")

    def __init__(self, weights: Sequence[Tensor], make: Callable[..., Tensor]) -> None:
        self.key = _key(weights)
        self.held = [weight.detach() for weight in weights]  # while these live, no other weight has their address
        with torch.inference_mode(False), torch.no_grad():  # it may serve calls with gradients later
            self.made = make(*weights)
        # What csrc/straight.cpp compares.
        self.marks = (_C.isa(), self.made, tuple((w, w.data_ptr(), w._version) for w in weights))

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        try:
            return self.key == _key(weights)
        except RuntimeError:  # a weight without version or memory has come in the place of one that was kept
            return False


def _key(weights: Sequence[Tensor]) -> list[Any]:
    key: list[Any] = [_C.isa()]
    for w in weights:
        key += (w.data_ptr(), w._version, w.dtype, w.shape, w.stride())
    return key


def _can_be_kept(weights: Sequence[Tensor]) -> bool:
    """Whether equal keys say that nothing was written: inference tensors have no version, tensor subclasses may have no
    memory of their own, and float64 is for checks that write through .data (gradcheck)."""
    for w in weights:
        plain = type(w) in (torch.nn.Parameter, Tensor) and w.device.type == "cpu"
        if not plain or w.dtype == torch.float64 or w.is_inference():
            return False
    return True


_kept: WeakKeyDictionary[torch.nn.Module, dict[str, _Kept]] = WeakKeyDictionary()


def kept(
    module: torch.nn.Module,
    name: str,
    weights: Sequence[Tensor],
    make: Callable[..., Tensor] = F.pack_linear_weight,
    *,
    in_training: bool = False,
) -> Tensor | None:
    """What make(*weights) gives, made anew when a weight has changed; None where nothing may be kept.

    name: of the weights among those that the module keeps something of.
    in_training: keep it in training too; the caller then drops it in the backward.
    """
    if torch.compiler.is_compiling() or _transforms_active() or not getattr(module, "keep_packed", True):
        return None
    if not backends.reads_layout():
        return None
    if _is_tracing():  # torch.jit.trace would write it into its graph, where no new weight could reach it
        return None
    if not in_training and module.training and torch.is_grad_enabled():
        drop(module)
        return None
    mine = _kept.get(module)
    found = None if mine is None else mine.get(name)
    if found is not None and found.is_of(weights):
        return found.made
    if not _can_be_kept(weights):
        return None
    found = _kept.setdefault(module, {})[name] = _Kept(weights, make)
    return found.made


def packed_weight(module: torch.nn.Module, name: str, weight: Tensor, input: Tensor) -> Tensor | None:
    """weight (out_features, in_features) packed for a linear of input; None where it should have the weight alone."""
    if torch.compiler.is_compiling():  # nothing is kept then, and a traced comparison would bind the rows
        return F.pack_linear_weight(weight) if _freezes() else None
    few = input.numel() <= FEW_ROWS * weight.shape[-1]
    return None if few else kept(module, name, (weight,))


def _freezes() -> bool:
    """Whether the compiler runs what depends on parameters alone once, and keeps the result."""
    import torch._inductor.config as inductor  # here, since it is slow to import and loaded where it can matter

    return inductor.freezing and not torch.is_grad_enabled()


def drop(module: torch.nn.Module) -> None:
    """Frees what is kept for the module; the next call that wants it makes it again."""
    _kept.pop(module, None)


class KeepsPacked(torch.nn.Module):
    """A module that keeps its weights packed, outside training.

    Packing takes as much memory again, once, and is done anew when a weight has changed: by an optimizer,
    load_state_dict or any other operation that autograd sees, by a move or a conversion. A write through weight.data
    or a NumPy view is seen by nobody: call drop_packed() after one. Under torch.compile and for float64 and inference
    tensors nothing is kept; a compiler that freezes parameters packs once by itself.

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
