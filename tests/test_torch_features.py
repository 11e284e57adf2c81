"""What users of torch do to a model: copy, cast, hook, prune, checkpoint and transform it; on all public modules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import compile_subjects as cs
import pytest
import torch
import torch.nn.functional as F
from test_compile import assert_close, result_and_grads
from test_norm_properties import assert_same_bits
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import prune

import handtuned
from handtuned import nn
from handtuned.nn import functional as H

each = pytest.mark.parametrize("name", cs.SUBJECTS)


def drawn(name: str, size: tuple[int, int] = (3, 7)) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    make, draw = cs.SUBJECTS[name]
    return make(), draw(*size)


def called(module: torch.nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    return result_and_grads(module, module, inputs)


# ---- copies ----------------------------------------------------------------------------------------------------------


@each
def test_copies(name: str) -> None:
    """deepcopy, pickle and torch.save, after calls that keep packed weights, each with weights of its own."""
    module, inputs = drawn(name)
    module.eval()
    with torch.no_grad():
        expected = module(*inputs)
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)]
        for found in copies:
            assert torch.equal(found(*inputs), expected)
            for parameter in found.parameters():
                parameter.mul_(1.5)
            assert not list(found.parameters()) or not torch.equal(found(*inputs), expected)
        assert torch.equal(module(*inputs), expected)
        other = cs.SUBJECTS[name][0]().eval()
        other(*inputs)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(*inputs), expected)


@each
def test_meta_device(name: str) -> None:
    """Made without memory, run for its shapes, then filled."""
    with torch.device("meta"):
        module, inputs = drawn(name)
        output = module(*inputs)
    real, inputs = drawn(name)
    assert output.device.type == "meta"
    assert (output.shape, output.dtype) == (real(*inputs).shape, real(*inputs).dtype)


# ---- modes and dtypes ------------------------------------------------------------------------------------------------


@each
def test_inference_mode(name: str) -> None:
    module, inputs = drawn(name)
    module.eval()
    with torch.no_grad():
        expected = module(*inputs)
    with torch.inference_mode():
        assert torch.equal(module(*inputs), expected)
        made, _ = drawn(name)  # of inference tensors
        made.load_state_dict(module.state_dict())
        assert torch.equal(made.eval()(*inputs), expected)


@each
def test_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        if name == "linears":  # int8 weights have no float64
            module, inputs = drawn(name)
            with pytest.raises(RuntimeError, match="float64"):
                module(*inputs)
            return
        module, inputs = drawn(name)
        found = called(module, inputs)
        assert {t.dtype for t in found.values()} == {torch.float64}
        assert module.state_dict().keys() == drawn(name)[0].state_dict().keys()
    finally:
        torch.set_default_dtype(torch.float32)


@each
def test_deterministic_mode(name: str) -> None:
    module, inputs = drawn(name)
    expected = called(module, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_bits(called(module, inputs), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Near the float32 result; gradients in the parameters' own dtype."""
    module, inputs = drawn(name)
    expected = called(module, inputs)
    with torch.autocast("cpu", dtype):
        output = module(*inputs)
    found = called(module, inputs) | {"output": output.float().detach()}
    loss = output.float().square().mean()
    if loss.requires_grad:
        loss.backward()
    for grad in [p.grad for p in module.parameters() if p.grad is not None]:
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
    scale = expected["output"].abs().max()
    assert (found["output"] - expected["output"]).abs().max() < 0.03 * scale


W, B, X = torch.randn(6, 6), torch.randn(6), torch.randn(2, 3, 6)
FLAT = [torch.randn(24, 6), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
TARGET = torch.tensor([[0, 1, 2], [3, 4, 5]])
RULES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "linear": (lambda: H.linear(X, W, B), lambda: F.linear(X, W, B)),
    "attention": (
        lambda: H.scaled_dot_product_attention(X, X, X),
        lambda: F.scaled_dot_product_attention(X, X, X),
    ),
    "layer_norm": (lambda: H.layer_norm(X, (6,), W[0], B), lambda: F.layer_norm(X, (6,), W[0], B)),
    "rms_norm": (lambda: H.rms_norm(X, (6,), W[0]), lambda: F.rms_norm(X, (6,), W[0])),
    "cross_entropy": (
        lambda: H.linear_cross_entropy(X, W, TARGET),
        lambda: F.cross_entropy(F.linear(X, W).flatten(0, 1).float(), TARGET.flatten()),
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_autocast_rule_is_torchs(name: str, dtype: torch.dtype) -> None:
    ours, theirs = RULES[name]
    with torch.autocast("cpu", dtype):
        found, expected = ours(), theirs()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_take_what_autocast_hands_them(dtype: torch.dtype) -> None:
    """A 16-bit activation beside float32 weights, the everyday case behind a linear layer."""
    model = torch.nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 2))
    with torch.autocast("cpu", dtype):
        y = model(X)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


