"""Arithmetic and conversions of the PTX simulator, by the PTX manual and by torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import fragments
import pytest
import torch
from ptx_snippets import F32, F64, FLOATS, I32, I64, NARROW, OTHERS, each_thread, run, same
from torch import Tensor

# ---- arithmetic ------------------------------------------------------------------------------------------------------

A32 = torch.tensor([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 12345, -98765, 0x5A5A5A5A, 255, 256], dtype=I32)
B32 = torch.tensor([1, 1, 3, -2, 2, 2**31 - 1, 2, -31, 4321, 0x0F0F0F0F, 13, -1], dtype=I32)
A64, B64 = A32.long() * 0x1_0000_0001, B32.long() * 0x7FFF_FFFF


def unsigned(t: Tensor) -> list[int]:
    return [v & (2 ** (8 * t.element_size()) - 1) for v in t.tolist()]


def signed(values: list[int], dtype: torch.dtype) -> Tensor:
    bits = 8 * dtype.itemsize
    return torch.tensor([(v & (2**bits - 1)) - (v >> (bits - 1) & 1) * 2**bits for v in values], dtype=dtype)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": truncated,
    "rem": lambda a, b: a - truncated(a, b) * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integers(name: str, kind: str) -> None:
    a, b = (A32, B32) if kind.endswith("32") else (A64, B64)
    values = [unsigned(t) if kind[0] == "u" else t.tolist() for t in (a, b)]
    wanted = [INTEGER[name](x, y) for x, y in zip(*values, strict=True)]
    assert same(each_thread(f"{name}.{kind}", (a, b), a.dtype), signed(wanted, a.dtype))


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products(kind: str) -> None:
    values = [unsigned(t) if kind[0] == "u" else t.tolist() for t in (A32, B32)]
    products = [x * y for x, y in zip(*values, strict=True)]
    assert same(each_thread(f"mul.wide.{kind}", (A32, B32), I64), signed(products, I64))
    assert same(each_thread(f"mul.hi.{kind}", (A32, B32), I32), signed([p >> 32 for p in products], I32))
    lower = signed([p + a for p, a in zip(products, unsigned(A32), strict=True)], I32)
    assert same(each_thread(f"mad.lo.{kind}", (A32, B32, A32), I32), lower)


LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}


@pytest.mark.parametrize("name", LOGIC)
def test_logic(name: str) -> None:
    assert same(each_thread(f"{name}.b32", (A32, B32), I32), LOGIC[name](A32, B32))
    assert same(each_thread(f"{name}.b64", (A64, B64), I64), LOGIC[name](A64, B64))


def test_shifts_and_fields() -> None:
    """Shifts by more than the width give zero, or the sign; fields as the manual's pseudocode has them."""
    by = torch.tensor([0, 1, 4, 31, 32, 33, 5, 9, 100, 16, 8, 2], dtype=I32)
    a, n = unsigned(A32), by.tolist()
    assert same(each_thread("shl.b32", (A32, by), I32), signed([v << s for v, s in zip(a, n, strict=True)], I32))
    assert same(each_thread("shr.u32", (A32, by), I32), signed([v >> s for v, s in zip(a, n, strict=True)], I32))
    wanted = [v >> s for v, s in zip(A32.tolist(), n, strict=True)]
    assert same(each_thread("shr.s32", (A32, by), I32), signed(wanted, I32))
    length = torch.tensor([8, 4, 0, 1, 5, 3, 32, 7, 8, 16, 24, 31], dtype=I32)
    fields = [v >> s & (1 << k) - 1 for v, s, k in zip(a, n, length.tolist(), strict=True)]
    assert same(each_thread("bfe.u32", (A32, by, length), I32), signed(fields, I32))
    assert each_thread("popc.b32", (A32,), I32).tolist() == [v.bit_count() for v in a]
    assert each_thread("clz.b32", (A32,), I32).tolist() == [32 - v.bit_length() for v in a]
    assert each_thread("brev.b32", (A32,), I32).tolist() == signed([int(f"{v:032b}"[::-1], 2) for v in a], I32).tolist()


