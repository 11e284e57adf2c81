"""Derivatives of the four functions: first to third, partial, tied, in torch.func and in odd uses of autograd."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import handtuned
from handtuned import FallbackError, FallbackWarning
from handtuned.nn import functional as H

pytestmark = pytest.mark.usefixtures("poison")
FORMS = [*cases.FORMS, *cases.DROPOUTS]
SMALL = [form.with_(shape=(3, 7), dtype=torch.float64) for form in FORMS]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def function_of(case: cases.Case, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The case as a function of the named tensors; dropout always with the same mask."""

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return cases.run(case, dict(zip(names, values, strict=True)))

    return call


def arguments(case: cases.Case) -> dict[str, Tensor]:
    return cases.tensors(case).leaves()


# ---- finite differences --------------------------------------------------------------------------------------------


@pytest.mark.cases(SMALL + [c.with_(affine="none") for c in SMALL] + [SMALL[0].with_(affine="bias")], triton=SMALL)
def test_first_and_second_derivatives(kernels: str, case: cases.Case) -> None:
    """Every input's derivative, and that derivative's own, against finite differences in float64."""
    named = arguments(case)
    function, values = function_of(case, list(named)), tuple(named.values())
    fast = kernels == "triton"  # its interpreter takes milliseconds a call: one random direction instead of all
    assert gradcheck(function, values, fast_mode=fast)
    assert gradgradcheck(function, values, fast_mode=kernels != "generic")


@pytest.mark.cases([c.with_(shape=(2, 3, 4), normalized_ndim=2) for c in SMALL])
def test_derivatives_over_two_normalised_dims(isa: str, case: cases.Case) -> None:
    named = arguments(case)
    function, values = function_of(case, list(named)), tuple(named.values())
    assert gradcheck(function, values)
    assert gradgradcheck(function, values, fast_mode=True)


@pytest.mark.cases(SMALL, triton=SMALL[:2])
def test_input_that_depends_on_the_weight(kernels: str, case: cases.Case) -> None:
    """Partial derivatives must not leak into each other when one argument is made of another."""
    named = arguments(case)
    x, w = named.pop("input"), named.pop("weight")
    rest = {name: t.detach() for name, t in named.items()}

    def tied(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return cases.run(case, {"input": x * w.sin(), "weight": w, **rest})

    assert gradcheck(tied, (x, w), fast_mode=kernels == "triton")
    assert gradgradcheck(tied, (x, w), fast_mode=True)


@pytest.mark.cases(SMALL)
def test_third_derivative(isa: str, case: cases.Case) -> None:
    """The first derivative as a function, whose own second derivative is taken. (torch's layer_norm fails this.)"""
    named = arguments(case)
    function = function_of(case, list(named))

    def first(*values: Tensor) -> tuple[Tensor, ...]:
        return grad(sum(o.pow(3).sum() for o in function(*values)), values, create_graph=True)

    assert gradgradcheck(first, tuple(named.values()), fast_mode=True, atol=1e-3, rtol=1e-3)


# ---- which gradients are wanted ------------------------------------------------------------------------------------


@pytest.mark.cases([form.with_(shape=(5, 33)) for form in FORMS])
def test_gradients_of_some_arguments_only(kernels: str, case: cases.Case) -> None:
    """Each alone is what it is among all, but for rounding, and the others get none."""
    t = cases.tensors(case)

    def grads(wanted: list[str]) -> dict[str, Tensor | None]:
        leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in t.leaves().items()}
        torch.manual_seed(3)
        outputs = cases.run(case, leaves)
        pairs = zip(outputs, (t.grad_output, t.grad_new_residual), strict=False)
        used = [(o, g) for o, g in pairs if o.requires_grad]  # new_residual does not depend on the weight
        torch.autograd.backward([o for o, _ in used], [g for _, g in used])
        return {name: leaf.grad for name, leaf in leaves.items()}

    names = list(t.leaves())
    together = grads(names)
    for name in names:
        alone = grads([name])
        value, want = alone.pop(name), together[name]
        assert (value - want).abs().max() <= 4 * torch.finfo(want.dtype).eps * want.abs().max(), name
        assert all(value is None for value in alone.values())


@pytest.mark.parametrize("used", [0, 1], ids=["output_only", "new_residual_only"])
@pytest.mark.cases([form.with_(shape=(5, 33)) for form in FORMS if form.add])
def test_one_result_used(kernels: str, case: cases.Case, used: int) -> None:
    t = cases.tensors(case)
    leaves = t.leaves()
    torch.manual_seed(3)
    outputs = cases.run(case, leaves)
    factor = (outputs[1] - t.residual).abs() > 1e-6 if case.dropout else None
    keep = None if factor is None else factor.to(case.dtype) / (1 - case.dropout)
    expected = cases.run_torch(case, leaves, torch.ones(()) if keep is None else keep)
    actual, want = (
        grad(o[used], list(leaves.values()), t.grad_output, allow_unused=True, materialize_grads=True)
        for o in (outputs, expected)
    )
    torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)


