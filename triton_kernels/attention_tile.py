"""Attention in Triton: what the kernels of forward and backward share. The maths is in csrc/attention.h.

A tile is BLOCK_ROWS rows times BLOCK_KEYS keys of one batch entry and one kv head. Rows of a tile are those of all
query heads that read the kv head: row r is query r / group of head kv_head * group + r % group. So a single query of
grouped heads fills a tile, keys are read once for the whole group, and the gradients of a kv head need no second sum.

Scores are kept as t, with weights exp2(t * unit - ...). PLAIN, without softcap, additive mask and slopes and with a
positive scale, t is the bare product and unit = scale * log2(e): one multiplication and addition an element. Otherwise
t is the score itself and unit = log2(e), and what is subtracted is so before the multiplication: a mask of the lowest
number of its dtype stays finite. Hidden pairs have t = -inf.

Widths are padded to a power of two (WIDTH, VALUE_WIDTH) by masks: nothing behind a row is read. Where one block does
not hold a row (WHOLE is false) products go over it block by block, and value columns get programs of their own.

A NaN in a key or value that is hidden from a query must not reach it, but 0 * NaN is NaN. Tiles are computed as if
there were none. Where keys can be hidden inside a tile, a program whose result is not finite says so with a flag, and a
second launch of the kernel does what is flagged once more: CAREFUL replaces what is not finite by 0 and adds NaN to the
rows that see it. (In one kernel the second way takes registers from the first.)
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of device functions have no Python types)

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2_E, scalar, tanh

LN_2 = tl.constexpr(0.6931471805599453)


# ---- where a tile is -------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(entries, tile, BLOCK: tl.constexpr, tiles, entry):
    """(entry, first row) of a tile."""
    if entries.tiles is not None:
        entry = tl.load(entries.tiles + tile)
        first = tl.load(entries.tiles + tiles + tile)
    else:
        first = tile * BLOCK
    return entry, first


@triton.jit
def locate(sizes, entries, b):
    """Of entry b: (queries, visible keys, stored keys, first packed query, first packed key).

    Packed rows behind the last sequence are entry `batch`: its queries see no keys, its keys no queries.
    """
    queries, keys, first_query, first_key = sizes.query_rows, sizes.key_rows, 0, 0
    real = b < sizes.batch
    if entries.query_starts is not None:
        first_query = tl.load(entries.query_starts + b).to(tl.int32)
        queries = tl.load(entries.query_starts + b + 1, mask=real, other=sizes.query_rows).to(tl.int32) - first_query
        keys = tl.where(real, keys, 0)
    stored = keys
    if entries.key_starts is not None:
        first_key = tl.load(entries.key_starts + b).to(tl.int32)
        stored = tl.load(entries.key_starts + b + 1, mask=real, other=sizes.key_rows).to(tl.int32) - first_key
        keys = tl.where(real, stored, 0)
    if entries.key_lengths is not None:
        length = tl.load(entries.key_lengths + b, mask=real, other=0).to(tl.int32)
        keys = tl.minimum(tl.maximum(length, 0), keys)
    return queries, keys, stored, first_query, first_key


@triton.jit
def clipped(value, least, most):
    """value, an int64 that may lie outside, as an int32 in [least, most]."""
    return tl.minimum(tl.maximum(value, least), most).to(tl.int32)


@triton.jit
def keys_of_queries(sizes, first, last, keys, offset, BLOCK: tl.constexpr):
    """Of queries first .. last: (begin, end) of the keys that any of them sees, (begin, end) of those that all see."""
    low = first.to(tl.int64) + offset
    high = last.to(tl.int64) + offset
    begin = clipped(low - sizes.window_left, 0, keys)
    end = clipped(high + sizes.window_right + 1, 0, keys)
    all_begin = clipped(high - sizes.window_left, 0, keys)
    all_end = clipped(low + sizes.window_right + 1, 0, keys)
    return begin // BLOCK * BLOCK, end, all_begin, all_end


@triton.jit
def keys_of_rows(sizes, first_row, queries, keys, offset, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """The same of a tile of rows."""
    last_row = tl.minimum(first_row + BLOCK_ROWS, queries * sizes.group) - 1
    return keys_of_queries(sizes, first_row // sizes.group, last_row // sizes.group, keys, offset, BLOCK_KEYS)


@triton.jit
def heads_of_rows(sizes, r, queries, kv_head):
    """(queries, heads, which of them exist) of rows r."""
    return r // sizes.group, kv_head * sizes.group + r % sizes.group, r < queries * sizes.group


@triton.jit
def flag_of(flags, wanted, CAREFUL: tl.constexpr):
    """(a program's place among the flags, whether its tile is wanted: by the CAREFUL kernel if it was flagged)."""
    if flags is not None:
        flags += tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        if CAREFUL:
            wanted = wanted & (tl.load(flags) != 0.0)
    return flags, wanted


@triton.jit
def queries_of_keys(sizes, first, last, queries, offset):
    """The same the other way round."""
    low = first.to(tl.int64) - offset
    high = last.to(tl.int64) - offset
    begin = clipped(low - sizes.window_right, 0, queries)
    end = clipped(high + sizes.window_left + 1, 0, queries)
    all_begin = clipped(high - sizes.window_right, 0, queries)
    all_end = clipped(low + sizes.window_left + 1, 0, queries)
    return begin, end, all_begin, all_end


@triton.jit
def page_of(entries, sizes, b, j):
    """The pages of keys j."""
    slot = tl.minimum(j // sizes.page_size, sizes.max_pages - 1)
    page = tl.load(entries.pages + b.to(tl.int64) * sizes.max_pages + slot)
    return tl.minimum(tl.maximum(page, 0), sizes.num_pages - 1).to(tl.int32)


@triton.jit
def key_rows(tensor, entries, sizes, b, head, first, j):
    """Offsets [keys] of the rows of keys j; j may be any number behind the end, for a masked load."""
    if entries.pages is not None:
        page = page_of(entries, sizes, b, j)
        return page.to(tl.int64) * tensor.batch + head * tensor.head + (j % sizes.page_size).to(tl.int64) * tensor.row
    else:
        return b.to(tl.int64) * tensor.batch + head * tensor.head + (first + j).to(tl.int64) * tensor.row


@triton.jit
def query_rows(tensor, b, h, first, i):
    """Offsets [rows] of queries i of heads h."""
    return b.to(tl.int64) * tensor.batch + h.to(tl.int64) * tensor.head + (first + i).to(tl.int64) * tensor.row


@triton.jit
def statistics_rows(sizes, entries, b, h, first, i):
    """Flat indices [rows] in the lse, which are also the rows of the dropout mask."""
    if entries.query_starts is not None:
        return h.to(tl.int64) * sizes.total_rows + first + i
    else:
        return (b.to(tl.int64) * sizes.heads + h) * sizes.total_rows + i


@triton.jit
def slopes_of(sizes, entries, b, h, inside, ACC: tl.constexpr):
    """[rows, 1]; 0 where there are none."""
    if entries.slopes is not None:
        at = entries.slopes + b.to(tl.int64) * entries.slopes_batch + h
        real = inside & (h < tl.where(b < sizes.batch, sizes.heads, 0))
        return tl.load(at, mask=real, other=0.0).to(ACC)[:, None]
    else:
        return tl.zeros_like(h).to(ACC)[:, None]


# ---- memory ----------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows of a tensor [.., width] that a kernel reads by blocks of columns."""

    data: Any
    rows: Any  # [n] offsets
    inside: Any  # [n] which of them exist: the others are 0
    block: Any  # a descriptor or None: with one, what exists in memory behind the last is read instead of 0
    first: Any  # where in the descriptor's three outer dims


@triton.jit
def query_tile(tensor, entries, sizes, b, kv_head, h, first, i, inside, start):
    """Queries i of heads h. start: the first row of the tile, of those that share a kv head."""
    where = (0, 0, 0)
    if tensor.block is not None:
        entry = 0 if entries.query_starts is not None else b
        where = (entry, first + start // sizes.group, kv_head * sizes.group)
    return Tile(tensor.data, query_rows(tensor, b, h, first, i), inside, tensor.block, where)


@triton.jit
def key_tile(tensor, entries, sizes, b, head, first, j, there, start):
    """Keys j = start, start + 1, ... of a kv head. A tile of a descriptor lies within a page."""
    where = (0, 0, 0)
    if tensor.block is not None:
        if entries.pages is not None:
            where = (page_of(entries, sizes, b, start), head, start % sizes.page_size)
        else:
            where = (0 if entries.key_starts is not None else b, head, first + start)
    return Tile(tensor.data, key_rows(tensor, entries, sizes, b, head, first, j), there, tensor.block, where)


@triton.jit
def load_tile(tile, start, width, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """[rows, WIDTH]: columns start .. start + WIDTH, 0 outside. EVEN: every block is full."""
    if tile.block is not None:
        x, y, z = tile.first
        return tl.reshape(tile.block.load([x, y, z, start]), (tile.rows.shape[0], WIDTH))
    else:
        return load_rows(tile.data, tile.rows, tile.inside, start, width, WIDTH, EVEN)


@triton.jit
def load_rows(data, rows, inside, start, width, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """[rows, WIDTH]: columns start .. start + WIDTH, 0 outside. EVEN: every block is full."""
    column = start + tl.arange(0, WIDTH)
    at = data + rows[:, None] + column[None, :]
    if EVEN:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(data, rows, inside, start, width, values, WIDTH: tl.constexpr):
    column = start + tl.arange(0, WIDTH)
    at = data + rows[:, None] + column[None, :]
    tl.store(at, values.to(data.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


# ---- products --------------------------------------------------------------------------------------------------------


@triton.jit
def product(a, a_tile, b_tile, width, WIDTH: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr):
    """[rows of a, rows of b]: a_i . b_j. `a` holds whole rows of a; where those are too wide it is loaded by blocks."""
    if WHOLE:
        b = load_tile(b_tile, 0, width, WIDTH, EVEN)
        return tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=ACC)
    else:
        total = tl.zeros((a_tile.rows.shape[0], b_tile.rows.shape[0]), ACC)
        for start in range(0, width, WIDTH):
            one = load_tile(a_tile, start, width, WIDTH, EVEN)
            b = load_tile(b_tile, start, width, WIDTH, EVEN)
            total = tl.dot(one, tl.trans(b), total, input_precision="ieee", out_dtype=ACC)
        return total


@triton.jit
def combine(weights, rows, seen, total, ACC: tl.constexpr, CAREFUL: tl.constexpr):
    """total + weights @ rows, weights [m, n] rounded to the dtype of rows [n, width]."""
    if CAREFUL:
        wide = rows.to(ACC)
        finite = tl.abs(wide) < float("inf")
        touched = tl.dot(seen.to(tl.float16), tl.where(finite, 0.0, 1.0).to(tl.float16), out_dtype=tl.float32)
        total += tl.where(touched > 0.0, float("nan"), 0.0)
        rows = tl.where(finite, wide, 0.0).to(rows.dtype)
    return tl.dot(weights.to(rows.dtype), rows, total, input_precision="ieee", out_dtype=ACC)


@triton.jit
def is_finite(total):
    """Whether a whole block is."""
    return tl.sum(tl.sum(tl.where(tl.abs(total) < float("inf"), 0, 1), 1), 0) == 0


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def scores(
    raw,
    i,
    j,
    within,
    mask,
    mask_rows,
    slopes,
    slope,
    offset,
    scale,
    softcap,
    PLAIN: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAP: tl.constexpr,
):
    """(t, derivative of the softcap) of bare products; i, j, mask_rows and slope broadcast to them.

    What the mask hides gets -inf. within: where there is a mask to read.
    """
    t = raw
    through = raw
    if not PLAIN:
        t = raw * scale
        if CAP:
            through = tanh(t / softcap)
            t = softcap * through
            through = 1.0 - through * through
    if mask.data is not None:
        at = mask.data + mask_rows + j.to(tl.int64) * mask.key
        if BOOLEAN:
            t = tl.where(tl.load(at, mask=within, other=0) != 0, t, float("-inf"))
        else:
            added = tl.load(at, mask=within, other=0.0).to(t.dtype)
            t = tl.where(added == float("-inf"), added, t + added)
    if slopes is not None:
        t -= slope * tl.abs(j - i - offset).to(t.dtype)
    return t, through


@triton.jit
def visible(sizes, i, j, keys, offset, WINDOWED: tl.constexpr):
    """What length and window leave; i and j broadcast."""
    seen = (j < keys) & (i >= 0)
    if WINDOWED:
        distance = j - i - offset
        seen = seen & (distance <= sizes.window_right) & (distance >= -sizes.window_left)
    return seen


@triton.jit
def unit_of(scale, PLAIN: tl.constexpr, ACC: tl.constexpr):
    """What t is multiplied by before exp2."""
    if PLAIN:
        return scalar(scale, ACC) * LOG2_E
    else:
        return scalar(1.0, ACC) * LOG2_E


@triton.jit
def weights_of(t, lse, unit, PLAIN: tl.constexpr):
    """exp(score - lse), 0 for hidden pairs also where lse is NaN. lse: +inf for rows that see nothing; broadcasts."""
    p = tl.exp2(t * unit - lse * LOG2_E) if PLAIN else tl.exp2((t - lse) * LOG2_E)
    return tl.where(t == float("-inf"), 0.0, p)
