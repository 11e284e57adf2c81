"""The ops as torch knows them: torch.ops.handtuned.<name>, schemas in csrc/ops.cpp.

This file gives each its fake kernel (checks, shapes and dtypes without data, for torch.compile and export) and, for
every device but the CPU, the kernel that the policy table finds. CPU kernels register themselves in C++.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._binary import OP_NAMESPACE

_namespace = getattr(torch.ops, OP_NAMESPACE)

layer_norm = _namespace.layer_norm.default
layer_norm_inference = _namespace.layer_norm_inference.default
layer_norm_backward = _namespace.layer_norm_backward.default
rms_norm = _namespace.rms_norm.default
rms_norm_inference = _namespace.rms_norm_inference.default
rms_norm_backward = _namespace.rms_norm_backward.default
add_layer_norm = _namespace.add_layer_norm.default
add_layer_norm_backward = _namespace.add_layer_norm_backward.default
add_rms_norm = _namespace.add_rms_norm.default
add_rms_norm_backward = _namespace.add_rms_norm_backward.default

NORM_OPS = {
    op._schema.name.removeprefix(f"{OP_NAMESPACE}::"): op
    for op in (
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
}


# ---- checks: the same limits and words as csrc/norm.cpp -------------------------------------------------------------


class _Arguments:
    """A norm op's arguments by name; `h` is the tensor whose rows are normalised."""

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op = op
        self.named = {a.name: value for a, value in zip(NORM_OPS[op]._schema.arguments, args, strict=True)}
        self.h: Tensor = self.named["new_residual"] if "new_residual" in self.named else self.named["input"]
        self.normalized_ndim: int = self.named["normalized_ndim"]

    def __getitem__(self, name: str) -> Any:
        return self.named.get(name)

    @property
    def normalized_shape(self) -> torch.Size:
        return self.h.shape[self.h.dim() - self.normalized_ndim :]

    @property
    def rows(self) -> int:
        return math.prod(self.h.shape[: self.h.dim() - self.normalized_ndim])  # symbolic where the shape is

    def require(self, ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"handtuned.{self.op}: {message}")

    def check(self) -> None:
        """Raises RuntimeError naming argument, value, limit and remedy. Reads no data."""
        h, n, p, eps = self.h, self.normalized_ndim, self["dropout_p"] or 0.0, self["eps"]
        self.require(
            h.dtype in backends.DTYPES,
            f"input is {h.dtype}, supported are float32, float64, bfloat16 and float16; convert it with .to()",
        )
        self.require(
            1 <= n <= h.dim(),
            f"normalized_ndim is {n}, the limits are 1 and the {h.dim()} dims of input; "
            "pass the number of trailing dims to normalise over",
        )
        self.require(eps is None or eps > 0, f"eps is {eps}, the limit is eps > 0; torch's default is 1e-5")
        self.require(0 <= p <= 1, f"dropout_p is {p}, the limits are 0 and 1; pass a probability")
        if p > 0:
            self._check_seed(p, self["seed"])
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

    def _check_seed(self, p: float, seed: Tensor | None) -> None:
        if seed is None:
            self.require(False, f"dropout_p is {p} but seed is None; pass an int64 tensor with one element")
            return
        self._check_device("seed", seed)
        self.require(
            seed.dtype == torch.int64 and seed.numel() == 1,
            f"seed is {seed.dtype} of shape {list(seed.shape)}, expected one int64 element on the device of input; "
            "draw it with torch.randint",
        )

    def _check_statistics(self, saved: Tensor) -> None:
        self._check_device("saved statistics", saved)
        count = 2 if "layer_norm" in self.op else 1
        rows = self.rows
        dtype = torch.float64 if self.h.dtype == torch.float64 else torch.float32
        self.require(
            saved.dtype == dtype and saved.numel() == rows * count and saved.is_contiguous(),
            f"the saved statistics are {saved.dtype} of shape {list(saved.shape)}, expected {dtype} with {count} x "
            f"{rows} elements; pass what the forward returned",
        )

    def _check_device(self, name: str, tensor: Tensor) -> None:
        self.require(
            tensor.device == self.h.device,
            f"{name} is on {tensor.device}, input is on {self.h.device}; move it with .to(input.device)",
        )

    def _check_like_input(self, name: str, tensor: Tensor) -> None:
        self._check_device(name, tensor)
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
        self._check_device(name, tensor)
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


def check(op: str, args: tuple[Any, ...]) -> None:
    """Raises RuntimeError if an op's positional arguments are not what it takes."""
    _Arguments(op, args).check()


# ---- fake kernels ---------------------------------------------------------------------------------------------------


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _fake_forward(a: _Arguments) -> Tensor | tuple[Tensor, ...]:
    if a.op.endswith("_inference"):
        return _contiguous(a.h)
    dtype = torch.float64 if a.h.dtype == torch.float64 else torch.float32
    stats = a.h.new_empty((2, a.rows) if "layer_norm" in a.op else (a.rows,), dtype=dtype)
    outputs = (_contiguous(a.h), _contiguous(a.h)) if a["residual"] is not None else (_contiguous(a.h),)
    return (*outputs, stats)


def _fake_backward(a: _Arguments) -> tuple[Tensor, ...]:
    weight = a["weight"]
    dtype = a.h.dtype if weight is None else weight.dtype

    def grad(wanted: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return a.h.new_empty(shape if wanted else (0,), dtype=dtype)

    grads = [grad(a["need_input"] or bool(a["need_residual"]), a.h.shape, a.h.dtype)]
    if a.op.startswith("add_"):
        grads.insert(0, grad(a["need_input"] and a["dropout_p"] > 0, a.h.shape, a.h.dtype))
    grads.append(grad(a["need_weight"], a.normalized_shape, dtype))
    if "layer_norm" in a.op:
        grads.append(grad(a["need_bias"], a.normalized_shape, dtype))
    return tuple(grads)


def _register(op: str) -> None:
    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        arguments = _Arguments(op, args)
        arguments.check()
        return _fake_backward(arguments) if op.endswith("_backward") else _fake_forward(arguments)

    def serve(*args: Any) -> Any:
        check(op, args)
        return backends.serve_device(op, args)

    torch.library.register_fake(f"{OP_NAMESPACE}::{op}", fake)
    torch.library.impl(f"{OP_NAMESPACE}::{op}", "CompositeExplicitAutograd", serve)


for _op in NORM_OPS:
    _register(_op)
