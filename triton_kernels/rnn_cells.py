"""Recurrent cells in Triton: one step of each cell and its derivative, on tiles [rows of the batch, units]. The maths
is in csrc/rnn.h.

Gates are kept as they are after their nonlinearity, from which its slope follows: s (1 - s) for the sigmoid, 1 - y^2
for tanh, 1/6 or 1 inside and 0 outside for the hard ones.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of device functions have no Python types)

import triton
import triton.language as tl

from .common import LOG2_E, tanh


@triton.jit
def sigmoid(x, HARD: tl.constexpr):
    if HARD:
        y = tl.clamp(x + 3.0, tl.zeros_like(x), tl.full(x.shape, 6.0, x.dtype), propagate_nan=tl.PropagateNan.ALL) / 6.0
    else:
        y = 1.0 / (1.0 + tl.exp2(-x * LOG2_E))
    return y


@triton.jit
def sigmoid_slope(y, HARD: tl.constexpr):
    slope = tl.where((y > 0.0) & (y < 1.0), 1.0, 0.0) / 6.0 if HARD else y * (1.0 - y)
    return slope


@triton.jit
def bend(x, HARD: tl.constexpr):
    if HARD:
        one = tl.full(x.shape, 1.0, x.dtype)
        y = tl.clamp(x, -one, one, propagate_nan=tl.PropagateNan.ALL)
    else:
        y = tanh(x)
    return y


@triton.jit
def bend_slope(y, HARD: tl.constexpr):
    slope = tl.where(tl.abs(y) < 1.0, 1.0, 0.0).to(y.dtype) if HARD else 1.0 - y * y
    return slope


# ---- LSTM: c' = f c + i g, h' = o tanh(c') ---------------------------------------------------------------------------


@triton.jit
def lstm_cell_state(i, f, g, c, COUPLED: tl.constexpr):
    new = (1.0 - i) * c + i * g if COUPLED else f * c + i * g
    return new


@triton.jit
def lstm_slopes(
    i, f, g, o, c, bent, dh, dc, peep_o, COUPLED: tl.constexpr, HARD: tl.constexpr, HARD_TANH: tl.constexpr
):
    """(di, df, dg, do before the nonlinearities, dc' whole); dh and dc are of h' and of c' without what h' owes it.
    Coupled, f = 1 - i and df is 0."""
    do = dh * bent * sigmoid_slope(o, HARD)
    dc += dh * o * bend_slope(bent, HARD_TANH) + do * peep_o
    dg = dc * i * bend_slope(g, HARD_TANH)
    if COUPLED:
        di = dc * (g - c) * sigmoid_slope(i, HARD)
        df = tl.zeros_like(di)
    else:
        di = dc * g * sigmoid_slope(i, HARD)
        df = dc * c * sigmoid_slope(f, HARD)
    return di, df, dg, do, dc


# ---- GRU: h' = (1 - z) n + z h, n = tanh(x_n + r s_n) with s_n from the state ----------------------------------------


@triton.jit
def gru_slopes(r, z, n, s_n, h, dh, HARD: tl.constexpr, HARD_TANH: tl.constexpr):
    """(dr, dz, dn before the nonlinearities); ds_n = dn r, and dh z goes on to h."""
    dn = dh * (1.0 - z) * bend_slope(n, HARD_TANH)
    dz = dh * (h - n) * sigmoid_slope(z, HARD)
    dr = dn * s_n * sigmoid_slope(r, HARD)
    return dr, dz, dn
