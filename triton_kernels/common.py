"""What the kernels and launchers of every family share: scalars, the dropout mask, buffers, rows of strided tensors."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of device functions have no Python types)

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

from .tuning import Config

LOG2_E = tl.constexpr(1.4426950408889634)

_HIDDEN = tl.constexpr(2**62 + 1)

# ---- device code -----------------------------------------------------------------------------------------------------


@triton.jit
def scalar(value, ACC: tl.constexpr):
    # A float argument is fp64 when compiled and a Python float in the interpreter; the product is fp64 in both.
    return (tl.full((), 1.0, tl.float64) * value).to(ACC)


@triton.jit
def number(hidden_one):
    """What the launcher passed as `hidden`, an int64."""
    return (hidden_one - _HIDDEN) >> 1


@triton.jit
def stride_of(hidden_one, loose):
    """One of hidden_strides(), whose last number is `loose`."""
    if loose is None:
        return number(hidden_one) * 16
    else:
        return number(hidden_one)


@triton.jit
def reciprocal_sqrt(value):
    # tl.rsqrt is approximate in fp32; once a row, the exact form costs nothing.
    if value.dtype == tl.float64:
        return 1.0 / tl.sqrt(value)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(value))


@triton.jit
def tanh(x):
    """Cephes: a polynomial (for float64 a fraction of two) near 0, 1 - 2 / (1 + exp(2 |x|)) elsewhere."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(size * (2.0 * LOG2_E)))
    z = x * x
    if x.dtype == tl.float64:
        above = ((-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z) - 1.61468768441708447952e3
        below = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        near = x + x * (z * (above / below))
    else:
        series = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        near = x + x * (z * (series * z - 3.33332819422e-1))
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def keep_factor(seed, row, start, threshold, scale, ROWS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    """Factors [ROWS, TILE] of columns start .. start + TILE: scale where kept, 0 where dropped (0 * NaN stays NaN).

    Column c has number c / 16 % 8 of the eight 16-bit halves, low half first, of Philox4x32-10 at counter
    (c / 128 * 16 + c % 16, row low, row high, 0), key = seed. So one call serves columns j, j+16, ... j+112 of a block
    of 128: it is made once, for counters [block, j], its eight verdicts travel as bits of one small integer to columns
    [block, number, j], and each column picks its bit. A TILE below 128 lies within a block and uses some of the bits.
    start is a multiple of TILE, and of 128 if that is larger.
    """
    BLOCKS: tl.constexpr = (TILE + 127) // 128
    counter = (start // 128 * 16 + tl.arange(0, BLOCKS * 16)).to(tl.uint32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    zero = tl.zeros((1, 1), tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), counter[None, :], low[:, None], high[:, None], zero)
    bound = threshold.to(tl.uint32)
    flags = _halves(w0, bound) | (_halves(w1, bound) << 2) | (_halves(w2, bound) << 4) | (_halves(w3, bound) << 6)
    flags = tl.reshape(flags, (ROWS, BLOCKS, 1, 16))
    flags = tl.broadcast_to(flags, (ROWS, BLOCKS, TILE // BLOCKS // 16, 16))
    first = 0 if TILE % 128 == 0 else start % 128
    number = ((first + tl.arange(0, TILE)) // 16 % 8).to(tl.int16)
    keep = ((tl.reshape(flags, (ROWS, TILE)) >> number[None, :]) & 1) != 0
    return tl.where(keep, scalar(scale, ACC), 0.0)


@triton.jit
def _halves(word, bound):
    """Verdicts on the low half (bit 0) and the high half (bit 1) of a word."""
    return ((word & 0xFFFF) >= bound).to(tl.int16) | (((word >> 16) >= bound).to(tl.int16) << 1)


# ---- launching -------------------------------------------------------------------------------------------------------


def hidden(value: int) -> int:
    """A number inside a tuple of arguments, in a form that tells Triton nothing: odd, large, and 64 bits wide.

    Triton compiles a kernel anew where a number inside a tuple is 1, where it is a multiple of 16, and where it takes
    64 bits, whatever do_not_specialize says. The kernel takes the `number` out again.
    """
    found: int = 2 * value + _HIDDEN.value
    return found


def hidden_strides(*strides: int) -> tuple[Any, ...]:
    """The strides, hidden, and None if all are multiples of 16 elements and given in sixteens, which lets a kernel
    load 16 bytes at once; else 1."""
    aligned = all(stride % 16 == 0 for stride in strides)
    return (*(hidden(stride // 16 if aligned else stride) for stride in strides), None if aligned else 1)


def empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Every buffer a kernel writes is allocated here, so that tests can put guard bands around all of them."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b by torch, 16 bits summed and returned in float32."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """With torch.empty_like's strides."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return empty((tensor.numel(),), tensor).as_strided(tensor.shape, strides)


def as_rows(tensor: torch.Tensor, normalized_ndim: int) -> tuple[torch.Tensor, int]:
    """The tensor and the distance between its rows; copied if its elements or its rows do not lie regularly."""
    split = tensor.dim() - normalized_ndim
    shape, strides = tensor.shape, tensor.stride()
    if tensor.is_contiguous():
        return tensor, math.prod(shape[split:])

    def collapses(dims: range, step: int | None) -> bool:
        for d in reversed(dims):
            if shape[d] == 1:
                continue
            if step is not None and strides[d] != step:
                return False
            step = strides[d] * shape[d]
        return True

    if collapses(range(split, tensor.dim()), 1) and collapses(range(split), None):
        return tensor, next((strides[d] for d in reversed(range(split)) if shape[d] != 1), 0)
    return tensor.contiguous(), math.prod(shape[split:])


def dropout_constants(p: float) -> tuple[int, float]:
    """Threshold and scale of the mask: keep where number >= threshold; with p = 1 everything is multiplied by 0."""
    return (0, 0.0) if p >= 1.0 else (math.floor(p * 65536 + 0.5), 1.0 / (1.0 - p))


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be the tensor's.
    if tensor.device.type != "cpu":
        devices: Any = torch.get_device_module(tensor.device)
        if tensor.device.index != devices.current_device():
            current: contextlib.AbstractContextManager[Any] = devices.device(tensor.device)
            return current
    return contextlib.nullcontext()


def meta(config: Config) -> dict[str, Any]:
    """The keyword arguments of a launch that a Config stands for."""
    # fp fusion: an fma rounds once where a multiplication and an addition round twice. Named because the default of
    # Triton is about to change.
    return {
        "TILE": config.tile,
        "ROWS": config.rows,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
