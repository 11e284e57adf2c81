"""The rotary ops: handles, checks in the same words as csrc/rotary.cpp, and fake kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Arguments, by_name, namespace, register

rotary = namespace.rotary.default
append_kv = namespace.append_kv.default

ROTARY_OPS = by_name(rotary, append_kv)


def _rows_in_place(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


class RotaryArguments(Arguments):
    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        super().__init__(op, args)
        self.main_name = "input" if self.op == "rotary" else "query"
        self.main: Tensor = self[self.main_name]

    # ---- checks: in the order of the skin. What the numbers in an index tensor say is checked there alone.

    def check(self) -> None:
        if self.op == "append_kv":
            return self._check_append()
        self._check_turn()
        x, c = self.main.shape, self["cos"].shape
        fits = len(c) <= len(x) and all(a in (1, b) for a, b in zip(reversed(c[:-1]), reversed(x[:-1]), strict=False))
        self.require(
            fits,
            f"cos has shape {list(c)}, expected one that broadcasts to the rows of input, {list(x)}; make or slice the "
            "tables for its positions",
        )

    def _check_turn(self) -> None:
        self.check_dtype()
        cos, sin, name = self["cos"], self["sin"], self.main_name
        self.check_device("cos", cos)
        self.check_device("sin", sin)
        own, table = self.main.dtype, cos.dtype
        narrow = own.itemsize == 2
        self.require(
            table == own or (narrow and table == torch.float32),
            f"cos is {table}, allowed beside a {own} {name}: {own}{' and torch.float32' if narrow else ''}; "
            "convert it with .to()",
        )
        self.require(
            sin.dtype == table and sin.shape == cos.shape,
            f"cos is {table} {list(cos.shape)}, sin is {sin.dtype} {list(sin.shape)}; pass a pair",
        )
        x = self.main.shape
        self.require(
            len(x) >= 1 and cos.dim() >= 1 and 2 * cos.shape[-1] <= x[-1],
            f"cos has shape {list(cos.shape)}, expected at most half of {name}'s width, {list(x)}; make the tables "
            "for at most that width",
        )

    def _check_append(self) -> None:
        self.check_dtype()
        query, table = self.main, self["block_table"]
        self._check_like_query("query")
        for name in ("key_cache", "value_cache"):
            cache = self[name]
            self._check_like_query(name)
            self.require(
                cache.shape[3] <= 1 or cache.stride(3) == 1,
                f"{name} has the last stride {cache.stride(3)}, expected 1; it is written in place",
            )
            self.require(
                table is not None or cache.shape[0] == query.shape[0],
                f"{name} has batch size {cache.shape[0]}, query has {query.shape[0]}; pass a row for each sequence, "
                "or a block_table",
            )
        k, v, q = self["key_cache"].shape, self["value_cache"].shape, query.shape
        self.require(
            k[:3] == v[:3] and k[3] == q[3],
            f"key_cache has shape {list(k)}, value_cache has {list(v)}, query has {list(q)}; the caches differ in "
            "their widths alone, and key_cache is as wide as query",
        )
        self._check_new()
        cos, sin = self["cos"], self["sin"]
        self.require((cos is None) == (sin is None), "of cos and sin one is None; pass both, or neither")
        if cos is not None:
            self.require(cos.dim() == 2, f"cos has shape {list(cos.shape)}, expected [positions, angles]; reshape it")
            self._check_turn()
        self._check_integers("cache_lengths", [q[0]])
        if table is not None:
            self.require(
                table.dim() == 2, f"block_table has shape {list(table.shape)}, expected [batch, pages]; reshape it"
            )
            self._check_integers("block_table", [q[0], table.shape[1]])

    def _check_new(self) -> None:
        key = self["key"]
        self.require(key.dim() == 4, f"key has shape {list(key.shape)}, expected 4 dims; unsqueeze it")
        for name in ("key", "value"):
            self._check_like_query(name)
            given, cache = self[name].shape, self[f"{name}_cache"].shape
            expected = [self.main.shape[0], cache[1], key.shape[2], cache[3]]
            self.require(
                list(given) == expected,
                f"{name} has shape {list(given)}, expected {expected} beside a {name}_cache of shape {list(cache)}; "
                "pass the new keys and values as (B, Hk, Lnew, D)",
            )

    def _check_like_query(self, name: str) -> None:
        tensor = self[name]
        self.check_type(name, tensor)
        self.require(tensor.dim() == 4, f"{name} has shape {list(tensor.shape)}, expected 4 dims; unsqueeze it")

    def _check_integers(self, name: str, shape: list[int]) -> None:
        tensor = self[name]
        self.check_device(name, tensor)
        self.require(
            tensor.dtype in (torch.int32, torch.int64),
            f"{name} is {tensor.dtype}, expected int32 or int64; convert it with .to(torch.int32)",
        )
        self.require(
            list(tensor.shape) == shape,
            f"{name} has shape {list(tensor.shape)}, expected {shape}; pass a number for each sequence of the batch",
        )

    def copies(self) -> list[str]:
        names = ("input", "query", "key", "value")
        scattered = [name for name in names if self[name] is not None and not _rows_in_place(self[name])]
        return [f"{name} is copied once: its rows are not contiguous" for name in scattered]

    def fake(self) -> Tensor | tuple[Tensor, ...]:
        x = self.main if _rows_in_place(self.main) else self.main.contiguous()
        if self.op == "rotary":
            return torch.empty_like(x)
        turns = self["cos"] is not None and self["cos"].shape[-1] > 0
        return torch.empty_like(x) if turns else x.new_empty(0), x.new_empty(x.shape[0], dtype=torch.int64)


for _op in ROTARY_OPS.values():
    register(_op, RotaryArguments, gpu=("triton",))
