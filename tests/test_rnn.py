"""The recurrent family against float64 and torch's own error, on every set of kernels; bad input; torch's samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numerics
import pytest
import rnn_cases as rc
import torch
from rnn_cases import CASES, FORMS, Case
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing._internal.common_modules import module_db

import handtuned
from handtuned import nn, ops
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _formula_on_one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever runs torch's small operators."""
    alone = "kernels" not in request.fixturenames or request.getfixturevalue("kernels") == "reference"
    with rc.one_thread() if alone else nullcontext():
        yield


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_formula_is_torchs(case: Case) -> None:
    """What the others are held against, in float64: outputs and every gradient."""
    t = rc.tensors(case.with_(dtype=torch.float64))
    found, expected = (rc.results(case, t, how) for how in (rc.run_formula, rc.run_torch))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12, equal_nan=True)


_drawn: dict[tuple[Case, int], tuple[rc.Tensors, dict[str, Tensor], dict[str, Tensor]]] = {}


def drawn(case: Case, draw: int) -> tuple[rc.Tensors, dict[str, Tensor], dict[str, Tensor]]:
    """Tensors, torch's results and the truth; those of the last case are remembered, for the next kernels."""
    if (case, draw) not in _drawn:
        if any(case != other for other, _ in _drawn):
            _drawn.clear()
        t = rc.tensors(case, draw)
        with rc.one_thread():
            _drawn[case, draw] = (t, rc.results(case, t, rc.run_torch), rc.exact(case, t))
    return _drawn[case, draw]


def check_contract(case: Case) -> None:
    """No output's or gradient's error exceeds 1.5 times torch's own, on the kernels in force."""
    errors: dict[str, numerics.Errors] = {}
    for draw in range(
        8 if case.elements < 100_000 else 1
    ):  # tensors are small: the largest error of one is a matter of luck
        t, torchs, truth = drawn(case, draw)
        ours = rc.results(case, t)
        assert ours.keys() == torchs.keys() == truth.keys()
        for name, tensor in ours.items():
            same = torchs[name]
            assert (tensor.shape, tensor.dtype) == (same.shape, same.dtype), name
            numerics.check_same_non_finite(name, tensor, same)
            # float64 has no wider reference here: its errors and the reference's own are of one size
            slack = 16 * torch.finfo(torch.float64).eps if case.dtype == torch.float64 else 0.0
            entry = errors.setdefault(name, numerics.Errors(torch.finfo(tensor.dtype).eps, slack))
            entry.add(tensor, same, truth[name].numpy())
    excess = {name: text for name, entry in errors.items() if (text := entry.excess())}
    assert not excess, f"{case.name}: {excess}"


@pytest.mark.cases(CASES)
def test_contract(kernels: str, case: Case) -> None:
    check_contract(case)


@pytest.mark.cases([case.with_(dtype=dtype) for case in FORMS for dtype in (torch.float32, torch.bfloat16)])
def test_inference_gives_the_same_bits(kernels: str, case: Case) -> None:
    t = rc.tensors(case)
    outputs = rc.run(case, t.with_leaves(t.leaves()))
    with torch.no_grad():
        for a, b in zip(rc.run(case, t), outputs, strict=True):
            assert a.equal(b.detach())


@pytest.mark.cases([FORMS[0], FORMS[3], FORMS[6], *(form for form in FORMS[8:] if form.layers == 2)])
def test_each_gradient_alone(kernels: str, case: Case) -> None:
    """A gradient does not depend on which others are wanted, nor on whether the others' outputs are used."""
    t = rc.tensors(case)
    together = rc.results(case, t)
    for name in t.leaves():
        leaves = {n: leaf.detach().requires_grad_(n == name) for n, leaf in t.leaves().items()}
        outputs = rc.run(case, t.with_leaves(leaves))
        (alone,) = torch.autograd.grad(outputs, leaves[name], t.grads(case))
        torch.testing.assert_close(alone, together[f"grad_{name}"], rtol=1e-5, atol=1e-5)
    for used in range(2 + (case.mode == "LSTM")):
        leaves = t.leaves()
        with rc.one_thread():
            found, expected = (
                torch.autograd.grad(
                    how(case, t.with_leaves(leaves))[used].nansum(), list(leaves.values()), materialize_grads=True
                )
                for how in (rc.run, rc.run_formula)
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cases([case for case in FORMS if case.layers == 2])
def test_dropout_is_the_references(kernels: str, case: Case) -> None:
    case = case.with_(dropout=0.4)
    t = rc.tensors(case)
    torch.manual_seed(5)
    found = rc.results(case, t)
    torch.manual_seed(5)
    expected = rc.exact(case, t)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=1e-5, equal_nan=True)
    state = torch.get_rng_state()
    rc.run(case.with_(dropout=0.0), t)
    assert torch.get_rng_state().equal(state)


