"""The PTX simulator itself, on kernels of a few instructions: values by the PTX manual, and that whatever a kernel must
not do, or the simulator does not know, is reported with the instruction's name."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import fragments
import ptx_tools
import pytest
import torch
from torch import Tensor

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<64>; .reg .b64 %d<32>; .reg .f32 %f<16>; .reg .f64 %g<8>;
    ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %laneid;
"""
I32, I64, F32, F64 = torch.int32, torch.int64, torch.float32, torch.float64
NARROW = {"f16": torch.float16, "bf16": torch.bfloat16}


def kernel(body: str, variables: str = "") -> str:
    """k(in, out) whose registers are declared; %d0 and %d1 hold the addresses, %r0 the thread."""
    return f"{HEAD}{variables}\n.visible .entry k(.param .u64 in, .param .u64 out)\n{{\n{REGISTERS}{body}\n ret;\n}}\n"


def run(
    body: str,
    values: Tensor,
    out: Tensor,
    *,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    cooperative: bool = False,
    variables: str = "",
) -> Tensor:
    ptx_tools.Module(kernel(body, variables)).launch(
        "k", values, out, grid=(blocks,), block=(threads,), shared=shared, cooperative=cooperative, unwritten=(out,)
    )
    return out


def each_thread(opcode: str, operands: Sequence[Tensor], result: torch.dtype) -> Tensor:
    """The opcode on row t of the operands, 8 bytes each, in thread t."""
    count = len(operands)
    rows = torch.zeros(len(operands[0]), count, dtype=I64)
    for i, operand in enumerate(operands):
        rows.view(torch.uint8).view(*rows.shape, 8)[:, i, : operand.element_size()] = operand.view(torch.uint8).view(
            len(operand), -1
        )
    size = {2: "h", 4: "r", 8: "d"}
    source, target = size[operands[0].element_size()], size[result.itemsize]
    registers = [f"%{source}{10 + i}" for i in range(count)]
    moves = "".join(
        f"ld.global.b{8 * operands[0].element_size()} {register}, [%d2+{8 * i}];"
        for i, register in enumerate(registers)
    )
    body = f"""
    mad.wide.u32 %d2, %r0, {8 * count}, %d0; mad.wide.u32 %d3, %r0, {result.itemsize}, %d1;
    {moves}
    {opcode} %{target}4, {", ".join(registers)};
    st.global.b{8 * result.itemsize} [%d3], %{target}4;"""
    return run(body, rows, torch.zeros(len(rows), dtype=result), threads=len(rows))


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


# ---- arithmetic ------------------------------------------------------------------------------------------------------

A32 = torch.tensor([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 12345, -98765, 0x5A5A5A5A, 255, 256], dtype=I32)
B32 = torch.tensor([1, 1, 3, -2, 2, 2**31 - 1, 2, -31, 4321, 0x0F0F0F0F, 13, -1], dtype=I32)
A64, B64 = A32.long() * 0x1_0000_0001, B32.long() * 0x7FFF_FFFF
FLOATS = torch.tensor([0.0, -0.0, 1.0, -1.5, 3.0e38, 1e-38, 1e-42, math.inf, -math.inf, math.nan, 0.1, 2.5])
OTHERS = torch.tensor([1.0, 2.0, 3.0, 0.75, 3.0e38, 1e-3, 1.0, -math.inf, 2.0, 1.0, 0.7, math.nan])


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


# ---- predicates, branches, memory ------------------------------------------------------------------------------------

STORE = "mad.wide.u32 %d3, %r0, 4, %d1; st.global.u32 [%d3], %r5;"


