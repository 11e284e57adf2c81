"""How evenly attention's pieces spread over threads this machine does not have (python -m bench.balance).

A piece of the forward is a tile of 64 query rows of a kv head, one of the backward a chunk of a kv head's keys. Each
kind of piece is timed alone on one thread, as an attention of its own: its rows against the keys that they see. Then
threads take runs of pieces from a counter, in the kernel's order, and the busiest one sets the time. Reported is the
sum of all pieces over threads times that: 100 % is a perfect balance. What the simulation leaves out is the memory that
threads share, what pieces of a run save each other, and the sums over chunks at the end.
"""

from __future__ import annotations

import functools
import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

import handtuned.nn.functional as H

# csrc/attention.h, run_of in cpu/attention_panel.h, BackwardCut in cpu/attention_backward.h
TILE, PIECES, MOST_CHUNKS = 64, 64, 8
LEAST_FLOPS, MOST_FLOPS = 2**19, 2**24
RUN_ELEMENTS, PIECES_OF_THREAD = 2**16, 4
THREADS = (2, 8, 32, 64)
ROUNDS = 15


@dataclass(frozen=True)
class Shape:
    """tokens: a multiple of TILE."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    width: int
    causal: bool

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch}x{heads}x{self.tokens}x{self.width}" + " causal" * self.causal


SHAPES = tuple(
    Shape(*sizes, causal)
    for sizes in ((1, 12, 12, 512, 64), (4, 12, 12, 512, 64), (1, 16, 16, 2048, 64), (1, 32, 8, 1024, 128))
    for causal in (False, True)
)


@functools.cache
def seconds(rows: int, keys: int, width: int, alignment: str, backward: bool) -> float:
    """Fastest of some calls on one thread: `rows` queries against `keys` keys. alignment: of causal; "" is full."""
    query, key, value = (torch.randn(1, 1, n, width).requires_grad_(backward) for n in (rows, keys, keys))
    causal: dict[str, Any] = {"is_causal": True, "causal_alignment": alignment} if alignment else {}
    grad = torch.randn(1, 1, rows, width)

    def forward() -> Tensor:
        out: Tensor = H.scaled_dot_product_attention(query, key, value, **causal)
        return out

    saved = forward()
    call = functools.partial(torch.autograd.grad, saved, (query, key, value), grad, True) if backward else forward
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def in_runs(costs: list[float], run: int) -> list[float]:
    return [sum(costs[first : first + run]) for first in range(0, len(costs), run)]


def forward_pieces(shape: Shape) -> list[float]:
    """The cost of every piece in the kernel's order: head by head, last tiles first."""
    rows_of_head = shape.tokens * (shape.heads // shape.kv_heads)
    costs = []
    for first in reversed(range(0, rows_of_head, TILE)):
        rows = min(TILE, rows_of_head - first)
        last = (first + rows - 1) % shape.tokens + 1  # one past the last query's place in its head
        keys, alignment = (last, "bottom_right") if shape.causal else (shape.tokens, "")
        costs.append(seconds(rows, keys, shape.width, alignment, False))
    return costs * (shape.batch * shape.kv_heads)


def forward_runs(shape: Shape, threads: int) -> list[float]:
    """The cost of what a thread takes at a time, whatever their number."""
    pieces = forward_pieces(shape)
    each = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.width / len(pieces)
    return in_runs(pieces, max(1, min(len(pieces) // PIECES, int(MOST_FLOPS / each)), int(LEAST_FLOPS / each)))


def backward_chunk(shape: Shape) -> int:
    """Keys of a chunk."""
    wanted = min(ceil(PIECES / (shape.batch * shape.kv_heads)), MOST_CHUNKS)
    return max(1, shape.tokens // (wanted * TILE)) * TILE


def backward_pieces(shape: Shape) -> list[float]:
    """Likewise, first chunks first. A query head of a group counts as a piece's worth of its own rows."""
    heads, group = shape.batch * shape.kv_heads, shape.heads // shape.kv_heads
    chunk = backward_chunk(shape)
    costs = []
    for first in range(0, shape.tokens, chunk):
        keys = min(chunk, shape.tokens - first)
        rows, alignment = (shape.tokens - first, "top_left") if shape.causal else (shape.tokens, "")
        costs.append(group * seconds(rows, keys, shape.width, alignment, True))
    return costs * heads


def backward_runs(shape: Shape, threads: int) -> list[float]:
    """Likewise: few threads take long runs."""
    pieces, heads = backward_pieces(shape), shape.batch * shape.kv_heads
    chunks = len(pieces) // heads
    fit = max(1, RUN_ELEMENTS // (backward_chunk(shape) * 2 * shape.width))
    runs = ceil(chunks / min(fit, max(1, len(pieces) // (PIECES_OF_THREAD * threads))))
    return in_runs(pieces[:chunks], ceil(chunks / runs)) * heads


def balance(costs: Iterable[float], threads: int) -> float:
    """Sum of the costs over threads times the busiest thread's, when idle threads take the next piece."""
    busy = [0.0] * threads
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
    return sum(busy) / (threads * max(busy))


def main() -> None:
    torch.set_num_threads(1)
    print("| pass | shape | pieces | " + " | ".join(f"{threads} threads" for threads in THREADS) + " |")
    print("| --- | --- |" + " ---: |" * (1 + len(THREADS)))
    for name, pieces, runs in (
        ("forward", forward_pieces, forward_runs),
        ("backward", backward_pieces, backward_runs),
    ):
        for shape in SHAPES:
            shares = " | ".join(f"{balance(runs(shape, threads), threads):.0%}" for threads in THREADS)
            print(f"| {name} | {shape.name} | {len(pieces(shape))} | {shares} |")


if __name__ == "__main__":
    main()
