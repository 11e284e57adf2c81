"""The linear family: the numerics contract on every set of kernels, packed weights, derivatives, arguments that are
wrong, and the module with its kept weight."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import linear_cases as lc
import pytest
import torch
import torch.nn.functional as F
from linear_cases import BF16, F16, F32, F64, Case
from test_norm_properties import same_bits
from test_ops import error_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import handtuned
from handtuned import ops, reference
from handtuned.nn import functional as H
from handtuned.nn import packing

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]
SLOW = ("generic", "emulated512")
EVERYTHING = [lc.EVERYTHING.with_(dtype=dtype, activation="gelu") for dtype in (F32, F64, BF16, F16)]


def everything(case: Case, packed: bool = False) -> dict[str, Tensor]:
    """Output and gradients of the kernels in force; dropout always with the same seed."""
    t = lc.tensors(case)
    leaves = t.leaves()
    torch.manual_seed(7)
    return lc.results(lc.run(case, leaves, H.pack_linear_weight(t.weight) if packed else None), leaves, t)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), name


# ---- the tests' own tools --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", lc.ACTIVATIONS)
def test_the_bounds_formula_is_torchs(activation: str) -> None:
    d = lc.drawn(lc.EVERYTHING.with_(dtype=F64, activation=activation), 0)
    for name, truth in d.truth.items():
        expected = torch.from_numpy(truth.astype("float64"))
        torch.testing.assert_close(d.torchs[name], expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [lambda t: t * (1 + 6 * torch.finfo(t.dtype).eps), lambda t: t.index_fill(-1, torch.tensor([0]), 0.0)],
    ids=["scaled_by_6_eps", "one_column_lost"],
)
def test_the_bound_catches(
    dtype: torch.dtype, spoil: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((37,), 10, 70, dtype)
    for draw in range(lc.draws(case)):
        lc.drawn(case, draw)  # torch's results, unspoiled
    results = lc.results
    monkeypatch.setattr(lc, "results", lambda *a: {name: spoil(t) for name, t in results(*a).items()})
    with pytest.raises(AssertionError, match=r"output.*allowed"):
        lc.check_contract(case)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.cases(lc.CASES, thinned=SLOW)
def test_numerics_contract(kernels: str, case: Case) -> None:
    lc.check_contract(case)


@pytest.mark.cases([*EVERYTHING, *(Case((rows,), 67, 65, BF16) for rows in (1, 4, 5))])
def test_packed_and_without_gradient_the_same_bits(kernels: str, case: Case) -> None:
    found = everything(case)
    assert_same_bits(everything(case, packed=True), found)
    t = lc.tensors(case)
    torch.manual_seed(7)
    with torch.no_grad():
        assert same_bits(lc.run(case, {name: leaf.detach() for name, leaf in t.leaves().items()}), found["output"])


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (65, 17), (200, 300), (3, 0), (0, 3)], ids=str)
def test_packed_layout(isa: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One layout for every instruction set: the formula's."""
    weight = torch.randn(shape).to(dtype)
    for w in (weight, weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, : shape[1]]):
        assert same_bits(ops.linear_pack(w), reference.linear_pack(weight))


@pytest.mark.cases([EVERYTHING[0], EVERYTHING[2], Case((410,), 530, 300), Case((3,), 800, 700, BF16)])
def test_same_bits_on_any_number_of_threads(isa: str, case: Case) -> None:
    torch.set_num_threads(1)
    alone = everything(case)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(everything(case), alone)


@pytest.mark.cases([Case((rows,), 70, 80, dtype) for rows in (3, 9) for dtype in (F32, BF16)])
def test_non_finite_values_stay_in_their_row_and_column(kernels: str, case: Case) -> None:
    t = lc.tensors(case)
    clean = lc.run(case, vars(t))
    for value in (float("nan"), float("inf")):
        x, w = t.input.clone(), t.weight.clone()
        x[1, 5] = value
        y = lc.run(case, vars(t) | {"input": x})
        assert not y[1].isfinite().any()
        assert same_bits(y[[0, 2]], clean[[0, 2]])
        w[7, 3] = value
        y = lc.run(case, vars(t) | {"weight": w})
        assert not y[:, 7].isfinite().any()
        assert same_bits(y[:, 8:], clean[:, 8:])