@pytest.mark.parametrize("how", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "num", "nan"])
def test_comparisons(how: str) -> None:
    """The unordered ones (…u) also hold where an operand is NaN, the others do not, not even `ne`."""
    body = f"""mad.wide.u32 %d2, %r0, 8, %d0; ld.global.v2.f32 {{%f1, %f2}}, [%d2];
    setp.{how}.f32 %p1|%p2, %f1, %f2; selp.u32 %r5, 1, 0, %p1; @%p2 add.u32 %r5, %r5, 2; {STORE}"""
    a, b = FLOATS, torch.where(torch.arange(12) % 3 == 0, FLOATS, OTHERS)
    found = run(body, torch.stack([a, b], 1).contiguous(), torch.zeros(12, dtype=I32), threads=12)
    nan = a.isnan() | b.isnan()
    plain = {"eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    wanted = plain | {"equ": (a == b) | nan, "neu": a != b, "ltu": (a < b) | nan, "num": ~nan, "nan": nan}
    assert found.tolist() == [1 if v else 2 for v in wanted[how].tolist()]


def test_lanes_that_part_meet_again() -> None:
    """Each lane goes round its own number of times; all of them shuffle afterwards."""
    body = f"""mov.u32 %r5, 0; mov.u32 %r2, 0;
L: setp.ge.u32 %p1, %r2, %r0; @%p1 bra M; add.u32 %r5, %r5, %r2; add.u32 %r2, %r2, 1; bra.uni L;
M: shfl.sync.bfly.b32 %r5, %r5, 1, 0x1f, 0xffffffff; {STORE}"""
    found = run(body, torch.zeros(1), torch.zeros(32, dtype=I32))
    assert found.tolist() == [sum(range(lane ^ 1)) for lane in range(32)]


def test_lanes_wait_for_others_of_their_mask() -> None:
    """The two halves of a warp come to one shuffle by different ways, the code of one of them far behind it."""
    body = f"""setp.lt.u32 %p1, %r0, 16; mov.u32 %r5, %r0; @!%p1 bra FAR;
J: shfl.sync.idx.b32 %r5, %r5, 31, 0x1f, 0xffffffff; {STORE} ret;
FAR: add.u32 %r5, %r5, 100; bra.uni J;"""
    assert run(body, torch.zeros(1), torch.zeros(32, dtype=I32)).tolist() == [131] * 32


def test_a_switch_is_a_branch_by_index() -> None:
    body = f"""and.b32 %r2, %r0, 1;
T: .branchtargets A, B;
    brx.idx %r2, T;
A: mov.u32 %r5, 7; bra.uni E;
B: mov.u32 %r5, 9;
E: {STORE}"""
    assert run(body, torch.zeros(1), torch.zeros(32, dtype=I32)).tolist() == [7, 9] * 16


def test_memory_spaces() -> None:
    """Constants, local and shared memory, by their own addresses and by generic ones; vectors; signs of small types."""
    variables = ".const .align 4 .b32 table[4] = {10, 20, 30, 40};\n.extern .shared .align 16 .b8 dyn[];"
    body = f"""and.b32 %r2, %r0, 3; mul.wide.u32 %d4, %r2, 4; mov.u64 %d5, table; add.s64 %d5, %d5, %d4;
    ld.const.u32 %r5, [%d5];
    {{ .local .align 16 .b8 own[16]; .reg .b64 %a; mov.u64 %a, own; cvta.local.u64 %a, %a;
       st.v2.u32 [%a+8], {{%r5, %r0}}; ld.local.u32 %r6, [own+12]; ld.u32 %r5, [%a+8]; }}
    add.u32 %r5, %r5, %r6;
    mov.u32 %r3, dyn; mad.lo.u32 %r3, %r0, 4, %r3; st.shared.u32 [%r3], %r5; bar.warp.sync -1;
    cvt.u64.u32 %d6, %r3; cvta.shared.u64 %d6, %d6; ld.u32 %r5, [%d6];
    ld.global.s8 %r7, [%d0]; ld.global.u8 %r8, [%d0]; add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8; {STORE}"""
    values = torch.tensor([-3], dtype=torch.int8)
    found = run(body, values, torch.zeros(32, dtype=I32), shared=128, variables=variables)
    assert found.tolist() == [10 * (t % 4 + 1) + t - 3 + 253 for t in range(32)]


def test_packing() -> None:
    body = f"""mov.b32 %r2, 0x00020001; mov.b32 {{%h1, %h2}}, %r2; mov.b32 %r5, {{%h2, %h1}};
    cvt.u64.u32 %d4, %r5; mov.b64 {{%r3, %r4}}, %d4; mov.b64 %d5, {{%r4, %r3}}; shr.u64 %d5, %d5, 32;
    cvt.u32.u64 %r5, %d5; {STORE}"""
    assert run(body, torch.zeros(1), torch.zeros(32, dtype=I32)).tolist() == [0x00010002] * 32


@pytest.mark.parametrize(("name", "operand", "wanted"), [("add", "1", 64), ("max", "%r0", 63), ("or", "%r0", 63),
                                                         ("inc", "9", 4), ("exch", "5", 5)])  # fmt: skip
def test_atomics(name: str, operand: str, wanted: int) -> None:
    kind = "b32" if name in ("or", "exch") else "u32"
    body = f"""setp.ne.u32 %p1, %r0, 0; @!%p1 st.global.u32 [%d1], 0; bar.sync 0;
    atom.global.{name}.{kind} %r5, [%d1], {operand}; red.global.add.u32 [%d1], 0;"""
    assert run(body, torch.zeros(1), torch.zeros(1, dtype=I32), threads=64).item() == wanted
    body = """setp.ne.u32 %p1, %r0, 0; @!%p1 st.global.f32 [%d1], 0f00000000; bar.sync 0;
    red.global.add.f32 [%d1], 0f3F000000;"""
    assert run(body, torch.zeros(1), torch.zeros(1), threads=64).item() == 32.0


@pytest.mark.parametrize(("least", "wanted"), [(0, 7), (40, 2 + 1), (64, 0)])
def test_barriers_that_reduce(least: int, wanted: int) -> None:
    """popc, or, and over the predicates of a whole block."""
    body = f"""setp.ge.u32 %p1, %r0, {least}; bar.red.popc.u32 %r2, 0, %p1; bar.red.or.pred %p2, 0, %p1;
    bar.red.and.pred %p3, 1, 64, %p1; selp.u32 %r5, 2, 0, %p2; selp.u32 %r3, 4, 0, %p3; add.u32 %r5, %r5, %r3;
    setp.eq.u32 %p4, %r2, {64 - least}; setp.ne.u32 %p5, %r2, 0; and.pred %p4, %p4, %p5;
    selp.u32 %r3, 1, 0, %p4; add.u32 %r5, %r5, %r3; {STORE}"""
    assert run(body, torch.zeros(1), torch.zeros(64, dtype=I32), threads=64).tolist() == [wanted] * 64


def test_a_barrier_between_blocks() -> None:
    """Blocks of a cooperative launch count each other up with release and acquire, and spin until all have come."""
    body = """mov.u32 %r2, %ctaid.x; mov.u32 %r6, %nctaid.x; mad.wide.u32 %d3, %r2, 4, %d1;
    st.global.u32 [%d3], %r2; bar.sync 0;
    setp.ne.u32 %p1, %r0, 0; @%p1 bra WAITED;
    red.release.gpu.global.add.u32 [%d0], 1;
SPIN: ld.acquire.gpu.global.u32 %r3, [%d0]; setp.lt.u32 %p2, %r3, %r6; @%p2 bra SPIN;
WAITED: bar.sync 0;
    sub.u32 %r4, %r6, %r2; sub.u32 %r4, %r4, 1; mad.wide.u32 %d4, %r4, 4, %d1; ld.global.u32 %r5, [%d4];
    setp.eq.u32 %p3, %r0, 40; mul.wide.u32 %d5, %r6, 4; add.s64 %d5, %d5, %d3; @%p3 st.global.u32 [%d5], %r5;"""
    out = torch.zeros(10, dtype=I32)
    found = run(body, torch.zeros(1, dtype=I32), out, threads=64, blocks=5, cooperative=True)
    assert found[5:].tolist() == [4, 3, 2, 1, 0]


# ---- warps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, width: int) -> None:
    for by in (0, 1, 5, 7, 31):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        body = f"""mul.lo.u32 %r2, %r0, 3; shfl.sync.{mode}.b32 %r5|%p1, %r2, {by}, {clamp}, -1;
        @%p1 add.u32 %r5, %r5, 1000; {STORE}"""
        found = run(body, torch.zeros(1), torch.zeros(32, dtype=I32)).tolist()
        assert found == [3 * lane + 1000 * inside for lane, inside in fragments.shuffled(mode, by, width)]


def test_votes_and_reductions() -> None:
    body = """and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 1; vote.sync.ballot.b32 %r5, %p1, -1;
    vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1; vote.sync.uni.pred %p4, %p1, -1;
    redux.sync.max.s32 %r6, %r0, -1; redux.sync.add.u32 %r7, %r0, -1; match.any.sync.b32 %r8, %r2, -1;
    selp.u32 %r9, 1, 0, %p2; selp.u32 %r10, 1, 0, %p3; add.u32 %r9, %r9, %r10; selp.u32 %r10, 1, 0, %p4;
    add.u32 %r9, %r9, %r10; mad.wide.u32 %d3, %r0, 32, %d1; st.global.v4.u32 [%d3], {%r5, %r6, %r7, %r8};
    st.global.v2.u32 [%d3+16], {%r9, %r9};"""
    found = run(body, torch.zeros(1), torch.zeros(32, 8, dtype=I32))
    odd = -0x55555556
    assert found[0, :5].tolist() == [odd, 31, 496, 0x55555555, 1]
    assert found[1, :5].tolist() == [odd, 31, 496, odd, 1]


MMA = {  # form: A's and B's elements, places of A and B, 16-bit
    "m16n8k16": (8, 4, fragments.a_16x16, fragments.b_16x8, (16, 16), (16, 8)),
    "m16n8k8": (4, 2, fragments.a_16x8, fragments.b_8x8, (16, 8), (8, 8)),
}


def product(opcode: str, a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], results: int) -> Tensor:
    """[32, results]: D's registers, from those of A, B and C (int32, one value a lane)."""
    rows = torch.stack([*a, *b, *c], 1).contiguous()
    names = [f"%r{10 + i}" for i in range(rows.shape[1])]
    loads = "".join(f"ld.global.u32 {name}, [%d2+{4 * i}];" for i, name in enumerate(names))
    groups, start = [], 0
    for size in (len(a), len(b), len(c)):
        groups.append("{" + ", ".join(names[start : start + size]) + "}")
        start += size
    d = [f"%r{50 + i}" for i in range(results)]
    stores = "".join(f"st.global.u32 [%d3+{4 * i}], {name};" for i, name in enumerate(d))
    body = f"""mad.wide.u32 %d2, %r0, {4 * rows.shape[1]}, %d0; mad.wide.u32 %d3, %r0, {4 * results}, %d1; {loads}
    {opcode} {{{", ".join(d)}}}, {", ".join(groups)}; {stores}"""
    return run(body, rows, torch.zeros(32, results, dtype=I32))


