"""The recurrent modules: as torch's, their kept weights, pieces of sequences, autocast, compilers."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from test_norm_properties import assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import handtuned
from handtuned import _C, nn

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]

# ---- as torch's ---

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "bias": False}),
]
KINDS += [("RNN", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {"bias": False}), ("RNNCell", {})]


def call(module: torch.nn.Module, x: Tensor) -> Tensor:
    found = module(x)
    first: Tensor = found[0] if isinstance(found, tuple) else found
    return first


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
def test_modules_are_torchs(isa: str, kind: str, options: dict[str, Any]) -> None:
    """Same weights for the same seed, same state_dict, copies and pickles, class swaps."""
    torch.manual_seed(1)
    theirs = getattr(torch.nn, kind)(4, 6, **options)
    torch.manual_seed(1)
    ours = getattr(nn, kind)(4, 6, **options)
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(5, 4) if kind.endswith("Cell") else torch.randn(3, 5, 4)
    expected = call(theirs, x)
    before = set(vars(ours))
    torch.testing.assert_close(call(ours, x), expected, rtol=1e-5, atol=1e-6)
    assert set(vars(ours)) == before
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stream, weights_only=False)):
        assert type(other) is type(ours)
        assert call(other, x).equal(call(ours, x))
    report = handtuned.replace(theirs)
    assert type(theirs) is type(ours)
    assert call(theirs, x).equal(call(ours, x))
    report.undo()
    torch.testing.assert_close(call(theirs, x), expected)


def changes() -> Iterator[tuple[str, Callable[[nn.LSTM], object]]]:
    """Ways to change the weights that must be noticed."""

    def in_place(m: torch.nn.LSTM) -> None:
        with torch.no_grad():
            m.weight_hh_l0.mul_(2)

    def other_data(m: torch.nn.LSTM) -> None:
        m.weight_hh_l0.data = m.weight_hh_l0.data * 2

    def parameter(m: torch.nn.LSTM) -> None:
        m.weight_hh_l0 = torch.nn.Parameter(m.weight_hh_l0.detach() * 2)

    def loaded(m: torch.nn.LSTM) -> None:
        m.load_state_dict({name: 2 * t for name, t in m.state_dict().items()})

    def step(m: torch.nn.LSTM) -> None:
        m(torch.randn(3, 2, 4))[0].sum().backward()
        torch.optim.SGD(m.parameters(), lr=1.0).step()

    def told(m: nn.LSTM) -> None:
        m.weight_hh_l0.data.mul_(2)
        m.drop_packed()

    def after_a_backward(m: torch.nn.LSTM) -> None:
        m(torch.randn(3, 2, 4))[0].sum().backward()
        m.weight_hh_l0.data.mul_(2)

    return iter([(f.__name__, f) for f in (in_place, other_data, parameter, loaded, step, told, after_a_backward)])


@pytest.mark.parametrize("change", [c for _, c in changes()], ids=[n for n, _ in changes()])
def test_changed_weights_are_noticed(change: Callable[[nn.LSTM], object]) -> None:
    module, x = nn.LSTM(4, 6), torch.randn(3, 2, 4)
    with torch.no_grad():
        module(x)
    change(module)
    fresh = torch.nn.LSTM(4, 6)
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x)[0], fresh(x)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(x)[0], fresh(x)[0], rtol=1e-5, atol=1e-6)


STRAIGHT: list[tuple[str, dict[str, Any]]] = [*KINDS, ("LSTM", {"batch_first": True, "num_layers": 2})]


@pytest.mark.parametrize(
    ("kind", "options"), STRAIGHT, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain"
)
def test_the_straight_way_is_the_general_one(isa: str, kind: str, options: dict[str, Any]) -> None:
    """The same bits, with states and without; what is unusual goes the general way and is told of there."""
    module = getattr(nn, kind)(4, 6, **options)
    cell = kind.endswith("Cell")
    x = torch.randn(3, 4) if cell else torch.randn(1, 3, 4)
    straight = functools.partial(_C.straight_cell if cell else _C.straight_layer, module, module._mode())
    assert straight(x, None) is None  # nothing is packed yet
    with torch.no_grad():
        state = module(x) if cell else module(x)[1]
    for hx in (None, state):
        expected = module(x, hx)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = straight(x, hx)
                assert found is not None
                assert_same_bits(dict(enumerate(tensors_in(found))), dict(enumerate(tensors_in(expected))))
    with torch.no_grad():
        for unusual in (x.double(), x[..., :3], x[0], torch.nn.Parameter(x), torch.nn.utils.rnn.pack_sequence([x])):
            assert straight(unusual, None) is None
        for unusual_state in ((None, None), [state], tuple(t[..., :1] for t in tensors_in(state))):
            assert straight(x, unusual_state) is None
        with torch.overrides.BaseTorchFunctionMode(), FakeTensorMode(allow_non_fake_inputs=True):
            assert straight(x, None) is None
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert straight(x, None) is None
        with torch.autocast("cpu", torch.bfloat16), handtuned.backend("reference"):
            assert straight(x, None) is None
        with handtuned.backend("reference"):
            assert straight(x, None) is None
        functional = torch.func.functional_call(module, {n: p * 2 for n, p in module.named_parameters()}, (x,))
        assert not tensors_in(functional)[0].equal(tensors_in(expected)[0])
        with pytest.raises(RuntimeError, match=f"handtuned.{kind}: input"):
            module(x[..., :3])
    assert straight(x, None) is None  # a gradient is wanted


def tensors_in(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for part in results for t in tensors_in(part)]


def test_weights_are_packed_once() -> None:
    module, x = nn.LSTM(4, 6), torch.randn(1, 2, 4)
    with torch.no_grad():
        _, state = module(x)
        calls = handtuned.explain(module, x, state).calls
        again = handtuned.explain(module, x, state).calls
    assert [c.op for c in calls] == [c.op for c in again] == ["rnn_inference"]
    module.to(torch.bfloat16)
    assert [c.op for c in handtuned.explain(module, x.bfloat16()).calls] == ["rnn_pack", "rnn"]


def test_truncated_sequences_pass_their_states(isa: str) -> None:
    """A sequence in pieces is the sequence; and the cell is a piece of one step."""
    module, x = nn.LSTM(4, 6, 2), torch.randn(7, 3, 4)
    whole, final = module(x)
    state, parts = None, []
    for piece in x.split(2):
        y, state = module(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(state, final)
    single, cell = nn.GRU(4, 6), nn.GRUCell(4, 6)
    cell.load_state_dict({name.removesuffix("_l0"): t for name, t in single.state_dict().items()})
    h = None
    for step in x:
        h = cell(step, h)
    torch.testing.assert_close(h, single(x)[1][0])


def test_autocast(isa: str) -> None:
    module, x = nn.GRU(4, 6), torch.randn(3, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = module(x)
        assert (y.dtype, h.dtype) == (torch.bfloat16, torch.bfloat16)
        y.float().sum().backward()
    assert module.weight_ih_l0.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x)[0], rtol=2e-2, atol=2e-2)


# ---- compile and export ----------------------------------------------------------------------------------------------


@pytest.fixture
def rnn_allowed() -> Iterator[None]:
    """Dynamo refuses every subclass of torch.nn.LSTM, GRU and RNN unless told otherwise."""
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("rnn_allowed")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiled_in_one_graph(kind: str) -> None:
    """Values and gradients, and again for another batch and length without another compilation."""
    module = getattr(nn, kind)(3, 5, 2, bidirectional=True, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 3), (4, 7, 3)):
        x, lengths = torch.randn(shape, requires_grad=True), torch.arange(shape[0])
        for more in ({}, {"lengths": lengths}):
            found, expected = (
                torch.autograd.grad(m(x, **more)[0].sin().sum(), [x, *module.parameters()]) for m in (compiled, module)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_exported_as_one_node(kind: str) -> None:
    module = getattr(nn, kind)(3, 5, 2, batch_first=True).eval()
    batch, steps = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("steps", min=2, max=512)
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(3, 4, 3),), dynamic_shapes=({0: batch, 1: steps},))
        names = [str(node.target) for node in program.graph.nodes if "handtuned" in str(node.target)]
        assert names == ["handtuned.rnn_pack.default", "handtuned.rnn_inference.default"]
        x = torch.randn(5, 9, 3)
        torch.testing.assert_close(program.module()(x), module(x))
