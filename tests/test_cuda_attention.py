"""What is particular to CUDA attention, in the emulator: every schedule, bank conflicts, keys cut into chunks, what
moves how often, numbers in device memory that lie beyond their limits. Values on the shared cases are in
test_attention.py, planted bugs in test_cuda_hunt.py, registers in test_cuda_budgets.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attention_cases as ac
import attention_numerics as an
import pytest
import simt_tools
import torch
from attention_cases import ALL, ALL_PACKED, BASE, BF16, CAUSAL, F16, F32, F64, PACKED, Case
from test_norm_properties import assert_same_bits
from torch import Tensor

from handtuned import ops

SCHEDULES = [("random", 1), ("forward", 0), ("backward", 0), ("warp_greedy", 3)]

# On tensor cores in tiles for each width, beside the kernels for every type and width.
FORMS = [
    ALL.with_(dtype=BF16),
    ALL_PACKED.with_(dtype=F32),
    PACKED.with_(dtype=F16, causal=True),
    CAUSAL.with_(dtype=F64, shape=(1, 1, 70, 130, 24)),
    Case((1, 2, 70, 130, 64), dtype=BF16, causal=True, dropout=0.1, sinks=F32),
    Case((1, 1, 17, 70, 128), dtype=F16, mask="add", mask_dims="qk"),
    Case((1, 1, 17, 70, 256), dtype=BF16, value_width=192),
    Case((1, 1, 5, 20, 264), dtype=BF16),
    Case((1, 1, 20, 30, 36), dtype=F32, value_width=136, mask="add", mask_dims="1"),
]
IN_CHUNKS = [
    Case((1, 2, 1, 520, 16), kv_heads=kv, dtype=d, sinks=s, window=w)
    for kv, d, s, w in ((1, BF16, F32, None), (2, F16, None, 300), (1, F32, F32, None), (2, F64, None, (20, 0)))
]


def everything(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return ac.results(case, ac.tensors(case))


@pytest.mark.parametrize("case", FORMS, ids=lambda c: c.name)
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    found = []
    for schedule, seed in SCHEDULES:
        with simt_tools.emulated(schedule, seed):
            found.append(everything(case))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("case", FORMS, ids=lambda c: c.name)
def test_no_bank_conflicts(case: Case) -> None:
    with simt_tools.emulated() as emulator:
        everything(case)
        assert emulator.counts.bank_conflicts == 0
        assert emulator.counts.most_shared_bytes <= 99 << 10


# ---- chunks of keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", IN_CHUNKS, ids=lambda c: c.name)
@pytest.mark.usefixtures("poison")
def test_keys_in_chunks(case: Case) -> None:
    with simt_tools.emulated("random", seed=5) as emulator:
        t = ac.tensors(case)
        with torch.no_grad():
            ac.run(case, t)
        assert emulator.counts.launches == 2  # the second merges them
        an.check_every_element(case, everything(case), an.exact(case, t))


@pytest.mark.parametrize("size", [1, 16])
def test_pages_are_read_in_place(size: int) -> None:
    """A cache in pages, in any order, gives the bits of the cache in one piece, and moves as many bytes of keys."""
    case = IN_CHUNKS[0].with_(shape=(2, 4, 1, 544, 32), lengths=(544, 301))
    t = ac.tensors(case)
    batch, heads, keys, width = t.key.shape
    order = torch.randperm(batch * keys // size).view(batch, keys // size)

    def paged(dense: Tensor) -> Tensor:
        pages = dense.new_full((batch * keys // size + 3, heads, size, width), torch.nan)
        pages[order.flatten()] = dense.reshape(batch, heads, -1, size, width).transpose(1, 2).flatten(0, 1)
        return pages

    def attend(key: Tensor, value: Tensor, table: Tensor | None) -> tuple[tuple[Tensor, Tensor], int]:
        options: tuple[Any, ...] = (None, t.sinks, case.score_scale, True, -1, -1, 0.0, 0.0, None)
        with simt_tools.emulated() as emulator:
            found = ops.attention(t.query, key, value, None, None, None, t.key_lengths, table, *options)
            return found, emulator.counts.bytes_loaded

    dense, moved = attend(t.key, t.value, None)
    found, moved_in_pages = attend(paged(t.key), paged(t.value), order.int())
    assert_same_bits(dict(enumerate(found)), dict(enumerate(dense)))  # type: ignore[arg-type]
    own = sum(case.lengths) * 2 * width * 2
    table = 2 * sum(case.lengths) * (width // 8) * 4  # an int32 for every 16 bytes
    assert own <= moved < 1.6 * own  # beside keys and values: lengths, queries, and the chunks' results
    assert moved_in_pages <= moved + 2 * table


# ---- what lies in device memory --------------------------------------------------------------------------------------


def test_numbers_beyond_their_limits_touch_nothing() -> None:
    """No launch waits for the device to look at them, so lengths and starts are brought into their limits."""
    long = BASE.with_(lengths=(51, 51))
    t = ac.tensors(long)
    assert t.key_lengths is not None
    with simt_tools.emulated():
        wanted = ac.run(long, t)
        for lengths in ((5000, 51), (51, 2**40)):
            wrong = torch.tensor(lengths)
            assert_same_bits(named(ac.run(long, replace(t, key_lengths=wrong))), named(wanted))
        negative = ac.run(long, replace(t, key_lengths=torch.tensor([51, -7])))[1]
    assert negative[0].equal(wanted[1][0])
    assert negative[1].isneginf().all()
    packed = ac.tensors(PACKED)
    assert packed.query_starts is not None
    with simt_tools.emulated():
        wanted = ac.run(PACKED, packed)
        beyond = packed.query_starts.clone()
        beyond[-1] = 10**6
        output, lse = ac.run(PACKED, replace(packed, query_starts=beyond))
    sequences = slice(0, int(packed.query_starts[-2]))
    assert output[sequences].equal(wanted[0][sequences])
    assert lse[:, sequences].equal(wanted[1][:, sequences])


def named(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("output", "lse"), outputs, strict=True))
