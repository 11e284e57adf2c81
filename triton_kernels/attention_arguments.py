"""Attention in Triton: the arguments of the kernels.

Launchers pass what changes from call to call `hidden` (common.py); kernels begin with inputs_of, rows_of and sizes_of,
which take it out.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the parameters of device functions have no Python types)

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import number, stride_of


class Rows(NamedTuple):
    """[batch, heads, rows, width], or packed [rows, heads, width] with batch = 0; or pages, batch apart."""

    data: Tensor | None
    batch: int = 0  # strides in elements, hidden; the last is 1
    head: int = 0
    row: int = 0
    loose: int | None = None  # of hidden_strides()
    block: Any = None  # a TensorDescriptor [batch, heads, rows, width] (queries: [batch, rows, heads, width]), or None


class Mask(NamedTuple):
    data: Tensor | None  # bool as uint8
    batch: int = 0  # strides in elements, hidden, 0 along a broadcast dim
    head: int = 0
    row: int = 0
    loose: int | None = None
    key: int | None = 0  # None: 1


class Inputs(NamedTuple):
    query: Rows
    key: Rows
    value: Rows
    mask: Mask
    seed: Tensor | None  # None without dropout


class Sizes(NamedTuple):
    batch: int  # hidden, as all of these lines
    query_rows: int  # of an entry; if packed all of them
    key_rows: int
    total_rows: int  # rows of one head in the lse
    max_pages: int
    num_pages: int
    statistics: int  # elements of the lse
    heads: int  # what a model fixes: the compiler may know it
    group: int  # query heads of a kv head
    width: int
    value_width: int
    bottom_right: int
    window_left: int  # unbounded: 2^31 - 1
    window_right: int
    page_size: int


class Entries(NamedTuple):
    """What is read on the device: nobody waits for it to know lengths."""

    query_starts: Tensor | None
    key_starts: Tensor | None
    key_lengths: Tensor | None
    pages: Tensor | None
    slopes: Tensor | None
    slopes_batch: int  # stride
    tiles: Tensor | None  # packed: [2, tiles], the entry of each tile and its first row


@triton.jit
def sizes_of(sizes):
    return Sizes(
        number(sizes.batch).to(tl.int32),
        number(sizes.query_rows).to(tl.int32),
        number(sizes.key_rows).to(tl.int32),
        number(sizes.total_rows).to(tl.int32),
        number(sizes.max_pages).to(tl.int32),
        number(sizes.num_pages).to(tl.int32),
        number(sizes.statistics),
        sizes.heads,
        sizes.group,
        sizes.width,
        sizes.value_width,
        sizes.bottom_right,
        sizes.window_left,
        sizes.window_right,
        sizes.page_size,
    )


@triton.jit
def rows_of(rows):
    if rows.data is None:
        return rows
    else:
        return Rows(
            rows.data,
            stride_of(rows.batch, rows.loose),
            stride_of(rows.head, rows.loose),
            stride_of(rows.row, rows.loose),
            rows.loose,
            rows.block,
        )


@triton.jit
def _mask_of(mask):
    if mask.data is None:
        return mask
    else:
        return Mask(
            mask.data,
            stride_of(mask.batch, mask.loose),
            stride_of(mask.head, mask.loose),
            stride_of(mask.row, mask.loose),
            mask.loose,
            1 if mask.key is None else number(mask.key),
        )


@triton.jit
def inputs_of(inputs):
    return Inputs(rows_of(inputs.query), rows_of(inputs.key), rows_of(inputs.value), _mask_of(inputs.mask), inputs.seed)
