"""Linear with an int8 weight: the numerics contract against the dequantised weight, integers that are the same on every
instruction set, the module with its state_dict. quantize() has tests of its own."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from collections.abc import Callable
from typing import Any

import cases
import linear_cases as lc
import numerics
import pytest
import torch
import torch.nn.functional as F
from linear_cases import BF16, F16, F32, Case
from test_norm_properties import same_bits
from test_ops import error_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import handtuned
from handtuned import nn, ops, reference
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]
SLOW = ("generic", "emulated512")


def _cases() -> list[Case]:
    dtypes = (F32, BF16, F16)
    found = [lc.EVERYTHING.with_(dtype=dtype, activation=a) for dtype in dtypes for a in lc.ACTIVATIONS]
    found += [Case(rows, k, n, dtype=dtype) for rows, k, n in lc.SIZES for dtype in dtypes]
    found += [Case((8,), 300, 65, F16), Case((9,), 300, 65), Case((2,), 4099, 70), Case((5,), 1030, 130, BF16)]
    for layout in list(cases.LAYOUTS)[1:]:
        found += [Case((4, 5, 3), 24, 24, dtype=dtype, layout=layout, residual=True) for dtype in (F32, BF16)]
    found += [Case((0,), 5, 7), Case((4,), 0, 5), Case((4,), 5, 0, BF16), Case((2, 0), 5, 7, F16), Case((12,), 0, 5)]
    found += [Case((), 12, 5), Case((410,), 530, 300), Case((410,), 530, 300, BF16, activation="gelu")]
    return found


CASES = _cases()


def drawn(case: Case, draw: int) -> tuple[lc.Tensors, Tensor, Tensor]:
    """A case's tensors with the dequantised weight, exact in float64, and what int8 there is of it: (q, scale)."""
    t = lc.tensors(case, draw)
    q, scale = H.quantize_linear_weight(t.weight.float())
    return dataclasses.replace(t, weight=q.double() * scale.double()[:, None]), q, scale


def run(case: Case, t: dict[str, Tensor], q: Tensor, scale: Tensor, **options: Any) -> Tensor:
    return H.linear_int8(
        *(t["input"], H.pack_int8_weight(q), scale, t.get("bias")),
        residual=t.get("residual"),
        activation=case.activation,
        dropout_p=case.dropout,
        **options,
    )


def leaves_of(t: lc.Tensors) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in t.leaves().items() if name != "weight"}


# ---- the weight alone ------------------------------------------------------------------------------------------------


@pytest.mark.cases(CASES, thinned=SLOW)
def test_numerics_contract(kernels: str, case: Case) -> None:
    """Against the exact dequantised weight: not further away than torch's linear with that weight in the dtype."""
    errors: dict[str, numerics.Errors] = {}
    for draw in range(lc.draws(case)):
        t, q, scale = drawn(case, draw)
        seed = numerics.draw_seed(draw)
        keep = factor = None
        if case.dropout:
            keep = reference.dropout_factor(torch.Size(case.output_shape), 1, case.dropout, seed, F32) != 0
            factor = keep.to(case.dtype).div_(1 - case.dropout)
        leaves = leaves_of(t)
        numerics.draw_seed(draw)
        ours = lc.results(run(case, leaves, q, scale), leaves, t)
        theirs = leaves_of(t)
        weight = t.weight.to(case.dtype)
        torchs = lc.results(lc.run_torch(case, theirs | {"weight": weight}, factor), theirs, t)
        truth = lc.exact(case, t, keep)
        for name, tensor in ours.items():
            same = torchs[name]
            assert (tensor.shape, tensor.dtype) == (same.shape, same.dtype), name
            errors.setdefault(name, numerics.Errors(torch.finfo(tensor.dtype).eps)).add(tensor, same, truth[name])
    excess = {name: text for name, entry in errors.items() if (text := entry.excess())}
    assert not excess, f"{case.name}: {excess}"


@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (65, 17), (200, 303), (3, 0), (0, 3)], ids=str)
def test_packed_layout(isa: str, shape: tuple[int, int]) -> None:
    """One layout for every instruction set, the formula's, from which the weight comes back."""
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    for w in (weight, weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, : shape[1]]):
        packed = ops.linear_int8_pack(w)
        assert packed.equal(reference.linear_int8_pack(weight))
        assert reference.linear_int8_unpack(packed, *shape).equal(weight)


