"""linear_cross_entropy: the numerics contract on every set of kernels, memory, derivatives, special values, arguments
that are wrong, and the module."""

from __future__ import annotations

import re
from typing import Any

import cross_entropy_cases as cc
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import BF16, F16, F32, F64, Case
from test_linear import assert_same_bits
from test_norm_properties import same_bits
from test_ops import error_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import handtuned
from handtuned import ops
from handtuned.nn import functional as H
from handtuned.nn.functional import cross_entropy

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]
SLOW = ("generic", "emulated512")
DTYPES = (F32, F64, BF16, F16)


def everything(case: Case) -> dict[str, Tensor]:
    t = cc.tensors(case)
    leaves = t.leaves()
    return cc.results(cc.run(case, leaves, t), leaves, t)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_bounds_formula_is_torchs(reduction: str) -> None:
    d = cc.drawn(cc.EVERYTHING.with_(dtype=F64, reduction=reduction), 0)
    for name, truth in d.truth.items():
        torch.testing.assert_close(d.torchs[name], torch.from_numpy(truth.astype("float64")), rtol=1e-11, atol=1e-12)


def test_the_bound_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cc.EVERYTHING.with_(reduction="mean")
    cc.drawn.cache_clear()
    for draw in range(cc.draws(case)):
        cc.drawn(case, draw)
    results = cc.results
    monkeypatch.setattr(cc, "results", lambda *a: {n: t * (1 + 1e-5) for n, t in results(*a).items()})
    with pytest.raises(AssertionError, match=r"grad_linear_weight.*allowed"):
        cc.check_contract(case)


@pytest.mark.cases(cc.CASES, thinned=SLOW)
def test_numerics_contract(kernels: str, case: Case) -> None:
    cc.check_contract(case)


