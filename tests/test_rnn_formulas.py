"""The recurrent layers' formulas, variants included: against loops over the steps in torch's elementary functions."""

from __future__ import annotations

from typing import Any

import pytest
import rnn_cases as rc
import torch
from rnn_cases import Case
from torch import Tensor
from torch.nn import functional as F

from handtuned import nn
from handtuned.nn import functional as H

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.no_triton]


def lstm_loop(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor, p: Tensor, *, coupled: bool, hard: bool, zone: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    sigma, tau = (lambda a: (a / 6 + 0.5).clamp(0, 1), F.hardtanh) if hard else (torch.sigmoid, torch.tanh)
    hidden = w_hh.shape[1]
    h = c = x.new_zeros(x.shape[1], hidden)
    hs, cs = [], []
    for x_t in x:
        a = dict(zip("igo" if coupled else "ifgo", (x_t @ w_ih.T + h @ w_hh.T + b).split(hidden, 1), strict=True))
        q = dict(zip("io" if coupled else "ifo", p.split(hidden), strict=True))
        i = sigma(a["i"] + q["i"] * c)
        f = 1 - i if coupled else sigma(a["f"] + q["f"] * c)
        new = f * c + i * tau(a["g"])
        o = sigma(a["o"] + q["o"] * new)
        h = zone[0] * h + (1 - zone[0]) * o * tau(new)
        c = zone[1] * c + (1 - zone[1]) * new
        hs.append(h)
        cs.append(c)
    return torch.stack(hs), torch.stack(cs)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_lstm_is_its_papers(isa: str, coupled: bool, hard: bool) -> None:
    gates, x = 3 + (not coupled), torch.randn(7, 3, 5, dtype=torch.float64)
    shapes = ((gates * 6, 5), (gates * 6, 6), (gates * 6,), ((gates - 1) * 6,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    w_ih, w_hh, b, p = leaves
    options: dict[str, Any] = dict(coupled_gates=coupled, peepholes=True, zoneout=0.1, cell_zoneout=0.3)
    options |= rc.ACTIVATIONS if hard else {}
    weights = [w_ih, w_hh, b, torch.zeros_like(b), p]
    output, (h, c), cells = H.lstm(x, None, weights, return_cell_states=True, **options)
    hs, cs = lstm_loop(x, *leaves, coupled=coupled, hard=hard, zone=(0.1, 0.3))
    pairs = ((output, hs), (cells, cs), (h[0], hs[-1]), (c[0], cs[-1]))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad((y.sin() + s.cos()).sum(), leaves) for y, s in ((output, cells), (hs, cs)))
    torch.testing.assert_close(found, expected)


def normal(v: Tensor) -> Tensor:
    centred = v - v.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("proj", [0, 4])
def test_layer_norm_is_its_papers(isa: str, bias: bool, proj: int) -> None:
    """Equations 20 to 22 of Ba et al. 2016, whose three biases beside each other are b_ih and b_hh."""
    module = nn.LSTM(5, 6, bias=bias, proj_size=proj, layer_norm=True).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    w = {name.removesuffix("_l0"): parameter for name, parameter in module.named_parameters()}
    x = torch.randn(7, 3, 5).double().requires_grad_()
    h, c = (torch.randn(3, n).double().requires_grad_() for n in (proj or 6, 6))
    leaves, hs = [x, h, c, *module.parameters()], []
    found = module(x, (h[None], c[None]))[0]
    for x_t in x:
        a = normal(x_t @ w["weight_ih"].T) * w["weight_ln_ih"] + normal(h @ w["weight_hh"].T) * w["weight_ln_hh"]
        i, f, g, o = (a + w["bias_ih"] + w["bias_hh"] if bias else a).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * (normal(c) * w["weight_ln_c"] + (w["bias_ln_c"] if bias else 0.0)).tanh()
        h = h @ w["weight_hr"].T if proj else h
        hs.append(h)
    torch.testing.assert_close(found, torch.stack(hs))
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (found, torch.stack(hs))]
    torch.testing.assert_close(*grads)


NORMED = [Case(mode, (64, 16, 64, 64), states=True, options=(("layer_norm", True),)) for mode in rc.MODES[:3]]


@pytest.mark.cases(NORMED)
def test_layer_norm_rounds_no_worse_than_the_formula(isa: str, case: Case) -> None:
    """Sums over many rows and steps: errors of outputs and all gradients beside those of torch's operators."""
    t = rc.tensors(case)
    truth, found, formula = rc.exact(case, t), rc.results(case, t), rc.results(case, t, rc.run_formula)
    for name, tensor in truth.items():
        error, allowed = ((r[name].double() - tensor).square().mean().sqrt().item() for r in (found, formula))
        assert error <= 1.5 * allowed, f"{name}: {error / allowed:.2f} times the formula's error"


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_layer_norm_of_gru_and_rnn(isa: str, kind: str) -> None:
    module, x = getattr(nn, kind)(5, 6, layer_norm=True).double(), torch.randn(7, 3, 5).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh = module._flat_weights
    h, hs = x.new_zeros(3, 6), []
    for x_t in x:
        a, b = normal(x_t @ w_ih.T) * gain_ih + b_ih, normal(h @ w_hh.T) * gain_hh + b_hh
        h = _gru_step(a, b, h, torch.sigmoid, torch.tanh) if kind == "GRU" else torch.tanh(a + b)
        hs.append(h)
    found = module(x)[0]
    torch.testing.assert_close(found, torch.stack(hs))
    grads = [torch.autograd.grad(y.sin().sum(), module._flat_weights) for y in (found, torch.stack(hs))]
    torch.testing.assert_close(*grads)


def test_gru_and_rnn_with_hard_functions(isa: str) -> None:
    for kind, cell, options in (
        ("GRU", _gru_step, rc.ACTIVATIONS),
        ("RNN", lambda a, b, h: F.hardtanh(a + b), {"activation": "hardtanh"}),
    ):
        module, x = getattr(nn, kind)(5, 6, zoneout=0.2, **options).double().eval(), torch.randn(7, 3, 5).double()
        h, hs = x.new_zeros(3, 6), []
        for x_t in x:
            a, b = F.linear(x_t, *module._flat_weights[::2]), F.linear(h, *module._flat_weights[1::2])
            h = 0.2 * h + 0.8 * cell(a, b, h)
            hs.append(h)
        torch.testing.assert_close(module(x)[0], torch.stack(hs))


def _gru_step(a: Tensor, b: Tensor, h: Tensor, sigma: Any = F.hardsigmoid, tau: Any = F.hardtanh) -> Tensor:
    (ra, za, na), (rb, zb, nb) = a.chunk(3, 1), b.chunk(3, 1)
    z = sigma(za + zb)
    return (1 - z) * tau(na + sigma(ra + rb) * nb) + z * h
