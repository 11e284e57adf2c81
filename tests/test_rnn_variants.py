"""The recurrent layers' variants: every pair of options against float64, what masks are."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rnn_cases as rc
import torch
import torch._dynamo
from rnn_cases import Case
from test_norm_properties import assert_same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import handtuned
from handtuned import nn
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]

# ---- every pair ------------------------------------------------------------------------------------------------------

OF_THE_LSTM = {"coupled_gates": True, "peepholes": True, "cell_zoneout": 0.3, "return_cell_states": True}
OF_ALL = {"zoneout": 0.4, "recurrent_dropout": 0.3, "weight_dropout": 0.2, "layer_norm": True}
RAGGED = (4, 6, 0, 1, 6)
FORMS: dict[str, Any] = {"layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "states": True}
FORMS |= {"lengths": RAGGED, "packed": True, "dropout": 0.3, "training": False}


def factors(mode: str) -> dict[str, Any]:
    """All that can be switched on, and how."""
    if mode == "LSTM":
        return {**rc.ACTIVATIONS, **OF_THE_LSTM, **OF_ALL, **FORMS, "proj": 5}
    if mode == "RNN_RELU":
        return OF_ALL | FORMS
    return (rc.ACTIVATIONS if mode == "GRU" else {"activation": "hardtanh"}) | OF_ALL | FORMS


def every_pair(mode: str) -> Iterator[Case]:
    """Few cases in which each two factors are seen both on, both off, and either alone."""
    given = factors(mode)
    wanted = {
        ((a, x), (b, y)) for a, b in itertools.combinations(given, 2) for x in (False, True) for y in (False, True)
    }
    generator = torch.Generator().manual_seed(1)
    while wanted:
        best: set[Any] = set()
        for _ in range(40):
            flags = [bool(f) for f in torch.randint(2, (len(given),), generator=generator)]
            row = dict(zip(given, flags, strict=True))
            if row["packed"] and not row["lengths"]:
                continue
            seen = {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(given, 2)} & wanted
            if len(seen) > len(best):
                best, chosen = seen, row
        if not best:  # all that are left ask for packed rows without lengths
            assert all({(name, on) for name, on in pair} >= {("packed", True), ("lengths", False)} for pair in wanted)
            return
        wanted -= best
        on = {name: given[name] for name in given if chosen[name]}
        options = tuple((n, v) for n, v in on.items() if n not in FORMS and n != "proj")
        forms = {n: v for n, v in on.items() if n in FORMS or n == "proj"}
        if forms.get("packed"):
            forms["lengths"] = tuple(max(1, n) for n in RAGGED)
        forms["training"] = "training" not in forms
        yield Case(mode, (6, 5, 3, 19), options=options, **forms)


PAIRS = [case for mode in rc.MODES for case in every_pair(mode)]


def close(case: Case, draw: int, rtol: float, atol: float) -> None:
    t = rc.tensors(case, draw)
    torch.manual_seed(7)
    truth = rc.exact(case, t)
    torch.manual_seed(7)
    found = rc.results(case, t)
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(
            found[name].double(), tensor, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.cases([case.with_(dtype=dtype) for case in PAIRS for dtype in (torch.float32, torch.float64)])
def test_every_pair_of_options(kernels: str, case: Case) -> None:
    """Outputs and every gradient are the formula's in float64, for the same seed."""
    close(case, 0, *((1e-4, 2e-5) if case.dtype == torch.float32 else (1e-9, 1e-11)))


# Without relu and hard functions: there are steps in their slopes, of which 16 bits take one side or the other.
ALL_OF = {"LSTM": OF_THE_LSTM | OF_ALL, "GRU": OF_ALL, "RNN_TANH": OF_ALL}
SHORT = [
    Case(mode, (5, 4, 9, 35), options=tuple(options.items()), layers=2, bidirectional=True, states=True, training=on)
    for mode, options in ALL_OF.items()
    for on in (False, True)
]


@pytest.mark.cases([case.with_(dtype=dtype) for case in SHORT for dtype in (torch.bfloat16, torch.float16)])
def test_short_floats(kernels: str, case: Case) -> None:
    check_short(case)


