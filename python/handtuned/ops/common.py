"""What the families' ops share: arguments by name, and fake kernels: checks, shapes and dtypes without data, for
torch.compile and export. CPU and CUDA kernels register themselves in C++, serving.py what other devices run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._binary import OP_NAMESPACE

namespace = getattr(torch.ops, OP_NAMESPACE)


class Arguments:
    """An op's arguments by name; a family's class checks them and makes the fake results."""

    main: Tensor  # whose device and dtype the others follow
    main_name: str
    mode = ""  # of a recurrent op

    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        self.op: str = name_of(op)
        self.named = {a.name: value for a, value in zip(op._schema.arguments, args, strict=True)}

    def __getitem__(self, name: str) -> Any:
        return self.named.get(name)

    def require(self, ok: bool, message: str) -> None:
        if not ok:
            raise RuntimeError(f"handtuned.{self.op}: {message}")

    def check(self) -> None:
        """Raises RuntimeError naming argument, value, limit and remedy. Reads no data."""
        raise NotImplementedError

    def fake(self) -> Tensor | tuple[Tensor, ...]:
        """Empty results of the right shapes, strides and dtypes."""
        raise NotImplementedError

    def copies(self) -> list[str]:
        """What explain() says of inputs that the kernels cannot read in place."""
        raise NotImplementedError

    def check_dtype(self) -> None:
        self.require(
            self.main.dtype in backends.DTYPES,
            f"{self.main_name} is {self.main.dtype}, supported are float32, float64, bfloat16 and float16; "
            "convert it with .to()",
        )

    def check_device(self, name: str, tensor: Tensor) -> None:
        device, main = self.main.device, self.main_name
        self.require(
            tensor.device == device,
            f"{name} is on {tensor.device}, {main} is on {device}; move it with .to({main}.device)",
        )

    def check_type(self, name: str, tensor: Tensor) -> None:
        self.check_device(name, tensor)
        self.require(
            tensor.dtype == self.main.dtype,
            f"{name} is {tensor.dtype}, {self.main_name} is {self.main.dtype}; convert one with .to()",
        )

    def check_shape(self, name: str, tensor: Tensor, shape: list[int]) -> None:
        self.require(
            list(tensor.shape) == shape,
            f"{name} has shape {list(tensor.shape)}, expected {shape}; expand or reshape it first",
        )

    def check_dropout(self, name: str = "dropout_p", p: float | None = None, needs_seed: bool = True) -> None:
        p, seed = (self[name] or 0.0) if p is None else p, self["seed"]
        self.require(0 <= p <= 1, f"{name} is {p}, the limits are 0 and 1; pass a probability")
        if p == 0 or not needs_seed:
            return
        if seed is None:
            self.require(False, f"{name} is {p} but seed is None; pass an int64 tensor with one element")
            return
        self.check_device("seed", seed)
        self.require(
            seed.dtype == torch.int64 and seed.numel() == 1,
            f"seed is {seed.dtype} of shape {list(seed.shape)}, expected one int64 element on the device of input; "
            "draw it with torch.randint",
        )


def name_of(op: Any) -> str:
    name: str = op._schema.name
    return name.removeprefix(f"{OP_NAMESPACE}::")


def by_name(*ops: Any) -> dict[str, Any]:
    return {name_of(op): op for op in ops}


def register(op: Any, arguments: type[Arguments], gpu: tuple[str, ...] = ()) -> None:
    """Gives an op its fake kernel; gpu: the backends of backends.gpu_ops that have kernels for it."""
    name = name_of(op)
    for backend in gpu:
        backends.gpu_ops[backend].add(name)

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        found = arguments(op, args)
        found.check()
        return found.fake()

    torch.library.register_fake(f"{OP_NAMESPACE}::{name}", fake)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and accumulation."""
    return torch.float64 if dtype == torch.float64 else torch.float32