# ---- parametrizations, pruning, hooks, checkpoints -------------------------------------------------------------------


def pairs() -> list[tuple[torch.nn.Module, torch.nn.Module, str, Tensor]]:
    made: list[tuple[Any, Any, str, Tensor]] = [
        (torch.nn.Linear(6, 5), nn.Linear(6, 5), "weight", X),
        (torch.nn.LSTM(6, 5, batch_first=True), nn.LSTM(6, 5, batch_first=True), "weight_hh_l0", X),
        (torch.nn.GRUCell(6, 5), nn.GRUCell(6, 5), "weight_hh", X[0]),
        (torch.nn.LayerNorm(6), nn.LayerNorm(6), "weight", X),
    ]
    for theirs, ours, _, _ in made:
        ours.load_state_dict(theirs.state_dict())
    return made


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("pair", range(4), ids=["Linear", "LSTM", "GRUCell", "LayerNorm"])
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "weight_norm of old", "prune", "global prune"])
def test_weights_that_are_computed(how: str, pair: int) -> None:
    """Values, gradients, and an optimizer's step seen by the next call, as with torch's own module."""
    theirs, ours, weight, x = pairs()[pair]
    if pair == 3 and how != "prune":
        return  # torch's norms of weights want a matrix
    changes: dict[str, Callable[[torch.nn.Module], Any]] = {
        "weight_norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m, weight),
        "spectral_norm": lambda m: torch.nn.utils.parametrizations.spectral_norm(m, weight),
        "weight_norm of old": lambda m: torch.nn.utils.weight_norm(m, weight),
        "prune": lambda m: prune.l1_unstructured(m, weight, amount=0.5),
        "global prune": lambda m: prune.global_unstructured([(m, weight)], prune.L1Unstructured, amount=0.3),
    }
    results = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        changes[how](module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        found = []
        for training in (True, False, True, False):
            module.train(training)
            optimizer.zero_grad()
            y = first(module(x))
            y.square().sum().backward()
            found += [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
            optimizer.step()
            with torch.no_grad():
                found.append(first(module(x)))
        results.append(found)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@each
def test_checkpointing(name: str) -> None:
    """The forward run twice, with dropout, gives the gradients of once."""
    module, inputs = drawn(name)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
        elif hasattr(part, "dropout") and isinstance(part.dropout, float) and not isinstance(part, torch.nn.RNNBase):
            part.dropout = 0.3

    def run(how: Callable[..., Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(2)
        return result_and_grads(module, how, inputs)

    again = run(lambda *x: torch.utils.checkpoint.checkpoint(module, *x, use_reentrant=False))
    assert_same_bits(again, run(module))


@each
def test_hooks(name: str) -> None:
    """Forward and full backward hooks of every submodule that is called are run, and change nothing."""
    module, inputs = drawn(name)
    expected, seen = called(module, inputs), set()
    for key, part in module.named_modules():
        part.register_forward_hook(lambda *_, k=key: seen.add(k))
        part.register_full_backward_hook(lambda *_, k=key: seen.add(f"{k}.backward"))
    assert_close(called(module, inputs), expected)
    assert {"", ".backward"} <= seen


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cs.SUBJECTS.keys() - {"transformer"}))  # made of what the encoder is made of
@pytest.mark.filterwarnings("ignore::handtuned.FallbackWarning")
def test_torch_func(name: str) -> None:
    """grad, jvp and vmap of a functional call run the formula, whose values are the kernels' but for rounding."""
    module, (x, *rest) = drawn(name)
    expected = called(module, (x, *rest))
    weights = dict(module.named_parameters())

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x, *rest))

    incoming = torch.linspace(-1, 1, expected["output"].numel()).view(expected["output"].shape)
    grads, grad_x = torch.func.grad(lambda *a: (run(*a) * incoming).sum(), argnums=(0, 1))(weights, x)
    assert_close({"grad of input": grad_x, **grads}, {k: v for k, v in expected.items() if k != "output"})
    direction = torch.randn_like(x)
    output, tangent = torch.func.jvp(lambda x: run(weights, x), (x,), (direction,))
    torch.testing.assert_close(output, expected["output"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(
        (tangent * incoming).sum(), (expected["grad of input"] * direction).sum(), rtol=1e-3, atol=1e-3
    )
    several = torch.stack([x, x.flip(0), x * 2])
    found = torch.func.vmap(lambda x: run(weights, x))(several)
    torch.testing.assert_close(found, torch.stack([run(weights, x) for x in several]), rtol=1e-4, atol=2e-5)


def test_torch_func_falls_back_aloud() -> None:
    module, inputs = drawn("encoder")
    with handtuned.strict(), pytest.raises(handtuned.FallbackError, match="transform"):
        torch.func.vmap(module, in_dims=(0, None))(inputs[0][None], inputs[1])
