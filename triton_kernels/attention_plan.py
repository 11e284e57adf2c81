"""Attention in Triton: what forward and backward know of a call. attention.py launches the kernels."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import common, descriptors, tuning
from .attention_arguments import Entries, Inputs, Mask, Rows, Sizes

UNBOUNDED = 2**31 - 1
WANTED_PROGRAMS = 512  # enough to fill any device; where rows make fewer, keys are dealt out too
LEAST_KEYS = 256  # of a program that shares its rows with others


def in_place(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def rows_in(tensor: Tensor | None) -> Rows:
    if tensor is None:
        return Rows(None)
    if tensor.dim() == 4:
        return Rows(tensor, *common.hidden_strides(*tensor.stride()[:3]))
    return Rows(tensor, *common.hidden_strides(0, tensor.stride(1), tensor.stride(0)))


def _mask(mask: Tensor | None) -> Mask:
    if mask is None:
        return Mask(None)
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    lead = 4 - mask.dim()
    strides = [stride if size != 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    *rows, key = [0] * lead + strides
    batch, head, row, loose = common.hidden_strides(*rows)
    return Mask(mask, batch, head, row, loose, None if key == 1 else common.hidden(key))


def like(tensor: Tensor, width: int) -> Tensor:
    """A result of tensor's rows: with its heads inside the rows if `tensor` has; else contiguous."""
    if tensor.dim() == 4 and tensor.stride(1) < tensor.stride(2):
        batch, heads, rows, _ = tensor.shape
        return common.empty((batch, rows, heads, width), tensor).transpose(1, 2)
    return common.empty((*tensor.shape[:-1], width), tensor)