@pytest.mark.parametrize("form", MMA)
@pytest.mark.parametrize("kind", NARROW)
def test_mma_has_the_fragments_of_the_manual(kind: str, form: str) -> None:
    """Small integers, so every sum is exact."""
    of_a, of_b, place_a, place_b, shape_a, shape_b = MMA[form]
    a, b = (torch.randint(-8, 9, shape).to(NARROW[kind]) for shape in (shape_a, shape_b))
    c = torch.randint(-99, 100, (16, 8)).float()
    pairs_a = [fragments.as_pairs(a[place_a(i)], a[place_a(i + 1)]) for i in range(0, of_a, 2)]
    pairs_b = [fragments.as_pairs(b[place_b(i)], b[place_b(i + 1)]) for i in range(0, of_b, 2)]
    sums = [c[fragments.d_16x8(i)].view(I32) for i in range(4)]
    found = product(f"mma.sync.aligned.{form}.row.col.f32.{kind}.{kind}.f32", pairs_a, pairs_b, sums, 4)
    wanted = c + a.float() @ b.float()
    for i in range(4):
        assert same(found[:, i].contiguous(), wanted[fragments.d_16x8(i)]), i
    if kind == "f16":
        halves = c.half()
        sums = [fragments.as_pairs(halves[fragments.d_16x8(i)], halves[fragments.d_16x8(i + 1)]) for i in (0, 2)]
        found = product(f"mma.sync.aligned.{form}.row.col.f16.f16.f16.f16", pairs_a, pairs_b, sums, 2)
        for i, register in ((0, 0), (2, 1)):
            low, high = (wanted.half()[fragments.d_16x8(i + k)] for k in (0, 1))
            assert same(found[:, register].contiguous(), fragments.as_pairs(low, high))


