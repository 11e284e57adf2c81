"""The CUDA emulator itself, on kernels that do one thing each (simt/unit.cpp): what it computes, and that whatever CUDA
forbids is reported under each schedule."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import simt_tools
import torch
from fragments import a_16x16, as_pairs, b_16x8, d_16x8, ldmatrix_pair, shuffled
from torch import Tensor


@pytest.fixture(params=[*simt_tools.SCHEDULES])
def emulator(request: pytest.FixtureRequest) -> Iterator[simt_tools.Emulator]:
    with simt_tools.emulated(request.param, seed=4) as found:
        found.library.simt_unit.argtypes = (
            ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        found.library.simt_error.restype = ctypes.c_char_p
        yield found


def launch(
    emulator: simt_tools.Emulator,
    name: str,
    threads: int = 64,
    *,
    blocks: int = 1,
    shared: int = 0,
    grid: bool = False,
    values: Tensor | None = None,
) -> tuple[Tensor, str]:
    """(out, what the emulator reports); in = 0, 1, 2 ... where no values are given."""
    values, out = torch.arange(1024.0) if values is None else values.contiguous(), torch.zeros(1024)
    emulator.reset()
    status = emulator.library.simt_unit(
        name.encode(), blocks, threads, shared or 4 * threads, grid, values.data_ptr(), out.data_ptr()
    )
    report = emulator.library.simt_error().decode()
    assert status != -1, f"no kernel of the name {name}"
    assert (status == 0) == (report == ""), report
    return out, report


# ---- what is right ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 31, 32, 100, 1024])
def test_a_barrier_orders_shared_memory(emulator: simt_tools.Emulator, threads: int) -> None:
    out, report = launch(emulator, "reverse", threads)
    assert not report
    assert out[:threads].tolist() == list(range(threads - 1, -1, -1))


def test_a_warp_barrier_orders_its_warp(emulator: simt_tools.Emulator) -> None:
    out, report = launch(emulator, "reverse_in_warps", 64)
    assert not report
    assert out[:64].tolist() == [*range(31, -1, -1), *range(63, 31, -1)]


def test_shuffles_and_ballot(emulator: simt_tools.Emulator) -> None:
    """A lane that would read beyond its segment keeps its own value."""
    out, report = launch(emulator, "shuffles", 32)
    assert not report
    wanted = [shuffled("bfly", 5), shuffled("up", 3), shuffled("down", 3), shuffled("idx", 6, 8)]
    for lane, found in enumerate(out[:160].reshape(32, 5).tolist()):
        assert found == [*(of_all[lane][0] for of_all in wanted), 0xFF00]


def test_a_grid_barrier_orders_global_memory(emulator: simt_tools.Emulator) -> None:
    out, report = launch(emulator, "through_the_grid", 33, blocks=5, grid=True)
    assert not report
    assert out[:5].tolist() == [10.0] * 5


def test_shared_memory_starts_as_nan(emulator: simt_tools.Emulator) -> None:
    out, report = launch(emulator, "read_unwritten", 64)
    assert not report
    assert out[:64].isnan().all()


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (32, 31), (33, 0)])
def test_bank_conflicts(emulator: simt_tools.Emulator, stride: int, conflicts: int) -> None:
    """32 banks of 4 bytes: a stride of 2 words takes 2 cycles, of 32 words 32."""
    assert not launch(emulator, f"strided_words_{stride}", 32, shared=8192)[1]
    assert emulator.counts.shared_accesses == 1
    assert emulator.counts.bank_conflicts == conflicts


def test_conversions_are_torchs() -> None:
    with simt_tools.emulated() as emulator:
        library = emulator.library
    library.simt_half_to_float.restype = ctypes.c_float
    for name in ("simt_float_to_half", "simt_float_to_bfloat"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_ushort, (ctypes.c_float,)
    halves = torch.arange(0, 65536, 7, dtype=torch.int32)
    for bits, value in zip(halves.tolist(), halves.to(torch.uint16).view(torch.float16).float().tolist(), strict=True):
        found = library.simt_half_to_float(bits)
        assert found == value or (found != found and value != value), bits
    scales = torch.tensor([1.0, 1e-3, 3e-5, 6e-8, 1e3, 65503.0, 65519.0, 65521.0, 1e30])
    values = torch.cat([torch.randn(200, 1).mul(scales).flatten(), torch.tensor([0.0, -0.0, float("inf"), 65520.0])])
    for name, dtype in (("simt_float_to_half", torch.float16), ("simt_float_to_bfloat", torch.bfloat16)):
        wanted = values.to(dtype).view(torch.int16).tolist()
        assert [getattr(library, name)(v) for v in values.tolist()] == [w & 0xFFFF for w in wanted]


# ---- instructions of PTX: what each lane holds, by the tables of the PTX manual (fragments.py) ----------------------

NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("dtype", NARROW)
def test_mma_has_the_fragments_of_the_manual(emulator: simt_tools.Emulator, dtype: str) -> None:
    """Small integers, so every sum is exact."""
    a, b = (torch.randint(-8, 9, shape).to(NARROW[dtype]) for shape in ((16, 16), (16, 8)))
    d = torch.randint(-99, 100, (16, 8)).float()
    registers = [as_pairs(a[a_16x16(2 * r)], a[a_16x16(2 * r + 1)]).view(torch.float32) for r in range(4)]
    registers += [as_pairs(b[b_16x8(2 * r)], b[b_16x8(2 * r + 1)]).view(torch.float32) for r in range(2)]
    registers += [d[d_16x8(i)] for i in range(4)]
    out, report = launch(emulator, f"mma_{dtype}", 32, values=torch.stack(registers, -1))
    assert not report
    found = torch.empty(16, 8)
    for i in range(4):
        found[d_16x8(i)] = out[:128].view(32, 4)[:, i]
    assert found.equal(d + a.float() @ b.float())


@pytest.mark.parametrize("dtype", NARROW)
def test_pairs_are_rounded_as_torch_does(emulator: simt_tools.Emulator, dtype: str) -> None:
    values = torch.randn(64) * torch.tensor([1.0, 1e-4, 300.0, 1e-7]).repeat(16)
    out, report = launch(emulator, f"pairs_{dtype}", 32, values=values)
    assert not report
    assert out[:32].view(torch.int16).equal(values.to(NARROW[dtype]).view(torch.int16))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_out_four_matrices(emulator: simt_tools.Emulator, transposed: bool) -> None:
    """Register n of each lane is of matrix n."""
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out, report = launch(
        emulator,
        "ldmatrix_trans" if transposed else "ldmatrix",
        32,
        shared=512,
        values=matrices.view(torch.float32),
    )
    assert not report
    low, high = ldmatrix_pair(transposed)
    for n, register in enumerate(out[:128].view(torch.int32).view(32, 4).T):
        assert register.equal(as_pairs(matrices[n][low], matrices[n][high]))


@pytest.mark.parametrize(("pitch", "conflicts"), [(32, 4), (128, 28), (144, 0)])
def test_bank_conflicts_of_ldmatrix(emulator: simt_tools.Emulator, pitch: int, conflicts: int) -> None:
    """Eight rows of 16 bytes at a time: 32 bytes apart two of them share each bank, 128 bytes apart all eight do."""
    assert not launch(emulator, f"ldmatrix_{pitch}_bytes_apart", 32, shared=32 * pitch)[1]
    assert emulator.counts.shared_accesses == 2  # the rows written, the rows read
    assert emulator.counts.bank_conflicts == 2 * conflicts


@pytest.mark.parametrize(("name", "copied"), [("copies", 4), ("copies_of_8_bytes", 2), ("copies_of_nothing", 0)])
def test_a_copy_fills_up_with_zeros(emulator: simt_tools.Emulator, name: str, copied: int) -> None:
    out, report = launch(emulator, name, 64, shared=1024)
    assert not report
    values = torch.arange(256.0).view(32, 2, 4).flip(1).reshape(64, 4)
    assert out[:320].view(64, 5)[:, :copied].equal(values[:, :copied])
    assert not out[:320].view(64, 5)[:, copied:4].any()
    assert emulator.counts.bytes_loaded == 64 * 4 * copied


def test_a_copy_that_is_pending_shows_nothing(emulator: simt_tools.Emulator) -> None:
    out, report = launch(emulator, "copies_second_pending", 64, shared=2048)
    assert not report
    seen = out[:320].view(64, 5)
    assert seen[:, :4].equal(torch.arange(256.0).view(32, 2, 4).flip(1).reshape(64, 4))
    assert seen[:, 4].isnan().all()
    for name in ("copies_not_waited", "copies_not_committed"):
        out, report = launch(emulator, name, 64, shared=1024)
        assert "returned while copies to shared memory were under way" in report
        assert not out[:320].nan_to_num().any(), name


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reverse_without_barrier", "race on shared memory"),
        ("all_write_one_word", "race on shared memory at 0: written, and written by thread"),
        ("beyond_shared", "write to shared memory at "),
        ("misaligned", "an access of 16 bytes is misaligned"),
        ("half_at_the_barrier", "deadlock: 1 threads wait for others that never come; block (0, 0, 0) thread 40 at"),
        ("diverged", "lanes of one warp meet in"),
        ("outside_the_mask", "the calling lane is not in the mask"),
        ("lane_that_is_missing", "reads lane 9, which is not in the mask"),
        ("copies_no_barrier", "race on shared memory"),
        ("copy_misaligned", "an access of 16 bytes is misaligned"),
    ],
)
def test_what_cuda_forbids_is_reported(emulator: simt_tools.Emulator, name: str, words: str) -> None:
    report = launch(emulator, name, 64, shared=1024)[1]
    assert words in report


def test_signals_between_blocks_need_a_cooperative_launch(emulator: simt_tools.Emulator) -> None:
    assert "between blocks in a launch that is not cooperative" in launch(emulator, "through_the_grid", blocks=2)[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("through_the_grid_at_once", "race on global memory"),
        ("a_signal_before_the_barrier", "race on global memory"),
        ("no_barrier_after_the_wait", "race on global memory"),
        ("one_block_does_not_come", "threads wait for others that never come"),
    ],
)
def test_what_blocks_must_not_do_is_reported(emulator: simt_tools.Emulator, name: str, words: str) -> None:
    """A write and a read in different blocks are ordered by barrier, signal, wait, barrier, and nothing less."""
    assert words in launch(emulator, name, 64, blocks=3, grid=True)[1]


def test_launches_that_cannot_be(emulator: simt_tools.Emulator) -> None:
    assert "1 blocks of 1025 threads" in launch(emulator, "reverse", 1025)[1]
    assert "0 blocks of 64 threads" in launch(emulator, "reverse", blocks=0)[1]
    assert "65536 bytes of shared memory were not asked for" in launch(emulator, "reverse", shared=64 << 10)[1]


def test_a_launch_after_a_failed_one_is_sound(emulator: simt_tools.Emulator) -> None:
    assert launch(emulator, "diverged")[1]
    out, report = launch(emulator, "reverse", 64)
    assert not report
    assert out[0] == 63
