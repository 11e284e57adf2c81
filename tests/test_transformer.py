"""Transformer layers and stacks beside torch's, with torch's own samples of them, and what is fused inside."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, module_db

import handtuned
from handtuned.nn.twins import TWINS

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
N, L, S, E, HEADS, HIDDEN = 3, 6, 4, 8, 2, 16
KINDS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder)
F64 = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def _served_by_kernels() -> Iterator[None]:
    with handtuned.strict():
        yield


def same(theirs: Any, ours: Any, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def run(module: Any, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Any, list[Tensor | None]]:
    """Results, and the gradients of a fixed combination of them."""
    results = module(*inputs, **options)
    outputs = [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None]
    generator = torch.Generator().manual_seed(0)  # in no order that sums over rows could profit from
    shares = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    wanted = [t for t in (*dict.fromkeys(inputs), *module.parameters()) if t.requires_grad]
    return results, list(torch.autograd.grad(outputs, wanted, shares, allow_unused=True))


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def build(kind: type[nn.Module], layers: int = 2, **options: Any) -> tuple[Any, Any]:
    """torch's module and its twin with the same random parameters."""
    options = {"dim_feedforward": HIDDEN, "dropout": 0.0, "batch_first": True, **F64, **options}

    def made(kind: type[nn.Module], within: Any) -> Any:
        if kind in (nn.Transformer, handtuned.nn.Transformer):
            return kind(E, HEADS, layers, layers, **options)
        if issubclass(kind, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return kind(E, HEADS, **options)
        part = "Encoder" if issubclass(kind, nn.TransformerEncoder) else "Decoder"
        layer = getattr(within, f"Transformer{part}Layer")(E, HEADS, **options)
        return kind(layer, layers, within.LayerNorm(E, dtype=options["dtype"]))

    theirs, ours = made(kind, nn), made(TWINS[kind], handtuned.nn)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(kind: type[nn.Module], rows_first: bool = False) -> tuple[Tensor, ...]:
    shapes = [(N, L, E)] if "Encoder" in kind.__name__ else [(N, L, E), (N, S, E)]
    return tuple(draw(b, a, e) if rows_first else draw(a, b, e) for a, b, e in shapes)


def ends(*kept: int, length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor(kept)[:, None]


# ---- torch's samples -------------------------------------------------------------------------------------------------

INFOS = [info for info in module_db if info.module_cls in (*KINDS, nn.Transformer, nn.MultiheadAttention)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_torchs_samples(info: ModuleInfo, training: bool) -> None:
    """Same start, outputs, gradients; without gradients too, where torch takes its fast path."""
    kind = info.module_cls
    dtype = {} if kind in (nn.TransformerEncoder, nn.TransformerDecoder) else F64
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    assert len(samples) > 30
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        modules = []
        for each in (kind, TWINS[kind]):
            torch.manual_seed(1)
            modules.append(each(*copy.deepcopy(made.args), **made.kwargs | dtype).train(training))
        theirs, ours = modules
        assert isinstance(ours, kind)
        same(dict(theirs.state_dict()), dict(ours.state_dict()), 0, 0)
        same(run(theirs, given.args, **given.kwargs), run(ours, given.args, **given.kwargs))
        with torch.no_grad():
            same(theirs(*given.args, **given.kwargs), ours(*given.args, **given.kwargs))


# ---- options beyond them ---------------------------------------------------------------------------------------------


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


ACTIVATIONS: list[Any] = [
    "relu",
    "gelu",
    nn.functional.silu,
    torch.tanh,
    nn.ReLU(),
    nn.SiLU(),
    nn.GELU("tanh"),
    Squared(),
]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", str(a)))
@pytest.mark.parametrize("kind", KINDS[:2])
def test_activations(kind: type[nn.Module], activation: Any, norm_first: bool) -> None:
    theirs, ours = build(kind, activation=activation, norm_first=norm_first)
    inputs = inputs_of(kind)
    same(run(theirs, inputs), run(ours, inputs))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_all_masks_of_a_transformer(batch_first: bool, norm_first: bool) -> None:
    theirs, ours = build(nn.Transformer, batch_first=batch_first, norm_first=norm_first)
    inputs = tuple(draw(N, n, E) if batch_first else draw(n, N, E) for n in (S, L))
    masks = dict(
        src_mask=draw(N * HEADS, S, S),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64),
        memory_mask=torch.rand(L, S) < 0.3,
        src_key_padding_mask=ends(4, 2, 1, length=S),
        tgt_key_padding_mask=ends(6, 3, 1, length=L),
    )
    masks["memory_mask"][:, 0] = False
    same(run(theirs, inputs, **masks), run(ours, inputs, **masks))


@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_causal_mask_is_found(kind: type[nn.Module], mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = build(kind)
    inputs = inputs_of(kind)
    causal: Tensor = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    name = "mask" if kind is nn.TransformerEncoder else "tgt_mask"
    hints: list[bool] = []
    original = handtuned.nn.MultiheadAttention.forward

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        hints.append(options["is_causal"])
        return original(self, *args, **options)

    monkeypatch.setattr(handtuned.nn.MultiheadAttention, "forward", watched)
    for given, found in ((causal, True), (causal.roll(1, 0), False)):
        given = given == -torch.inf if mask == "bool" else given
        if not found:
            given[0, 0] = 0
        same(run(theirs, inputs, **{name: given}), run(ours, inputs, **{name: given}))
        assert hints[0] is found
        hints.clear()


def test_constructors_show_torchs_arguments() -> None:
    for kind in (*KINDS, nn.Transformer):
        assert inspect.signature(TWINS[kind]) == inspect.signature(kind)


# ---- padding left out ------------------------------------------------------------------------------------------------


def count_rows(module: nn.Module, *args: Any, **options: Any) -> int:
    """Rows that the feed-forwards of one run see."""
    rows = 0

    def seen(op: Any, input: Tensor, *others: Any, **kwargs: Any) -> Tensor:
        nonlocal rows
        rows += input[..., 0].numel() * (kwargs.get("activation", "none") != "none")
        return op(input, *others, **kwargs)

    original = handtuned.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(handtuned.nn.functional, "linear", lambda *a, **k: seen(original, *a, **k))
        module(*args, **options)
    return rows


def test_padding_is_left_out_where_torch_does() -> None:
    theirs, ours = build(nn.TransformerEncoder)
    theirs.eval(), ours.eval()
    x, kept = draw(N, L, E).detach(), (6, 1, 3)
    right, holes = ends(*kept, length=L), torch.rand(N, L) < 0.4
    holes[:, 0], holes[0, 1], holes[0, 2] = False, True, False
    for padding, rows in ((right, sum(kept)), (holes, N * L)):
        with torch.no_grad():
            same(theirs(x, src_key_padding_mask=padding), ours(x, src_key_padding_mask=padding))
        assert count_rows(ours, x, src_key_padding_mask=padding) == 2 * rows
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            same(theirs(x, src_key_padding_mask=right), ours(x, src_key_padding_mask=right))
        assert count_rows(ours, x, src_key_padding_mask=right) == 2 * N * L
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("change", ["norm_first", "training", "mask", "hook", "enable_nested_tensor"])
def test_padding_is_kept_where_torch_keeps_it(change: str) -> None:
    _, ours = build(nn.TransformerEncoder, norm_first=change == "norm_first")
    ours.train(change == "training")
    options = dict(src_key_padding_mask=ends(6, 1, 3, length=L))
    if change == "mask":
        options["mask"] = torch.zeros(L, L, dtype=torch.bool)
    if change == "hook":
        ours.layers[1].register_forward_hook(lambda *_: None)
    if change == "enable_nested_tensor":
        ours.use_nested_tensor = False
    assert count_rows(ours, draw(N, L, E), **options) == 2 * N * L


class OwnEncoder(nn.TransformerEncoder):
    """Left alone by replace(), which makes twins of its layers."""


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_layers_take_nested_tensors(layout: torch.layout) -> None:
    _, ours = build(nn.TransformerEncoderLayer)
    sequences = [draw(n, E).detach() for n in (5, 1, 3)]
    nested = ours(torch.nested.nested_tensor(sequences, layout=layout))
    assert nested.layout == layout
    for found, rows in zip(nested.unbind(), sequences, strict=True):
        same(ours(rows[None])[0], found)


def test_torchs_encoder_leaves_padding_out_around_our_layers() -> None:
    theirs, _ = build(nn.TransformerEncoder)
    theirs.__class__ = OwnEncoder
    x, padding = draw(N, L, E).detach(), ends(6, 1, 3, length=L)
    with torch.no_grad():
        expected = theirs.eval()(x, src_key_padding_mask=padding)
        report = handtuned.replace(theirs)
        assert [row.type for row in report.left] == ["OwnEncoder"]
        assert type(theirs.layers[0]) is handtuned.nn.TransformerEncoderLayer
        same(expected, theirs(x, src_key_padding_mask=padding))


# ---- what is fused, and what is not bypassed -------------------------------------------------------------------------


def ops(module: nn.Module, *inputs: Tensor) -> list[str]:
    with torch.no_grad():
        calls = handtuned.explain(module, *inputs).calls
    return [call.op.removesuffix("_inference") for call in calls if call.op != "linear_pack"]


def test_which_kernels_serve_a_layer() -> None:
    inputs = inputs_of(nn.TransformerDecoderLayer)
    _, ours = build(nn.TransformerEncoderLayer)
    block = ["linear", "attention", "linear", "add_layer_norm"]
    assert ops(ours, inputs[0]) == [*block, "linear", "linear", "add_layer_norm"]
    _, ours = build(nn.TransformerEncoderLayer, norm_first=True)
    assert ops(ours, inputs[0]) == ["layer_norm", *block, "linear", "linear"]
    _, ours = build(nn.TransformerDecoderLayer)
    assert ops(ours, *inputs) == [*block, "linear", *block, "linear", "linear", "add_layer_norm"]


CHILDREN = ("self_attn", "linear1", "activation", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")


@pytest.mark.parametrize("norm_first", [True, False])
def test_hooks_on_every_child_are_called(norm_first: bool) -> None:
    theirs, ours = build(nn.TransformerEncoderLayer, norm_first=norm_first, activation=nn.ReLU())
    x, called = draw(N, L, E), []
    expected = run(theirs, (x,))
    for name in CHILDREN:
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    same(expected, run(ours, (x,)))
    assert sorted(called) == sorted(CHILDREN)


class Doubled(nn.Module):
    """In place of a child: twice what it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        result = self.inner(*args, **options)
        return (result[0] * 2, None) if isinstance(result, tuple) else result * 2


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("child", CHILDREN)
def test_exchanged_children_are_what_runs(child: str, norm_first: bool) -> None:
    theirs, ours = build(nn.TransformerEncoderLayer, norm_first=norm_first, activation=nn.ReLU(), batch_first=False)
    for layer in (theirs, ours):
        setattr(layer, child, Doubled(getattr(layer, child)))
    x = draw(L, N, E)
    same(run(theirs, (x,)), run(ours, (x,)))


def test_norms_without_eps_run_as_torchs() -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, HIDDEN, 0.0, layer_norm_eps=0.0, **F64)
    x = draw(L, N, E)
    expected = run(layer, (x,))
    report = handtuned.replace(layer)
    assert {row.name for row in report.left} == {"norm1", "norm2"}
    same(expected, run(layer, (x,)))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout(kind: type[nn.Module], norm_first: bool) -> None:
    """In training alone, by torch's seed, each of the layer's dropouts, and the gradient is that of what was drawn."""
    _, ours = build(kind, dropout=0.5, norm_first=norm_first)
    theirs, _ = build(kind, norm_first=norm_first)
    theirs.load_state_dict(ours.state_dict())
    inputs = inputs_of(kind)
    same(run(theirs, inputs), run(ours.eval(), inputs))
    ours.train()

    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        result: Tensor = ours(*inputs)
        return result

    assert seeded(*inputs).equal(seeded(*inputs))
    assert not ours(*inputs).equal(ours(*inputs))
    assert torch.autograd.gradcheck(seeded, inputs, fast_mode=True)
    names = [name for name, child in ours.named_children() if isinstance(child, nn.Dropout)]
    for name in names:
        for other in names:
            getattr(ours, other).p = 0.5 * (name == other)
        ours.self_attn.dropout = 0.0
        if kind is nn.TransformerDecoderLayer:
            ours.multihead_attn.dropout = 0.0
        assert not ours(*inputs).equal(ours(*inputs)), name


# ---- numerics, tracing, copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [True, False])
def test_errors_are_not_larger_than_torchs(dtype: torch.dtype, norm_first: bool) -> None:
    squares: dict[str, list[Tensor]] = {}
    for _ in range(12):
        modules = build(nn.TransformerEncoderLayer, dtype=dtype, norm_first=norm_first)
        exact = copy.deepcopy(modules[0]).double()
        x = draw(8, 20, E, dtype=dtype)
        wide = x.detach().double().requires_grad_()
        truth, *found = (run(m, (t,)) for m, t in ((exact, wide), *((m, x) for m in modules)))
        names = ["output", "grad of input", *(f"grad of {name}" for name, _ in exact.named_parameters())]
        results = [[outputs, *grads] for outputs, grads in (truth, *found)]
        for name, right, theirs, ours in zip(names, *results, strict=True):
            assert ours.dtype == dtype
            new = [(t.double() - right).square().sum().detach() for t in (theirs, ours)]
            new.append(right.square().sum().detach())
            squares[name] = [a + b for a, b in zip(squares.get(name, [0, 0, 0]), new, strict=True)]
    for name, sums in squares.items():
        theirs, ours, scale = (float(total) ** 0.5 for total in sums)
        assert ours <= max(1.5 * theirs, torch.finfo(dtype).eps / 2 * scale), name


@pytest.mark.parametrize("kind", [*KINDS, nn.Transformer])
def test_compiled_whole(kind: type[nn.Module]) -> None:
    torch.compiler.reset()
    _, ours = build(kind, layers=1)
    inputs = inputs_of(kind)[:: -1 if kind is nn.Transformer else 1]
    name = {"TransformerEncoderLayer": "src_mask", "TransformerEncoder": "mask"}.get(kind.__name__, "tgt_mask")
    rows = inputs[-1 if kind is nn.Transformer else 0].shape[1]
    masks = {name: torch.ones(rows, rows, dtype=torch.bool).triu(1)}
    expected = run(ours, inputs, **masks)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    same(expected, run(compiled, inputs, **masks))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_twins(again: Callable[[nn.Module], nn.Module]) -> None:
    _, ours = build(nn.Transformer)
    inputs = (draw(N, S, E), draw(N, L, E))
    twin = again(ours)
    assert type(twin) is handtuned.nn.Transformer
    assert type(twin.encoder.layers[0].self_attn) is handtuned.nn.MultiheadAttention
    same(ours(*inputs), twin(*inputs), 0, 0)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    build(nn.Transformer)[0].load_state_dict(torch.load(file))


def test_under_autocast() -> None:
    theirs, ours = build(nn.TransformerEncoderLayer, dtype=torch.float32)
    x = torch.randn(N, L, E)
    for norm_first in (False, True):
        theirs.norm_first = ours.norm_first = norm_first
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, actual = theirs(x), ours(x)
        assert actual.dtype == expected.dtype
        same(expected, actual, 5e-2, 5e-2)


# ---- replace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_replace_inside_a_model(norm_first: bool) -> None:
    theirs, _ = build(nn.Transformer, norm_first=norm_first)
    model = nn.ModuleDict({"transformer": theirs})
    inputs = (draw(N, S, E), draw(N, L, E))
    expected = run(theirs, inputs)
    report = handtuned.replace(model)
    assert not report.left
    assert {type(m) for m in model.modules()} & set(TWINS) == set()
    kinds = {row.after.__name__ for row in report.replaced}
    assert kinds >= {"Transformer", "TransformerEncoder", "TransformerDecoder", "MultiheadAttention", "Linear"}
    same(expected, run(theirs, inputs))
    report.undo()
    assert {type(m) for m in model.modules()} & set(TWINS.values()) == set()


@pytest.mark.parametrize("padding", [False, True])
def test_replace_with_a_check(padding: bool) -> None:
    encoder, _ = build(nn.TransformerEncoder, dtype=torch.float32)
    check: dict[str, Any] = dict(src=draw(N, L, E, dtype=torch.float32))
    if padding:
        check["src_key_padding_mask"] = ends(6, 1, 3, length=L)
    report = handtuned.replace(encoder, check=check)
    assert all(difference.ok for difference in report.differences)
    assert len(report.differences) == 1 + len(list(encoder.parameters()))