@pytest.mark.parametrize("kept", [0, 8200, 8300])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_numerics_contract_over_chunks_of_rows_and_classes(
    dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the probabilities of no class, of a chunk and a few, and of all."""
    case = cc.SEVERAL_CHUNKS.with_(dtype=dtype)
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", kept * dtype.itemsize * case.rows[0])
    cc.check_contract(case)


@pytest.mark.cases([case for case in cc.CASES if not case.softcap], thinned=SLOW)
def test_numerics_contract_without_probabilities(isa: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", 0)
    cc.check_contract(case)


@pytest.mark.cases([cc.EVERYTHING, cc.EVERYTHING.with_(dtype=BF16), Case((1100,), 40, 900, F32, bias=True)])
def test_same_bits_on_any_number_of_threads(isa: str, case: Case) -> None:
    torch.set_num_threads(1)
    alone = everything(case)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(everything(case), alone)


@pytest.mark.cases([cc.EVERYTHING.with_(dtype=dtype) for dtype in (F32, BF16)])
def test_rows_that_do_not_count_are_not_read(kernels: str, case: Case) -> None:
    t = cc.tensors(case)
    clean = everything(case)
    t.input[t.target == cc.IGNORED] = float("nan")
    leaves = t.leaves()
    assert_same_bits(cc.results(cc.run(case, leaves, t), leaves, t), clean)
    assert (clean["grad_input"][t.target == cc.IGNORED] == 0).all()


def test_no_row_counts(kernels: str) -> None:
    x, w = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    for target in (torch.full((4,), -100), torch.full((0,), 0)):
        given = x[: len(target)]
        assert H.linear_cross_entropy(given, w, target).isnan()
        assert H.linear_cross_entropy(given, w, target, reduction="sum") == 0
        assert same_bits(H.linear_cross_entropy(given, w, target, reduction="none"), torch.zeros(len(target)))
        dx, dw = torch.autograd.grad(H.linear_cross_entropy(given, w, target, reduction="sum"), (x, w))
        assert (dx == 0).all()
        assert (dw == 0).all()


def test_forbidden_classes_and_non_finite_values(kernels: str) -> None:
    """A bias of -infinity forbids a class; NaN and infinite rows are torch's."""
    x, w, bias = torch.randn(5, 8), torch.randn(300, 8), torch.zeros(300)
    bias[:260] = float("-inf")
    target = torch.arange(295, 300)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    expected = F.cross_entropy(F.linear(x, w, bias), target, reduction="none")
    loss = H.linear_cross_entropy(x, w, target, linear_bias=bias, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert H.linear_cross_entropy(x[:1], w, torch.tensor([3]), linear_bias=bias) == float("inf")


def test_large_logits_do_not_overflow(kernels: str) -> None:
    x, w = torch.full((3, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.999]])
    loss = H.linear_cross_entropy(x, w, torch.tensor([0, 1, 2]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([4.54e-5, 2e4, 10.0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [(), (7,), (2, 3)], ids=str)
def test_shapes_and_ignore_index(kernels: str, rows: tuple[int, ...]) -> None:
    x, w = torch.randn(*rows, 6), torch.randn(9, 6)
    target = torch.randint(9, rows)
    logits, flat = F.linear(x, w).reshape(-1, 9), target.reshape(-1)
    for ignored in (None, int(flat[0]), 77):
        options: dict[str, Any] = {"ignore_index": -100 if ignored is None else ignored, "reduction": "none"}
        expected = F.cross_entropy(logits, flat, **options).reshape(rows)
        found = H.linear_cross_entropy(x, w, target, ignore_index=ignored, reduction="none")
        torch.testing.assert_close(found, expected)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(run: Any) -> int:
    """The most memory of torch's CPU allocator that a call holds at a time, beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_memory_beyond_what_is_kept_grows_with_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits would take 240 and 480 MB; the gradient of the weight and the chunks take 40, rows 0.6 KB each."""
    classes, width = 30_000, 16
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", 5_000_000)
    peaks = []
    for rows in (2048, 4096):
        x, w = (torch.randn(n, width, requires_grad=True) for n in (rows, classes))
        target = torch.randint(classes, (rows,))

        def step(x: Tensor = x, w: Tensor = w, target: Tensor = target) -> None:
            H.linear_cross_entropy(x, w, target).backward()

        step()
        x.grad = w.grad = None
        peaks.append(peak_bytes(step))
    assert 10e6 < peaks[0] < 50e6
    assert peaks[1] - peaks[0] < 2048 * 1000


def test_explain_says_what_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(4, 5, requires_grad=True), torch.randn(40, 5)
    for kept, says in ((40, False), (30, True)):
        monkeypatch.setattr(cross_entropy, "KEPT_BYTES", kept * 4 * 4)
        found = handtuned.explain(lambda: H.linear_cross_entropy(x, w, torch.arange(4)).backward())
        assert ("the logits of 10 of 40 classes are made again" in str(found)) == says


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.cases([cc.EVERYTHING.with_(rows=(4,), in_features=3, classes=5, dtype=F64, reduction=r)
                    for r in ("none", "mean", "sum")])  # fmt: skip
def test_first_and_second_derivatives(kernels: str, case: Case) -> None:
    t = cc.tensors(case)
    named = t.leaves()

    def call(*values: Tensor) -> Tensor:
        return cc.run(case, dict(zip(named, values, strict=True)), t)

    assert gradcheck(call, tuple(named.values()))
    assert gradgradcheck(call, tuple(named.values()), fast_mode=True)


@pytest.mark.cases([cc.EVERYTHING.with_(dtype=BF16)])
def test_gradients_of_some_arguments_only(kernels: str, case: Case) -> None:
    together = everything(case)
    t = cc.tensors(case)
    for wanted in t.leaves():
        leaves = {name: leaf.requires_grad_(name == wanted) for name, leaf in t.leaves().items()}
        cc.run(case, leaves, t).backward(t.grad_loss)
        assert same_bits(leaves[wanted].grad, together[f"grad_{wanted}"])
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_without_gradient_the_same_bits(kernels: str) -> None:
    t = cc.tensors(cc.EVERYTHING)
    with torch.no_grad():
        alone = cc.run(cc.EVERYTHING, t.leaves(), t)
    assert same_bits(alone, everything(cc.EVERYTHING)["loss"])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, w, bias = (torch.randn(*s, requires_grad=True) for s in ((8, 20), (30, 20), (30,)))
    target = torch.randint(30, (8,))
    with torch.autocast("cpu", dtype):
        loss = H.linear_cross_entropy(x, w, target, linear_bias=bias)
        expected = F.cross_entropy(F.linear(x, w, bias), target)
    assert loss.dtype == expected.dtype == F32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-2)
    assert all(g.dtype == F32 for g in torch.autograd.grad(loss, (x, w, bias)))


def test_torch_func_runs_the_formula() -> None:
    x, w, target = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 3])
    with pytest.warns(handtuned.FallbackWarning, match=r"torch\.func"):
        found = torch.func.grad(lambda x: H.linear_cross_entropy(x, w, target))(x)
    expected = torch.func.grad(lambda x: F.cross_entropy(F.linear(x, w), target))(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    torch.compiler.reset()
    case = cc.EVERYTHING.with_(reduction="mean")
    compiled = torch.compile(cc.run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (21, 9):
        t = cc.tensors(case.with_(rows=(rows,)))
        found = []
        for run in (compiled, cc.run):
            leaves = t.leaves()
            found.append(cc.results(run(case, leaves, t), leaves, t))
        assert_same_bits(*found)


# ---- wrong arguments -------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str]] = [
    ("input", torch.ones(4, 6, dtype=torch.int64), r"input is (torch\.)?int64, supported are float32"),
    ("input", torch.ones(4, 7), r"input has shape \[4, 7\], expected \[\*, 6\] beside linear_weight of shape \[5, 6\]"),
    ("linear_weight", torch.ones(5, 6, 1), r"linear_weight has shape \[5, 6, 1\], expected \[classes, in_features\]"),
    ("linear_weight", torch.ones(0, 6), r"linear_weight has shape \[0, 6\], expected .* a class at least"),
    ("linear_weight", torch.ones(5, 6).double(), r"linear_weight is (torch\.)?float64, input is (torch\.)?float32"),
    ("linear_bias", torch.ones(6), r"linear_bias has shape \[6\], expected \[5\]"),
    ("weight", torch.ones(6), r"weight has shape \[6\], expected \[5\]"),
    ("weight", torch.ones(5).half(), r"weight is (torch\.)?float16, input is (torch\.)?float32"),
    ("target", torch.ones(4), r"target is (torch\.)?float32, expected int64"),
    ("target", torch.ones(3, dtype=torch.int64), r"target has shape \[3\], expected \[4\]"),
    ("reduction", 3, r"reduction is 3, the limits are 0 and 2"),
    ("label_smoothing", 1.5, r"label_smoothing is 1\.5, the limits are 0 and 1"),
    ("softcap", -1.0, r"softcap is -1, it must be finite and at least 0"),
    ("z_loss", float("inf"), r"z_loss is inf, it must be finite"),
    ("keep", 6, r"keep is 6, the limits are 0 and 5 for 5 classes"),
    ("kept", torch.ones(4), r"kept has shape \[4\], expected \[rows, classes kept\]"),
    ("kept", torch.ones(3, 5), r"kept has shape \[3, 5\], expected \[4, 5\]"),
    ("kept", torch.ones(4, 6), r"keep is 6, the limits are 0 and 5"),
    ("kept", torch.ones(4, 5).double(), r"kept is (torch\.)?float64, input is (torch\.)?float32"),
    ("grad_loss", torch.ones(4), r"grad_loss has shape \[4\], expected \[\]"),
    ("stats", torch.ones(4), r"stats has shape \[4\], expected \[2, 4\]"),
    (
        "stats",
        torch.ones(2, 4).double(),
        r"stats is (torch\.)?float64, expected (torch\.)?float32 beside (torch\.)?float32",
    ),
]


def wrong_calls() -> list[Any]:
    return [
        pytest.param(name, argument, value, says, id=f"{name}-{argument}-{i}")
        for name, op in ops.CROSS_ENTROPY_OPS.items()
        for i, (argument, value, says) in enumerate(WRONG)
        if argument in {a.name for a in op._schema.arguments}
    ]


def arguments_of(op: str) -> dict[str, Any]:
    right: dict[str, Any] = {"input": torch.ones(4, 6), "linear_weight": torch.ones(5, 6), "grad_loss": torch.ones(())}
    right |= {"target": torch.arange(4), "stats": torch.ones(2, 4), "kept": torch.ones(4, 5), "keep": 5}
    right |= {"reduction": 1, "ignore_index": -100}
    right |= {"label_smoothing": 0.0, "softcap": 0.0, "z_loss": 0.0}
    right |= {"need_input": True, "need_linear_weight": True, "need_linear_bias": False}
    return {a.name: right.get(a.name) for a in ops.CROSS_ENTROPY_OPS[op]._schema.arguments}


@pytest.mark.parametrize(("op", "argument", "value", "says"), wrong_calls())
def test_wrong_arguments(op: str, argument: str, value: Any, says: str) -> None:
    """An error naming op, argument, value, limit and remedy: from the kernel, and the same words from its fake."""
    arguments = arguments_of(op) | {argument: value}
    real = error_of(lambda: ops.CROSS_ENTROPY_OPS[op](**arguments))
    assert real.startswith(f"handtuned.{op}: ")
    assert re.search(says, real), real
    assert "; " in real, f"no remedy: {real}"
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        fake = error_of(lambda: ops.CROSS_ENTROPY_OPS[op](**tensors))
    assert fake.replace("torch.", "") == real


@pytest.mark.parametrize("wrong", [5, -1, 2**62, -(2**62)])
@pytest.mark.parametrize("op", ops.CROSS_ENTROPY_OPS)
def test_a_target_out_of_bounds_is_refused(kernels: str, op: str, wrong: int) -> None:
    arguments = arguments_of(op) | {"target": torch.tensor([0, 1, wrong, -100])}
    call = handtuned.serving.namespace(kernels if kernels == "reference" else "cpu")
    says = error_of(lambda: getattr(call, op)(*arguments.values()))
    assert re.search(rf"target {wrong}.* is out of bounds, the limits are 0 and 4; rows of class -100", says)


def test_wrong_arguments_of_the_function() -> None:
    x, w, target = torch.ones(4, 6), torch.ones(5, 6), torch.arange(4)
    says = error_of(lambda: H.linear_cross_entropy(x, w, target, reduction="max"))
    assert "reduction is 'max', allowed are none, mean, sum" in says
    says = error_of(lambda: H.linear_cross_entropy(x, w, target, weight=torch.ones(5, requires_grad=True)))
    assert "weight requires a gradient" in says


# ---- the module ------------------------------------------------------------------------------------------------------

has_module = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"),
    reason="this torch has no LinearCrossEntropyLoss; it came with 2.13",
)


@has_module
def test_the_twin_is_torchs_module() -> None:
    options: dict[str, Any] = {"bias": True, "label_smoothing": 0.1, "weight": torch.rand(30), "ignore_index": 3}
    torch.manual_seed(1)
    theirs = torch.nn.LinearCrossEntropyLoss(20, 30, **options)
    torch.manual_seed(1)
    ours = handtuned.nn.LinearCrossEntropyLoss(20, 30, **options)
    assert isinstance(ours, torch.nn.LinearCrossEntropyLoss)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, target = torch.randn(9, 20), torch.randint(30, (9,))
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    handtuned.replace(theirs, check=(x, target))
    assert type(theirs) is handtuned.nn.LinearCrossEntropyLoss
    assert "linear_cross_entropy: cpu" in str(handtuned.explain(theirs, x, target))


@has_module
def test_the_module_says_when_it_is_torchs_own_function() -> None:
    module = handtuned.nn.LinearCrossEntropyLoss(5, 6)
    x, probabilities = torch.randn(4, 5), torch.randn(4, 6).softmax(-1)
    with pytest.warns(handtuned.FallbackWarning, match="target holds probabilities"):
        loss = module(x, probabilities)
    torch.testing.assert_close(loss, F.cross_entropy(module.linear(x), probabilities))
    wide = handtuned.nn.LinearCrossEntropyLoss(5, 6, out_features=(2,))
    with pytest.warns(handtuned.FallbackWarning, match="out_features are given"):
        wide(x, torch.randint(6, (4, 2)))
