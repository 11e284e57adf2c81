"""MultiheadAttention and multi_head_attention_forward beside torch's: every option, outputs, weights and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import handtuned
from handtuned.nn import functional as H
from handtuned.nn import packing

pytestmark = pytest.mark.usefixtures("poison")
N, L, S, E, HEADS = 3, 4, 5, 8, 2
Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _served_by_kernels() -> Iterator[None]:
    with handtuned.strict():
        yield


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's module and its twin with the same random parameters, biases too, in float64."""
    options = {"dtype": torch.float64, **options}
    theirs, ours = (kind(E, HEADS, **options) for kind in (nn.MultiheadAttention, handtuned.nn.MultiheadAttention))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def hidden(*shape: int) -> Tensor:
    """A bool mask that leaves the first key to everyone."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def same(theirs: Any, ours: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def run(module: Any, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Any, list[Tensor | None]]:
    """Output and weights, and the gradients of a fixed combination of both."""
    results = module(*inputs, **options)
    outputs = [result for result in results if result is not None]
    generator = torch.Generator().manual_seed(0)  # in no order that sums over rows could profit from
    shares = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    wanted = [t for t in (*dict.fromkeys(inputs), *module.parameters()) if t.requires_grad]
    return results, list(torch.autograd.grad(outputs, wanted, shares, allow_unused=True))


MASKS: dict[str, Any] = {
    "none": lambda: {},
    "padding": lambda: dict(key_padding_mask=hidden(N, S)),
    "mask": lambda: dict(attn_mask=hidden(L, S)),
    "mask by head": lambda: dict(attn_mask=hidden(N * HEADS, L, S)),
    "both": lambda: dict(key_padding_mask=hidden(N, S), attn_mask=hidden(L, S)),
    "both by head": lambda: dict(key_padding_mask=hidden(N, S), attn_mask=hidden(N * HEADS, L, S)),
    "additive": lambda: dict(attn_mask=draw(L, S)),
    "additive padding": lambda: dict(key_padding_mask=draw(N, S), attn_mask=draw(N * HEADS, L, S)),
    "additive and bool": lambda: dict(key_padding_mask=hidden(N, S), attn_mask=draw(L, S)),
}
WEIGHTS = (dict(need_weights=False), dict(need_weights=True), dict(need_weights=True, average_attn_weights=False))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "rows first"])
@pytest.mark.parametrize("form", ["self", "memory", "three", "widths"])
def test_every_option(form: str, batch_first: bool, masks: Any) -> None:
    widths = dict(kdim=6, vdim=7) if form == "widths" else {}
    rows = S if form == "self" else L
    shapes = [(N, rows, E), (N, S, widths.get("kdim", E)), (N, S, widths.get("vdim", E))]
    q, k, v = (draw(*(shape if batch_first else (shape[1], shape[0], shape[2]))) for shape in shapes)
    inputs = {"self": (k, k, k), "memory": (q, k, k)}.get(form, (q, k, v))
    for bias, extra, zero in itertools.product((True, False), repeat=3):
        theirs, ours = pair(bias=bias, add_bias_kv=extra, add_zero_attn=zero, batch_first=batch_first, **widths)
        given = masks()
        if form == "self" and "attn_mask" in given:
            given["attn_mask"] = given["attn_mask"][..., :1, :].expand(*given["attn_mask"].shape[:-2], S, S)
        for weights in WEIGHTS:
            same(run(theirs, inputs, **given, **weights), run(ours, inputs, **given, **weights))


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, add_zero_attn=True)
    inputs = (draw(L, E), draw(S, E), draw(S, E))
    for weights in WEIGHTS:
        options = dict(key_padding_mask=hidden(S), attn_mask=hidden(HEADS, L, S), **weights)
        same(run(theirs, inputs, **options), run(ours, inputs, **options))


def test_the_gradient_of_an_additive_mask() -> None:
    theirs, ours = pair(batch_first=True)
    x, mask, padding = draw(N, L, E), draw(L, L), draw(N, L)
    grads = []
    for module in (theirs, ours):
        output = module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        grads.append(torch.autograd.grad(output.square().sum(), (mask, padding)))
    same(*grads)


@pytest.mark.parametrize("static", ["k", "v", "both"])
def test_the_function_with_static_keys_and_values(static: str) -> None:
    """Every argument by torch's order of them."""
    module, _ = pair(kdim=6, vdim=7)
    q, k, v = draw(L, N, E), draw(S, N, 6), draw(S, N, 7)
    fixed = {f"static_{x}": draw(N * HEADS, S, E // HEADS) for x in "kv" if static in (x, "both")}
    weights: list[Any] = [module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0]
    weights += [module.out_proj.weight, module.out_proj.bias, True, hidden(N, S), True, None, True]
    weights += [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    theirs = nn.functional.multi_head_attention_forward(q, k, v, E, HEADS, *weights, **fixed)
    same(theirs, H.multi_head_attention_forward(q, k, v, E, HEADS, *weights, **fixed))


# ---- what differs from torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("padding", [False, True])
def test_causal_by_hint_is_causal_by_mask(options: Options, padding: bool) -> None:
    _, ours = pair(batch_first=True, **options)
    x = draw(N, L, E)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    masks = dict(key_padding_mask=torch.arange(L) >= torch.tensor([[4], [2], [1]])) if padding else {}
    for weights in WEIGHTS:
        expected = run(ours, (x, x, x), attn_mask=mask, **masks, **weights)
        same(expected, run(ours, (x, x, x), attn_mask=mask, is_causal=True, **masks, **weights))
        same(expected, run(ours, (x, x, x), is_causal=True, **masks, **weights))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_keys_gives_the_bias(need_weights: bool) -> None:
    _, ours = pair(batch_first=True)
    x = draw(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    (output, weights), grads = run(ours, (x, x, x), key_padding_mask=padding, need_weights=need_weights)
    same(output[1], ours.out_proj.bias.expand(L, E))
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert weights is None or weights[1].abs().max() == 0


def test_dropout_is_of_the_weights_and_in_training_alone() -> None:
    _, ours = pair(batch_first=True, dropout=0.5)
    x = draw(N, L, E)
    plain = pair(batch_first=True)[1]
    plain.load_state_dict(ours.state_dict())
    expected, weights = plain(x, x, x)
    same(ours.eval()(x, x, x)[0], expected)
    ours.train()
    torch.manual_seed(0)
    outputs = [ours(x, x, x) for _ in range(400)]
    same(outputs[0][1], weights)  # they are without dropout
    assert not outputs[0][0].equal(outputs[1][0])
    mean = torch.stack([output for output, _ in outputs]).mean(0)
    assert (mean - expected).abs().max() < 0.3 * expected.abs().max()


def test_gradients_with_dropout() -> None:
    _, ours = pair(batch_first=True, dropout=0.3)

    def seeded(x: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(3)
        inputs = (x, x, x)
        result: Tensor = torch.func.functional_call(ours, {"in_proj_weight": weight}, inputs, {"need_weights": False})[
            0
        ]
        return result

    with handtuned.strict(False):
        assert torch.autograd.gradcheck(seeded, (draw(1, 3, E), ours.in_proj_weight), fast_mode=True)


def test_kept_weights_follow_their_parameters() -> None:
    theirs, ours = pair(batch_first=True, dtype=torch.float32)
    x, memory = draw(N, L, E), draw(N, S, E)
    with torch.no_grad():
        for change in (lambda m: m.in_proj_weight.mul_(2), lambda m: m.out_proj.weight[2].zero_(), lambda m: m.half()):
            for inputs in ((x, x, x), (x, memory, memory), (x, memory, memory.clone())):
                inputs = tuple(t.to(ours.in_proj_weight.dtype) for t in dict.fromkeys(inputs))
                inputs = {1: inputs * 3, 2: (*inputs, inputs[-1]), 3: inputs}[len(inputs)]
                torch.testing.assert_close(ours(*inputs)[0], theirs(*inputs)[0], rtol=1e-5, atol=1e-5)
            assert packing._kept[ours].keys() == {"qkv", "q", "kv", "k", "v", "out"}
            change(theirs), change(ours)
        ours.drop_packed()
        assert ours not in packing._kept


# ---- memory, dtypes, tracing -----------------------------------------------------------------------------------------


def test_heads_are_split_and_merged_without_copies() -> None:
    _, ours = pair(batch_first=True, dtype=torch.float32)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        ours(x, x, x, need_weights=False)  # packs the weights
        with torch.profiler.profile() as profile:
            ours(x, x, x, need_weights=False)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat"}
    assert not copies & {event.key for event in profile.key_averages()}


def test_which_kernels_serve_it() -> None:
    _, ours = pair(batch_first=True, dtype=torch.float32)
    x, memory = torch.randn(N, L, E), torch.randn(N, S, E)

    def ops(*inputs: Tensor) -> list[str]:
        with torch.no_grad():
            calls = handtuned.explain(ours, *inputs, need_weights=False).calls
        return [call.op.removesuffix("_inference") for call in calls if call.op != "linear_pack"]

    assert ops(x, x, x) == ["linear", "attention", "linear"]
    assert ops(x, memory, memory) == ["linear", "linear", "attention", "linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_not_larger_than_torchs(dtype: torch.dtype) -> None:
    sums: dict[int, Tensor] = {}
    for _ in range(8):
        modules = pair(batch_first=True, dtype=dtype)
        x = draw(8, 40, E, dtype=dtype)
        exact = pair(batch_first=True)[0]
        exact.load_state_dict({name: t.double() for name, t in modules[0].state_dict().items()})
        wide = x.detach().double().requires_grad_()
        sides = ((exact, wide), *((module, x) for module in modules))
        truth, *found = (run(module, (t, t, t), need_weights=False) for module, t in sides)
        results = [[outputs[0], *grads] for outputs, grads in (truth, *found)]
        for i, (right, theirs, ours) in enumerate(zip(*results, strict=True)):
            assert ours.dtype == dtype
            squares = [t.double().square().sum().detach() for t in (theirs - right, ours - right, right)]
            sums[i] = sums.get(i, 0) + torch.stack(squares)
    for squares in sums.values():
        theirs, ours, scale = squares.sqrt().tolist()
        assert ours <= max(1.5 * theirs, torch.finfo(dtype).eps / 2 * scale)


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiled_whole(need_weights: bool) -> None:
    _, ours = pair(batch_first=True)
    x = draw(N, L, E)
    options = dict(key_padding_mask=hidden(N, L), attn_mask=hidden(L, L), need_weights=need_weights)
    expected = run(ours, (x, x, x), **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    same(expected, run(compiled, (x, x, x), **options))


def test_under_autocast() -> None:
    theirs, ours = pair(batch_first=True, dtype=torch.float32)
    x = torch.randn(N, L, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = theirs(x, x, x)[0], ours(x, x, x)[0]
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


# ---- bad input -------------------------------------------------------------------------------------------------------

NESTED = torch.nested.nested_tensor([torch.ones(3, E), torch.ones(2, E)], layout=torch.jagged)
BAD: list[tuple[str, dict[str, Any]]] = [
    (r"query is a nested tensor, expected a padded one", dict(query=NESTED)),
    (r"query has 4 dims, expected 3, or 2 without a batch", dict(query=torch.ones(1, 1, 1, E))),
    (r"key has 2 dims, query has 3", dict(key=torch.ones(S, E))),
    (r"query has width 9, expected the embedding width 8", dict(query=torch.ones(N, L, 9))),
    (r"value has shape \[3, 6, 8\], key has \[3, 5, 8\]", dict(value=torch.ones(N, 6, E))),
    (r"attn_mask has shape \[4, 4\], expected \[4, 5\] or \[6, 4, 5\]", dict(attn_mask=torch.ones(L, L))),
    (r"key_padding_mask has shape \[3, 4\], expected \[3, 5\]", dict(key_padding_mask=torch.ones(N, L))),
    (r"attn_mask is torch.int64, allowed are bool", dict(attn_mask=torch.ones(L, S, dtype=torch.int64))),
]


@pytest.mark.parametrize(("message", "changes"), BAD, ids=[message[:24] for message, _ in BAD])
def test_bad_input(message: str, changes: dict[str, Any]) -> None:
    _, ours = pair(batch_first=True, dtype=torch.float32)
    inputs: dict[str, Any] = dict(query=torch.ones(N, L, E), key=torch.ones(N, S, E), value=torch.ones(N, S, E))
    with pytest.raises(RuntimeError, match=message):
        ours(**inputs | changes)


def test_the_function_without_weights_names_them() -> None:
    x = torch.ones(L, N, E)
    plain = (None, None, False, 0.0, torch.ones(E, E), None)
    with pytest.raises(RuntimeError, match="in_proj_weight is None"):
        H.multi_head_attention_forward(x, x, x, E, HEADS, None, None, *plain)
    with pytest.raises(RuntimeError, match="q_proj_weight is None"):
        H.multi_head_attention_forward(x, x, x, E, HEADS, None, None, *plain, use_separate_proj_weight=True)
