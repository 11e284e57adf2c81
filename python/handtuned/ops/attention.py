"""The attention ops: handles, checks in the same words as csrc/attention.cpp, and fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Arguments, by_name, namespace, register, wide_dtype

attention = namespace.attention.default
attention_backward = namespace.attention_backward.default

ATTENTION_OPS = by_name(attention, attention_backward)
MOST_WIDTH = 512
DENSE = "[batch, heads, rows, width]"


class AttentionArguments(Arguments):
    """Dense (query [B, H, Lq, D]) or packed (query [T, H, D] beside query_starts)."""

    main_name = "query"

    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        super().__init__(op, args)
        self.main: Tensor = self["query"]
        self.packed = self["query_starts"] is not None
        self.backward = op is attention_backward

    @property
    def batch(self) -> int:
        return self["query_starts"].numel() - 1 if self.packed else self.main.shape[0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.main.shape[:-1], self["value"].shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        rows, heads = self.main.shape[:2]
        return (heads, rows) if self.packed else tuple(self.main.shape[:-1])

    # ---- checks: in the order of the skin. What the numbers in an index tensor say is checked there alone.

    def check(self) -> None:
        self._check_queries()
        self._check_keys()
        if self["mask"] is not None:
            self._check_mask(self["mask"])
        self._check_per_head()
        softcap = self["softcap"]
        self.require(softcap >= 0, f"softcap is {softcap}, the limit is softcap >= 0; pass 0 for none")
        self.check_dropout()
        if self.backward:
            self._check_saved()

    def _check_queries(self) -> None:
        query, starts = self.main, self["query_starts"]
        self.check_dtype()
        self._check_dims("query", "[rows, heads, width] beside query_starts" if self.packed else DENSE)
        if self.packed:
            self.require(
                starts.numel() >= 1, "query_starts has no elements, the least is 1; pass cumulative lengths from 0"
            )
            self._check_integers("query_starts", starts.numel())
        self._check_width("query", query)

    def _check_keys(self) -> None:
        query, key, value = self.main, self["key"], self["value"]
        packed_keys, table = self["key_starts"] is not None, self["block_table"]
        self.require(
            self.packed == packed_keys or table is not None,
            f"query is {'' if self.packed else 'not '}packed and key is {'' if packed_keys else 'not '}packed; "
            "pass both query_starts and key_starts, or neither",
        )
        self.require(
            table is None or not packed_keys, "both key_starts and block_table are given; keys are packed or paged"
        )
        for name in ("key", "value"):
            self.check_device(name, self[name])
            self.require(
                self[name].dtype == query.dtype,
                f"{name} is {self[name].dtype}, query is {query.dtype}; convert one with .to()",
            )
            self._check_dims(name, "[rows, heads, width] beside key_starts" if packed_keys else DENSE)
        self.require(
            key.shape[-1] == query.shape[-1],
            f"key has width {key.shape[-1]}, query has {query.shape[-1]}; they must be equal",
        )
        self.require(
            packed_keys or table is not None or key.shape[0] == self.batch,
            f"key has batch size {key.shape[0]}, query has {self.batch}; expand one of them",
        )
        self.require(
            value.shape[:-1] == key.shape[:-1],
            f"value has shape {list(value.shape)}, key has {list(key.shape)}; all but the last dim must be equal",
        )
        self._check_width("value", value)
        heads, kv_heads = query.shape[1], key.shape[1]
        self.require(
            heads % kv_heads == 0 if kv_heads else heads == 0,
            f"query has {heads} heads and key {kv_heads}; the heads of query must be a multiple of those of key",
        )
        if packed_keys:
            self._check_integers("key_starts", self.batch + 1)
        elif table is not None:
            self._check_pages(table, key)
        if self["key_lengths"] is not None:
            self._check_integers("key_lengths", self.batch)

    def _check_pages(self, table: Tensor, key: Tensor) -> None:
        self.require(
            table.dim() == 2 and table.shape[0] == self.batch,
            f"block_table has shape {list(table.shape)}, expected [{self.batch}, pages]; pass a row of page numbers "
            "for each batch entry",
        )
        self.require(
            self["key_lengths"] is not None, "block_table is given but key_lengths is None; pass the keys in use"
        )
        self.require(
            key.shape[2] >= 1, f"pages have {key.shape[2]} slots, the least is 1; pass pages with room for a key"
        )
        self._check_integers("block_table", table.numel())

    def _check_dims(self, name: str, meaning: str) -> None:
        shape, dims = self[name].shape, meaning.count(",") + 1
        self.require(
            len(shape) == dims,
            f"{name} has shape {list(shape)}, expected {dims} dims, {meaning}; unsqueeze or reshape it",
        )

    def _check_width(self, name: str, tensor: Tensor) -> None:
        width = tensor.shape[-1]
        self.require(
            1 <= width <= MOST_WIDTH, f"{name} has width {width}, the limits are 1 and {MOST_WIDTH}; split the heads"
        )

    def _check_integers(self, name: str, count: int) -> None:
        tensor = self[name]
        self.check_device(name, tensor)
        self.require(
            tensor.dtype in (torch.int32, torch.int64),
            f"{name} is {tensor.dtype}, expected int32 or int64; convert it with .to(torch.int32)",
        )
        self.require(
            tensor.numel() == count and tensor.dim() == (2 if name == "block_table" else 1),
            f"{name} has shape {list(tensor.shape)}, expected {count} elements; pass one for each batch entry (starts: "
            "and one more)",
        )

    def _check_mask(self, mask: Tensor) -> None:
        query, key, table = self.main, self["key"], self["block_table"]
        self.check_device("mask", mask)
        beside = "" if query.dtype == torch.float64 else " and float32"
        self.require(
            mask.dtype in (torch.bool, query.dtype) or (bool(beside) and mask.dtype == torch.float32),
            f"mask is {mask.dtype}, allowed are bool, {query.dtype}{beside}; convert it with .to()",
        )
        self.require(
            mask.dim() <= 4, f"mask has {mask.dim()} dims, the limit is 4: [batch, heads, queries, keys]; reshape it"
        )
        shape: list[Any] = [self.batch, query.shape[1], "queries", "keys"]  # packed: at least the longest sequence
        if not self.packed:
            shape[2:] = [query.shape[2], key.shape[2] if table is None else table.shape[1] * key.shape[2]]
        pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
        self.require(
            all(isinstance(n, str) or size == n or size == 1 for size, n in pairs),
            f"mask has shape {list(mask.shape)}, expected one that broadcasts to [{', '.join(map(str, shape))}]; "
            "reshape it",
        )

    def _check_per_head(self) -> None:
        heads, dtype = self.main.shape[1], self.main.dtype
        shapes = {"alibi_slopes": ((heads,), (self.batch, heads)), "sinks": ((heads,),)}
        for name, allowed in shapes.items():
            tensor = self[name]
            if tensor is None:
                continue
            self.check_device(name, tensor)
            self.require(
                tensor.dtype in (torch.float32, dtype),
                f"{name} is {tensor.dtype}, allowed are float32 and the dtype of query, {dtype}; convert it with .to()",
            )
            batched = f" or [{self.batch}, {heads}]" if name == "alibi_slopes" else ""
            self.require(
                tuple(tensor.shape) in allowed,
                f"{name} has shape {list(tensor.shape)}, expected [{heads}]{batched}; pass one for each head of query",
            )

    def _check_saved(self) -> None:
        wide = wide_dtype(self.main.dtype)
        saved = {name: (self.output_shape, self.main.dtype) for name in ("grad_output", "output")}
        saved |= {name: (self.lse_shape, wide) for name in ("lse", "grad_lse")}
        for name, (shape, dtype) in saved.items():
            tensor = self[name]
            if tensor is None:
                continue
            self.check_device(name, tensor)
            self.require(
                tuple(tensor.shape) == shape,
                f"{name} has shape {list(tensor.shape)}, expected {list(shape)}; pass what the forward returned",
            )
            self.require(tensor.dtype == dtype, f"{name} is {tensor.dtype}, expected {dtype}; convert it with .to()")

    # ---- fakes

    def copies(self) -> list[str]:
        names = ("grad_output", "query", "key", "value", "output")
        tensors = {name: self[name] for name in names if self[name] is not None and self[name].numel()}
        return [
            f"{name} is copied once: its last stride is {tensor.stride(-1)}, not 1"
            for name, tensor in tensors.items()
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1
        ]

    def fake(self) -> tuple[Tensor, ...]:
        query, key, value = self.main, self["key"], self["value"]
        if not self.backward:
            lse = query.new_empty(self.lse_shape, dtype=wide_dtype(query.dtype))
            return _empty_like(query, self.output_shape), lse
        wanted = ((query, self["need_query"]), (key, self["need_key"]), (value, self["need_value"]))
        grads = [_empty_like(x, x.shape) if needed else x.new_empty(0) for x, needed in wanted]
        for x, needed in ((self["mask"], self["need_mask"]), (self["sinks"], self["need_sinks"])):
            if x is None:
                grads.append(query.new_empty(0, dtype=torch.float32))
            else:
                grads.append(x.new_empty(x.shape if needed and x.dtype != torch.bool else 0))
        return tuple(grads)


def _empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result that has its heads inside its rows if `tensor` has; else contiguous."""
    if len(shape) == 4 and tensor.stride(1) < tensor.stride(2):
        batch, heads, rows, width = shape
        return tensor.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return tensor.new_empty(shape)


for _op in ATTENTION_OPS.values():
    register(_op, AttentionArguments, gpu=("cuda", "triton"))