def test_prmt_chooses_bytes() -> None:
    choice = signed([0x3210, 0x7654, 0x0123, 0x7531, 0x1054, 0x8888, 0xFFFF, 0x4321, 0x0, 0x7777, 0x5410, 0x6240], I32)
    both = [struct.pack("<II", x, y) for x, y in zip(unsigned(A32), unsigned(B32), strict=True)]

    def pick(data: bytes, nibble: int) -> int:
        byte = data[nibble & 7]
        return byte if nibble < 8 else 255 * (byte >> 7)

    wanted = [
        sum(pick(data, c >> 4 * i & 15) << 8 * i for i in range(4))
        for data, c in zip(both, choice.tolist(), strict=True)
    ]
    assert same(each_thread("prmt.b32", (A32, B32, choice), I32), signed(wanted, I32))


def test_lop3_is_its_table() -> None:
    c = A32.flip(0)
    body = """mad.wide.u32 %d2, %r0, 12, %d0; mad.wide.u32 %d3, %r0, 4, %d1;
    ld.global.u32 %r2, [%d2]; ld.global.u32 %r3, [%d2+4]; ld.global.u32 %r4, [%d2+8];
    lop3.b32 %r5, %r2, %r3, %r4, 0xE8; st.global.u32 [%d3], %r5;"""
    found = run(body, torch.stack([A32, B32, c], 1).contiguous(), torch.zeros(12, dtype=I32), threads=12)
    assert same(found, (A32 & B32) | (B32 & c) | (A32 & c))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn", "div.full"])
def test_floats(name: str) -> None:
    operation = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}.get(name, torch.div)
    for kind, dtype in (("f32", F32), ("f64", F64)):
        if name == "div.full" and kind == "f64":
            continue
        a, b = FLOATS.to(dtype), OTHERS.to(dtype)
        found = each_thread(f"{name}.{kind}", (a, b), dtype)
        assert torch.equal(found.nan_to_num(7.0, 8.0, 9.0), operation(a, b).nan_to_num(7.0, 8.0, 9.0))


def test_fma_rounds_once() -> None:
    a = torch.tensor([1 + 2.0**-12, 1 + 2.0**-23, 3.0])
    c = torch.tensor([-1.0, -1.0, 1e-9])
    assert same(each_thread("fma.rn.f32", (a, a, c), F32), (a.double() * a.double() + c.double()).float())


def test_fma_with_a_directed_rounding() -> None:
    """Against exact fractions; also where the sum needs more than a double."""
    a = torch.tensor([1.1, -1.1, 3.0, 1 + 2.0**-23, 1e-30])
    c = torch.tensor([0.3, 1e-9, -9.0, -1.0, 1.0])
    exact = [Fraction(x) * Fraction(x) + Fraction(y) for x, y in zip(a.tolist(), c.tolist(), strict=True)]
    below = each_thread("fma.rm.f32", (a, a, c), F32)
    above = each_thread("fma.rp.f32", (a, a, c), F32)
    for value, low, high in zip(exact, below.tolist(), above.tolist(), strict=True):
        assert Fraction(low) <= value <= Fraction(high)
        assert low == high if Fraction(low) == value else high == torch.nextafter(torch.tensor(low), torch.tensor(9e9))
    zero = each_thread("fma.rz.f32", (a, a, c), F32)
    assert same(zero, torch.where(below > 0, below, above))


def test_min_and_max_prefer_numbers_and_order_zeros() -> None:
    assert each_thread("min.f32", (FLOATS, OTHERS), F32)[9:].tolist() == [1.0, pytest.approx(0.1), 2.5]
    both = each_thread("max.NaN.f32", (FLOATS, OTHERS), F32)
    assert both.isnan().tolist() == (FLOATS.isnan() | OTHERS.isnan()).tolist()
    zeros = torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])
    assert each_thread("min.f32", zeros, F32).signbit().all()
    assert not each_thread("max.f32", zeros, F32).signbit().any()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("sqrt.rn", lambda v: v.double().sqrt().float()),
        ("rcp.rn", torch.reciprocal),
        ("neg", torch.neg),
        ("abs", torch.abs),
    ],
)
def test_exact_functions(name: str, function: Callable[[Tensor], Tensor]) -> None:
    values = torch.rand(32).add(0.1)
    assert same(each_thread(f"{name}.f32", (values,), F32), function(values))


