"""Benchmarks of the Transformer modules: whole modules with their parameters, forward and with backward.

Work is counted in operations that the result needs, over rows that are not padding: 2 · rows · features in · features
out for each linear and 4 · heads · queries · keys · dim for the attention, three times the linears and 3.5 times the
attention with the backward.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import numerics
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import handtuned

from . import gate
from .peers import TRANSFORMER_PEERS, Case, OnnxModel, Tensors
from .room import Room, Target

FP32, BF16 = torch.float32, torch.bfloat16
COMPILED = (8, 128, 768)
QUICK = ((8, 128, 768),)


@dataclass(frozen=True)
class Op:
    """One line of the table. module: "attention", "layer" or "stack"; sentences: rows kept of each, else all."""

    name: str
    module: str
    shape: tuple[int, int, int]  # batch, tokens, width
    dtype: torch.dtype
    backward: bool = False
    norm_first: bool = False
    kept: tuple[int, ...] = ()
    target: float | None = None

    @property
    def heads(self) -> int:
        return self.shape[2] // (32 if self.shape[2] == 384 else 64)

    @property
    def id(self) -> str:
        name = self.name.replace(", ", "-").replace(" ", "-")
        return f"{name}-{cases.SHORT[self.dtype]}-{gate.shape_name(self.shape)}"

    @property
    def work(self) -> float:
        batch, tokens, width = self.shape
        lengths = self.kept or (tokens,) * batch
        linears = 2 * sum(lengths) * width * width * (4 if self.module == "attention" else 12)
        scores = 4 * sum(length * length for length in lengths) * width
        layers = LAYERS if self.module == "stack" else 1
        return layers * (3 * linears + 3.5 * scores if self.backward else linears + scores)


LAYERS = 6  # of a stack
# Tokens of 32 sentences, as many as MiniLM's in `handtuned compare` about.
SENTENCES = (32, 25, 384)
KEPT = tuple(12 + (7 * i) % 14 for i in range(32))


def _ops() -> list[Op]:
    shapes = ((8, 128, 768), (1, 512, 768), (32, 25, 384))
    found = []
    for dtype in (FP32, BF16):
        wanted = 1.7 if dtype == FP32 else 1.35
        found += [Op("MultiheadAttention fwd", "attention", shape, dtype, target=wanted) for shape in shapes]
        found += [Op("MultiheadAttention f+b", "attention", shapes[0], dtype, backward=True)]
        found += [Op("encoder layer fwd", "layer", shape, dtype) for shape in shapes]
        found += [Op("encoder layer f+b", "layer", shape, dtype, backward=True, target=1.5) for shape in shapes]
        found += [Op("encoder layer, norm first fwd", "layer", shapes[0], dtype, norm_first=True)]
        found += [Op("encoder layer, norm first f+b", "layer", shapes[0], dtype, backward=True, norm_first=True)]
        found += [Op("encoder of 6, padding fwd", "stack", SENTENCES, dtype, kept=KEPT)]
    return found


OPS = _ops()


def build(op: Op, dtype: torch.dtype) -> nn.Module:
    """torch's module, in eval mode for a forward; without dropout, so that all results can be compared."""
    torch.manual_seed(0)
    width = op.shape[2]
    options: dict[str, Any] = dict(batch_first=True, dtype=dtype)
    module: nn.Module
    if op.module == "attention":
        module = nn.MultiheadAttention(width, op.heads, **options)
    else:
        layer = nn.TransformerEncoderLayer(
            width, op.heads, 4 * width, 0.0, "gelu", norm_first=op.norm_first, batch_first=True, dtype=dtype
        )
        module = nn.TransformerEncoder(layer, LAYERS) if op.module == "stack" else layer
    return module.train(op.backward)


def function(op: Op, module: nn.Module) -> Callable[..., Tensors]:
    """The module as a function of x and its parameters, which are passed on for their gradients alone."""

    def attention(x: Tensor, *parameters: Tensor) -> Tensors:
        return (module(x, x, x, need_weights=False)[0],)

    def layer(x: Tensor, *parameters: Tensor) -> Tensors:
        return (module(x),)

    def stack(x: Tensor, *parameters: Tensor) -> Tensors:
        output: Tensor = module(x, src_key_padding_mask=padding)
        return (output.masked_fill_(padding[..., None], 0),)  # what padding holds, no two of torch's paths agree on

    padding = torch.arange(op.shape[1]) >= torch.tensor(op.kept or (op.shape[1],) * op.shape[0])[:, None]
    return {"attention": attention, "layer": layer, "stack": stack}[op.module]


