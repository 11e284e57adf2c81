"""Positions and gated feed-forwards: SinusoidalPositionalEncoding, rotary_embedding, SwiGLU, GEGLU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import handtuned
from handtuned.nn import functional as H

# ---- sinusoidal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_sinusoidal_positions(shape: tuple[int, ...], batch_first: bool) -> None:
    module = handtuned.nn.SinusoidalPositionalEncoding(6, 0.0, max_length=12, batch_first=batch_first)
    x = torch.randn(shape)
    given = x.transpose(0, 1) if len(shape) == 3 and not batch_first else x
    for offset in (0, 5):
        added = module(given, offset) - given
        added = added.transpose(0, 1) if len(shape) == 3 and not batch_first else added
        for position in range(7):
            angles = [(offset + position) / 10000 ** (2 * i / 6) for i in range(3)]
            expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
            torch.testing.assert_close(added[..., position, :], torch.tensor(expected).expand(*shape[:-2], 6))
    assert not module.state_dict()


def test_sinusoidal_dropout_and_dtype() -> None:
    module = handtuned.nn.SinusoidalPositionalEncoding(6, 0.5, batch_first=True)
    x = torch.ones(2, 3, 6, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    assert (module(x) == 0).any()
    assert not (module.eval()(x) == 0).any()


def test_sinusoidal_limits() -> None:
    module = handtuned.nn.SinusoidalPositionalEncoding(6, max_length=4)
    with pytest.raises(RuntimeError, match=r"positions 2 to 4 are asked for, the limits are 0 and 3"):
        module(torch.ones(3, 6), 2)
    with pytest.raises(ValueError, match="d_model is 5, it must be even"):
        handtuned.nn.SinusoidalPositionalEncoding(5)


# ---- rotary ----------------------------------------------------------------------------------------------------------


def turned(x: Tensor, width: int, interleaved: bool) -> Tensor:
    """By multiplication of complex numbers, position by position."""
    result = x.clone()
    for position in range(x.shape[-2]):
        for i in range(width // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
            angle = torch.tensor(position * 10000 ** (-2 * i / width), dtype=torch.float64)
            spun = torch.complex(x[..., position, a], x[..., position, b]) * torch.polar(torch.ones_like(angle), angle)
            result[..., position, a], result[..., position, b] = spun.real, spun.imag
    return result


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [8, 4])
def test_rotary(width: int, interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    tables = H.rotary_tables(5, width, dtype=torch.float64)
    torch.testing.assert_close(H.rotary_embedding(x, *tables, interleaved=interleaved), turned(x, width, interleaved))
    assert torch.autograd.gradcheck(
        lambda x: H.rotary_embedding(x, *tables, interleaved=interleaved), x.requires_grad_(), fast_mode=True
    )


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)

    def score(at: int, to: int) -> Tensor:
        spun = [
            H.rotary_embedding(x, *H.rotary_tables(torch.tensor([p]), 8, dtype=torch.float64))
            for x, p in ((q, at), (k, to))
        ]
        return spun[0] @ spun[1].T

    torch.testing.assert_close(score(11, 4), score(1007, 1000))


def test_rotary_positions_by_batch_and_dtype() -> None:
    x = torch.randn(2, 3, 4, 8).bfloat16()
    positions = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    cos, sin = H.rotary_tables(positions, 8)
    assert cos.shape == (2, 4, 4)
    result = H.rotary_embedding(x, cos[:, None], sin[:, None])
    assert result.dtype == torch.bfloat16
    whole = H.rotary_tables(9, 8)
    torch.testing.assert_close(result[1], H.rotary_embedding(x[1], *(t[5:] for t in whole)))


def test_rotary_limits() -> None:
    with pytest.raises(RuntimeError, match="width is 3, it must be even"):
        H.rotary_tables(4, 3)
    cos, sin = H.rotary_tables(4, 8)
    for x, s, message in (
        (torch.ones(4, 4), sin, "cos has width 4, the limit is half of input's width 4"),
        (torch.ones(5, 8), sin, r"cos has shape \[4, 4\], expected 5 rows"),
        (torch.ones(4, 8), sin[:2], "pass a pair"),
    ):
        with pytest.raises(RuntimeError, match=message):
            H.rotary_embedding(x, cos, s)


# ---- gated feed-forwards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [handtuned.nn.SwiGLU, handtuned.nn.GEGLU])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_feed_forwards(kind: type[torch.nn.Module], bias: bool) -> None:
    module = kind(6, 10, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    gated = torch.nn.functional.silu if kind is handtuned.nn.SwiGLU else torch.nn.functional.gelu
    expected = gated(module.gate_proj(x)) * module.up_proj(x)
    expected = expected @ module.down_proj.weight.T + (module.down_proj.bias if bias else 0)
    wanted = (x, *module.parameters())
    torch.testing.assert_close(module(x), expected)
    grads = [torch.autograd.grad(y.square().sum(), wanted, retain_graph=True) for y in (module(x), expected)]
    torch.testing.assert_close(*grads)
    names = {f"{n}_proj.{p}" for n in ("gate", "up", "down") for p in ("weight", "bias")[: 1 + bias]}
    assert set(module.state_dict()) == names


def test_gated_dropout() -> None:
    module = handtuned.nn.SwiGLU(6, 10, dropout=0.5)
    x = torch.randn(3, 6)
    assert not module(x).equal(module(x))
    assert module.eval()(x).equal(module(x))
