"""For tests: samples of every op, and the choice of an instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import _C, ops


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels of one instruction set inside; ValueError if this machine cannot. Process-wide."""
    before = _C.isa()
    _C.select_isa(name)
    try:
        yield
    finally:
        _C.select_isa(before)


def available_isas() -> list[str]:
    """The instruction sets that are built and that this machine can run, best first."""
    return [row["name"] for row in _C.isa_table() if row["built"] and row["supported"]]


def op_samples(device: str = "cpu") -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(op, args, kwargs) for every op, over dtypes, optional arguments and odd shapes; for opcheck and fuzzing."""
    yield from _norm_samples(device)


def _norm_samples(device: str) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    seed = torch.tensor([1234567890123], device=device)
    cases = [
        ((3, 5), 1, torch.float32, torch.float32, True),
        ((2, 3, 4), 2, torch.float64, torch.float64, True),
        ((4, 33), 1, torch.bfloat16, torch.float32, True),
        ((4, 1), 1, torch.float16, torch.float16, False),
        ((0, 7), 1, torch.float32, torch.float32, True),
    ]
    for shape, ndim, dtype, weight_dtype, affine in cases:
        x, r, dy, dh = (draw(*shape, dtype=dtype) for _ in range(4))
        w, b = (draw(*shape[-ndim:], dtype=weight_dtype) if affine else None for _ in range(2))
        yield ops.layer_norm, (x, ndim, w, b, 1e-5), {}
        yield ops.layer_norm_inference, (x, ndim, w, b, 1e-5), {}
        stats = ops.layer_norm(x, ndim, w, b, 1e-5)[1]
        yield ops.layer_norm_backward, (dy, x, ndim, stats, w, True, affine, affine), {}
        yield ops.rms_norm, (x, ndim, w, 1e-6), {}
        yield ops.rms_norm_inference, (x, ndim, w, 1e-6), {}
        rstd = ops.rms_norm(x, ndim, w, 1e-6)[1]
        yield ops.rms_norm_backward, (dy, x, ndim, rstd, w, True, affine), {}
        for p in (0.0, 0.3):
            key = seed if p else None
            yield ops.add_layer_norm, (x, r, ndim, w, b, 1e-5, p, key), {}
            _, h, stats = ops.add_layer_norm(x, r, ndim, w, b, 1e-5, p, key)
            yield (
                ops.add_layer_norm_backward,
                (dy, dh, h, ndim, stats, w, p, key, True, True, affine, affine),
                {},
            )
            yield ops.add_rms_norm, (x, r, ndim, w, 1e-6, p, key), {}
            _, h, rstd = ops.add_rms_norm(x, r, ndim, w, 1e-6, p, key)
            yield ops.add_rms_norm_backward, (dy, None, h, ndim, rstd, w, p, key, True, False, affine), {}
