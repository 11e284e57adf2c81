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
from handtuned.compare import models
from handtuned.integrations import transformers as integration

from . import gate
from .peers import TRANSFORMER_PEERS, Case, OnnxGraph, OnnxNode, Tensors
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


class OfOne(nn.Module):
    """function(op, module) of its input alone, as a module."""

    def __init__(self, op: Op, module: nn.Module) -> None:
        super().__init__()
        self.module, self.run = module, function(op, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]


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
        onnx=None
        if op.backward or op.kept or op.dtype != FP32 or op.norm_first
        else onnx_graph(op, module, x.detach()),
        module=OfOne(op, module) if op.dtype == FP32 and not op.backward else None,
        module_inputs=(x.detach(),),
        no_compile=no_compile,
        fast_path=not op.backward,
        freeze=not op.backward,
    )
    return made, gate.Truth(tuple(torchs), torchs, truth)


# ---- onnxruntime -----------------------------------------------------------------------------------------------------


class OnnxBuilder:
    """Nodes as onnxruntime's optimizer for transformers would find them: its own fused ones."""

    def __init__(self) -> None:
        self.nodes: list[OnnxNode] = []
        self.constants: dict[str, Tensor] = {}

    def node(self, kind: str, inputs: tuple[str, ...], output: str, domain: str = "com.microsoft", **more: Any) -> str:
        self.nodes.append(OnnxNode(kind, inputs, (output,), more, domain))
        return output

    def constant(self, name: str, tensor: Tensor) -> str:
        self.constants[name] = tensor.detach()
        return name

    def linear(self, x: str, name: str, layer: nn.Linear, activation: bool = False) -> str:
        weight, bias = self.constant(f"{name}.w", layer.weight.T.contiguous()), self.constant(f"{name}.b", layer.bias)
        product = self.node("MatMul", (x, weight), f"{name}.product", "")
        if activation:
            return self.node("BiasGelu", (product, bias), f"{name}.out")
        return self.node("Add", (product, bias), f"{name}.out", "")

    def add_norm(self, x: str, residual: str, name: str, norm: nn.LayerNorm) -> str:
        weight, bias = self.constant(f"{name}.w", norm.weight), self.constant(f"{name}.b", norm.bias)
        return self.node("SkipLayerNormalization", (x, residual, weight, bias), f"{name}.out", epsilon=norm.eps)

    def attention(self, x: str, name: str, weight: Tensor, bias: Tensor, heads: int, mask: tuple[str, ...] = ()) -> str:
        """weight (3 width, width) and bias of queries, keys and values; mask: the name of each row's length."""
        given = (x, self.constant(f"{name}.w", weight.T.contiguous()), self.constant(f"{name}.b", bias), *mask)
        return self.node("Attention", given, f"{name}.out", num_heads=heads)

    def feed_forward(self, x: str, name: str, first: nn.Linear, second: nn.Linear, norm: nn.LayerNorm) -> str:
        inside = self.linear(x, f"{name}.1", first, activation=True)
        return self.add_norm(self.linear(inside, f"{name}.2", second), x, f"{name}.norm", norm)

    def graph(self, last: str, **more: Any) -> OnnxGraph:
        return OnnxGraph(tuple(self.nodes), (last,), self.constants, **more)


def onnx_graph(op: Op, module: nn.Module, x: Tensor) -> OnnxGraph:
    """An attention module or an encoder layer, norm last, of the case's first input."""
    build = OnnxBuilder()
    attention = module if isinstance(module, nn.MultiheadAttention) else module.get_submodule("self_attn")
    assert isinstance(attention, nn.MultiheadAttention)
    heads = build.attention("input0", "qkv", attention.in_proj_weight, attention.in_proj_bias, op.heads)
    last = build.linear(heads, "out", attention.out_proj)
    if isinstance(module, nn.TransformerEncoderLayer):
        first = build.add_norm(last, "input0", "norm1", module.norm1)
        last = build.feed_forward(first, "feed", module.linear1, module.linear2, module.norm2)
    return build.graph(last, inputs=(x,))


# ---- a real model ----------------------------------------------------------------------------------------------------