def check_short(case: Case) -> None:
    t = rc.tensors(case)
    torch.manual_seed(7)
    truth = rc.exact(case, t)
    torch.manual_seed(7)
    found = rc.results(case, t)
    eps = torch.finfo(case.dtype).eps
    for name, tensor in truth.items():
        error = (found[name].double() - tensor).abs().max().item()
        assert error <= 4 * eps * max(1.0, tensor.abs().max().item()), name


# ---- masks -----------------------------------------------------------------------------------------------------------


def share(found: Tensor, p: float) -> None:
    """Whether a share of a sample is p, within five standard deviations."""
    assert abs(found.double().mean().item() - p) < 5 * (p * (1 - p) / found.numel()) ** 0.5


def test_zoneout_keeps_old_states(isa: str) -> None:
    module = nn.LSTM(4, 64, zoneout=0.3, cell_zoneout=0.6, return_cell_states=True)
    output, _, cells = module(torch.randn(40, 8, 4))
    kept_h, kept_c = output[1:] == output[:-1], cells[1:] == cells[:-1]
    share(kept_h, 0.3)
    share(kept_c, 0.6)
    share(kept_h & kept_c, 0.18)
    share(kept_h[1:] & kept_h[:-1], 0.09)
    share(kept_h[:, 1:] & kept_h[:, :-1], 0.09)


def test_all_or_nothing(isa: str) -> None:
    """With probability 1 a state stands still, or nothing comes back to a step from the one before."""
    x, h0 = torch.randn(6, 3, 4), torch.randn(1, 3, 7)
    for training in (True, False):
        still, h = nn.GRU(4, 7, zoneout=1.0).train(training)(x, h0)
        assert still.equal(h0.expand_as(still))
        assert h.equal(h0)
    for option in ("recurrent_dropout", "weight_dropout"):
        module = nn.RNN(4, 7, **{option: 1.0})
        expected = torch.tanh(F.linear(x, module.weight_ih_l0, module.bias_ih_l0 + module.bias_hh_l0))
        torch.testing.assert_close(module(x, h0)[0], expected)
        assert not module.eval()(x, h0)[0].allclose(expected)


def test_states_are_dropped_alike_in_all_steps(isa: str) -> None:
    """With W_hh = 1 and relu the state shows its mask: it grows in each step by a factor, or not at all."""
    module = nn.RNN(1, 50, nonlinearity="relu", bias=False, recurrent_dropout=0.25).double()
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.eye(50))
    output, _ = module(torch.zeros(3, 40, 1).double(), torch.ones(1, 40, 50).double())
    share(output[0] == 0, 0.25)
    torch.testing.assert_close(output[0] ** 3, output[2])
    torch.testing.assert_close(output[0].max().item(), 1 / 0.75)
    weights = nn.RNN(1, 50, nonlinearity="relu", bias=False, weight_dropout=0.25).double()
    weights.load_state_dict({"weight_ih_l0": torch.zeros(50, 1), "weight_hh_l0": torch.ones(50, 50)})
    first, _ = weights(torch.zeros(1, 2, 1).double(), torch.eye(50)[None, :2].double())
    share(first == 0, 0.25)
    assert not first[0, 0].equal(first[0, 1])


def test_seeds(isa: str) -> None:
    """torch's generator rules; it is asked only where something is drawn."""
    x = torch.randn(5, 3, 4)
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}, {"weight_dropout": 0.5}):
        module = nn.GRU(4, 6, **options)
        torch.manual_seed(1)
        first, second = module(x)[0], module(x)[0]
        torch.manual_seed(1)
        assert first.equal(module(x)[0])
        assert not first.equal(second)
        state = torch.get_rng_state()
        assert module.eval()(x)[0].equal(module(x)[0])
        assert state.equal(torch.get_rng_state())


# ---- as the plain layers ---------------------------------------------------------------------------------------------


@pytest.mark.cases([case.with_(shape=(5, 9, 40, 150)) for case in SHORT[1::2]])
def test_same_bits_for_any_number_of_threads(isa: str, case: Case) -> None:
    t = rc.tensors(case)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        found.append(rc.results(case, t))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


