"""replace(): which modules become twins, what stays untouched, what the check finds; and the twins as modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import handtuned
from handtuned.nn import functional as H


class CustomLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class T5LayerNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """Two norms, one of them under two names, around linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.first = nn.LayerNorm(8)
        self.second = nn.RMSNorm(8, eps=1e-6)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.linear(self.first(x))))


@pytest.fixture
def model() -> Model:
    model = Model()
    for p in model.parameters():
        nn.init.normal_(p)
    return model


X = torch.linspace(-2, 3, 40).reshape(5, 8)
TWINS = {"linear": handtuned.nn.Linear, "first": handtuned.nn.LayerNorm, "second": handtuned.nn.RMSNorm}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- what is replaced ------------------------------------------------------------------------------------------------


def test_exact_types_become_twins_in_place(model: Model) -> None:
    expected, modules, parameters = model(X), dict(model.named_modules()), dict(model.named_parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    report = handtuned.replace(model)
    assert {row.name: row.after for row in report.replaced} == TWINS
    assert {row.name: row.before for row in report.replaced} == {
        "linear": nn.Linear,
        "first": nn.LayerNorm,
        "second": nn.RMSNorm,
    }
    assert not report.left
    assert {name: type(getattr(model, name)) for name in TWINS} == TWINS
    assert all(m is modules[name] for name, m in model.named_modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(t.equal(state[name]) for name, t in model.state_dict().items())
    assert model.again is model.first
    assert isinstance(model.first, nn.LayerNorm)
    close(model(X), expected)
    calls = [c.op.removesuffix("_inference") for c in handtuned.explain(model, X).calls]
    assert calls == ["layer_norm", "linear", "rms_norm", "layer_norm"]


def test_what_is_left_is_named_with_its_reason() -> None:
    parametrized = nn.utils.parametrizations.weight_norm(nn.LayerNorm(8))
    patched = nn.RMSNorm(8)
    patched.forward = lambda x: x + 1  # type: ignore[method-assign]
    named = {"custom": CustomLayerNorm(8), "parametrized": parametrized, "patched": patched, "foreign": T5LayerNorm()}
    model = nn.ModuleDict(named | {"plain": nn.LayerNorm(8), "other": nn.Conv1d(8, 8, 1), "batch": nn.BatchNorm1d(8)})
    before = {name: type(m) for name, m in model.items()}
    report = handtuned.replace(model)
    left = {row.name: row.why for row in report.left}
    assert set(left) == {"custom", "parametrized", "patched", "foreign"}
    assert "subclass of torch.nn.LayerNorm" in left["custom"]
    assert "subclass" in left["parametrized"]
    assert "forward was replaced" in left["patched"]
    assert "no twin" in left["foreign"]
    assert {name: type(m) for name, m in model.items() if name != "plain"} == {
        name: kind for name, kind in before.items() if name != "plain"
    }
    assert [(row.name, row.type) for row in report.torchs] == [("other", "Conv1d")]
    text = str(report)
    assert "no convolutions" in text
    for name, why in left.items():
        assert name in text
        assert " ".join(why.split()[:2]) in text


def test_a_module_with_parameters_no_kernel_reads_is_left() -> None:
    report = handtuned.replace(nn.Sequential(nn.LayerNorm(8, dtype=torch.complex64, bias=False)))
    assert not report.replaced
    assert "complex64" in report.left[0].why


def test_strict_replaces_nothing_when_something_is_left() -> None:
    model = nn.Sequential(nn.LayerNorm(8), CustomLayerNorm(8))
    with pytest.raises(ValueError, match=r"1 \(CustomLayerNorm\).*subclass.*strict=False"):
        handtuned.replace(model, strict=True)
    assert type(model[0]) is nn.LayerNorm
    assert len(handtuned.replace(nn.Sequential(nn.LayerNorm(8)), strict=True).replaced) == 1


def test_second_replace_does_nothing(model: Model) -> None:
    handtuned.replace(model)
    again = handtuned.replace(model, check=X)
    assert not again.replaced
    assert not again.left  # twins are no news
    again.undo()
    assert type(model.first) is handtuned.nn.LayerNorm


def test_undo_and_redo(model: Model) -> None:
    expected = model(X)
    report = handtuned.replace(model)
    report.undo()
    assert type(model.first) is nn.LayerNorm
    assert type(model.second) is nn.RMSNorm
    assert model(X).equal(expected)
    report.redo()
    assert type(model.first) is handtuned.nn.LayerNorm


def test_the_model_may_itself_be_a_norm() -> None:
    norm = nn.LayerNorm(8)
    report = handtuned.replace(norm)
    assert type(norm) is handtuned.nn.LayerNorm
    assert [row.name for row in report.replaced] == ["(model)"]


# ---- check -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [X, (X,), {"x": X}], ids=["tensor", "tuple", "dict"])
def test_check_passes_and_compares_everything(model: Model, check: object) -> None:
    report = handtuned.replace(model, check=check)
    compared = {d.tensor for d in report.differences}
    assert compared == {"output"} | {f"grad of {name}" for name, _ in model.named_parameters()}
    assert all(d.ok and 0 <= d.largest <= d.allowed for d in report.differences)


def planted_forward(x: Tensor, *args: object) -> Tensor:
    y = torch.nn.functional.rms_norm(x, *args)  # type: ignore[arg-type]
    return y + 1e-3 * y.square()  # a mere factor would be normalised away by the LayerNorm behind it


class PlantedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.001


def planted_gradient(x: Tensor, *args: object) -> Tensor:
    result: Tensor = PlantedGradient.apply(torch.nn.functional.rms_norm(x, *args))  # type: ignore[arg-type]
    return result


def planted_nan(x: Tensor, *args: object) -> Tensor:
    return torch.nn.functional.rms_norm(x, *args) * float("nan")  # type: ignore[arg-type]


@pytest.mark.parametrize("planted", [planted_forward, planted_gradient, planted_nan])
def test_check_catches_a_difference_and_puts_the_model_back(
    model: Model, planted: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(H, "rms_norm", planted)
    with pytest.raises(AssertionError, match=r"differs by .*allowed .*undo"):
        handtuned.replace(model, check=X)
    assert type(model.first) is nn.LayerNorm
    report = handtuned.replace(model)
    with pytest.raises(AssertionError, match="differs by"):
        report.check(X)
    assert any(not d.ok for d in report.differences)


def test_check_leaves_random_state_and_gradients_alone(model: Model) -> None:
    model(X).sum().backward()
    grads = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 5
    model.linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    handtuned.replace(nn.Sequential(nn.Dropout(0.5), model), check=X)
    assert torch.get_rng_state().equal(state)
    for name, p in model.named_parameters():
        kept, value = grads[name]
        assert p.grad is kept
        assert kept.equal(value)


def test_a_failing_model_is_put_back(model: Model) -> None:
    with pytest.raises(RuntimeError):
        handtuned.replace(model, check=torch.ones(3, 3))
    assert type(model.first) is nn.LayerNorm


# ---- what surrounds a model ------------------------------------------------------------------------------------------


def test_hooks_and_optimizer_stay(model: Model) -> None:
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("forward"))
    model.second.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.first.weight.register_hook(lambda _: seen.append("grad"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.first.weight.detach().clone()
    handtuned.replace(model)
    model(X).square().sum().backward()
    optimizer.step()
    assert seen.count("forward") == 2
    assert {"pre", "grad"} <= set(seen)
    assert not model.first.weight.equal(before)


def test_deepcopy_pickle_and_save(model: Model) -> None:
    handtuned.replace(model)
    expected = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(twin.first) is handtuned.nn.LayerNorm
        assert twin.first is not model.first
        assert twin.again is twin.first
        assert twin(X).equal(expected)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    close(plain(X), expected)
    model.load_state_dict(plain.state_dict())


def test_a_report_can_be_copied_with_its_model(model: Model) -> None:
    report = copy.deepcopy(handtuned.replace(model))
    report.undo()
    assert type(report.model.get_submodule("first")) is nn.LayerNorm
    assert type(model.first) is handtuned.nn.LayerNorm


def test_before_torch_compile(model: Model) -> None:
    expected = model(X)
    handtuned.replace(model)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected)


def test_after_torch_compile(model: Model) -> None:
    """Also where the compiled model has already run: it is compiled again with the twins."""
    torch.compiler.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append("".join(m.code for m in graph.modules() if isinstance(m, torch.fx.GraphModule)))
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    expected = compiled(X)
    report = handtuned.replace(compiled)
    assert len(report.replaced) == 3
    close(compiled(X), expected)
    assert "handtuned" in graphs[-1]
    assert "handtuned" not in graphs[0]
    report.undo()
    assert compiled(X).equal(expected)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["before", "after"])
def test_distributed_data_parallel(model: Model, order: str) -> None:
    plain = copy.deepcopy(model)
    plain(X).square().sum().backward()
    if order == "before":
        handtuned.replace(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if order == "after":
        assert len(handtuned.replace(wrapped, check=X).replaced) == 3
    wrapped(X).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_under_autocast(model: Model) -> None:
    """autocast runs the linear in bfloat16; torch's norms then compute in float32 or bfloat16, and so do the twins."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(X)
        handtuned.replace(model)
        actual = model(X)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


# ---- the twins as modules --------------------------------------------------------------------------------------------

CONSTRUCTORS = [
    (nn.LayerNorm, handtuned.nn.LayerNorm, {}),
    (nn.LayerNorm, handtuned.nn.LayerNorm, {"eps": 1e-3, "bias": False}),
    (nn.LayerNorm, handtuned.nn.LayerNorm, {"elementwise_affine": False}),
    (nn.LayerNorm, handtuned.nn.LayerNorm, {"device": "meta", "dtype": torch.bfloat16}),
    (nn.RMSNorm, handtuned.nn.RMSNorm, {}),
    (nn.RMSNorm, handtuned.nn.RMSNorm, {"eps": 1e-3}),
    (nn.RMSNorm, handtuned.nn.RMSNorm, {"elementwise_affine": False, "dtype": torch.float64}),
    (nn.LayerNorm, handtuned.nn.AddLayerNorm, {"dtype": torch.float16}),
    (nn.RMSNorm, handtuned.nn.AddRMSNorm, {"device": "meta"}),
]


@pytest.mark.parametrize(("theirs", "ours", "options"), CONSTRUCTORS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("shape", [8, (2, 4), [8]], ids=str)
def test_constructors(
    theirs: type[nn.Module], ours: type[nn.Module], options: dict[str, object], shape: object
) -> None:
    torch.manual_seed(5)
    a = theirs(shape, **options)
    torch.manual_seed(5)
    b = ours(shape, **options)
    assert isinstance(b, theirs)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p.shape, p.dtype, p.device) == (q.shape, q.dtype, q.device)
        assert p.is_meta or p.equal(q)
    assert a.eps == b.eps
    assert a.extra_repr() in b.extra_repr()
    if options.get("device") == "meta":
        x = torch.ones(3, 8, device="meta", dtype=next(b.parameters()).dtype).reshape(3, *b.normalized_shape)
        outputs = b(x, x) if "Add" in ours.__name__ else (b(x),)
        assert all(o.is_meta and o.shape == x.shape for o in outputs)


@pytest.mark.parametrize("kind", [handtuned.nn.AddLayerNorm, handtuned.nn.AddRMSNorm])
def test_add_modules_drop_only_while_training(kind: type[nn.Module]) -> None:
    module, residual = kind(8, dropout=0.5), X.flip(0)
    assert "dropout=0.5" in repr(module)
    module.eval()
    assert module(X, residual)[1].equal(X + residual)
    module.train()
    torch.manual_seed(1)
    first = module(X, residual)
    torch.manual_seed(1)
    assert all(a.equal(b) for a, b in zip(first, module(X, residual), strict=True))
    assert not first[1].equal(module(X, residual)[1])
    with pytest.raises(ValueError, match=r"dropout is 1\.5, the limits are 0 and 1"):
        kind(8, dropout=1.5)


def test_rms_norm_with_eps_none_has_torchs_default() -> None:
    x = X * 1e-4
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a, b = nn.RMSNorm(8, dtype=dtype), handtuned.nn.RMSNorm(8, dtype=dtype)
        assert b.eps is None
        torch.testing.assert_close(b(x.to(dtype)), a(x.to(dtype)))