@pytest.mark.parametrize("activation", lc.ACTIVATIONS)
def test_activations_over_their_whole_range(kernels: str, activation: str) -> None:
    """Values and derivatives from -100 to 100, infinities and NaN, through a weight of 1."""
    dtype = F64
    points = torch.cat([torch.linspace(-100, 100, 2001), torch.linspace(-6, 6, 4001), torch.tensor([0.0])]).to(dtype)
    for narrow in (F32, F64):
        x = points.to(narrow)[:, None].requires_grad_()
        y = H.linear(x, torch.ones(1, 1, dtype=narrow), activation=activation)
        (dx,) = torch.autograd.grad(y.sum(), x)
        wide = x.detach().double().requires_grad_()
        truth = lc.activate(wide, activation)
        (slope,) = torch.autograd.grad(truth.sum(), wide)
        eps = torch.finfo(narrow).eps
        assert ((y.double() - truth).abs() <= 4 * eps * wide.abs().clamp(min=1)).all()
        assert ((dx.double() - slope).abs() <= 64 * eps).all()
    if kernels == "reference":
        return  # torch's float32 gelu of infinity is NaN
    special = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]])
    y = H.linear(special, torch.ones(1, 1), activation=activation)
    torch.testing.assert_close(y.double(), lc.activate(special.double(), activation), equal_nan=True)


# ---- derivatives -----------------------------------------------------------------------------------------------------

SMALL = [
    Case((3,), 5, 4, F64, activation=a, residual=a == "gelu", dropout=0.3 if a in ("gelu", "none") else 0.0)
    for a in lc.ACTIVATIONS
]


@pytest.mark.cases(SMALL)
def test_first_and_second_derivatives(kernels: str, case: Case) -> None:
    named = lc.tensors(case).leaves()

    def call(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return lc.run(case, dict(zip(named, values, strict=True)))

    assert gradcheck(call, tuple(named.values()))
    assert gradgradcheck(call, tuple(named.values()), fast_mode=True)


@pytest.mark.cases([EVERYTHING[1]])
def test_gradients_of_some_arguments_only(kernels: str, case: Case) -> None:
    together = everything(case)
    t = lc.tensors(case)
    for wanted in t.leaves():
        leaves = {name: leaf.requires_grad_(name == wanted) for name, leaf in t.leaves().items()}
        torch.manual_seed(7)
        lc.run(case, leaves).backward(t.grad_output)
        assert same_bits(leaves[wanted].grad, together[f"grad_{wanted}"])
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_torch_func_runs_the_formula() -> None:
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    with pytest.warns(handtuned.FallbackWarning, match=r"torch\.func"):
        rows = torch.func.vmap(lambda row: H.linear(row, w, activation="gelu"))(x)
    torch.testing.assert_close(rows, F.gelu(F.linear(x, w)))


def test_training_off_and_dropout_of_everything() -> None:
    x, w, r = torch.randn(6, 5), torch.randn(4, 5), torch.randn(6, 4)
    assert same_bits(H.linear(x, w, dropout_p=0.5, training=False), H.linear(x, w))
    assert same_bits(H.linear(x, w, residual=r, dropout_p=1.0), r)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    module = handtuned.nn.Linear(20, 30)
    x = torch.randn(8, 20, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = module(x)
        expected = F.linear(x, module.weight, module.bias)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == F32
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert same_bits(module(x), y.detach())  # the kept weight is float32's, and is not used


# ---- compile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    torch.compiler.reset()
    case = lc.EVERYTHING.with_(activation="gelu_tanh", dropout=0.0)
    compiled = torch.compile(lambda t: lc.run(case, t), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (37, 9):
        t = lc.tensors(case.with_(rows=(rows,)))
        found = []
        for run in (compiled, lambda t: lc.run(case, t)):
            leaves = t.leaves()
            found.append(lc.results(run(leaves), leaves, t))
        assert_same_bits(*found)


def test_compiled_and_exported_module() -> None:
    torch.compiler.reset()
    module = handtuned.nn.Linear(33, 20)
    x = torch.randn(9, 33)
    expected = module(x)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=99)},))
    for rows in (1, 17):
        x = torch.randn(rows, 33)
        torch.testing.assert_close(exported.module()(x), module(x))


