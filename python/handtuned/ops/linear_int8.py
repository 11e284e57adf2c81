"""The ops with an int8 weight: handles, checks in the same words as csrc/linear.cpp, and fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import by_name, namespace, register
from .linear import PANEL, LinearArguments

linear_int8_pack = namespace.linear_int8_pack.default
linear_int8 = namespace.linear_int8.default

LINEAR_INT8_OPS = by_name(linear_int8_pack, linear_int8)
MOST_QUANTIZED = 65536  # features of an input that is quantised, so that int32 holds the sum of products


def int8_packed_shape(out: int, k: int) -> list[int]:
    """[panels, steps, 64, 4] of what linear_int8_pack makes; the last step holds the sums of the columns."""
    return [(out + PANEL - 1) // PANEL, (k + 3) // 4 + 1, PANEL, 4]


class LinearInt8Arguments(LinearArguments):
    def check(self) -> None:
        if self.op == "linear_int8_pack":
            w = self.main
            self.require(
                w.dtype == torch.int8,
                f"weight is {w.dtype}, expected int8; quantize it with quantize_linear_weight",
            )
            self.check_weight()
            return
        x, scale, packed = self.main, self["scale"], self["packed"]
        self.check_dtype()
        self.require(
            x.dtype != torch.float64,
            "input is float64, supported are float32, bfloat16 and float16; convert it with .to()",
        )
        self.require(x.dim() >= 1, "input has shape [], expected [*, in_features]; its last dim is in_features")
        self._check_is("scale", scale, torch.float32, "convert it with .float()")
        self.require(
            scale.dim() == 1 and scale.is_contiguous(),
            f"scale has shape {list(scale.shape)}, expected a contiguous [out_features]; "
            "pass what quantize_linear_weight made",
        )
        self._check_is("packed", packed, torch.int8, "pass what linear_int8_pack made of the weight")
        n, k = scale.shape[0], x.shape[-1]
        self.check_packed(packed, int8_packed_shape(n, k), "linear_int8_pack")
        self.require(
            not self["quantize_input"] or k <= MOST_QUANTIZED,
            f"input has {k} features, the limit is {MOST_QUANTIZED} with quantize_input; switch it off",
        )
        self.check_rest(n)

    def _check_is(self, name: str, tensor: Tensor, dtype: torch.dtype, remedy: str) -> None:
        self.check_device(name, tensor)
        self.require(tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}; {remedy}")

    def fake(self) -> Tensor | tuple[Tensor, ...]:
        if self.op == "linear_int8_pack":
            return self.main.new_empty(int8_packed_shape(*self.main.shape))
        shape = [*self.main.shape[:-1], self["scale"].shape[0]]
        saved = self["activation"] and self["need_preactivation"]
        return self.main.new_empty(shape), self.main.new_empty(shape if saved else [0])


for _op in LINEAR_INT8_OPS.values():
    register(_op, LinearInt8Arguments, gpu=("triton",))
