"""What gpu_check times: norms against torch's own, attention against each kernel of torch's SDPA, LSTM with cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import handtuned
import handtuned.nn.functional as H

from . import bench_norm

OURS = "handtuned"
Prepare = Callable[[torch.device], Callable[[], object]]


@dataclass(frozen=True)
class Workload:
    """peers: name -> what makes the call on a device. work: bytes or operations of a call."""

    family: str
    name: str
    dtype: torch.dtype
    unit: str  # "bytes" or "operations"
    work: float
    peers: dict[str, Prepare]

    def served(self, device: torch.device) -> str:
        """The backends that handtuned's ops went to."""
        calls = handtuned.explain(self.peers[OURS](device)).calls
        return ", ".join(sorted({call.served_by.backend for call in calls})) or "none"


def round_trip(forward: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor], backward: bool) -> Callable[[], object]:
    """The forward, or with the gradients of all leaves."""
    if not backward:
        return forward
    incoming = [torch.randn_like(out) for out in forward()]
    return lambda: torch.autograd.grad(forward(), leaves, incoming)


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm(op: bench_norm.Op, shape: tuple[int, int], dtype: torch.dtype) -> Workload:
    def prepare(function: Callable[..., tuple[Tensor, ...]]) -> Prepare:
        def on(device: torch.device) -> Callable[[], object]:
            rows = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2 if op.add else 1)]
            parameters = [torch.randn(shape[1], device=device, dtype=dtype) for _ in range(2 - (op.kind == "rms"))]
            leaves = [t.requires_grad_(op.backward) for t in (*rows, *parameters)]
            return round_trip(lambda: function(*leaves), leaves, op.backward)

        return on

    peers = {
        "torch": prepare(bench_norm.torch_function(op, 1e-5)),
        OURS: prepare(bench_norm.handtuned_function(op, 1e-5)),
    }
    work = op.traffic * shape[0] * shape[1] * dtype.itemsize
    return Workload("norm", f"{op.name} {dtype} {shape[0]}x{shape[1]}", dtype, "bytes", work, peers)


# ---- attention -------------------------------------------------------------------------------------------------------

SDPA = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch math": SDPBackend.MATH,
}


def attention(shape: tuple[int, int, int, int], dtype: torch.dtype, causal: bool, backward: bool) -> Workload:
    """shape: batch, heads, tokens, head dim."""

    def prepare(backend: SDPBackend | None) -> Prepare:
        def on(device: torch.device) -> Callable[[], object]:
            leaves = [torch.randn(shape, device=device, dtype=dtype).requires_grad_(backward) for _ in range(3)]

            q, k, v = leaves

            def forward() -> tuple[Tensor, ...]:
                if backend is None:
                    return (H.scaled_dot_product_attention(q, k, v, is_causal=causal),)
                with sdpa_kernel(backend):
                    return (F.scaled_dot_product_attention(q, k, v, is_causal=causal),)

            return round_trip(forward, leaves, backward)

        return on

    batch, heads, tokens, dim = shape
    work = 4.0 * batch * heads * tokens * tokens * dim * (0.5 if causal else 1) * (3.5 if backward else 1)
    name = f"attention {'causal ' * causal}{'f+b' if backward else 'fwd'} {dtype} {'x'.join(map(str, shape))}"
    peers = {name: prepare(backend) for name, backend in SDPA.items()} | {OURS: prepare(None)}
    return Workload("attention", name, dtype, "operations", work, peers)


# ---- LSTM ------------------------------------------------------------------------------------------------------------


def lstm(shape: tuple[int, int, int], dtype: torch.dtype, backward: bool) -> Workload:
    """shape: steps, batch, width of input and state."""
    steps, batch, width = shape

    def prepare(module: type[torch.nn.Module]) -> Prepare:
        def on(device: torch.device) -> Callable[[], object]:
            layer = module(width, width).to(device, dtype).requires_grad_(backward)
            x = torch.randn(steps, batch, width, device=device, dtype=dtype).requires_grad_(backward)
            leaves = [x, *layer.parameters()]
            return round_trip(lambda: (layer(x)[0],), leaves, backward)

        return on

    work = 2.0 * 2 * width * 4 * width * steps * batch * (3 if backward else 1)
    name = f"LSTM {'f+b' if backward else 'fwd'} {dtype} {'x'.join(map(str, shape))}"
    peers = {"torch (cuDNN)": prepare(torch.nn.LSTM), OURS: prepare(handtuned.nn.LSTM)}
    return Workload("rnn", name, dtype, "operations", work, peers)


def workloads(small: bool, quick: bool) -> Iterator[Workload]:
    """small: shapes for a dry run."""
    norms = [(4, 256)] if small else [(16384, 1024), (4096, 4096), (512, 16384), (131072, 64)]
    heads = [(1, 2, 16, 32)] if small else [(4, 16, 4096, 128), (16, 16, 1024, 64)]
    layers = [(3, 2, 8)] if small else [(128, 64, 1024), (512, 16, 512), (512, 1, 1024)]
    for dtype in (torch.bfloat16, torch.float32):
        for shape in norms[: 1 if quick else None]:
            for op in bench_norm.OPS:
                yield norm(op, shape, dtype)
    for backward in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in heads[: 1 if quick else None]:
                for causal in (False, True):
                    yield attention(tokens, dtype, causal, backward)
            for steps in layers[: 1 if quick else None]:
                yield lstm(steps, dtype, backward)