TINY = [
    Case("LSTM", (3, 2, 2, 3), bidirectional=True, states=True, options=tuple((OF_THE_LSTM | OF_ALL).items())),
    Case("LSTM", (3, 2, 2, 3), proj=2, lengths=(3, 1), options=(("cell_zoneout", 0.5), ("peepholes", True))),
    Case("GRU", (3, 2, 2, 3), layers=2, options=tuple(OF_ALL.items())),
    Case("RNN_TANH", (3, 2, 2, 3), options=tuple(OF_ALL.items()), training=False),
    Case("GRU", (3, 2, 2, 3), options=tuple(rc.ACTIVATIONS.items())),
]


@pytest.mark.cases([case.with_(dtype=torch.float64) for case in TINY])
def test_first_and_second_derivatives(kernels: str, case: Case) -> None:
    t = rc.tensors(case)
    leaves = t.with_leaves({**t.leaves(), "input": t.input.nan_to_num(0).requires_grad_()}).leaves()

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return rc.run(case, t.with_leaves(dict(zip(leaves, values, strict=True))))

    with rc.one_thread():
        assert gradcheck(call, tuple(leaves.values()), fast_mode=kernels != "generic")
        assert gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


MODULES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", dict(coupled_gates=True, peepholes=True, bidirectional=True, num_layers=2, proj_size=3)),
    ("LSTM", dict(peepholes=True, bias=False, zoneout=0.2, layer_norm=True)),
    ("LSTM", dict(layer_norm=True, num_layers=2)),
    ("LSTMCell", dict(layer_norm=True, peepholes=True)),
    ("RNNCell", dict(layer_norm=True, bias=False)),
    ("GRU", dict(recurrent_activation="hardsigmoid")),
    ("RNN", dict(weight_dropout=0.5)),
    ("LSTMCell", dict(coupled_gates=True, peepholes=True)),
    ("GRUCell", dict(zoneout=0.5)),
]


@pytest.mark.parametrize(("kind", "options"), MODULES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_modules(kind: str, options: dict[str, Any]) -> None:
    """Parameters by name, copies, pickles, what it prints, its kernels."""
    module = getattr(nn, kind)(4, 6, **options)
    gates = {"LSTM": 4, "GRU": 3}.get(kind.removesuffix("Cell"), 1) - options.get("coupled_gates", False)
    names = set(module.state_dict())
    plain = {n: v for n, v in options.items() if n in ("bidirectional", "num_layers", "proj_size", "bias")}
    torchs = set(getattr(torch.nn, kind)(4, 6, **plain).state_dict())
    peepholes = {n.replace("weight_ih", "weight_ch") for n in torchs if "weight_ih" in n and "peepholes" in options}
    kinds = ["weight_ln_ih", "weight_ln_hh", *(["weight_ln_c"] if "LSTM" in kind else [])]
    kinds += ["bias_ln_c"] if "LSTM" in kind and options.get("bias", True) else []
    norms = {n.replace("weight_ih", k) for n in torchs if "weight_ih" in n for k in kinds if "layer_norm" in options}
    assert names == torchs | peepholes | norms
    for name, parameter in module.named_parameters():
        kind_of, _, of = name.replace("ln_", "").split("_l")[0].partition("_")
        rows = {"ih": gates * 6, "hh": gates * 6, "hr": 3, "ch": (gates - 1) * 6, "c": 6}[of]
        assert parameter.shape[0] == rows
        if name in norms:
            assert (parameter == (kind_of == "weight")).all()
        else:
            assert parameter.abs().max() <= 6**-0.5
    x = torch.randn(5, 4) if kind.endswith("Cell") else torch.randn(3, 5, 4)
    for option in options:
        assert f"{option}=" in repr(module)
    module.eval()
    expected = module(x)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert other.variant == module.variant
        assert other(x)[0].equal(expected)
    other = getattr(nn, kind)(4, 6, **options).eval()
    other.load_state_dict(module.state_dict())
    assert other(x)[0].equal(expected)
    assert not handtuned.replace(module).replaced
    assert {call.served_by.backend for call in handtuned.explain(module, x).calls} == {"cpu"}


def test_plain_options_are_torchs() -> None:
    module = nn.LSTM(4, 6, zoneout=0.0, activation="tanh", peepholes=False)
    assert set(vars(module)) == set(vars(torch.nn.LSTM(4, 6)))
    assert module.variant == nn.LSTM.variant


def test_cells_are_layers_of_one_step(isa: str) -> None:
    options: dict[str, Any] = dict(coupled_gates=True, peepholes=True, zoneout=0.2, cell_zoneout=0.3, layer_norm=True)
    options |= rc.ACTIVATIONS
    layer, cell = nn.LSTM(4, 6, **options).eval(), nn.LSTMCell(4, 6, **options).eval()
    cell.load_state_dict({name.removesuffix("_l0"): t for name, t in layer.state_dict().items()})
    x, state = torch.randn(5, 3, 4), None
    for step in x:
        state = cell(step, state)
    torch.testing.assert_close(state, tuple(s[0] for s in layer(x)[1]))
    w_ih, w_hh, b_ih, b_hh, w_ch, *w_ln = layer._flat_weights
    found = H.lstm_cell(x[0], None, w_ih, w_hh, b_ih, b_hh, w_ch=w_ch, w_ln=w_ln, **options)
    torch.testing.assert_close(found, tuple(s[0] for s in layer(x[:1])[1]))


def test_cell_states_come_as_the_output_does(isa: str) -> None:
    module, x = nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True, return_cell_states=True), torch.randn(2, 4, 3)
    output, (_, c), cells = module(x)
    assert cells.shape == output.shape == (2, 4, 10)
    assert cells[:, -1, :5].equal(c[2])
    assert cells[:, 0, 5:].equal(c[3])
    torch.testing.assert_close(module(x[0])[2], cells[0])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 4], batch_first=True)
    assert torch.nn.utils.rnn.pad_packed_sequence(module(packed)[2], batch_first=True)[0].equal(cells)
    assert (module(x, lengths=[4, 2])[2][1, 2:] == 0).all()


