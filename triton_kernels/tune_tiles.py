"""The explicit tune() of attention and recurrent kernels: their tiles measured on the GPU at hand.

The fastest is kept in a file beside the norms' (tuning.user_file()), where later lookups find it. Nothing is measured
unless these are called.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton

from . import attention, rnn, tuning

Progress = Callable[[str], None] | None
ATTENTION_KERNELS = ("forward", "decode", "rows", "keys")
RNN_KERNELS = ("forward", "backward")


def candidates(tile: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The tile and its neighbours in the first two sizes, warps and stages."""
    first, second, third, warps, stages = tile

    def around(value: int, least: int, most: int) -> list[int]:
        return [v for v in (value, value // 2, value * 2) if least <= v <= most]

    sizes = itertools.product(around(first, 16, 256), around(second, 16, 256), [third])
    rest = list(itertools.product(around(warps, 1, 16), sorted({stages, 1, 2, 3}, key=lambda s: s != stages)))
    return [(*size, *others) for size in sizes for others in rest]


def _measure(
    family: str, keys: tuple[str, ...], tile: tuple[int, ...], order: Callable[..., Any], run: Callable[[], Any],
    progress: Progress,
) -> Any:  # fmt: skip
    """Times `run` with each candidate of a table's entry, keeps the fastest and returns it."""
    timed: list[tuple[float, tuple[int, ...]]] = []
    for candidate in (order(c) for c in candidates(tile)):
        tuning.try_tile(family, keys, candidate)
        try:
            milliseconds = float(triton.testing.do_bench(run, return_mode="median"))
        except (RuntimeError, triton.TritonError) as error:  # does not fit this device
            note = f"refused: {str(error).splitlines()[0]}"
        else:
            timed.append((milliseconds, candidate))
            note = f"{milliseconds:.4f} ms"
        if progress:
            progress(f"{family} {' '.join(keys)} {list(candidate)}: {note}")
    tuning.forget()
    if not timed:
        raise RuntimeError(f"none of the candidates for {family} {' '.join(keys)} ran")
    best = min(timed)[1]
    tuning.save_tile(family, keys, best)
    return best


def _device() -> torch.device:
    tuning._require_gpu()
    return torch.device("cuda", torch.cuda.current_device())


def tune_attention(
    kernel: str, width: int, dtype: torch.dtype, rows: int = 2048, progress: Progress = print
) -> tuning.AttentionConfig:
    """Measure the tiles of an attention kernel on the current GPU, causal, keep the fastest and return it.

    Args:
        kernel: "forward", "decode" (few queries), "rows" (gradient of queries) or "keys" (of keys and values). The
            backward's two are timed together.
        width: head dim; the result serves all of the same bucket (up to the next power of two).
        dtype: the result serves all dtypes of its size.
        rows: queries and keys to measure with.
        progress: called with one line per candidate; None for silence.

    Raises:
        RuntimeError: no GPU that Triton can launch on, or no candidate ran.
        ValueError: an unknown kernel, or width < 1.
    """
    if kernel not in ATTENTION_KERNELS:
        raise ValueError(f"kernel is {kernel!r}, expected one of {', '.join(ATTENTION_KERNELS)}")
    if width < 1:
        raise ValueError(f"width is {width}, expected at least 1")
    device = _device()
    query = torch.randn(4, 16, 1 if kernel == "decode" else rows, width, device=device).to(dtype)
    key = torch.randn(4, 16, rows, width, device=device).to(dtype)
    rest = (None, None, None, None)
    options = (width**-0.5, True, -1, 0, 0.0, 0.0, None)
    inputs: list[Any] = [query, key, key, *rest, None, None, None, *options]

    def run() -> Any:
        if kernel in ("forward", "decode"):
            return attention.attention(*inputs)
        return attention.attention_backward(*saved)

    output, lse = attention.attention(*inputs)
    saved: list[Any] = [output, None, query, key, key, output, lse, *rest, None, None, *options]
    saved += [True, True, True, False, False]  # gradients of query, key and value
    tile = tuning.attention(kernel, width, width, query)
    keys = (tuning.architecture(device), kernel, str(dtype.itemsize), str(tuning.attention_bucket(width)))
    # AttentionConfig ends with the widest block, which is not tried.
    best = _measure("attention", keys, (tile.rows, tile.keys, tile.widest, *tile[2:4]), _attention_order, run, progress)
    return tuning.AttentionConfig(*best)


def _attention_order(candidate: tuple[int, ...]) -> tuple[int, ...]:
    rows, keys, widest, warps, stages = candidate
    return rows, keys, warps, stages, widest


def tune_rnn(
    kernel: str, hidden: int, dtype: torch.dtype, batch: int = 64, steps: int = 128, progress: Progress = print
) -> tuning.RnnConfig:
    """Measure the tiles of a recurrent kernel on the current GPU, as an LSTM, keep the fastest and return it.

    Args:
        kernel: "forward" or "backward".
        hidden: hidden size to measure with; the result serves all.
        dtype: the result serves all dtypes of its size.
        batch, steps: rows and steps to measure with.
        progress: called with one line per candidate; None for silence.

    Raises:
        RuntimeError: no GPU that Triton can launch on, or no candidate ran.
        ValueError: an unknown kernel, or hidden < 1.
    """
    if kernel not in RNN_KERNELS:
        raise ValueError(f"kernel is {kernel!r}, expected one of {', '.join(RNN_KERNELS)}")
    if hidden < 1:
        raise ValueError(f"hidden is {hidden}, expected at least 1")
    device = _device()
    x = torch.randn(steps, batch, hidden, device=device).to(dtype)
    shapes = [(4 * hidden, hidden)] * 2 + [(4 * hidden,)] * 2
    weights = [(torch.randn(shape, device=device) * hidden**-0.5).to(dtype) for shape in shapes]
    packed = rnn.rnn_pack(weights, "LSTM", False, True, 0.0, None)

    def forward() -> Any:
        return rnn.rnn(x, None, None, None, packed, "LSTM", hidden, 0, 1, False, 0.0, None, None, True, False)

    output, _, _, _, saved = forward()
    given = (output, None, None, None, x, None, None, None, weights, saved)
    options = ("LSTM", False, True, 0.0, None, None, True, False, False, True)
    keys = (tuning.architecture(device), kernel, str(dtype.itemsize))
    tile = tuning.rnn(kernel, x)
    run = forward if kernel == "forward" else lambda: rnn.rnn_backward(*given, *options)
    return tuning.RnnConfig(*_measure("rnn", keys, tile, tuple, run, progress))