@functools.lru_cache(maxsize=1)
def draw(op: Op) -> tuple[nn.Module, Tensor, Tensor, dict[str, Tensor], dict[str, numerics.Array]]:
    """Module, input, its output's gradient, torch's results and those in float64."""
    module = build(op, op.dtype)
    generator = torch.Generator().manual_seed(gate.DRAW)
    x, grad = (torch.randn(op.shape, generator=generator, dtype=torch.float64).to(op.dtype) for _ in range(2))
    torchs = _results(op, module, x, grad)
    exact = _results(op, copy.deepcopy(module).double(), x.double(), grad.double())
    return module, x, grad, torchs, {name: tensor.numpy() for name, tensor in exact.items()}


def _results(op: Op, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """By name: the output, or with it all gradients."""
    inputs = (x.detach().clone().requires_grad_(op.backward), *module.parameters())
    with torch.set_grad_enabled(op.backward):
        (output,) = function(op, module)(*inputs)
    if not op.backward:
        return {"output": output}
    grads = torch.autograd.grad(output, inputs, grad)
    names = ("input", *(name for name, _ in module.named_parameters()))
    return {"output": output.detach()} | {f"grad_{name}": g for name, g in zip(names, grads, strict=True)}


def prepare(op: Op, no_compile: str = "") -> tuple[Case, gate.Truth]:
    """What is timed, and what its results must be. Both sides share the parameters."""
    module, x, grad, torchs, truth = draw(op)
    twin = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    handtuned.replace(twin)
    made = Case(
        op=op.name,
        dtype=op.dtype,
        shape=op.shape,
        eager=function(op, module),
        ours=function(op, twin),
        inputs=(x.requires_grad_(op.backward), *module.parameters()),
        grad_outputs=(grad,) if op.backward else None,
        onnx=None if op.backward or op.kept or op.dtype != FP32 or op.norm_first else onnx_model(op, module),
        no_compile=no_compile,
        fast_path=not op.backward,
        freeze=not op.backward,
    )
    return made, gate.Truth(tuple(torchs), torchs, truth)


# ---- onnxruntime -----------------------------------------------------------------------------------------------------


def onnx_model(op: Op, module: nn.Module) -> OnnxModel:
    """The module of onnxruntime's own fused nodes, as its optimizer for transformers would find them."""
    nodes: list[tuple[str, str, tuple[str, ...], str, dict[str, object]]] = []
    weights: dict[str, Tensor] = {}

    def node(kind: str, inputs: tuple[str, ...], output: str, **attributes: object) -> str:
        own = kind in ("Attention", "BiasGelu", "SkipLayerNormalization")
        nodes.append((kind, "com.microsoft" if own else "", inputs, output, attributes))
        return output

    def linear(x: str, name: str, layer: nn.Linear, bias: str = "Add") -> str:
        weights[f"{name}.w"], weights[f"{name}.b"] = layer.weight.T.contiguous(), layer.bias
        return node(bias, (node("MatMul", (x, f"{name}.w"), f"{name}.product"), f"{name}.b"), f"{name}.out")

    def add_norm(x: str, residual: str, name: str, norm: nn.LayerNorm) -> str:
        weights[f"{name}.w"], weights[f"{name}.b"] = norm.weight, norm.bias
        return node("SkipLayerNormalization", (x, residual, f"{name}.w", f"{name}.b"), f"{name}.out", epsilon=norm.eps)

    attention = module if isinstance(module, nn.MultiheadAttention) else module.get_submodule("self_attn")
    assert isinstance(attention, nn.MultiheadAttention)
    weights["qkv.w"], weights["qkv.b"] = attention.in_proj_weight.T.contiguous(), attention.in_proj_bias
    heads = node("Attention", ("input0", "qkv.w", "qkv.b"), "heads", num_heads=op.heads)
    last = linear(heads, "out", attention.out_proj)
    if isinstance(module, nn.TransformerEncoderLayer):
        first = add_norm(last, "input0", "norm1", module.norm1)
        second = linear(linear(first, "linear1", module.linear1, "BiasGelu"), "linear2", module.linear2)
        last = add_norm(second, first, "norm2", module.norm2)
    return OnnxModel(tuple(nodes), {name: weight.detach() for name, weight in weights.items()}, last)


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def not_compiled(room: Room, op: Op) -> str:
    if room.quick:
        return "left out of --quick"
    if op.module == "stack":
        return "left out: it would be compiled for many seconds"
    return "" if op.shape == COMPILED and op.dtype == FP32 else "left out: each compilation takes seconds"


@pytest.fixture(scope="module")
def transformer_room(room: Room) -> Room:
    """The same room, rows included, with other peers."""
    return dataclasses.replace(room, peers=TRANSFORMER_PEERS)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in OPS])
def test_transformer(op: Op, transformer_room: Room, benchmark: BenchmarkFixture) -> None:
    if transformer_room.quick and op.shape not in QUICK:
        pytest.skip("not in --quick")
    made, truth = prepare(op, not_compiled(transformer_room, op))
    limit = "dot" if op.dtype == BF16 else "FMA"
    transformer_room.measure(made, truth, Target(op.target, op.work, limit), benchmark)
