"""Which class of torch.nn has which twin. A twin adds no state, so a module becomes its twin by changing its class."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}
Kind = TypeVar("Kind", bound=type[torch.nn.Module])


def twin(kind: Kind) -> Kind:
    """Declares a class to be the twin of its last base."""
    TWINS[kind.__bases__[-1]] = kind
    return kind


def become_twins(module: torch.nn.Module) -> None:
    """module and all modules inside, where the exact type has a twin: what torch's constructors have made."""
    for found in module.modules():
        found.__class__ = TWINS.get(type(found), type(found))


def constructor(base: type[torch.nn.Module]) -> Callable[..., None]:
    """The constructor of a twin whose base makes modules: the base's, after which all of them are twins."""
    construct: Callable[..., None] = base.__init__

    @wraps(construct)
    def init(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        become_twins(self)

    return init
