"""append_kv in Triton: new keys and values into their places of a cache, keys and queries turned on the way.

One launch: of the programs, those with program_id(1) = 0 write keys, 1 values, 2 turn queries. Nobody waits for the
device: what has no place in the cache (by its length, or its page) is not written, and a position behind the end of the
tables takes their last row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import common
from .attention_arguments import Rows, rows_of
from .attention_plan import in_place, rows_in
from .common import number
from .rotary import pass_on, turn


class Sizes(NamedTuple):
    batch: int  # hidden, as all of them
    query_rows: int
    new_rows: int
    cache_rows: int  # of an entry, or of a page
    entries: int
    max_pages: int
    positions: int


class Places(NamedTuple):
    lengths: Tensor  # keys of each sequence before the new ones
    pages: Tensor | None
    cos: Tensor | None  # [positions, angles]
    sin: Tensor | None


@triton.jit
def _rows(r, rows, heads, batch):
    """(entry, head, row, which exist) of rows r."""
    return r // rows // heads, r // rows % heads, r % rows, r < rows * heads * batch


@triton.jit
def _at(tensor, b, h, row):
    return (tensor.data + b * tensor.batch + h * tensor.head + row * tensor.row)[:, None]


@triton.jit
def _copy(
    x, target, position, places, positions, inside, width, angles, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows to their places, their first pairs turned by the tables' rows of these positions."""
    if places.cos is not None:
        table = (tl.minimum(tl.maximum(position, 0), positions - 1) * angles)[:, None]
        for start in range(0, angles, BLOCK):
            pair = start + tl.arange(0, BLOCK)[None, :]
            there = inside & (pair < angles)
            c = tl.load(places.cos + table + pair, mask=there, other=0.0)
            s = tl.load(places.sin + table + pair, mask=there, other=0.0)
            turn(x, target, c, s, pair, angles, there, INTERLEAVED)
    pass_on(x, target, inside, 2 * angles, width, BLOCK)


@triton.jit
def _append(new, cache, r, heads, places, sizes, width, angles, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    b, h, t, exists = _rows(r, number(sizes.new_rows), heads, number(sizes.batch))
    size = number(sizes.cache_rows)
    position = tl.load(places.lengths + b, mask=exists, other=-1).to(tl.int64) + t
    inside = exists & (position >= 0)
    if places.pages is not None:
        slot, row = position // size, position % size
        inside = inside & (slot < number(sizes.max_pages))
        entry = tl.load(places.pages + b * number(sizes.max_pages) + slot, mask=inside, other=-1).to(tl.int64)
        inside = inside & (entry >= 0) & (entry < number(sizes.entries))
    else:
        entry, row = b, position
        inside = inside & (position < size)
    x, target = _at(rows_of(new), b, h, t), _at(rows_of(cache), entry, h, row)
    _copy(x, target, position, places, number(sizes.positions), inside[:, None], width, angles, INTERLEAVED, BLOCK)


@triton.jit(do_not_specialize=["in_order"])
def append_kernel(
    query,
    key,
    value,
    output,
    key_cache,
    value_cache,
    places,
    sizes,
    heads,
    kv_heads,
    width,
    value_width,
    angles,
    in_order,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if tl.program_id(1) == 0:
        _append(key, key_cache, r, kv_heads, places, sizes, width, angles, INTERLEAVED, BLOCK)
    elif tl.program_id(1) == 1:
        bare = Places(places.lengths, places.pages, None, None)
        _append(value, value_cache, r, kv_heads, bare, sizes, value_width, 0, INTERLEAVED, BLOCK)
    elif output.data is not None:
        b, h, t, exists = _rows(r, number(sizes.query_rows), heads, number(sizes.batch))
        position = tl.load(places.lengths + b, mask=exists, other=0).to(tl.int64) + t * in_order
        x, target = _at(rows_of(query), b, h, t), _at(rows_of(output), b, h, t)
        positions = number(sizes.positions)
        _copy(x, target, position, places, positions, exists[:, None], width, angles, INTERLEAVED, BLOCK)


def append_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    """(query, turned; lengths after). The caches are written in place."""
    (batch, heads, query_rows, width), (kv_heads, new_rows) = query.shape, key.shape[1:3]
    query, key, value = (in_place(t) for t in (query, key, value))
    angles = 0 if cos is None else cos.shape[-1]
    output = common.empty_like(query) if angles else common.empty((0,), query)
    lengths = cache_lengths.long() + new_rows
    cos, sin = (t.contiguous() if t is not None and angles else None for t in (cos, sin))
    places = Places(cache_lengths.contiguous(), None if block_table is None else block_table.contiguous(), cos, sin)
    pages = 0 if block_table is None else block_table.shape[1]
    positions = 0 if cos is None else cos.shape[0]
    sizes = (batch, query_rows, new_rows, key_cache.shape[2], key_cache.shape[0], pages, positions)
    block = min(128, max(16, triton.next_power_of_2(max(width, value.shape[3]))))
    rows = 1024 // block
    most = batch * max(kv_heads * new_rows, heads * query_rows if angles else 0)
    if most and width and positions >= bool(angles):
        with common.on_device(query):
            append_kernel[(triton.cdiv(most, rows), 3 if angles else 2)](
                *(rows_in(query), rows_in(key), rows_in(value), rows_in(output) if angles else Rows(None)),
                *(rows_in(key_cache), rows_in(value_cache), places, Sizes(*map(common.hidden, sizes))),
                *(heads, kv_heads, width, value.shape[3], angles, int(in_order)),
                INTERLEAVED=interleaved,
                BLOCK_ROWS=rows,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return output, lengths