@pytest.mark.parametrize(
    ("name", "function"),
    [("ex2", torch.exp2), ("lg2", torch.log2), ("rsqrt", torch.rsqrt), ("tanh", torch.tanh), ("sin", torch.sin)],
)
def test_approximations_are_near(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Hardware's own bits are not known; the simulator has what they approximate."""
    values = torch.rand(32).add(0.1)
    torch.testing.assert_close(each_thread(f"{name}.approx.f32", (values,), F32), function(values))


def test_ftz_flushes_operands_and_results() -> None:
    tiny = torch.tensor([1e-40, -1e-40, 1.5e-38])
    assert each_thread("mul.ftz.f32", (tiny, torch.tensor([1e3, 1e3, 0.5])), F32).tolist() == [0.0, 0.0, 0.0]
    assert each_thread("mul.f32", (tiny, torch.tensor([1e3, 1e3, 0.5])), F32).ne(0).all()


@pytest.mark.parametrize("kind", NARROW)
def test_sixteen_bits_round_once(kind: str) -> None:
    a, b, c = torch.randn(3, 64).to(NARROW[kind])
    found = each_thread(f"fma.rn.{kind}", (a, b, c), NARROW[kind])
    assert same(found, (a.double() * b.double() + c.double()).to(NARROW[kind]))
    pairs = [t.view(I32) for t in (a, b)]
    assert same(each_thread(f"add.{kind}x2", pairs, I32), (a.float() + b.float()).to(NARROW[kind]).view(I32))


# ---- conversions -----------------------------------------------------------------------------------------------------

WIDE_RANGE = torch.cat([FLOATS, torch.randn(20) * 1e5, torch.tensor([65503.0, 65519.0, 65520.0, 1e30, 6e-8, 3e-5])])


@pytest.mark.parametrize("kind", NARROW)
def test_conversions_to_sixteen_bits(kind: str) -> None:
    dtype = NARROW[kind]
    wanted = WIDE_RANGE.to(dtype)
    found = each_thread(f"cvt.rn.{kind}.f32", (WIDE_RANGE,), torch.int16)
    number = ~WIDE_RANGE.isnan()
    assert same(found[number], wanted.view(torch.int16)[number])
    assert found[~number].tolist() == [0x7FFF]
    halves = torch.arange(0, 65536, 97).to(torch.int16)
    for some in halves.split(512):
        back = each_thread(f"cvt.f32.{kind}", (some,), F32)
        assert torch.equal(back.nan_to_num(7.0), some.view(dtype).float().nan_to_num(7.0))
    high, low = WIDE_RANGE[number], WIDE_RANGE[number].flip(0)
    pair = each_thread(f"cvt.rn.{kind}x2.f32", (high, low), I32)
    assert same(pair, fragments.as_pairs(low.to(dtype), high.to(dtype)))


def test_conversions_between_integers_and_floats() -> None:
    big = torch.tensor([2**53 + 1, -(2**62) - 12345, 16777217, 5], dtype=I64)
    assert same(each_thread("cvt.rn.f32.s64", (big,), F32), big.float())
    assert same(each_thread("cvt.rn.f64.s64", (big,), F64), big.double())
    values = torch.tensor([1.5, 2.5, -1.5, -2.7, 3e9, -3e9, math.nan, math.inf])
    rounded = {
        "rni": [2, 2, -2, -3], "rzi": [1, 2, -1, -2], "rmi": [1, 2, -2, -3], "rpi": [2, 3, -1, -2],
    }  # fmt: skip
    for how, wanted in rounded.items():
        found = each_thread(f"cvt.{how}.s32.f32", (values,), I32)
        assert found.tolist() == [*wanted, 2**31 - 1, -(2**31), 0, 2**31 - 1]
    assert each_thread("cvt.s64.s32", (A32,), I64).tolist() == A32.tolist()
    assert each_thread("cvt.u64.u32", (A32,), I64).tolist() == unsigned(A32)


def test_directed_roundings() -> None:
    """rz, rm, rp of float64 to float32: the float on that side."""
    values = torch.tensor([0.1, -0.1, 1 + 2.0**-40, -1 - 2.0**-40, 2.0], dtype=F64)
    near = values.float()
    down = torch.where(near.double() > values, torch.nextafter(near, torch.tensor(-math.inf)), near)
    up = torch.where(near.double() < values, torch.nextafter(near, torch.tensor(math.inf)), near)
    assert same(each_thread("cvt.rm.f32.f64", (values,), F32), down)
    assert same(each_thread("cvt.rp.f32.f64", (values,), F32), up)
    assert same(each_thread("cvt.rz.f32.f64", (values,), F32), torch.where(values > 0, down, up))
