"""The norm ops: handles, checks in the same words as csrc/norm.cpp, and fake kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .common import Arguments, by_name, namespace, register, wide_dtype

layer_norm = namespace.layer_norm.default
layer_norm_inference = namespace.layer_norm_inference.default
layer_norm_backward = namespace.layer_norm_backward.default
rms_norm = namespace.rms_norm.default
rms_norm_inference = namespace.rms_norm_inference.default
rms_norm_backward = namespace.rms_norm_backward.default
add_layer_norm = namespace.add_layer_norm.default
add_layer_norm_backward = namespace.add_layer_norm_backward.default
add_rms_norm = namespace.add_rms_norm.default
add_rms_norm_backward = namespace.add_rms_norm_backward.default

NORM_OPS = by_name(
    layer_norm,
    layer_norm_inference,
    layer_norm_backward,
    rms_norm,
    rms_norm_inference,
    rms_norm_backward,
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
)


class NormArguments(Arguments):
    """`h` is the tensor whose rows are normalised."""

    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        super().__init__(op, args)
        self.h: Tensor = self["new_residual"] if "new_residual" in self.named else self["input"]
        self.main_name, self.main = "input", self.h
        self.normalized_ndim: int = self["normalized_ndim"]

    @property
    def normalized_shape(self) -> torch.Size:
        return self.h.shape[self.h.dim() - self.normalized_ndim :]

    @property
    def rows(self) -> int:
        return math.prod(self.h.shape[: self.h.dim() - self.normalized_ndim])  # symbolic where the shape is

    def check(self) -> None:
        h, n, eps = self.h, self.normalized_ndim, self["eps"]
        self.check_dtype()
        self.require(
            1 <= n <= h.dim(),
            f"normalized_ndim is {n}, the limits are 1 and the {h.dim()} dims of input; "
            "pass the number of trailing dims to normalise over",
        )
        self.require(eps is None or eps > 0, f"eps is {eps}, the limit is eps > 0; torch's default is 1e-5")
        self.check_dropout()
        for name in ("stats", "rstd"):
            if self[name] is not None:
                self._check_statistics(self[name])
        for name in ("residual", "grad_output", "grad_new_residual"):
            if self[name] is not None:
                self._check_like_input(name, self[name])
        parameters = {name: self[name] for name in ("weight", "bias") if self[name] is not None}
        for name, tensor in parameters.items():
            self._check_parameter(name, tensor)
        self.require(
            len({tensor.dtype for tensor in parameters.values()}) <= 1,
            "weight and bias differ in dtype; convert one with .to()",
        )

    def _check_statistics(self, saved: Tensor) -> None:
        self.check_device("saved statistics", saved)
        count = 2 if "layer_norm" in self.op else 1
        rows = self.rows
        dtype = wide_dtype(self.h.dtype)
        self.require(
            saved.dtype == dtype and saved.numel() == rows * count and saved.is_contiguous(),
            f"the saved statistics are {saved.dtype} of shape {list(saved.shape)}, expected {dtype} with {count} x "
            f"{rows} elements; pass what the forward returned",
        )

    def _check_like_input(self, name: str, tensor: Tensor) -> None:
        self.check_device(name, tensor)
        self.require(
            tensor.shape == self.h.shape,
            f"{name} has shape {list(tensor.shape)}, expected the shape of input, {list(self.h.shape)}; "
            "expand or reshape it first",
        )
        self.require(
            tensor.dtype == self.h.dtype,
            f"{name} is {tensor.dtype}, input is {self.h.dtype}; convert one with .to()",
        )

    def _check_parameter(self, name: str, tensor: Tensor) -> None:
        self.check_device(name, tensor)
        shape, dtype = self.normalized_shape, self.h.dtype
        self.require(
            tensor.shape == shape,
            f"{name} has shape {list(tensor.shape)}, expected normalized_shape {list(shape)}; "
            f"pass a {name} of that shape",
        )
        allowed = [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]
        self.require(
            tensor.dtype in allowed,
            f"{name} is {tensor.dtype}, allowed beside a {dtype} input: "
            f"{' and '.join(str(a) for a in allowed)}; convert it with .to()",
        )

    def copies(self) -> list[str]:
        ndim = self.normalized_ndim
        tensors = {
            name: tensor
            for name, tensor in self.named.items()
            if isinstance(tensor, Tensor) and tensor.shape == self.h.shape and tensor.numel()
        }
        scattered = [name for name, t in tensors.items() if not t[(0,) * (t.dim() - ndim)].is_contiguous()]
        return [f"{name} is copied once: its rows are not contiguous" for name in scattered]

    def fake(self) -> Tensor | tuple[Tensor, ...]:
        return self._fake_backward() if self.op.endswith("_backward") else self._fake_forward()

    def _fake_forward(self) -> Tensor | tuple[Tensor, ...]:
        if self.op.endswith("_inference"):
            return self._like_h()
        shape = (2, self.rows) if "layer_norm" in self.op else (self.rows,)
        stats = self.h.new_empty(shape, dtype=wide_dtype(self.h.dtype))
        outputs = (self._like_h(), self._like_h()) if self["residual"] is not None else (self._like_h(),)
        return (*outputs, stats)

    def _like_h(self) -> Tensor:
        return self.h.new_empty(self.h.shape)

    def _fake_backward(self) -> tuple[Tensor, ...]:
        weight, h = self["weight"], self.h
        dtype = h.dtype if weight is None else weight.dtype

        def grad(wanted: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            return h.new_empty(shape if wanted else (0,), dtype=dtype)

        grads = [grad(self["need_input"] or bool(self["need_residual"]), h.shape, h.dtype)]
        if self.op.startswith("add_"):
            grads.insert(0, grad(self["need_input"] and self["dropout_p"] > 0, h.shape, h.dtype))
        grads.append(grad(self["need_weight"], self.normalized_shape, dtype))
        if "layer_norm" in self.op:
            grads.append(grad(self["need_bias"], self.normalized_shape, dtype))
        return tuple(grads)


for _op in NORM_OPS.values():
    register(_op, NormArguments, gpu=("cuda", "triton"))
