"""What holds of the recurrent family exactly, or in every form: lengths, edges, derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import rnn_cases as rc
import torch
import torch._dynamo
from rnn_cases import FORMS, Case
from test_norm_properties import assert_same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import handtuned
from handtuned import nn

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]


# ---- lengths ---------------------------------------------------------------------------------------------------------

RAGGED = [
    Case(mode, (6, 7, 5, 18), lengths=(3, 0, 6, 1, 0, 6, 2), bidirectional=True, layers=2, states=True, proj=proj)
    for mode, proj in (*((mode, 0) for mode in rc.MODES), ("LSTM", 4))
]


@pytest.mark.cases([case.with_(batch_first=first) for case in RAGGED for first in (False, True)])
def test_each_row_is_as_if_alone(kernels: str, case: Case) -> None:
    """Lengths in any order, zero among them, NaN in the padding: values and gradients of a loop over the rows."""
    t = rc.tensors(case)
    leaves = t.leaves()
    whole = rc.run(case, t.with_leaves(leaves))
    padding = torch.arange(case.shape[0])[:, None] >= t.lengths
    output = whole[0].transpose(0, 1) if case.batch_first else whole[0]
    assert (output[padding] == 0).all()

    u = t.with_leaves(leaves)
    x, single = (u.input.transpose(0, 1) if case.batch_first else u.input), case.with_(lengths=(), batch_first=False)
    parts: list[tuple[Tensor, ...]] = []
    for b, length in enumerate(case.lengths):
        states = {name: s if s is None else s[:, b : b + 1] for name, s in (("h0", u.h0), ("c0", u.c0))}
        y, *finals = rc.run(single, replace(u, input=x[:length, b : b + 1], lengths=None, **states))
        filled = torch.cat([y, y.new_zeros(case.shape[0] - length, 1, y.shape[-1])])
        parts.append((filled, *finals))
    alone = tuple(torch.cat(column, 1) for column in zip(*parts, strict=True))
    alone = (alone[0].transpose(0, 1) if case.batch_first else alone[0], *alone[1:])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
    incoming = t.grads(case)
    found, expected = (
        torch.autograd.grad(outputs, list(leaves.values()), incoming, retain_graph=True) for outputs in (whole, alone)
    )
    assert all(grad.isfinite().all() for grad in found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cases([case.with_(lengths=(3, 4, 6, 1, 2, 6, 2)) for case in RAGGED])
def test_lengths_are_a_packed_sequence(kernels: str, case: Case) -> None:
    t = rc.tensors(case)
    expected = rc.results(case, t)
    found = rc.results(case.with_(packed=True), t)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_any_kind(kernels: str, dtype: torch.dtype) -> None:
    module, x = nn.GRU(3, 5), torch.randn(4, 3, 3)
    expected, _ = module(x, lengths=torch.tensor([4, 2, 0]))
    for lengths in (torch.tensor([4, 2, 0], dtype=dtype), [4, 2, 0], torch.tensor([4, 0, 2, 0, 0])[::2].to(dtype)):
        assert module(x, lengths=lengths)[0].equal(expected)


@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_packed_sequences_in_and_out(kernels: str, mode: str, enforce_sorted: bool) -> None:
    theirs = getattr(torch.nn, mode)(3, 6, 2, bidirectional=True)
    ours = getattr(nn, mode)(3, 6, 2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    lengths = torch.tensor([5, 3, 1] if enforce_sorted else [3, 5, 1])
    packed = pack_padded_sequence(torch.randn(5, 3, 3), lengths, enforce_sorted=enforce_sorted)
    h0 = torch.randn(4, 3, 6)
    found, expected = (m(packed, (h0, h0) if mode == "LSTM" else h0) for m in (ours, theirs))
    assert isinstance(found[0], PackedSequence)
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b) if b is not None else None
    torch.testing.assert_close(found[1], expected[1])
    assert pad_packed_sequence(found[0])[1].equal(lengths)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.cases([case.with_(shape=shape) for case in FORMS[::4] for shape in ((0, 3, 4, 5), (3, 0, 4, 5))])
def test_no_steps_or_no_rows(kernels: str, case: Case) -> None:
    case = case.with_(lengths=(), packed=False, states=True, proj=0)
    t = rc.tensors(case)
    found = rc.results(case, t)
    if case.shape[0] == 0:
        assert t.h0 is not None
        assert found["hn"].equal(t.h0)
        assert found["grad_h0"].equal(t.grad_hn)
    assert all((grad == 0).all() for name, grad in found.items() if name.startswith("grad_w"))


@pytest.mark.cases(
    [
        Case(mode, shape, states=True, bidirectional=True)
        for mode in rc.MODES
        for shape in ((2, 3, 4, 1), (1, 1, 1, 3), (3, 2, 130, 15), (2, 67, 3, 31), (5, 4, 1, 129))
    ]
)
def test_odd_sizes(kernels: str, case: Case) -> None:
    t = rc.tensors(case)
    truth = rc.exact(case, t)
    for name, tensor in rc.results(case, t).items():
        torch.testing.assert_close(tensor.double(), truth[name], rtol=1e-4, atol=2e-5)


@pytest.mark.cases([form.with_(lengths=(), packed=False) for form in FORMS[:3]])
def test_strides_change_no_bit(isa: str, case: Case) -> None:
    t = rc.tensors(case)
    expected = rc.results(case, t)
    wide = torch.full((*t.input.shape[:2], 2 * t.input.shape[2] + 1), torch.nan)
    for place in (slice(1, 1 + t.input.shape[2]), slice(0, None, 2)):
        spread = wide.clone()[..., place][..., : t.input.shape[2]]
        spread.copy_(t.input)
        assert_same_bits(rc.results(case, replace(t, input=spread)), expected)
    turned = rc.results(
        case,
        replace(
            t, input=t.input.mT.contiguous().mT, grad_output=t.grad_output.transpose(0, 1).contiguous().transpose(0, 1)
        ),
    )
    assert_same_bits(turned, expected)


# ---- derivatives -----------------------------------------------------------------------------------------------------

TINY = [
    *(Case(mode, (3, 2, 2, 3), bidirectional=True, layers=2, states=True) for mode in rc.MODES[:3]),
    Case("LSTM", (3, 3, 2, 3), proj=2, lengths=(2, 0, 3), states=True, dropout=0.0),
    Case("GRU", (3, 2, 2, 2), layers=2, dropout=0.4),
]


@pytest.mark.cases([case.with_(dtype=torch.float64) for case in TINY])
def test_first_and_second_derivatives(kernels: str, case: Case) -> None:
    t = rc.tensors(case)
    t = replace(t, input=t.input.nan_to_num(0))
    leaves = t.leaves()

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return rc.run(case, t.with_leaves(dict(zip(leaves, values, strict=True))))

    with rc.one_thread():
        assert gradcheck(call, tuple(leaves.values()), fast_mode=kernels != "generic")
        assert gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


def test_torch_func_runs_the_formula() -> None:
    ours, theirs = nn.LSTM(3, 4).double(), torch.nn.LSTM(3, 4).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: module(x)[0].pow(2).sum()

    with pytest.warns(handtuned.FallbackWarning):
        found = torch.func.grad(loss(ours))(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(theirs)(leaf), leaf)[0])
    each = torch.func.vmap(loss(ours), in_dims=1)(x)
    torch.testing.assert_close(each.sum(), loss(theirs)(x))