# ---- wrong arguments -------------------------------------------------------------------------------------------------

X, W = torch.ones(4, 6), torch.ones(5, 6)
WRONG: list[tuple[str, Any, str]] = [
    ("input", torch.ones(4, 6, dtype=torch.int64), r"input is (torch\.)?int64, supported are float32"),
    ("input", torch.ones(4, 7), r"input has shape \[4, 7\], expected \[\*, 6\] beside weight of shape \[5, 6\]"),
    ("input", torch.tensor(1.0), r"input has shape \[\], expected \[\*, 6\]"),
    ("weight", torch.ones(6), r"weight has shape \[6\], expected \[out_features, in_features\]"),
    ("weight", torch.ones(5, 6).double(), r"weight is (torch\.)?float64, input is (torch\.)?float32"),
    ("bias", torch.ones(6), r"bias has shape \[6\], expected \[5\]"),
    ("bias", torch.ones(5).half(), r"bias is (torch\.)?float16, input is (torch\.)?float32"),
    ("residual", torch.ones(5), r"residual has shape \[5\], expected \[4, 5\]"),
    ("packed", torch.ones(1, 6, 32, 1), r"packed has shape \[1, 6, 32, 1\], expected a contiguous \[1, 6, 64, 1\]"),
    ("activation", 5, r"activation is 5, the limits are 0 and 4"),
    ("activation", -1, r"activation is -1, the limits are 0 and 4"),
    ("dropout_p", 1.5, r"dropout_p is 1\.5, the limits are 0 and 1"),
    ("dropout_p", 0.5, r"dropout_p is 0\.5 but seed is None"),
    ("grad_output", torch.ones(4, 6), r"grad_output has shape \[4, 6\], expected \[4, 5\]"),
    ("preactivation", torch.ones(4, 5), r"preactivation has shape \[4, 5\], expected \[0\]"),
]


def wrong_calls() -> list[Any]:
    return [
        pytest.param(name, argument, value, says, id=f"{name}-{argument}-{i}")
        for name, op in ops.LINEAR_OPS.items()
        for i, (argument, value, says) in enumerate(WRONG)
        if argument in {a.name for a in op._schema.arguments}
    ]


@pytest.mark.parametrize(("op", "argument", "value", "says"), wrong_calls())
def test_wrong_arguments(op: str, argument: str, value: Any, says: str) -> None:
    """An error naming op, argument, value, limit and remedy: from the kernel, and the same words from its fake."""
    if op == "linear_pack" and isinstance(value, Tensor) and value.dim() == 2:
        return  # right for packing
    right: dict[str, Any] = {"input": X, "weight": W, "grad_output": torch.ones(4, 5), "preactivation": torch.ones(0)}
    right |= {"activation": 0, "dropout_p": 0.0, "need_input": True, "need_weight": True, "need_bias": True}
    names = [a.name for a in ops.LINEAR_OPS[op]._schema.arguments]
    arguments = {name: right.get(name) for name in names} | {argument: value}
    real = error_of(lambda: ops.LINEAR_OPS[op](**arguments))
    assert real.startswith(f"handtuned.{op}: ")
    assert re.search(says, real), real
    assert "; " in real, f"no remedy: {real}"
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        fake = error_of(lambda: ops.LINEAR_OPS[op](**tensors))
    assert fake.replace("torch.", "") == real


def test_wrong_arguments_of_the_function() -> None:
    assert "activation is 'tanh', allowed are none, relu" in error_of(lambda: H.linear(X, W, activation="tanh"))
    assert "dropout_p is 2" in error_of(lambda: H.linear(X, W, dropout_p=2.0))
    assert "expected [*, 6]" in error_of(lambda: H.linear(torch.ones(4, 5), W.requires_grad_()))


# ---- the module ------------------------------------------------------------------------------------------------------


@pytest.fixture
def module() -> handtuned.nn.Linear:
    return handtuned.nn.Linear(70, 80).eval()


ROWS = torch.randn(9, 70)