@pytest.mark.cases([form.with_(shape=(5, 33)) for form in FORMS])
def test_retain_graph_and_accumulation(kernels: str, case: cases.Case) -> None:
    t = cases.tensors(case)
    leaves = t.leaves()
    outputs = cases.run(case, leaves)
    incoming = [t.grad_output, t.grad_new_residual][: len(outputs)]
    torch.autograd.backward(outputs, incoming, retain_graph=True)
    once = {name: v.grad.clone() for name, v in leaves.items()}
    torch.autograd.backward(outputs, incoming)
    for name, v in leaves.items():
        assert v.grad.equal(2 * once[name]), name
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(outputs, incoming)


@pytest.mark.cases([form.with_(shape=(4, 6, 33)) for form in FORMS])
def test_expanded_incoming_gradient(kernels: str, case: cases.Case) -> None:
    """sum().backward() sends one number with strides 0, transpose().sum(0) a permuted one."""
    t = cases.tensors(case)

    def grads(seen: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = t.leaves()
        torch.manual_seed(3)
        return grad(seen(cases.run(case, leaves)[0]), list(leaves.values()))

    for spread, dense in (
        (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()),
        (lambda y: y.transpose(0, 1)[..., 1:].sum(), lambda y: (y * (torch.arange(33) > 0)).sum()),
    ):
        for a, b in zip(grads(spread), grads(dense), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_graph_where_none_is_wanted(isa: str) -> None:
    x, w = leaf(3, 5, dtype=torch.float32), leaf(5, dtype=torch.float32)
    with torch.no_grad():
        assert H.layer_norm(x, (5,), w).grad_fn is None
    with torch.inference_mode():
        assert H.rms_norm(x, (5,), w).is_inference()
    assert not H.layer_norm(x.detach(), (5,), w.detach()).requires_grad
    assert H.layer_norm(x, (5,), w).requires_grad


def test_an_argument_changed_in_place_is_noticed(isa: str) -> None:
    x, w = leaf(3, 5, dtype=torch.float32), leaf(5, dtype=torch.float32)
    y = H.layer_norm(x, (5,), w)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_and_anomaly_mode(isa: str) -> None:
    x, w = leaf(6, 33, dtype=torch.float32), leaf(33, dtype=torch.float32)

    def block(x: Tensor) -> Tensor:
        return H.add_rms_norm(x, x, (33,), w, dropout_p=0.5)[0].square()

    torch.manual_seed(3)
    expected = grad(block(x).sum(), (x, w))
    torch.manual_seed(3)
    with torch.autograd.detect_anomaly(check_nan=True):
        actual = grad(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum(), (x, w))
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


# ---- torch.func ----------------------------------------------------------------------------------------------------


def loss_of(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: function(x, (5,), w).pow(3).sum()


PAIRS = [(H.layer_norm, F.layer_norm), (H.rms_norm, F.rms_norm)]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["layer_norm", "rms_norm"])
def test_torch_func_gives_torchs_values_and_says_so(ours: Callable[..., Tensor], torchs: Callable[..., Tensor]) -> None:
    x, w = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    eps = {"eps": 1e-5}
    loss, expected = loss_of(lambda *a: ours(*a, **eps)), loss_of(lambda *a: torchs(*a, **eps))
    transforms: dict[str, Callable[..., object]] = {
        "grad": lambda f: torch.func.grad(f, argnums=(0, 1))(x, w),
        "hessian": lambda f: torch.func.hessian(f)(x, w),
        "jvp": lambda f: torch.func.jvp(f, (x, w), (w.expand(4, 5), x[0])),
        "vmap": lambda f: torch.func.vmap(f, in_dims=(0, None))(x, w),
        "grad_of_samples": lambda f: torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None))(x, w),
    }
    for name, transform in transforms.items():
        handtuned.backends._warned.clear()
        with pytest.warns(FallbackWarning, match=r"torch\.func transform"):
            actual = transform(loss)
        torch.testing.assert_close(actual, transform(expected), msg=lambda m, name=name: f"{name}: {m}")
        with handtuned.strict(), pytest.raises(FallbackError, match=r"torch\.func transform"):
            transform(loss)


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_torch_func_of_the_add_forms(name: str) -> None:
    x, r = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    plain = getattr(H, name.removeprefix("add_"))

    def ours(x: Tensor) -> Tensor:
        return getattr(H, name)(x, r, (5,), eps=1e-5)[0].pow(3).sum()

    def expected(x: Tensor) -> Tensor:
        return plain(x + r, (5,), eps=1e-5).pow(3).sum()

    leaf_x = x.clone().requires_grad_()
    with pytest.warns(FallbackWarning):
        actual = torch.func.grad(ours)(x)
    torch.testing.assert_close(actual, grad(expected(leaf_x), leaf_x)[0])


def test_forward_mode_without_torch_func() -> None:
    """Dual numbers get the formula's tangent, and a warning that no kernel served; never a tangent lost in silence."""
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        want = torch.autograd.forward_ad.unpack_dual(F.layer_norm(dual, (5,))).tangent
        with pytest.warns(handtuned.FallbackWarning, match="forward-mode AD"):
            actual = torch.autograd.forward_ad.unpack_dual(H.layer_norm(dual, (5,))).tangent
    assert actual is not None
    torch.testing.assert_close(actual, want)