@pytest.fixture
def rnn_allowed() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("rnn_allowed")
def test_compiled_in_one_graph() -> None:
    options: dict[str, Any] = dict(peepholes=True, coupled_gates=True, zoneout=0.2, return_cell_states=True)
    module = nn.LSTM(3, 5, 2, layer_norm=True, **options, **rc.ACTIVATIONS)
    compiled = torch.compile(module.eval(), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 2, 3), (7, 4, 3)):
        x = torch.randn(shape, requires_grad=True)
        found, expected = (
            torch.autograd.grad(sum(t.sin().sum() for t in m(x)[::2]), [x, *module.parameters()])
            for m in (compiled, module)
        )
        torch.testing.assert_close(found, expected)
    module.train()
    options = dict(peepholes=True, coupled_gates=True, weight_dropout=0.5, recurrent_dropout=0.5)
    module.variant = nn.LSTM(3, 5, layer_norm=True, **options).variant
    assert torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: nn.GRU(3, 4, peepholes=True), "handtuned.GRU: peepholes is True, which GRU does not have; leave it out"),
    (lambda: nn.RNN(3, 4, recurrent_activation="hardsigmoid"), "which RNN_TANH does not have"),
    (lambda: nn.RNN(3, 4, nonlinearity="relu", activation="hardtanh"), "which RNN_RELU does not have"),
    (lambda: nn.LSTM(3, 4, zoneout=1.5), "zoneout is 1.5, the limits are 0 and 1; pass a probability"),
    (lambda: nn.LSTM(3, 4, activation="relu"), "activation is 'relu', allowed are 'tanh' and 'hardtanh'"),
    (lambda: nn.LSTMCell(3, 4, weight_dropout=0.1), "which is of a sequence and not of one step; leave it out"),
    (lambda: H.lstm(torch.randn(2, 2, 3), None, nn.LSTM(3, 4)._flat_weights, peepholes=True), "expected 5 for num_lay"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_bad_options_are_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        call()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="zone_out"):
        nn.LSTM(3, 4, zone_out=0.1)
