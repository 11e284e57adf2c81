"""The linear ops: handles, checks in the same words as csrc/linear.cpp, and fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Arguments, by_name, namespace, register

linear_pack = namespace.linear_pack.default
linear = namespace.linear.default
linear_inference = namespace.linear_inference.default
linear_backward = namespace.linear_backward.default

LINEAR_OPS = by_name(linear_pack, linear, linear_inference, linear_backward)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")  # by number
PANEL = 64
FEW_ROWS = 4  # up to so many, a kernel reads the weight itself, once, and needs none that is packed


def packed_shape(weight: Tensor) -> list[int]:
    """[panels, steps, 64, elements in a step] of what linear_pack makes of a weight."""
    n, k = weight.shape
    step = 2 if weight.dtype == torch.bfloat16 else 1
    return [(n + PANEL - 1) // PANEL, (k + step - 1) // step, PANEL, step]


class LinearArguments(Arguments):
    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        super().__init__(op, args)
        self.main_name = "weight" if self.op.endswith("_pack") else "input"
        self.main: Tensor = self[self.main_name]
        self.weight: Tensor = self["weight"]  # absent where an int8 one is packed

    def check(self) -> None:
        self.check_dtype()
        if self.weight is not self.main:
            self.check_type("weight", self.weight)
        w = self.weight
        self.check_weight()
        if self.op == "linear_pack":
            return
        n, k = w.shape
        x = self.main
        self.require(
            x.dim() >= 1 and x.shape[-1] == k,
            f"input has shape {list(x.shape)}, expected [*, {k}] beside weight of shape {list(w.shape)}; "
            "its last dim is in_features",
        )
        self.check_rest(n)
        if self["packed"] is not None:
            self.check_type("packed", self["packed"])
            self.check_packed(self["packed"], packed_shape(w), "linear_pack")

    def check_weight(self) -> None:
        w = self.weight
        self.require(
            w.dim() == 2, f"weight has shape {list(w.shape)}, expected [out_features, in_features]; reshape it"
        )

    def check_packed(self, packed: Tensor, shape: list[int], maker: str) -> None:
        self.require(
            list(packed.shape) == shape and packed.is_contiguous(),
            f"packed has shape {list(packed.shape)}, expected a contiguous {shape}; "
            f"pass what {maker} made of this weight",
        )

    def check_rest(self, n: int) -> None:
        """What is beside input and weight, where the weight has n rows."""
        x, activation = self.main, self["activation"]
        self.require(
            0 <= activation < len(ACTIVATIONS),
            f"activation is {activation}, the limits are 0 and {len(ACTIVATIONS) - 1}; "
            "pass the number of an activation",
        )
        self.check_dropout()
        bias = self["bias"]
        if bias is not None:
            self.check_type("bias", bias)
            self.check_shape("bias", bias, [n])
        for name in ("residual", "grad_output"):
            if self[name] is not None:
                self.check_type(name, self[name])
                self.check_shape(name, self[name], [*x.shape[:-1], n])
        saved = self["preactivation"]
        if saved is not None:
            self.check_type("preactivation", saved)
            self.check_shape("preactivation", saved, [*x.shape[:-1], n] if activation else [0])

    def copies(self) -> list[str]:
        rows = ("input", "weight", "residual", "grad_output", "preactivation")
        given = {name: self[name] for name in rows if self[name] is not None and self[name].numel()}
        scattered = [name for name, t in given.items() if t.shape[-1] > 1 and t.stride(-1) != 1]
        return [f"{name} is copied once: its rows are not contiguous" for name in scattered]

    def fake(self) -> Tensor | tuple[Tensor, ...]:
        x, w = self.main, self.weight
        if self.op == "linear_pack":
            return w.new_empty(packed_shape(w))
        if self.op == "linear_backward":
            wanted = [("input", list(x.shape)), ("weight", list(w.shape)), ("bias", [w.shape[0]])]
            return tuple(x.new_empty(shape if self[f"need_{name}"] else [0]) for name, shape in wanted)
        shape = [*x.shape[:-1], w.shape[0]]
        output = x.new_empty(shape)
        if self.op == "linear_inference":
            return output
        return output, x.new_empty(shape if self["activation"] else [0])


for _op in LINEAR_OPS.values():
    register(_op, LinearArguments, gpu=("triton",))