class Problem(NamedTuple):
    """What the kernels of forward and backward are told of a call."""

    inputs: Inputs
    sizes: Sizes
    entries: Entries
    numbers: tuple[float, float, int, float]  # scale, softcap, dropout's threshold and scale
    form: dict[str, bool]  # constexpr

    @property
    def query(self) -> Tensor:
        assert self.inputs.query.data is not None
        return self.inputs.query.data

    @property
    def packed(self) -> bool:
        return self.entries.query_starts is not None

    def hides(self, by_descriptor: bool, *bounds: Tensor | None) -> bool:
        """Whether a key that exists may be hidden from some queries of a tile. bounds: what tells the device where rows
        end, behind which a descriptor reads on."""
        beyond = by_descriptor and any(bound is not None for bound in bounds)
        return self.form["WINDOWED"] or self.inputs.mask.data is not None or beyond

    def key_tiles(self, kernel: str, config: tuning.AttentionConfig, blocks: dict[str, Any]) -> tuple[Inputs, bool]:
        """(inputs for a kernel that walks over keys, `hides`)."""
        key, value, entries = self.inputs.key, self.inputs.value, self.entries
        if config.descriptors and key.data is not None and value.data is not None:
            widths = (blocks["WIDTH"], blocks["VALUE_WIDTH"])
            page_size = None if entries.pages is None else self.sizes.page_size
            found = descriptors.of_keys(kernel, key.data, value.data, config.keys, widths, page_size)
            key, value = key._replace(block=found[0]), value._replace(block=found[1])
        hides = self.hides(key.block is not None, entries.key_starts, entries.key_lengths, entries.pages)
        return self.inputs._replace(key=key, value=value), hides

    def query_tiles(
        self, kernel: str, config: tuning.AttentionConfig, blocks: dict[str, Any], grad_output: Rows
    ) -> tuple[Inputs, Rows, bool]:
        """(inputs, grad_output for a kernel that walks over queries, `hides`)."""
        query = self.inputs.query
        if config.descriptors and query.data is not None and grad_output.data is not None:
            widths = (blocks["WIDTH"], blocks["VALUE_WIDTH"])
            of = (kernel, query.data, grad_output.data, config.rows, self.sizes.group, widths)
            found = descriptors.of_queries(*of)
            query, grad_output = query._replace(block=found[0]), grad_output._replace(block=found[1])
        hides = self.hides(query.block is not None, self.entries.query_starts)
        return self.inputs._replace(query=query), grad_output, hides

    def kernel(self, name: str) -> str:
        """The name in the table of tiles: options need registers of their own."""
        bare = self.form["PLAIN"] and self.inputs.mask.data is None and self.inputs.seed is None
        return name if bare else name + "_options"

    @property
    def hidden_sizes(self) -> Sizes:
        """As the kernels take them."""
        return Sizes._make([*map(common.hidden, self.sizes[:7]), *self.sizes[7:]])

    @property
    def kv_heads(self) -> int:
        return self.sizes.heads // self.sizes.group

    def tiles(self, starts: Tensor | None, rows: int, rows_of_one: int, block: int) -> tuple[Entries, int, int]:
        """(entries, tiles of an entry, entries in the grid) where an entry's rows, times rows_of_one, go in blocks.

        Packed rows go as one entry of as many tiles as there can be. A table made on the device tells each its place.
        """
        if starts is None:
            return self.entries, triton.cdiv(rows * rows_of_one, block), self.sizes.batch
        most = rows * rows_of_one // block + starts.numel()
        ends = torch.cat([starts, starts.new_full((1,), rows)]).long()
        counts = (ends.diff() * rows_of_one + block - 1) // block
        last = counts.cumsum(0)
        tile = torch.arange(most, device=starts.device)
        entry = torch.searchsorted(last, tile, right=True).clamp_(max=starts.numel() - 1)
        first = (tile - (last - counts)[entry]) * block
        return self.entries._replace(tiles=torch.stack([entry, first]).int()), most, 1


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    key_lengths: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Problem:
    packed = query_starts is not None
    heads, kv_heads = query.shape[1], key.shape[1]
    key_rows = key.shape[0] if key_starts is not None else key.shape[2]
    max_pages, page_size = (0, 1) if block_table is None else (block_table.shape[1], key.shape[2])
    if block_table is not None:
        block_table, key_rows = block_table.contiguous(), max_pages * page_size
    query_rows = query.shape[0] if packed else query.shape[2]
    batch = query_starts.numel() - 1 if query_starts is not None else query.shape[0]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    sizes = Sizes(
        batch=batch,
        heads=heads,
        group=heads // max(kv_heads, 1),
        query_rows=query_rows,
        key_rows=key_rows,
        total_rows=query_rows,
        width=query.shape[-1],
        value_width=value.shape[-1],
        bottom_right=int(bottom_right),
        window_left=window_left if window_left >= 0 else UNBOUNDED,
        window_right=window_right if window_right >= 0 else UNBOUNDED,
        max_pages=max_pages,
        page_size=page_size,
        num_pages=key.shape[0],
        statistics=heads * query_rows * (1 if packed else batch),
    )
    starts, of_keys, lengths = (None if t is None else t.contiguous() for t in (query_starts, key_starts, key_lengths))
    slopes_batch = heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
    entries = Entries(starts, of_keys, lengths, block_table, alibi_slopes, slopes_batch, None)
    additive = mask is not None and mask.dtype != torch.bool
    form = {
        "PLAIN": softcap == 0 and not additive and alibi_slopes is None and scale > 0,
        "BOOLEAN": mask is not None and not additive,
        "CAP": softcap > 0,
        "WINDOWED": window_left >= 0 or window_right >= 0,
    }
    q, k, v = (rows_in(in_place(t)) for t in (query, key, value))
    inputs = Inputs(q, k, v, _mask(mask), seed if dropout_p > 0 else None)
    return Problem(inputs, sizes, entries, (scale, softcap, *common.dropout_constants(dropout_p)), form)


def blocks_of(problem: Problem, config: tuning.AttentionConfig) -> dict[str, Any]:
    """Blocks of a row of queries and of values: constexpr."""
    width, value_width = problem.sizes.width, problem.sizes.value_width
    block, value_block = (min(max(16, triton.next_power_of_2(w)), config.widest) for w in (width, value_width))
    return {
        "WIDTH": block,
        "VALUE_WIDTH": value_block,
        "WHOLE": width <= block,
        "EVEN": width % block == 0,
        "EVEN_VALUES": value_width % value_block == 0,
        "BLOCK_ROWS": config.rows,
        "BLOCK_KEYS": config.keys,
        "STAGES": config.stages,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def splits_of(sizes: Sizes, packed_keys: bool, programs: int, block: int) -> tuple[int, int]:
    """(programs that share the keys of a tile, keys of each), by the shape alone."""
    most = 1 if packed_keys else triton.cdiv(sizes.key_rows, LEAST_KEYS)
    splits = max(1, min(most, triton.cdiv(WANTED_PROGRAMS, programs)))
    keys = block * triton.cdiv(triton.cdiv(sizes.key_rows, splits), block)
    return (1, UNBOUNDED) if splits == 1 else (triton.cdiv(sizes.key_rows, keys), keys)