MINILM = "MiniLM, 32 sentences fwd"
PACKED = "MiniLM, 32 sentences, packed fwd"  # by handtuned; the others compute the padding too


class Encoder(nn.Module):
    """A BERT encoder's hidden states, 0 in padding, of ids, token types and mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state
        return hidden * mask[..., None]


class PackedEncoder(Encoder):
    """The same without computing the padding."""

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        rows: Tensor = self.model(**integration.packed(ids, mask, types)).last_hidden_state[0]
        return rows.new_zeros(*mask.shape, rows.shape[-1]).index_put((mask.bool(),), rows)


def prepare_minilm(packed: bool = False, no_compile: str = "") -> tuple[Case, gate.Truth, Target]:
    """all-MiniLM-L6-v2 on the sentences of `handtuned compare`, end to end from ids to hidden states."""
    minilm = models.minilm()
    given = minilm.inputs(32)
    inputs = (given["input_ids"], given["token_type_ids"], given["attention_mask"])
    module = Encoder(minilm.module)
    twin = (PackedEncoder if packed else Encoder)(copy.deepcopy(minilm.module))
    integration.replace(twin.model)
    with torch.no_grad():
        torchs, exact = module(*inputs), copy.deepcopy(module).double()(*inputs)
    lengths, width = inputs[2].sum(1).tolist(), torchs.shape[-1]
    work = LAYERS * (24 * sum(lengths) * width * width + 4 * sum(n * n for n in lengths) * width)
    made = Case(
        op=PACKED if packed else MINILM,
        dtype=FP32,
        shape=tuple(torchs.shape),
        eager=lambda *values: (module(*values),),
        ours=lambda *values: (twin(*values),),
        inputs=inputs,
        onnx=onnx_minilm(minilm.module, inputs),
        module=module,
        module_inputs=inputs,
        no_compile=no_compile,
        freeze=True,
    )
    return made, gate.Truth(("output",), {"output": torchs}, {"output": exact.numpy()}), Target(1.8, work, "FMA")


def onnx_minilm(model: Any, inputs: Tensors) -> OnnxGraph:
    """The whole encoder: embeddings, and layers whose attention is told the lengths."""
    build, embeddings, heads = OnnxBuilder(), model.embeddings, model.config.num_attention_heads
    named = {
        "words": embeddings.word_embeddings.weight,
        "positions": embeddings.position_embeddings.weight,
        "types": embeddings.token_type_embeddings.weight,
        "norm.w": embeddings.LayerNorm.weight,
        "norm.b": embeddings.LayerNorm.bias,
    }
    tables = tuple(build.constant(name, tensor) for name, tensor in named.items())
    epsilon = {"epsilon": embeddings.LayerNorm.eps}
    given = ("input0", "input1", *tables, "input2")
    build.nodes.append(OnnxNode("EmbedLayerNormalization", given, ("x", "lengths"), epsilon, "com.microsoft"))
    x = "x"
    for i, layer in enumerate(model.encoder.layer):
        own, output = layer.attention.self, layer.attention.output
        parts = (own.query, own.key, own.value)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        attended = build.attention(x, f"{i}.qkv", weight, bias, heads, ("lengths",))
        x = build.add_norm(build.linear(attended, f"{i}.out", output.dense), x, f"{i}.norm", output.LayerNorm)
        x = build.feed_forward(x, f"{i}.feed", layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
    kept = build.constant("kept", inputs[2][..., None].float())
    shape = (*inputs[0].shape, model.config.hidden_size)
    last = build.node("Mul", (x, kept), "hidden", "")
    return build.graph(last, inputs=tuple(t.int() for t in inputs), shape=shape, result=shape)


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


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_minilm(packed: bool, transformer_room: Room, benchmark: BenchmarkFixture) -> None:
    if transformer_room.quick:
        pytest.skip("not in --quick")
    pytest.importorskip("transformers", reason="transformers is not installed")
    try:
        made, truth, target = prepare_minilm(packed, "left out: compiled for the row above" if packed else "")
    except models.ModelUnavailable as error:
        pytest.skip(str(error))
    transformer_room.measure(made, truth, target, benchmark)