# ---- torch's own samples ---------------------------------------------------------------------------------------------

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
SAMPLED = [info for info in module_db if info.module_cls.__name__ in NAMES]


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, Tensor) else [t for item in found for t in flat(item)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("info", SAMPLED, ids=lambda info: info.module_cls.__name__)
def test_torchs_samples(kernels: str, info: Any, training: bool) -> None:
    """Every sample that torch tests its modules with: values and gradients."""
    samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=training)
    assert samples
    for sample in samples:
        constructor, given = sample.constructor_input, sample.forward_input
        theirs = info.module_cls(*constructor.args, **constructor.kwargs).train(training)
        ours = getattr(nn, info.module_cls.__name__)(*constructor.args, **constructor.kwargs).train(training)
        ours.load_state_dict(theirs.state_dict())
        leaves = [t for t in flat(given.args) if t.requires_grad]
        pair = []
        for module in (ours, theirs):
            outputs = flat(module(*given.args, **given.kwargs))
            loss = sum((o.sin().sum() for o in outputs), torch.zeros(()))
            pair.append([*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


def weights(mode: str = "LSTM", hidden: int = 4, width: int = 3) -> list[Tensor]:
    return list(rc.tensors(Case(mode, (1, 1, width, hidden))).weights)


X = torch.randn(5, 2, 3)
W = weights()
BAD: list[tuple[str, Any, str]] = [
    ("width", lambda: H.lstm(torch.randn(5, 2, 4), None, W), "input has shape [5, 2, 4], expected input_size 3"),
    ("dims", lambda: H.lstm(torch.randn(3), None, W), "input has 1 dims, expected 3, or 2 without a batch"),
    ("dtype", lambda: H.lstm(X.double(), None, W), "input is torch.float64, the weights are torch.float32"),
    ("integers", lambda: H.lstm(X.int(), None, [w.int() for w in W]), "supported are float32, float64"),
    ("count", lambda: H.lstm(X, None, W, num_layers=2), "weights has 4 tensors, expected 8 for num_layers 2"),
    ("hx", lambda: H.lstm(X, torch.zeros(1, 2, 4), W), "hx is a Tensor, expected a tuple of two tensors, (h, c)"),
    ("hx of gru", lambda: H.gru(X, (X, X), weights("GRU")), "hx is a tuple, expected a tensor"),
    ("h0", lambda: H.gru(X, torch.zeros(1, 3, 4), weights("GRU")), "h0 has shape [1, 3, 4], expected [1, 2, 4]"),
    ("h0 dims", lambda: H.gru(X, torch.zeros(2, 4), weights("GRU")), "h0 has 2 dims, input has 3"),
    ("h0 dtype", lambda: H.gru(X, torch.zeros(1, 2, 4).double(), weights("GRU")), "expected"),
    ("lengths", lambda: H.lstm(X, None, W, lengths=[1, 2, 3]), "lengths has shape [3], expected [2]"),
    ("too long", lambda: H.lstm(X, None, W, lengths=[1, 6]), "lengths"),
    ("negative", lambda: H.lstm(X, None, W, lengths=[1, -1]), "lengths"),
    ("unbatched", lambda: H.lstm(X[:, 0], None, W, lengths=[5]), "lengths is given but input has 2 dims"),
    ("both", lambda: H.lstm(pack_sequence([X[:, 0]]), None, W, lengths=[5]), "lengths is given beside a PackedSeq"),
    ("dropout", lambda: H.lstm(X, None, 2 * W, num_layers=2, dropout=1.5), "dropout_p is 1.5, the limits are 0 and 1"),
    ("nonlinearity", lambda: H.rnn(X, None, weights("RNN_TANH"), nonlinearity="elu"), "nonlinearity is 'elu'"),
    ("cell dims", lambda: H.lstm_cell(X, None, *W), "input has 3 dims, expected 2, or 1 without a batch"),
    ("cell state", lambda: H.gru_cell(X[0], torch.zeros(4), *weights("GRU")), "h has 1 dims, input has 2"),
]


@pytest.mark.parametrize(
    ("backend", "call", "words"),
    [
        pytest.param(backend, call, words, id=f"{backend}-{name}")
        for backend in ("auto", "reference")
        for name, call, words in BAD
        if (backend, words) != ("reference", "lengths")  # only the kernels read the numbers in lengths
    ],
)
def test_bad_input_is_named(backend: str, call: Any, words: str) -> None:
    with handtuned.backend(backend), pytest.raises(RuntimeError, match=re.escape(words)):
        call()


def test_packed_weights_of_another_instruction_set_are_refused(isa: str) -> None:
    weights = [torch.ones(80, 8), torch.ones(80, 20), torch.ones(80), torch.ones(80)]
    packed = ops.rnn_pack(weights, "LSTM", False, True, 0.0, None)
    for row in handtuned._C.isa_table():
        if not (row["built"] and row["supported"]):
            continue
        with handtuned.testing.isa(row["name"]):
            args = (
                torch.ones(3, 2, 8),
                None,
                None,
                None,
                packed,
                "LSTM",
                20,
                0,
                1,
                False,
                0.0,
                None,
                None,
                False,
                False,
            )
            same = row["vector_bits"] == next(r["vector_bits"] for r in handtuned._C.isa_table() if r["name"] == isa)
            with nullcontext() if same else pytest.raises(RuntimeError, match="another instruction set"):
                ops.rnn(*args)


def test_no_weights_are_refused() -> None:
    with pytest.raises(RuntimeError, match="weights has 0 tensors, expected 1 layer's or more; pass torch's flat"):
        H.pack_rnn_weights("LSTM", [])


def test_packed_weights_of_another_size_are_refused() -> None:
    packed = ops.rnn_pack(weights(hidden=4, width=3), "LSTM", False, True, 0.0, None)
    args = (None, None, None, packed, "LSTM", 8, 0, 1, False, 0.0, None, None, False, False)
    with pytest.raises(RuntimeError, match="pass what rnn_pack made"):
        ops.rnn(X, *args)