def is_right(module: handtuned.nn.Linear, x: Tensor = ROWS) -> bool:
    """Without gradient, so with the kept weight: what the weight as it is now gives."""
    with torch.no_grad():
        return same_bits(module(x), H.linear(x, module.weight, module.bias))


def test_the_twin_is_torchs_module(module: handtuned.nn.Linear) -> None:
    torch.manual_seed(1)
    theirs = torch.nn.Linear(70, 80)
    torch.manual_seed(1)
    ours = handtuned.nn.Linear(70, 80)
    assert ours.weight.equal(theirs.weight)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(ROWS), theirs(ROWS))
    assert is_right(module)
    assert set(vars(module)) == set(vars(theirs))
    assert list(module.state_dict()) == ["weight", "bias"]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other not in packing._kept
        assert is_right(other)
    file = io.BytesIO()
    torch.save(module, file)
    assert len(file.getvalue()) < 1.5 * module.weight.numel() * 4


CHANGES: dict[str, Callable[[handtuned.nn.Linear], object]] = {
    "in place": lambda m: m.weight.mul_(2),
    "part": lambda m: m.weight[3].zero_(),
    "new data": lambda m: setattr(m.weight, "data", torch.randn(80, 70)),
    "new parameter": lambda m: setattr(m, "weight", torch.nn.Parameter(torch.randn(80, 70))),
    "other strides": lambda m: setattr(m.weight, "data", m.weight.data.T.contiguous().T),
    "state_dict": lambda m: m.load_state_dict(torch.nn.Linear(70, 80).state_dict()),
    "dtype and back": lambda m: m.bfloat16().float(),
    "optimizer": lambda m: optimize(m),
    "written past autograd": lambda m: write_past_autograd(m),
}


def write_past_autograd(module: handtuned.nn.Linear) -> None:
    module.weight.data.add_(1)
    module.drop_packed()


def optimize(module: handtuned.nn.Linear) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with torch.enable_grad():
        module(ROWS).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_weight_follows_its_parameter(module: handtuned.nn.Linear, change: str) -> None:
    assert is_right(module)
    first = packing._kept[module]["weight"].made
    assert is_right(module)
    assert packing._kept[module]["weight"].made is first  # packed once
    with torch.no_grad():
        CHANGES[change](module)
    assert is_right(module)
    assert packing._kept[module]["weight"].made is not first


def test_frozen_weights_are_packed_once(module: handtuned.nn.Linear) -> None:
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(module, fullgraph=True)
        assert same_bits(compiled(ROWS), module(ROWS))
        with torch.profiler.profile() as profile:
            compiled(ROWS)
    torch._dynamo.reset()
    assert {e.key for e in profile.key_averages() if "handtuned" in e.key} == {"handtuned::linear_inference"}


def test_an_address_that_comes_back_is_no_kept_weight(module: handtuned.nn.Linear) -> None:
    """A new weight may get the freed memory, and with it the key, of the one that was packed."""
    for _ in range(20):
        assert is_right(module)
        del module.weight
        module.weight = torch.nn.Parameter(torch.randn(80, 70))


def test_nothing_is_kept_where_it_would_be_stale_or_useless(module: handtuned.nn.Linear) -> None:
    kept = packing._kept
    with torch.no_grad():
        module(ROWS[:4])
        assert module not in kept  # few rows read the weight itself
        module(ROWS)
        assert module in kept
        module.train()
        assert module not in kept
        module(ROWS)
        assert module in kept
    module(ROWS)  # a training step
    assert module not in kept
    module.keep_packed = False
    with torch.no_grad():
        assert is_right(module)
        assert module not in kept
    with torch.inference_mode():
        other = handtuned.nn.Linear(70, 80).eval()
        assert is_right(other)
        assert other not in kept


def test_the_kept_weight_goes_with_its_module() -> None:
    module = handtuned.nn.Linear(70, 80).eval()
    assert is_right(module)
    gc.collect()  # what other tests left
    before = len(packing._kept)
    del module
    gc.collect()
    assert len(packing._kept) == before - 1


def test_explain_names_the_copy_of_a_transposed_weight() -> None:
    text = str(handtuned.explain(H.linear, torch.randn(9, 6), torch.randn(6, 5).T))
    assert "linear_inference: cpu" in text
    assert "weight is copied once" in text
