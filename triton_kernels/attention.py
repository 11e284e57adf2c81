"""Attention in Triton: the launchers, one for each op. Kernels: attention_forward.py, attention_backward.py.

Arguments are those of the op schemas, already checked. No nn, no autograd, and nothing waits for the device: lengths,
starts and page numbers are read there, so what they say is not checked (lengths and pages are clipped to what exists).

Inputs may have any strides but the last, which is 1; else they are copied once.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import common, tuning
from .attention_arguments import Rows
from .attention_backward import delta_kernel, keys_kernel, mask_kernel, rows_kernel, sinks_kernel
from .attention_forward import forward_kernel, merge_kernel
from .attention_plan import WANTED_PROGRAMS, Problem, blocks_of, in_place, like, problem_of, rows_in, splits_of
from .norm import sum_partials


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output, lse)."""
    problem = problem_of(
        *(query, key, value, mask, query_starts, key_starts, key_lengths, block_table, alibi_slopes),
        *(scale, bottom_right, window_left, window_right, softcap, dropout_p, seed),
    )
    sizes = problem.sizes
    output = like(query, sizes.value_width)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = common.empty((query.shape[1], query.shape[0]) if query_starts is not None else query.shape[:-1], query, wide)
    if lse.numel() == 0:
        return output, lse
    few = query_starts is None and sizes.query_rows * sizes.group <= 16
    kernel = problem.kernel("decode" if few else "forward")
    config = tuning.attention(kernel, sizes.width, sizes.value_width, query)
    blocks = blocks_of(problem, config)
    columns = triton.cdiv(sizes.value_width, blocks["VALUE_WIDTH"])
    entries, tiles, count = problem.tiles(query_starts, sizes.query_rows, sizes.group, config.rows)
    splits, keys_of_split = splits_of(
        sizes, key_starts is not None, tiles * count * problem.kv_heads * columns, config.keys
    )
    parts = None if splits == 1 else common.empty((splits, lse.numel(), sizes.value_width + 2), lse)
    sinks = None if sinks is None else sinks.contiguous()
    with common.on_device(query):
        grid = (tiles * problem.kv_heads * splits * count, columns)
        walked, hides = problem.key_tiles(kernel, config, blocks)
        flags = common.empty(grid, lse, torch.float32) if hides else None
        for careful in (False, True)[: 1 + hides]:
            forward_kernel[grid](
                *(problem.inputs if careful else walked, sinks, rows_in(output), lse, parts, flags),
                *(problem.hidden_sizes, entries, tiles, splits, keys_of_split, *problem.numbers),
                CAREFUL=careful,
                **problem.form,
                **(blocks_of(problem, tuning.careful(config)) if careful else blocks),
            )
        if parts is not None:
            rows = max(1, min(64, 4096 // blocks["VALUE_WIDTH"]))
            merge_kernel[(triton.cdiv(sizes.statistics, rows), columns)](
                *(parts, sinks, rows_in(output), lse, problem.hidden_sizes, entries.query_starts, splits),
                PLAIN=problem.form["PLAIN"],
                VALUE_WIDTH=blocks["VALUE_WIDTH"],
                BLOCK_ROWS=rows,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return output, lse


# ---- backward --------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What the backward reads beside the inputs."""

    grad_output: Rows
    lse: Tensor
    delta: Tensor


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_mask: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_mask, grad_sinks); what is not needed has shape (0,)."""
    problem = problem_of(
        *(query, key, value, mask, query_starts, key_starts, key_lengths, None, alibi_slopes),
        *(scale, bottom_right, window_left, window_right, softcap, dropout_p, seed),
    )
    additive = mask is not None and mask.dtype != torch.bool
    grad_query, grad_key, grad_value = (
        like(t, t.shape[-1]) if need else common.empty((0,), t)
        for t, need in ((query, need_query), (key, need_key), (value, need_value))
    )
    grad_mask = common.empty((0,) if mask is None or not (need_mask and additive) else mask.shape, lse, _dtype(mask))
    grad_sinks = common.empty((0,) if sinks is None or not need_sinks else sinks.shape, lse, _dtype(sinks))
    if lse.numel() == 0:
        grads = (grad_query, grad_key, grad_value, grad_mask, grad_sinks)
        for grad in grads:
            grad.zero_()
        return grads
    saved = _saved(problem, in_place(grad_output), in_place(output), lse.contiguous(), grad_lse)
    with common.on_device(query):
        if need_query:
            _grad_query(problem, saved, grad_query)
        if need_key or need_value:
            _grad_key_and_value(problem, saved, grad_key if need_key else None, grad_value if need_value else None)
        if mask is not None and grad_mask.numel():
            _grad_mask(problem, saved, mask, grad_mask)
        if sinks is not None and grad_sinks.numel():
            sinks_kernel[(problem.sizes.heads,)](
                *(sinks.contiguous(), saved.lse, saved.delta, grad_sinks, problem.hidden_sizes),
                BLOCK=1024,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return grad_query, grad_key, grad_value, grad_mask, grad_sinks


def _dtype(tensor: Tensor | None) -> torch.dtype:
    return torch.float32 if tensor is None else tensor.dtype


def _saved(problem: Problem, grad_output: Tensor, output: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Saved:
    delta = common.empty(lse.shape, lse)
    width = min(128, max(16, triton.next_power_of_2(problem.sizes.value_width)))
    rows = 2048 // width
    with common.on_device(lse):
        delta_kernel[(triton.cdiv(problem.sizes.statistics, rows),)](
            *(rows_in(grad_output), rows_in(output), None if grad_lse is None else grad_lse.contiguous(), delta),
            problem.hidden_sizes,
            VALUE_WIDTH=width,
            BLOCK_ROWS=rows,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return Saved(rows_in(grad_output), lse, delta)


def _config(problem: Problem, kernel: str) -> tuple[tuning.AttentionConfig, dict[str, Any]]:
    config = tuning.attention(problem.kernel(kernel), problem.sizes.width, problem.sizes.value_width, problem.query)
    return config, _backward_blocks(problem, config)


def _backward_blocks(problem: Problem, config: tuning.AttentionConfig) -> dict[str, Any]:
    blocks = blocks_of(problem, config)
    return blocks | {"VALUES_WHOLE": problem.sizes.value_width <= blocks["VALUE_WIDTH"]}


def _grad_query(problem: Problem, saved: Saved, grad_query: Tensor) -> None:
    sizes = problem.sizes
    config, blocks = _config(problem, "rows")
    entries, tiles, count = problem.tiles(problem.entries.query_starts, sizes.query_rows, sizes.group, config.rows)
    grid = (tiles * problem.kv_heads * count, triton.cdiv(sizes.width, blocks["WIDTH"]))
    walked, hides = problem.key_tiles("rows", config, blocks)
    flags = common.empty(grid, saved.lse, torch.float32) if hides else None
    for careful in (False, True)[: 1 + hides]:
        rows_kernel[grid](
            *(problem.inputs if careful else walked, *saved, rows_in(grad_query), flags),
            *(problem.hidden_sizes, entries, tiles, *problem.numbers),
            CAREFUL=careful,
            **problem.form,
            **(_backward_blocks(problem, tuning.careful(config)) if careful else blocks),
        )


def _grad_key_and_value(problem: Problem, saved: Saved, grad_key: Tensor | None, grad_value: Tensor | None) -> None:
    sizes = problem.sizes
    config, blocks = _config(problem, "keys")
    entries, tiles, count = problem.tiles(problem.entries.key_starts, sizes.key_rows, 1, config.keys)
    columns = max(
        0 if grad_key is None else triton.cdiv(sizes.width, blocks["WIDTH"]),
        0 if grad_value is None else triton.cdiv(sizes.value_width, blocks["VALUE_WIDTH"]),
    )
    grid = (tiles * problem.kv_heads * count, columns)
    if 0 in grid:
        return
    walked, grad_output, hides = problem.query_tiles("keys", config, blocks, saved.grad_output)
    plain, by_tiles = (problem.inputs, *saved), (walked, *saved._replace(grad_output=grad_output))
    flags = common.empty(grid, saved.lse, torch.float32) if hides else None
    for careful in (False, True)[: 1 + hides]:
        keys_kernel[grid](
            *(*(plain if careful else by_tiles), rows_in(grad_key), rows_in(grad_value), flags, problem.hidden_sizes),
            *(entries, tiles, *problem.numbers),
            CAREFUL=careful,
            **problem.form,
            **(_backward_blocks(problem, tuning.careful_rows(config)) if careful else blocks),
        )


def _grad_mask(problem: Problem, saved: Saved, mask: Tensor, grad_mask: Tensor) -> None:
    """Shares are as many as fill a device, by the shape alone."""
    sizes = problem.sizes
    config, blocks = _config(problem, "mask")
    shape = (*[1] * (4 - mask.dim()), *mask.shape)
    tiles = math.prod(shape[:2]) * triton.cdiv(shape[2], config.rows) * triton.cdiv(shape[3], config.keys)
    all_rows, all_keys = triton.cdiv(sizes.query_rows, config.rows), triton.cdiv(sizes.key_rows, config.keys)
    along = zip(shape, (sizes.batch, sizes.heads, all_rows, all_keys), strict=True)
    steps = math.prod(count for size, count in along if size == 1)
    shares = max(1, min(steps, triton.cdiv(WANTED_PROGRAMS, tiles)))
    partial = common.empty((shares, mask.numel()), saved.lse)
    mask_kernel[(tiles, shares)](
        *(problem.inputs, *saved, partial, problem.hidden_sizes, problem.entries),
        *(tuple(map(common.hidden, shape)), shares, *problem.numbers),
        **problem.form,
        **blocks,
    )
    sum_partials(partial, grad_mask, shares, mask.numel())
