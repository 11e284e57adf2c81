"""Attention in Triton: the kernels of the backward. attention.py launches them; maths and tiles: attention_tile.py.

    p = exp(s - lse),  dp = keep / (1 - p_drop) * (dout . v),  ds = p * (dp - delta),  delta = dout . out - dlse

    delta      a row after the other.
    rows       grad_query: one program owns a tile of rows and walks over keys, as the forward does.
    keys       grad_key and grad_value: one program owns a tile of keys of a kv head and walks over the rows of its
               group. Scores are made transposed, so that they are the left operand of both products as they are.
    mask       grad_mask: one program owns a tile of the mask and a share of what it was broadcast along, and walks over
               that share; the shares are added up afterwards.
    sinks      grad_sinks: one program owns a head.

Scores are made again in each, so that no program adds to what another one wrote: gradients have the same bits at every
run, on every device.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of kernels have no Python types)

import triton
import triton.language as tl

from .attention_arguments import inputs_of, rows_of, sizes_of
from .attention_tile import (
    combine,
    flag_of,
    heads_of_rows,
    is_finite,
    key_rows,
    key_tile,
    keys_of_queries,
    keys_of_rows,
    load_rows,
    load_tile,
    locate,
    product,
    queries_of_keys,
    query_rows,
    query_tile,
    scores,
    slopes_of,
    statistics_rows,
    store_rows,
    tile_of,
    unit_of,
    visible,
    weights_of,
)
from .common import keep_factor, number, scalar


@triton.jit
def delta_kernel(
    grad_output,
    output,
    grad_lse,
    delta,
    sizes,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    ACC: tl.constexpr = delta.dtype.element_ty
    grad_output, output, sizes = rows_of(grad_output), rows_of(output), sizes_of(sizes)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < sizes.statistics
    i, h = row % sizes.total_rows, row // sizes.total_rows % sizes.heads
    b = row // sizes.total_rows // sizes.heads  # 0 if packed
    grad_rows, rows = query_rows(grad_output, b, h, 0, i), query_rows(output, b, h, 0, i)
    total = tl.zeros((BLOCK_ROWS,), ACC)
    for start in range(0, sizes.value_width, VALUE_WIDTH):
        grad = load_rows(grad_output.data, grad_rows, inside, start, sizes.value_width, VALUE_WIDTH, False)
        out = load_rows(output.data, rows, inside, start, sizes.value_width, VALUE_WIDTH, False)
        total += tl.sum(grad.to(ACC) * out.to(ACC), 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + row, mask=inside, other=0.0)
    tl.store(delta + row, total, mask=inside)


@triton.jit
def _statistics(lse, delta, at, inside):
    """lse and delta of rows; where a row sees nothing the lse is +inf, so that its weights are 0."""
    log = tl.load(lse + at, mask=inside, other=float("inf"))
    return tl.where(log == float("-inf"), float("inf"), log), tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def _gradients(
    raw,
    dp,
    i,
    j,
    within,
    at_edge,
    keys,
    offset,
    log,
    delta,
    mask_rows,
    slope,
    keep,
    inputs,
    sizes,
    entries,
    numbers,
    PLAIN: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAP: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """(weights after dropout, ds, ds before the softcap, which pairs are seen); what is per row broadcasts."""
    scale, softcap, unit = numbers
    t, through = scores(
        raw, i, j, within, inputs.mask, mask_rows, entries.slopes, slope, offset, scale, softcap, PLAIN, BOOLEAN, CAP
    )
    if at_edge:
        t = tl.where(visible(sizes, i, j, keys, offset, WINDOWED), t, float("-inf"))
    seen = t != float("-inf")
    p = weights_of(t, log, unit, PLAIN)
    if inputs.seed is not None:
        dp *= keep
    ds = tl.where(seen, p * (dp - delta), 0.0)
    if inputs.seed is not None:
        p *= keep
    if CAP:
        return p, ds, tl.where(seen, ds * through, 0.0), seen
    else:
        return p, ds, ds, seen


@triton.jit(do_not_specialize=["tiles"])
def rows_kernel(
    inputs,
    grad_output,
    lse,
    delta,
    grad_query,
    flags,
    sizes,
    entries,
    tiles,
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
    VALUES_WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    ACC: tl.constexpr = lse.dtype.element_ty
    inputs, sizes = inputs_of(inputs), sizes_of(sizes)
    grad_output, grad_query = rows_of(grad_output), rows_of(grad_query)
    pid = tl.program_id(0)
    tile, pid = tiles - 1 - pid % tiles, pid // tiles
    kv_head, entry = pid % (sizes.heads // sizes.group), pid // (sizes.heads // sizes.group)
    b, first_row = tile_of(entries, tile, BLOCK_ROWS, tiles, entry)
    queries, keys, _stored, first_query, first_key = locate(sizes, entries, b)
    wanted = first_row < queries * sizes.group
    flag, wanted = flag_of(flags, wanted, CAREFUL)
    if wanted:
        i, h, inside = heads_of_rows(sizes, first_row + tl.arange(0, BLOCK_ROWS), queries, kv_head)
        offset = (keys - queries) * sizes.bottom_right
        begin, end, all_begin, all_end = keys_of_rows(sizes, first_row, queries, keys, offset, BLOCK_ROWS, BLOCK_KEYS)
        statistics = statistics_rows(sizes, entries, b, h, first_query, i)
        log, delta_i = _statistics(lse, delta, statistics, inside)
        q_tile = query_tile(inputs.query, entries, sizes, b, kv_head, h, first_query, i, inside, first_row)
        grad_tile = query_tile(grad_output, entries, sizes, b, kv_head, h, first_query, i, inside, first_row)
        q = load_tile(q_tile, 0, sizes.width, WIDTH, EVEN)
        grad = load_tile(grad_tile, 0, sizes.value_width, VALUE_WIDTH, EVEN_VALUES)
        mask_rows = query_rows(inputs.mask, b, h, 0, i)[:, None]
        slope = slopes_of(sizes, entries, b, h, inside, ACC)
        numbers = (scalar(scale, ACC), scalar(softcap, ACC), unit_of(scale, PLAIN, ACC))
        column = tl.program_id(1) * WIDTH
        total = tl.zeros((BLOCK_ROWS, WIDTH), ACC)
        for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
            j = start + tl.arange(0, BLOCK_KEYS)
            there = j < keys
            k_tile = key_tile(inputs.key, entries, sizes, b, kv_head, first_key, j, there, start)
            v_tile = key_tile(inputs.value, entries, sizes, b, kv_head, first_key, j, there, start)
            raw = product(q, q_tile, k_tile, sizes.width, WIDTH, WHOLE, EVEN, ACC)
            dp = product(grad, grad_tile, v_tile, sizes.value_width, VALUE_WIDTH, VALUES_WHOLE, EVEN_VALUES, ACC)
            keep = raw
            if inputs.seed is not None:
                keep = keep_factor(inputs.seed, statistics, start, threshold, keep_scale, BLOCK_ROWS, BLOCK_KEYS, ACC)
            within = inside[:, None] & there[None, :]
            at_edge = (start < all_begin) | (start + BLOCK_KEYS > all_end)
            _weights, _ds, ds, seen = _gradients(
                raw, dp, i[:, None], j[None, :], within, at_edge, keys, offset, log[:, None], delta_i[:, None],
                mask_rows, slope, keep, inputs, sizes, entries, numbers, PLAIN, BOOLEAN, CAP, WINDOWED,
            )  # fmt: skip
            k = load_tile(k_tile, column, sizes.width, WIDTH, EVEN)
            total = combine(ds, k, seen, total, ACC, CAREFUL)
        if flags is not None and not CAREFUL:
            tl.store(flag, tl.where(is_finite(total), 0.0, 1.0))
        rows_out = query_rows(grad_query, b, h, first_query, i)
        store_rows(grad_query.data, rows_out, inside, column, sizes.width, total * scalar(scale, ACC), WIDTH)


@triton.jit(do_not_specialize=["tiles"])
def keys_kernel(
    inputs,
    grad_output,
    lse,
    delta,
    grad_key,
    grad_value,
    flags,
    sizes,
    entries,
    tiles,
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
    VALUES_WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_key or grad_value may be unwanted: Rows of None."""
    ACC: tl.constexpr = lse.dtype.element_ty
    inputs, sizes, grad_output = inputs_of(inputs), sizes_of(sizes), rows_of(grad_output)
    grad_key, grad_value = rows_of(grad_key), rows_of(grad_value)
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    kv_head, entry = pid % (sizes.heads // sizes.group), pid // (sizes.heads // sizes.group)
    b, first = tile_of(entries, tile, BLOCK_KEYS, tiles, entry)
    queries, keys, stored, first_query, first_key = locate(sizes, entries, b)
    wanted = first < stored
    flag, wanted = flag_of(flags, wanted, CAREFUL)
    if wanted:
        j = first + tl.arange(0, BLOCK_KEYS)
        there = j < keys
        offset = (keys - queries) * sizes.bottom_right
        last = tl.minimum(first + BLOCK_KEYS, keys) - 1
        begin, end, all_begin, all_end = queries_of_keys(sizes, first, last, queries, offset)
        end = tl.where(first < keys, end, 0)  # keys behind the length: of no query
        k_tile = key_tile(inputs.key, entries, sizes, b, kv_head, first_key, j, there, first)
        v_tile = key_tile(inputs.value, entries, sizes, b, kv_head, first_key, j, there, first)
        k = load_tile(k_tile, 0, sizes.width, WIDTH, EVEN)
        v = load_tile(v_tile, 0, sizes.value_width, VALUE_WIDTH, EVEN_VALUES)
        numbers = (scalar(scale, ACC), scalar(softcap, ACC), unit_of(scale, PLAIN, ACC))
        column, value_column = tl.program_id(1) * WIDTH, tl.program_id(1) * VALUE_WIDTH
        dk = tl.zeros((BLOCK_KEYS, WIDTH), ACC)
        dv = tl.zeros((BLOCK_KEYS, VALUE_WIDTH), ACC)
        for start in tl.range(begin * sizes.group, end * sizes.group, BLOCK_ROWS, num_stages=STAGES):
            i, h, inside = heads_of_rows(sizes, start + tl.arange(0, BLOCK_ROWS), queries, kv_head)
            statistics = statistics_rows(sizes, entries, b, h, first_query, i)
            log, delta_i = _statistics(lse, delta, statistics, inside)
            q_tile = query_tile(inputs.query, entries, sizes, b, kv_head, h, first_query, i, inside, start)
            grad_tile = query_tile(grad_output, entries, sizes, b, kv_head, h, first_query, i, inside, start)
            raw = product(k, k_tile, q_tile, sizes.width, WIDTH, WHOLE, EVEN, ACC)
            dp = product(v, v_tile, grad_tile, sizes.value_width, VALUE_WIDTH, VALUES_WHOLE, EVEN_VALUES, ACC)
            keep = raw
            if inputs.seed is not None:
                keep = tl.trans(
                    keep_factor(inputs.seed, statistics, first, threshold, keep_scale, BLOCK_ROWS, BLOCK_KEYS, ACC)
                )
            within = inside[None, :] & there[:, None]
            slope = tl.trans(slopes_of(sizes, entries, b, h, inside, ACC))
            mask_rows = query_rows(inputs.mask, b, h, 0, i)[None, :]
            at_edge = (start < all_begin * sizes.group) | (start + BLOCK_ROWS > all_end * sizes.group)
            p, _ds, ds, seen = _gradients(
                raw, dp, i[None, :], j[:, None], within, at_edge, keys, offset, log[None, :], delta_i[None, :],
                mask_rows, slope, keep, inputs, sizes, entries, numbers, PLAIN, BOOLEAN, CAP, WINDOWED,
            )  # fmt: skip
            if grad_key.data is not None:
                q = load_tile(q_tile, column, sizes.width, WIDTH, EVEN)
                dk = combine(ds, q, seen, dk, ACC, CAREFUL)
            if grad_value.data is not None:
                grad = load_tile(grad_tile, value_column, sizes.value_width, VALUE_WIDTH, EVEN_VALUES)
                dv = combine(p, grad, seen, dv, ACC, CAREFUL)
        if flags is not None and not CAREFUL:
            tl.store(flag, tl.where(is_finite(dk) & is_finite(dv), 0.0, 1.0))
        behind = j < stored
        if grad_key.data is not None:
            rows = key_rows(grad_key, entries, sizes, b, kv_head, first_key, j)
            dk = tl.where(there[:, None], dk * scalar(scale, ACC), 0.0)
            store_rows(grad_key.data, rows, behind, column, sizes.width, dk, WIDTH)
        if grad_value.data is not None:
            rows = key_rows(grad_value, entries, sizes, b, kv_head, first_key, j)
            dv = tl.where(there[:, None], dv, 0.0)
            store_rows(grad_value.data, rows, behind, value_column, sizes.value_width, dv, VALUE_WIDTH)


@triton.jit
def sinks_kernel(sinks, lse, delta, grad_sinks, sizes, BLOCK: tl.constexpr):
    ACC: tl.constexpr = lse.dtype.element_ty
    sizes = sizes_of(sizes)
    h = tl.program_id(0)
    sink = tl.load(sinks + h).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, sizes.statistics // sizes.heads, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < sizes.statistics // sizes.heads
        at = ((n // sizes.total_rows).to(tl.int64) * sizes.heads + h) * sizes.total_rows + n % sizes.total_rows
        log, delta_i = _statistics(lse, delta, at, inside)
        total -= tl.where(log == float("inf"), 0.0, tl.exp(sink - log) * delta_i)
    tl.store(grad_sinks + h, tl.sum(total, 0).to(grad_sinks.dtype.element_ty))


@triton.jit(do_not_specialize=["shares"])
def mask_kernel(
    inputs,
    grad_output,
    lse,
    delta,
    partial,
    sizes,
    entries,
    shape,
    shares,
    scale: tl.float64,
    softcap: tl.float64,
    threshold: tl.int64,
    keep_scale: tl.float64,
    BOOLEAN: tl.constexpr,
    CAP: tl.constexpr,
    PLAIN: tl.constexpr,
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    VALUES_WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VALUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [shares, *mask.shape]. shape: batches, heads, rows and keys of the mask, 1 where it is broadcast."""
    ACC: tl.constexpr = lse.dtype.element_ty
    inputs, grad_output, sizes = inputs_of(inputs), rows_of(grad_output), sizes_of(sizes)
    batches, heads = number(shape[0]).to(tl.int32), number(shape[1]).to(tl.int32)
    rows, keys_of_mask = number(shape[2]).to(tl.int32), number(shape[3]).to(tl.int32)
    key_blocks, row_blocks = tl.cdiv(keys_of_mask, BLOCK_KEYS), tl.cdiv(rows, BLOCK_ROWS)
    pid = tl.program_id(0)
    key_block, pid = pid % key_blocks, pid // key_blocks
    row_block, pid = pid % row_blocks, pid // row_blocks
    mask_head, mask_batch = pid % heads, pid // heads
    # What the mask was broadcast along, as one loop; this program's share of it.
    along_keys = tl.where(keys_of_mask == 1, tl.cdiv(sizes.key_rows, BLOCK_KEYS), 1)
    along_rows = tl.where(rows == 1, tl.cdiv(sizes.query_rows, BLOCK_ROWS), 1)
    along_heads = tl.where(heads == 1, sizes.heads, 1)
    along_batch = tl.where(batches == 1, sizes.batch, 1)
    steps = along_keys.to(tl.int64) * along_rows * along_heads * along_batch
    share = tl.cdiv(steps, shares)
    numbers = (scalar(scale, ACC), scalar(softcap, ACC), unit_of(scale, PLAIN, ACC))
    total = tl.zeros((BLOCK_ROWS, BLOCK_KEYS), ACC)
    for step in range(tl.program_id(1) * share, tl.minimum((tl.program_id(1) + 1) * share, steps)):
        key_step, rest = (step % along_keys).to(tl.int32), step // along_keys
        row_step, rest = (rest % along_rows).to(tl.int32), rest // along_rows
        h = mask_head + (rest % along_heads).to(tl.int32)
        b = mask_batch + (rest // along_heads).to(tl.int32)
        first_row, first_of_keys = (row_block + row_step) * BLOCK_ROWS, (key_block + key_step) * BLOCK_KEYS
        queries, keys, _stored, first_query, first_key = locate(sizes, entries, b)
        offset = (keys - queries) * sizes.bottom_right
        last_row = tl.minimum(first_row + BLOCK_ROWS, queries) - 1
        begin, end, _all_begin, _all_end = keys_of_queries(sizes, first_row, last_row, keys, offset, BLOCK_KEYS)
        if (first_row < queries) & (first_of_keys < end) & (first_of_keys + BLOCK_KEYS > begin):
            i, j = first_row + tl.arange(0, BLOCK_ROWS), first_of_keys + tl.arange(0, BLOCK_KEYS)
            inside, there = i < queries, j < keys
            h_of_rows = h + tl.zeros_like(i)
            statistics = statistics_rows(sizes, entries, b, h_of_rows, first_query, i)
            log, delta_i = _statistics(lse, delta, statistics, inside)
            kv_head = h // sizes.group
            q_tile = query_tile(inputs.query, entries, sizes, b, kv_head, h, first_query, i, inside, 0)
            grad_tile = query_tile(grad_output, entries, sizes, b, kv_head, h, first_query, i, inside, 0)
            k_tile = key_tile(inputs.key, entries, sizes, b, kv_head, first_key, j, there, first_of_keys)
            v_tile = key_tile(inputs.value, entries, sizes, b, kv_head, first_key, j, there, first_of_keys)
            q = load_tile(q_tile, 0, sizes.width, WIDTH, EVEN)
            grad = load_tile(grad_tile, 0, sizes.value_width, VALUE_WIDTH, EVEN_VALUES)
            raw = product(q, q_tile, k_tile, sizes.width, WIDTH, WHOLE, EVEN, ACC)
            dp = product(grad, grad_tile, v_tile, sizes.value_width, VALUE_WIDTH, VALUES_WHOLE, EVEN_VALUES, ACC)
            keep = raw
            if inputs.seed is not None:
                keep = keep_factor(
                    inputs.seed, statistics, first_of_keys, threshold, keep_scale, BLOCK_ROWS, BLOCK_KEYS, ACC
                )
            slope = slopes_of(sizes, entries, b, h_of_rows, inside, ACC)
            mask_rows = query_rows(inputs.mask, b, h_of_rows, 0, i)[:, None]
            _weights, ds, _ds, _seen = _gradients(
                raw, dp, i[:, None], j[None, :], inside[:, None] & there[None, :], True, keys, offset, log[:, None],
                delta_i[:, None], mask_rows, slope, keep, inputs, sizes, entries, numbers, PLAIN, BOOLEAN, CAP,
                WINDOWED,
            )  # fmt: skip
            total += ds
    i = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = key_block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    if rows == 1:
        total = tl.where(i[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)
    if keys_of_mask == 1:
        total = tl.where(j[None, :] == 0, tl.sum(total, 1)[:, None], 0.0)
    at = ((tl.program_id(1) * batches + mask_batch).to(tl.int64) * heads + mask_head) * rows
    at = (at + i)[:, None] * keys_of_mask + j[None, :]
    tl.store(partial + at, total, mask=(i < rows)[:, None] & (j < keys_of_mask)[None, :])
