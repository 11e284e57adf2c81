"""Attention in Triton: the kernels of the forward. attention.py launches them; maths and tiles: attention_tile.py.

forward    one program owns a tile of rows and a block of value columns and walks over the keys that any of its rows
           sees, with a running maximum m, sum of weights and weighted sum of values. Tiles of keys that all rows
           see skip the comparisons. Where rows are few (decoding) the keys are dealt out to several programs by
           shape alone, and each leaves its three.
merge      adds those up, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import triton
import triton.language as tl

from .attention_arguments import inputs_of, rows_of, sizes_of
from .attention_tile import (
    LN_2,
    combine,
    flag_of,
    heads_of_rows,
    is_finite,
    key_tile,
    keys_of_rows,
    load_rows,
    load_tile,
    locate,
    product,
    query_rows,
    query_tile,
    scores,
    slopes_of,
    statistics_rows,
    store_rows,
    tile_of,
    unit_of,
    visible,
)
from .common import LOG2_E, keep_factor, scalar


@triton.jit
def _walk(
    q,
    rows,
    span,
    place,
    inputs,
    sizes,
    entries,
    numbers,
    PLAIN: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAREFUL: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """(m, sum of weights, sum of values) of the keys in `span`, m in the units of t times `unit` if PLAIN."""
    i, queries, mask_rows, dropout_rows, slope = rows
    inside = queries.inside
    begin, end, all_begin, all_end = span
    b, kv_head, first_key, keys, offset, value_start = place
    scale, softcap, threshold, keep_scale = numbers
    unit = unit_of(scale, PLAIN, ACC)
    m = tl.full((i.shape[0],), float("-inf"), ACC)
    mass = tl.zeros((i.shape[0],), ACC)
    total = tl.zeros((i.shape[0], VALUE_WIDTH), ACC)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_KEYS)
        there = j < keys
        k = key_tile(inputs.key, entries, sizes, b, kv_head, first_key, j, there, start)
        raw = product(q, queries, k, sizes.width, WIDTH, WHOLE, EVEN, ACC)
        within = inside[:, None] & there[None, :]
        t, _through = scores(
            raw, i[:, None], j[None, :], within, inputs.mask, mask_rows, entries.slopes, slope, offset, scale, softcap,
            PLAIN, BOOLEAN, CAP,
        )  # fmt: skip
        if (start < all_begin) | (start + BLOCK_KEYS > all_end):
            t = tl.where(visible(sizes, i[:, None], j[None, :], keys, offset, WINDOWED), t, float("-inf"))
        if PLAIN:
            new_m = tl.maximum(m, tl.max(t, 1) * unit)
            base = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = tl.exp2(t * unit - base[:, None])
            shrink = tl.exp2(m - base)
        else:
            new_m = tl.maximum(m, tl.max(t, 1))
            base = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = tl.exp2((t - base[:, None]) * unit)
            shrink = tl.exp2((m - base) * unit)
        mass = mass * shrink + tl.sum(p, 1)
        if inputs.seed is not None:
            p *= keep_factor(inputs.seed, dropout_rows, start, threshold, keep_scale, i.shape[0], BLOCK_KEYS, ACC)
        v_tile = key_tile(inputs.value, entries, sizes, b, kv_head, first_key, j, there, start)
        v = load_tile(v_tile, value_start, sizes.value_width, VALUE_WIDTH, EVEN_VALUES)
        total = combine(p, v, t != float("-inf"), total * shrink[:, None], ACC, CAREFUL)
        m = new_m
    return m, mass, total


@triton.jit
def _finish(m, mass, total, sinks, h, real, unit, ACC: tl.constexpr):
    """(output, lse) of rows: m in the units that `unit` turns into powers of two. Rows of nothing: 0 and -inf."""
    if sinks is not None:
        sink = tl.load(sinks + h, mask=real, other=float("-inf")).to(ACC)
        natural = m * (unit * LN_2)
        top = tl.maximum(natural, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2((natural - base) * LOG2_E)
        mass = mass * shrink + tl.exp2((sink - base) * LOG2_E)
        total = total * shrink[:, None]
    else:
        top = m * (unit * LN_2)
    nothing = mass == 0.0
    mass = tl.where(nothing, 1.0, mass)
    lse = top + tl.log2(mass) * LN_2
    return tl.where(nothing[:, None], 0.0, total / mass[:, None]), tl.where(nothing, float("-inf"), lse)


@triton.jit(do_not_specialize=["tiles", "splits", "keys_of_split"])
def forward_kernel(
    inputs,
    sinks,
    output,
    lse,
    parts,
    flags,
    sizes,
    entries,
    tiles,
    splits,
    keys_of_split,
    scale: tl.float64,
    softcap: tl.float64,
    threshold: tl.int64,
    keep_scale: tl.float64,
    PLAIN: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAREFUL: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """parts: None, or [splits, rows of the lse, value_width + 2], each row's sum of values, m and l.

    flags: None where nothing hides a key; else one for each program, set where its result is not finite. The CAREFUL
    kernel does those again.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    inputs, sizes, output = inputs_of(inputs), sizes_of(sizes), rows_of(output)
    pid = tl.program_id(0)
    tile, pid = tiles - 1 - pid % tiles, pid // tiles  # the last tiles see most keys where it is causal
    kv_head, pid = pid % (sizes.heads // sizes.group), pid // (sizes.heads // sizes.group)
    split, entry = pid % splits, pid // splits
    b, first_row = tile_of(entries, tile, BLOCK_ROWS, tiles, entry)
    queries, keys, _stored, first_query, first_key = locate(sizes, entries, b)
    wanted = first_row < queries * sizes.group
    flag, wanted = flag_of(flags, wanted, CAREFUL)
    if wanted:
        i, h, inside = heads_of_rows(sizes, first_row + tl.arange(0, BLOCK_ROWS), queries, kv_head)
        offset = (keys - queries) * sizes.bottom_right
        begin, end, all_begin, all_end = keys_of_rows(sizes, first_row, queries, keys, offset, BLOCK_ROWS, BLOCK_KEYS)
        begin = tl.maximum(begin, split * keys_of_split)
        end = tl.minimum(end, (split + 1) * keys_of_split)
        statistics = statistics_rows(sizes, entries, b, h, first_query, i)
        tile_of_queries = query_tile(inputs.query, entries, sizes, b, kv_head, h, first_query, i, inside, first_row)
        q = load_tile(tile_of_queries, 0, sizes.width, WIDTH, EVEN)
        mask_rows = query_rows(inputs.mask, b, h, 0, i)[:, None]
        slope = slopes_of(sizes, entries, b, h, inside, ACC)
        value_start = tl.program_id(1) * VALUE_WIDTH
        rows = (i, tile_of_queries, mask_rows, statistics, slope)
        span = (begin, end, all_begin, all_end)
        place = (b, kv_head, first_key, keys, offset, value_start)
        numbers = (scalar(scale, ACC), scalar(softcap, ACC), threshold, keep_scale)
        m, mass, total = _walk(
            q, rows, span, place, inputs, sizes, entries, numbers, PLAIN, BOOLEAN, CAP, WINDOWED, CAREFUL, WIDTH,
            VALUE_WIDTH, WHOLE, EVEN, EVEN_VALUES, BLOCK_KEYS, STAGES, ACC,
        )  # fmt: skip
        if flags is not None and not CAREFUL:
            tl.store(flag, tl.where(is_finite(total), 0.0, 1.0))
        if parts is None:
            real = i < tl.where(b < sizes.batch, queries, 0)
            unit = scalar(1.0, ACC) if PLAIN else unit_of(scale, PLAIN, ACC)
            out, statistic = _finish(m, mass, total, sinks, h, real, unit, ACC)
            rows_out = query_rows(output, b, h, first_query, i)
            store_rows(output.data, rows_out, inside, value_start, sizes.value_width, out, VALUE_WIDTH)
            if value_start == 0:
                tl.store(lse + statistics, statistic, mask=inside)
        else:
            at = (split.to(tl.int64) * sizes.statistics + statistics) * (sizes.value_width + 2)
            store_rows(parts, at, inside, value_start, sizes.value_width, total, VALUE_WIDTH)
            if value_start == 0:
                tl.store(parts + at + sizes.value_width, m, mask=inside)
                tl.store(parts + at + sizes.value_width + 1, mass, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts,
    sinks,
    output,
    lse,
    sizes,
    query_starts,
    splits,
    PLAIN: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    ACC: tl.constexpr = lse.dtype.element_ty
    sizes, output = sizes_of(sizes), rows_of(output)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    value_start = tl.program_id(1) * VALUE_WIDTH
    inside = row < sizes.statistics
    unit = scalar(1.0, ACC) if PLAIN else scalar(1.0, ACC) * LOG2_E
    m = tl.full((BLOCK_ROWS,), float("-inf"), ACC)
    mass = tl.zeros((BLOCK_ROWS,), ACC)
    total = tl.zeros((BLOCK_ROWS, VALUE_WIDTH), ACC)
    for split in range(0, splits):
        at = (split * sizes.statistics + row) * (sizes.value_width + 2)
        part_m = tl.load(parts + at + sizes.value_width, mask=inside, other=float("-inf"))
        part_l = tl.load(parts + at + sizes.value_width + 1, mask=inside, other=0.0)
        part = load_rows(parts, at, inside, value_start, sizes.value_width, VALUE_WIDTH, False)
        new_m = tl.maximum(m, part_m)
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        before, now = tl.exp2((m - base) * unit), tl.exp2((part_m - base) * unit)
        mass = mass * before + part_l * now
        total = total * before[:, None] + part * now[:, None]
        m = new_m
    h = row // sizes.total_rows % sizes.heads
    b = row // sizes.total_rows // sizes.heads  # 0 if packed
    real = inside
    if query_starts is not None:
        real = inside & (row % sizes.total_rows < tl.load(query_starts + sizes.batch))
    out, statistic = _finish(m, mass, total, sinks, h, real, unit, ACC)
    rows = query_rows(output, b, h, 0, row % sizes.total_rows)
    store_rows(output.data, rows, inside, value_start, sizes.value_width, out, VALUE_WIDTH)
    if value_start == 0:
        tl.store(lse + row, statistic, mask=inside)