@pytest.mark.parametrize("depth", [8, 4])
def test_mma_of_tf32(depth: int) -> None:
    a, b, c = torch.randint(-8, 9, (16, depth)).float(), torch.randint(-8, 9, (depth, 8)).float(), torch.zeros(16, 8)
    of_a = [a[fragments.a_16x8_tf32(i)].view(I32) for i in range(depth // 2)]
    of_b = [b[fragments.b_8x8_tf32(i)].view(I32) for i in range(depth // 4)]
    sums = [c[fragments.d_16x8(i)].view(I32) for i in range(4)]
    found = product(f"mma.sync.aligned.m16n8k{depth}.row.col.f32.tf32.tf32.f32", of_a, of_b, sums, 4)
    for i in range(4):
        assert same(found[:, i].contiguous(), (a @ b)[fragments.d_16x8(i)])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_out_matrices(count: int, transposed: bool) -> None:
    matrices = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8)
    registers = [f"%r{10 + i}" for i in range(count)]
    stores = "".join(f"st.global.u32 [%d3+{4 * i}], {name};" for i, name in enumerate(registers))
    body = f"""mov.u32 %r2, dyn; mad.lo.u32 %r2, %r0, 16, %r2; mad.wide.u32 %d2, %r0, 16, %d0;
    ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%d2]; st.shared.v4.u32 [%r2], {{%r3, %r4, %r5, %r6}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16 {{{", ".join(registers)}}}, [%r2];
    mad.wide.u32 %d3, %r0, {4 * count}, %d1; {stores}"""
    out = torch.zeros(32, count, dtype=I32)
    found = run(body, matrices, out, shared=512, variables=".extern .shared .align 16 .b8 dyn[];")
    low, high = fragments.ldmatrix_pair(transposed)
    for i in range(count):
        rows = matrices.view(32, 8)[fragments.ldmatrix_row(i)]
        assert same(found[:, i].contiguous(), fragments.as_pairs(rows[low], rows[high]))


COPY = """mov.u32 %r2, dyn; mad.lo.u32 %r3, %r0, 16, %r2; mad.wide.u32 %d2, %r0, 16, %d0;
    xor.b32 %r4, %r0, 1; mad.lo.u32 %r4, %r4, 16, %r2;"""
SEEN = """ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r4]; mad.wide.u32 %d3, %r0, 16, %d1;
    st.global.v4.u32 [%d3], {%r5, %r6, %r7, %r8};"""
DYNAMIC = ".extern .shared .align 16 .b8 dyn[];"


@pytest.mark.parametrize("read", [16, 8, 0])
def test_copies(read: int) -> None:
    """The first bytes come from global memory, zeros behind; the neighbour sees them after wait and barrier."""
    values = torch.arange(256, dtype=I32)
    body = f"""{COPY} cp.async.cg.shared.global [%r3], [%d2], 16, {read}; cp.async.commit_group;
    cp.async.wait_group 0; bar.sync 0; {SEEN}"""
    found = run(body, values, torch.zeros(64, 4, dtype=I32), threads=64, shared=1024, variables=DYNAMIC)
    wanted = values.view(64, 4).clone()
    wanted[:, read // 4 :] = 0
    assert found.tolist() == wanted.view(32, 2, 4).flip(1).reshape(64, 4).tolist()


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def wrong(body: str, words: str, *, threads: int = 64, shared: int = 1024, out: int = 256) -> None:
    with pytest.raises(ptx_tools.PtxError) as caught:
        run(body, torch.zeros(256, dtype=I32), torch.zeros(out, dtype=I32), threads=threads, shared=shared,
            variables=DYNAMIC)  # fmt: skip
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1}, %d1, %d2, 1, 1, 1;",
        "cp.async.bulk.shared.global [%r1], [%d1], 16, [%r2];",
        "add.cc.u32 %r1, %r1, 1;",
        "add.rz.f32 %f1, %f1, %f1;",
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%g1, %g2}, {%g3}, {%g4}, {%g1, %g2};",
        "frobnicate.b32 %r1;",
    ],
)
def test_unknown_instructions_are_named(instruction: str) -> None:
    wrong(instruction, f"does not know this instruction (line 11 of k): {instruction[:-1]}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("st.global.u32 [%d1+1024], %r0;", "global memory outside every tensor"),
        ("ld.global.u32 %r2, [%d0+-4];", "global memory outside every tensor"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%d0+1016];", "misaligned"),
        ("ld.global.u32 %r2, [%d0+2];", "misaligned"),
        ("mov.u64 %d2, 16; ld.global.u32 %r2, [%d2];", "a null pointer"),
        ("ld.global.u32 %r2, [%d1];", "global memory is read and was never written"),
        ("ld.shared.u32 %r2, [dyn+4];", "shared memory at 4 is read and was never written"),
        ("st.shared.u32 [dyn+1024], %r0;", "shared memory at 1024, of 1024 bytes"),
        ("ld.shared.v2.u32 {%r2, %r3}, [dyn+4];", "misaligned"),
        ("cp.async.ca.shared.global [dyn], [%d0], 4; cp.async.commit_group; ld.shared.u32 %r2, [dyn];",
         "is read before its copy was waited for"),
        ("cp.async.ca.shared.global [dyn], [%d0], 4; cp.async.wait_group 0; ld.shared.u32 %r2, [dyn];",
         "is read before its copy was waited for"),
        ("cp.async.ca.shared.global [dyn], [%d0], 4;", "returns with copies under way"),
        ("setp.lt.u32 %p1, %r0, 40; @%p1 bar.sync 0; @%p1 bar.sync 1, 64;", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 40; @%p1 ret; shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", "lanes that have returned"),
        ("shfl.sync.bfly.b32 %r2, %r0, 1, 31, 1;", "the lane is not in its own mask"),
        ("setp.lt.u32 %p1, %r1, 4; @%p1 shfl.sync.idx.b32 %r2, %r0, 9, 31, 15;", "reads lane 9"),
        ("setp.lt.u32 %p1, %r1, 4; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [dyn];", "deadlock"),
        ("trap;", "a trap"),
    ],
)  # fmt: skip
def test_what_kernels_must_not_do(body: str, words: str) -> None:
    wrong(body, words)


def test_text_that_is_no_ptx() -> None:
    for body, words in {
        "add.u32 %r1, %r2, nothing;": "no operand: nothing",
        "bra NOWHERE;": "no label NOWHERE",
        ".surprise 3;": "what is .surprise 3?",
        "mov.u32 %r1, %wonder;": "unknown register",
    }.items():
        with pytest.raises(ptx_tools.PtxError, match=words.replace("?", r"\?")):
            ptx_tools.Module(kernel(body))
    with pytest.raises(ptx_tools.PtxError, match="the module has no kernel other"):
        ptx_tools.Module(kernel("")).launch("other")
