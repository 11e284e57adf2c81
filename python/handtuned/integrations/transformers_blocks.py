"""Twins of transformers' own modules: its many RMSNorms, Conv1D, and blocks that are one fused call or two.

Every model of transformers has classes of its own for the same few blocks. A class is recognised by the names of its
parts and then by what it computes: it runs once, with small parts of random weights, and must give what the twin gives,
its dropouts at their places included. Only then do its modules become twins. A twin is a subclass made of the class
itself, with another forward and no state, so isinstance, state_dict and save_pretrained stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..nn import functional as F
from ..nn.fusing import activated, add_norm
from ..nn.packing import kept, packed_weight

SMALL, INSIDE, ROWS = 6, 10, 5  # features of a trial, and its rows
TOLERANCE = 1e-5  # of a trial, in float32
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
Twin = type[Module]


# ---- the forwards of the twins; `activation` is a class attribute of theirs ------------------------------------------


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, _eps_of(self))


def _rms_norm_from_one(self: Any, hidden_states: Tensor) -> Tensor:
    """Gemma's, whose weight is kept less 1."""
    return F.rms_norm(hidden_states, self.weight.shape, 1 + self.weight.float(), _eps_of(self))


def _conv1d(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.run(x)
    return result


def _run_conv1d(self: Any, x: Tensor, **options: Any) -> Tensor:
    """Conv1D has the weight (in, out). Where no gradient leads to it, it is kept transposed, as that of a Linear."""
    weight = self.weight.T
    if not (torch.is_grad_enabled() and weight.requires_grad):
        transposed = kept(self, "transposed", (self.weight,), lambda weight: weight.detach().T.contiguous())
        weight = weight if transposed is None else transposed
    return F.linear(x, weight, self.bias, packed=packed_weight(self, "weight", weight, x), **options)


def _intermediate(self: Any, hidden_states: Tensor) -> Tensor:
    return activated(hidden_states, self.dense, self.intermediate_act_fn, None, self.activation)


def _output(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    return add_norm(self.dense(hidden_states), input_tensor, self.dropout, self.LayerNorm)[0]


def _gated(self: Any, x: Tensor) -> Tensor:
    gate = activated(x, self.gate_proj, self.act_fn, None, self.activation)
    projected: Tensor = self.down_proj(gate * self.up_proj(x))
    return projected


def _mlp(self: Any, hidden_states: Tensor) -> Tensor:
    projected: Tensor = self.fc2(activated(hidden_states, self.fc1, self.activation_fn, None, self.activation))
    return projected


def _gpt2_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    inside = activated(hidden_states, self.c_fc, self.act, None, self.activation)
    projected: Tensor = self.dropout(self.c_proj(inside))
    return projected


def _eps_of(norm: Any) -> float:
    """0 where it has none."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0)


# ---- the blocks ------------------------------------------------------------------------------------------------------

UP, DOWN = (SMALL, INSIDE), (INSIDE, SMALL)
ACTIVATION, DROPOUT, NORM = "activation", "dropout", "norm"


@dataclass(frozen=True)
class Block:
    """A block by its parts: name of each child -> (features in, out) of a linear, or which other thing it is."""

    forward: Callable[..., Tensor]
    parts: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[int, ...] = (SMALL,)  # features of each argument of forward

    @property
    def activation(self) -> str | None:
        return next((name for name, part in self.parts.items() if part == ACTIVATION), None)

    def twin(self, module: Module) -> Twin | None:
        """The twin if module has these parts, and its class computes with them what the twin does."""
        kind = type(module)
        if dict(module.named_children()).keys() != self.parts.keys() or list(module.parameters(recurse=False)):
            return None
        name = _activation_name(getattr(module, self.activation)) if self.activation else None
        twin = _subclass(kind, self.forward, name)
        small = _with(module, children={name: self._part(name, child) for name, child in module.named_children()})
        inputs = [torch.randn(ROWS, features) for features in self.inputs]
        return twin if _same(small, kind, twin, inputs) else None

    def _part(self, name: str, child: Module) -> Module:
        """What a trial has in the place of a child."""
        part = self.parts[name]
        if part == ACTIVATION:
            return child
        if part == DROPOUT:
            return _Thrice()
        if part == NORM:
            return torch.nn.LayerNorm(SMALL, getattr(child, "eps", 1e-5))
        linear = torch.nn.Linear(*part) if not _is_conv1d(child) else type(child)(*part[::-1])
        for parameter in linear.parameters():
            torch.nn.init.normal_(parameter)
        return linear


class _Thrice(Module):
    """In a trial in the place of a dropout: shows where it is, and is not random."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


BLOCKS = (
    Block(_intermediate, {"dense": UP, "intermediate_act_fn": ACTIVATION}),  # BERT and its relatives
    Block(_output, {"dense": DOWN, "LayerNorm": NORM, "dropout": DROPOUT}, (INSIDE, SMALL)),
    Block(_gated, {"gate_proj": UP, "up_proj": UP, "down_proj": DOWN, "act_fn": ACTIVATION}),  # Llama and most since
    Block(_mlp, {"activation_fn": ACTIVATION, "fc1": UP, "fc2": DOWN}),  # ViT, CLIP
    Block(_gpt2_mlp, {"c_fc": UP, "c_proj": DOWN, "act": ACTIVATION, "dropout": DROPOUT}),
)


# ---- recognition -----------------------------------------------------------------------------------------------------

_made: dict[tuple[Twin, Any, str | None], Twin] = {}  # (class, forward, activation) -> its twin


def find_block(module: Module) -> Twin | None:
    """The twin of one of transformers' own modules; None for all others, and for twins."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.") or "forward" in module.__dict__ or kind in _made.values():
        return None
    if _is_conv1d(module):
        return _subclass(kind, _conv1d, None)
    with torch.random.fork_rng(devices=()):
        if kind.__name__.endswith(("RMSNorm", "LayerNorm")):
            return _norm_twin(module)
        return next((twin for block in BLOCKS if (twin := block.twin(module))), None)


def _is_conv1d(module: Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _norm_twin(module: Module) -> Twin | None:
    """For a norm by root mean square with one weight over the last dim, and eps > 0."""
    weights = dict(module.named_parameters())
    if weights.keys() != {"weight"} or weights["weight"].dim() != 1 or not _eps_of(module) > 0:
        return None
    small = _with(module, parameters={"weight": Parameter(torch.randn(SMALL))})
    inputs = [torch.randn(ROWS, SMALL) * _eps_of(module) ** 0.5]  # so small that eps shows
    twins = (_subclass(type(module), forward, None) for forward in (_rms_norm, _rms_norm_from_one))
    return next((twin for twin in twins if _same(small, type(module), twin, inputs)), None)


def _subclass(kind: Twin, forward: Any, activation: str | None) -> Twin:
    key = (kind, forward, activation)
    if key not in _made:
        members = {"forward": forward, "activation": activation, "__module__": kind.__module__}
        members |= {"run": _run_conv1d} if forward is _conv1d else {}
        _made[key] = type(kind.__name__, (kind,), members)
    return _made[key]


def _with(
    module: Module, children: dict[str, Module | None] | None = None, parameters: dict[str, Any] | None = None
) -> Module:
    """A shallow copy, in training, with other children or parameters."""
    small = copy.copy(module)
    small._modules, small._parameters, small.training = children or {}, parameters or {}, True
    return small


@torch.no_grad()
def _same(small: Module, kind: Twin, twin: Twin, inputs: list[Tensor]) -> bool:
    """Whether both classes give the same for a small module."""
    try:
        theirs: Tensor = kind.forward(small, *inputs)
        small.__class__ = twin
        ours: Tensor = twin.forward(small, *inputs)
        return torch.allclose(theirs, ours, TOLERANCE, TOLERANCE * float(theirs.abs().max()))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # other arguments, or parts that are used otherwise
        return False
    finally:
        small.__class__ = kind


def _activation_name(activation: Any) -> str | None:
    """What functional.linear calls an activation, by its values; None if it has parameters or is none of them."""
    if not isinstance(activation, Module) or list(activation.parameters()):
        return None
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        found = activation(x)
        return next((name for name, values in ACTIVATIONS.items() if torch.allclose(found, values(x), 0, 1e-6)), None)
