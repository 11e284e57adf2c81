"""The PTX simulator itself, on kernels of a few instructions: values by the PTX manual, and that whatever a kernel must
not do, or the simulator does not know, is reported with the instruction's name."""

from __future__ import annotations

from collections.abc import Sequence

import fragments
import ptx_tools
import pytest
import torch
from ptx_snippets import FLOATS, I32, NARROW, OTHERS, kernel, run, same
from torch import Tensor

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