def test_quantized_weights_are_within_half_a_step() -> None:
    weight = torch.randn(40, 50)
    weight[3] = 0
    q, scale = H.quantize_linear_weight(weight)
    assert scale[3] == 0
    assert not q[3].any()
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.50001).all()
    assert (q.abs().amax(1) == 127).sum() == 39
    for dtype in (BF16, F16, torch.float64):
        assert H.quantize_linear_weight(weight.to(dtype))[0].dtype == torch.int8


@pytest.mark.parametrize("quantize_input", [False, True])
@pytest.mark.cases([Case((3,), 800, 700, BF16), Case((410,), 530, 300, activation="gelu")])
def test_same_bits_on_any_number_of_threads(isa: str, case: Case, quantize_input: bool) -> None:
    t, q, scale = drawn(case, 0)

    def found(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return run(case, vars(t), q, scale, quantize_input=quantize_input)

    alone = found(1)
    assert all(same_bits(found(threads), alone) for threads in (2, 3, 7))


# ---- the input too ---------------------------------------------------------------------------------------------------


def in_integers(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """The result without bias, by the definition, in float32 and integers."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    s = high / 255 - low / 255
    inverse = torch.where(s >= 2.0**-126, 1 / s, 0.0)
    zero = (-low * inverse).round()
    u = ((x * inverse).round() + zero).clamp(0, 255)
    sums = (u - zero).double() @ q.double().T  # exact
    return sums.float() * (s * scale)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [(1, 5, 3), (4, 303, 70), (13, 64, 129), (60, 1031, 65)], ids=str)
def test_integers_are_the_same_everywhere(isa: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, k, n = size
    x = torch.randn(rows, k)
    x[0] = x[0].abs() + 1  # one side of 0 alone
    x[-1] *= 1e-3
    x = x.to(dtype)
    q, scale = H.quantize_linear_weight(torch.randn(n, k))
    found = H.linear_int8(x, H.pack_int8_weight(q), scale, quantize_input=True)
    assert same_bits(found, in_integers(x, q, scale).to(dtype))


def test_the_largest_sums_are_exact(isa: str) -> None:
    """Where an instruction with 16-bit sums would saturate, and as near to 2^31 as the limit allows."""
    for k in (40, ops.MOST_QUANTIZED):
        x = torch.ones(2, k)
        x[1] = -1
        q = torch.full((3, k), 127, dtype=torch.int8)
        q[1] = -127
        found = H.linear_int8(x, H.pack_int8_weight(q), torch.ones(3), quantize_input=True)
        expected = 127.0 * k * torch.tensor([[1.0, -1, 1], [-1, 1, -1]])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.cases([c for c in CASES if c.elements < 20_000])
def test_quantized_input_with_all_that_follows(kernels: str, case: Case) -> None:
    """Against the formula, whose rounding of the input is another only where a value is half-way."""
    t, q, scale = drawn(case, 0)
    seed = numerics.draw_seed(0)
    numerics.draw_seed(0)
    found = run(case, vars(t), q, scale, quantize_input=True)
    number = lc.ACTIVATIONS.index(case.activation)
    packed = reference.linear_int8_pack(q)
    args = (packed, scale, t.bias, t.residual, number, case.dropout, seed, True, False)
    expected, _ = reference.linear_int8(t.input, *args)
    tolerance = 4 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=max(tolerance, 1e-5))


def test_rows_of_odd_values(isa: str) -> None:
    """Zeros give 0, tiny rows 0, and what is not finite makes its whole row NaN and no other."""
    x = torch.randn(7, 70)
    x[1], x[2] = 0, 1e-39
    x[3, 5], x[4, 69], x[5, 0] = float("nan"), float("inf"), -float("inf")
    x[6] = 3e38 * torch.randn(70).sign()
    q, scale = H.quantize_linear_weight(torch.randn(80, 70))
    y = H.linear_int8(x, H.pack_int8_weight(q), scale, quantize_input=True)
    assert y[[3, 4, 5]].isnan().all()
    assert (y[[1, 2]] == 0).all()
    torch.testing.assert_close(y[[0, 6]], in_integers(x[[0, 6]], q, scale))


def test_accuracy_is_that_of_8_bits() -> None:
    """What docs/linear.md says of random numbers: the errors of weight and input."""
    x, w = torch.randn(50, 768), torch.randn(100, 768)
    exact = x.double() @ w.double().T
    q, scale = H.quantize_linear_weight(w)
    packed = H.pack_int8_weight(q)
    errors = [
        ((H.linear_int8(x, packed, scale, quantize_input=both) - exact).norm() / exact.norm()).item()
        for both in (False, True)
    ]
    assert 0.004 < errors[0] < 0.01
    assert 0.006 < errors[1] < 0.02


# ---- derivatives, tracing, arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize_input", [False, True])
def test_gradients_pass_the_dequantised_weight(kernels: str, quantize_input: bool) -> None:
    x, bias = torch.randn(6, 30, requires_grad=True), torch.randn(20, requires_grad=True)
    q, scale = H.quantize_linear_weight(torch.randn(20, 30))
    packed, weight = H.pack_int8_weight(q), q * scale[:, None]
    y = H.linear_int8(x, packed, scale, bias, quantize_input=quantize_input)
    found = torch.autograd.grad(y.pow(2).sum(), (x, bias), create_graph=True)
    dy = 2 * y.detach()
    torch.testing.assert_close(found, (dy @ weight, dy.sum(0)), rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(found[0].sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(), (6,), (2, 5, 6)], ids=str)
def test_a_weight_has_two_dims(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"weight has shape \[.*\], expected \[out_features, in_features\]; reshape"):
        H.quantize_linear_weight(torch.randn(shape))


def test_sums_of_junk_wrap() -> None:
    """Packed bytes are the caller's: where they hold other sums than the weight's own, only the result is wrong."""
    q, scale = H.quantize_linear_weight(torch.randn(70, 6))
    packed = H.pack_int8_weight(q)
    junk = torch.full_like(packed, -128)
    assert H.linear_int8(torch.randn(3, 6), junk, scale, quantize_input=True).isfinite().all()


def test_a_scale_cannot_be_trained() -> None:
    q, scale = H.quantize_linear_weight(torch.randn(5, 6))
    with pytest.raises(RuntimeError, match=r"scale requires grad.*detach it"):
        H.linear_int8(torch.randn(3, 6), H.pack_int8_weight(q), scale.requires_grad_())


def test_autocast() -> None:
    layer = nn.Int8Linear.from_linear(torch.nn.Linear(6, 5))
    with torch.autocast("cpu", BF16):
        assert layer(torch.randn(3, 6)).dtype == BF16


X, Q, SCALE = torch.ones(4, 6), torch.ones(5, 6, dtype=torch.int8), torch.ones(5)
WRONG: list[tuple[str, Any, str]] = [
    ("input", X.double(), "input is float64, supported are float32, bfloat16 and float16"),
    ("input", X.long(), "input is int64, supported are"),
    ("input", torch.tensor(1.0), r"input has shape \[\], expected \[\*, in_features\]"),
    ("input", torch.ones(4, 9), r"packed has shape \[1, 3, 64, 4\], expected a contiguous \[1, 4, 64, 4\]"),
    ("packed", torch.ones(1, 3, 64, 4), "packed is float32, expected int8; pass what linear_int8_pack"),
    ("packed", Q, "packed has shape .* pass what linear_int8_pack made"),
    ("scale", torch.ones(5, dtype=BF16), r"scale is bfloat16, expected float32; convert it with .float\(\)"),
    ("scale", torch.ones(5, 1), r"scale has shape \[5, 1\], expected a contiguous \[out_features\]"),
    ("scale", torch.ones(5, 2)[:, 0], "scale has shape"),
    ("bias", torch.ones(4), r"bias has shape \[4\], expected \[5\]"),
    ("bias", torch.ones(5, dtype=BF16), "bias is bfloat16, input is float32"),
    ("residual", torch.ones(4, 6), r"residual has shape \[4, 6\], expected \[4, 5\]"),
    ("activation", 5, "activation is 5, the limits are 0 and 4"),
    ("dropout_p", 1.5, r"dropout_p is 1\.5, the limits are 0 and 1"),
]


@pytest.mark.parametrize(("argument", "value", "says"), WRONG, ids=[f"{a}-{i}" for i, (a, _, _) in enumerate(WRONG)])
def test_wrong_arguments(argument: str, value: Any, says: str) -> None:
    """An error naming op, argument, value, limit and remedy: from the kernel, and the same words from its fake."""
    right: dict[str, Any] = {"input": X, "packed": ops.linear_int8_pack(Q), "scale": SCALE, "bias": None}
    right |= {"residual": None, "activation": 0, "dropout_p": 0.0, "seed": None}
    arguments = right | {"quantize_input": False, "need_preactivation": True} | {argument: value}
    check_words(ops.linear_int8, arguments, says)


@pytest.mark.parametrize(
    ("weight", "says"), [(X, "weight is float32, expected int8"), (Q[0], r"weight has shape \[6\], expected")]
)
def test_wrong_weights(weight: Tensor, says: str) -> None:
    check_words(ops.linear_int8_pack, {"weight": weight}, says)


def test_too_many_features_for_integers() -> None:
    k = ops.MOST_QUANTIZED + 1
    arguments: dict[str, Any] = {
        "input": torch.ones(1, k),
        "packed": torch.zeros(1, (k + 3) // 4 + 1, 64, 4, dtype=torch.int8),
    }
    arguments |= {"scale": torch.ones(1), "bias": None, "residual": None, "activation": 0, "dropout_p": 0.0}
    arguments |= {"seed": None, "quantize_input": True, "need_preactivation": False}
    check_words(ops.linear_int8, arguments, "input has 65537 features, the limit is 65536 with quantize_input; switch")


def check_words(op: Any, arguments: dict[str, Any], says: str) -> None:
    real = error_of(lambda: op(**arguments))
    assert real.startswith(f"handtuned.{op._schema.name.split('::')[1]}: ")
    assert re.search(says, real), real
    assert "; " in real, f"no remedy: {real}"
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        fake = error_of(lambda: op(**tensors))
    assert fake.replace("torch.", "") == real


# ---- the module ------------------------------------------------------------------------------------------------------


def layers(**options: Any) -> tuple[torch.nn.Linear, nn.Int8Linear]:
    linear = torch.nn.Linear(70, 80, **options).eval()
    return linear, nn.Int8Linear.from_linear(linear)


def test_the_layer_is_the_dequantised_one() -> None:
    linear, layer = layers()
    x = torch.randn(2, 3, 70)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), linear.bias), rtol=1e-5, atol=1e-5)
    assert layer.bias is linear.bias
    assert (layer.weight.shape, layer.weight.dtype, layer.scale.shape) == ((80, 70), torch.int8, (80,))
    assert (layer(x) - linear(x)).norm() < 0.01 * linear(x).norm()
    assert "in_features=70, out_features=80, bias=True" in repr(layer)
    assert nn.Int8Linear.from_linear(torch.nn.Linear(70, 80, bias=False)).bias is None
    sizes = [sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (linear, layer)]
    assert sizes[1] < 0.28 * sizes[0]


@pytest.mark.parametrize("how", ["load", "assign", "file", "deepcopy"])
def test_saving_and_loading(how: str) -> None:
    _, layer = layers()
    x = torch.randn(3, 70)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "scale"]
    other: nn.Int8Linear = nn.Int8Linear(70, 80)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "file":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
    else:
        other.load_state_dict(state, assign=how == "assign")
    assert same_bits(other(x), layer(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("weight"), "Missing key.*weight"),
        (lambda s: s.update(weight=s["weight"].float()), "weight is torch.float32.*expected torch.int8"),
        (lambda s: s.update(weight=s["weight"][:5]), r"weight is torch.int8 of shape \[5, 70\]"),
        (lambda s: s.update(other=s["weight"]), "Unexpected key.*other"),
    ],
)
def test_a_wrong_state_dict_is_named(change: Callable[[Any], Any], says: str) -> None:
    _, layer = layers()
    state = layer.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){says}"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_conversions_leave_weight_and_scale(dtype: torch.dtype) -> None:
    _, layer = layers()
    weight, scale = layer.weight, layer.scale.clone()
    layer.to(dtype)
    assert layer.bias is not None
    assert (layer.bias.dtype, layer.scale.dtype) == (dtype, F32)
    assert layer.weight.equal(weight)
    assert layer.scale.equal(scale)
    assert layer(torch.randn(3, 70).to(dtype)).dtype == dtype


@pytest.mark.parametrize("quantize_input", [False, True])
def test_compiled_and_exported(quantize_input: bool) -> None:
    layer = nn.Int8Linear.from_linear(torch.nn.Linear(70, 80), quantize_input=quantize_input)
    x = torch.randn(9, 70, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 3, 20):
        part = torch.randn(rows, 70, requires_grad=True)
        found, expected = (torch.autograd.grad(m(part).sin().sum(), part) for m in (compiled, layer))
        torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
    with torch.no_grad():
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
        names = [str(node.target) for node in program.graph.nodes if "handtuned" in str(node.target)]
        assert names == ["handtuned.linear_int8.default"]
        assert same_bits(program.module()(x[:5]), layer(x[:5]))


def test_explain_names_kernel_and_copies() -> None:
    _, layer = layers()
    with torch.no_grad():
        text = str(handtuned.explain(layer, torch.randn(70, 9).T))
    assert "linear_int8: cpu" in text
    assert "input is copied once" in text
