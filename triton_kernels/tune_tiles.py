"""Tuning, which is explicit: tiles of norms, attention and recurrent kernels measured on the GPU at hand.

The fastest is kept in a file of the user's (tuning.user_file()), where later lookups find it. Nothing is measured
unless these are called.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import triton

from . import attention, norm, rnn, tuning

Progress = Callable[[str], None] | None
Tile = TypeVar("Tile", bound=tuple[Any, ...])
ATTENTION_KERNELS = ("forward", "decode", "rows", "keys")
RNN_KERNELS = ("forward", "backward")


def _fastest(
    what: str, tries: Iterable[Tile], place: Callable[[Tile], None], run: Callable[[], Any], progress: Progress
) -> Tile:
    """Times `run` with each in its place in the tables."""
    timed: list[tuple[float, Tile]] = []
    for tile in tries:
        place(tile)
        try:
            milliseconds = float(triton.testing.do_bench(run, return_mode="median"))
        except (RuntimeError, triton.TritonError) as error:  # does not fit this device
            note = f"refused: {str(error).splitlines()[0]}"
        else:
            timed.append((milliseconds, tile))
            note = f"{milliseconds:.4f} ms"
        if progress:
            progress(f"{what} {tile}: {note}")
    tuning.forget()
    if not timed:
        raise RuntimeError(f"none of the candidates for {what} ran")
    return min(timed)[1]


def _require_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "tuning measures on a GPU and torch sees none (torch.cuda.is_available() is False). Run it "
            "on a machine with a GPU and a CUDA or ROCm build of torch; until then the committed table "
            "is used."
        )
    if triton.knobs.runtime.interpret:
        raise RuntimeError("tuning measures compiled kernels and Triton's interpreter is on. Unset TRITON_INTERPRET.")
    return torch.device("cuda", torch.cuda.current_device())


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm_candidates(kernel: str, cols: int, itemsize: int, arch: str) -> list[tuning.Config]:
    """What tune_norm() tries: that in force and its neighbours in rows, warps, stages; for long rows tile."""
    base = tuning._lookup(kernel, cols, itemsize, arch)
    most_warps = 16 if arch.startswith("gfx") else 32  # 1024 threads a block at most
    one_tile = kernel != "partials" and cols <= base.tile
    found = [base]
    for tile in (base.tile,) if one_tile else (base.tile // 2, base.tile, base.tile * 2):
        for rows in (base.rows // 2, base.rows, base.rows * 2):
            for warps in (base.warps // 2, base.warps, base.warps * 2):
                for stages in (1, 2, 3):
                    config = tuning.Config(tile, rows, warps, stages)
                    if tile >= tuning.SMALLEST_TILE and rows >= 1 and 1 <= warps <= most_warps and config not in found:
                        found.append(config)
    return found


def tune_norm(
    kernel: str, cols: int, dtype: torch.dtype, rows: int | None = None, progress: Progress = print
) -> tuning.Config:
    """Measure the candidates of one kernel on the current GPU, keep the fastest in `tuning.user_file()`, return it.

    Args:
        kernel: "forward", "backward", "row_sums" (rows longer than the backward's tile) or "partials" (the sums over
            rows behind dgamma and dbeta). The whole op is timed, as LayerNorm with weight and bias.
        cols: length of a row; the result serves all lengths of the same bucket (up to the next power of two).
        dtype: float32, bfloat16, float16 or float64; the result serves all dtypes of this size.
        rows: number of rows to measure with; by default about 2^26 elements in all.
        progress: called with one line per candidate; None for silence.

    Raises:
        RuntimeError: no GPU that Triton can launch on, or no candidate ran.
        ValueError: an unknown kernel, or cols < 1.
    """
    if kernel not in tuning.KERNELS:
        raise ValueError(f"kernel is {kernel!r}, expected one of {', '.join(tuning.KERNELS)}")
    if cols < 1:
        raise ValueError(f"cols is {cols}, expected at least 1")
    device = _require_gpu()
    arch, itemsize = tuning.architecture(device), dtype.itemsize
    width = torch.promote_types(dtype, torch.float32).itemsize if kernel == "partials" else itemsize
    run = _workload(kernel, cols, dtype, rows or max(1, 2**26 // cols), device)
    committed = tuning._committed_table()[tuning._table_name(arch)][kernel][str(width)]
    name = tuning.bucket(cols, committed)
    what = f"{kernel} with {cols} columns of {dtype} on {arch}"
    tries = norm_candidates(kernel, cols, width, arch)
    best = _fastest(what, tries, lambda config: _try(arch, kernel, width, name, config), run, progress)
    _save(arch, kernel, width, name, best)
    return best


def _workload(kernel: str, cols: int, dtype: torch.dtype, rows: int, device: torch.device) -> Callable[[], Any]:
    x = torch.randn(rows, cols, device=device).to(dtype)
    weight = torch.ones(cols, device=device, dtype=dtype)
    if kernel == "forward":
        return lambda: norm.layer_norm(x, 1, weight, weight, 1e-5)
    _, stats = norm.layer_norm(x, 1, weight, weight, 1e-5)
    sums_only = kernel == "row_sums"
    return lambda: norm.layer_norm_backward(x, x, 1, stats, weight, True, not sums_only, not sums_only)


def _try(arch: str, kernel: str, itemsize: int, name: str, config: tuning.Config) -> None:
    tuning.forget()
    tables = tuning._user_table()  # cached: the entry set here is what lookup finds until forget()
    tables.setdefault(arch, {}).setdefault(kernel, {}).setdefault(str(itemsize), {})[name] = list(config)


def _save(arch: str, kernel: str, itemsize: int, name: str, config: tuning.Config) -> None:
    path = tuning.user_file()
    tuning.forget()
    tables = tuning._user_table()
    tables.setdefault(arch, {}).setdefault(kernel, {}).setdefault(str(itemsize), {})[name] = list(config)
    tuning.write(path, tables)


# ---- attention and recurrent layers ----------------------------------------------------------------------------------


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
    tries = (order(c) for c in candidates(tile))
    what = f"{family} {' '.join(keys)}"
    best = _fastest(what, tries, lambda candidate: tuning.try_tile(family, keys, candidate), run, progress)
    tuning.save_tile(family, keys, best)
    return best


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
    device = _require_gpu()
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

    def order(candidate: tuple[int, ...]) -> tuple[int, ...]:
        rows, keys, widest, warps, stages = candidate
        return rows, keys, warps, stages, widest, tile.descriptors

    # The widest block and descriptors, with which AttentionConfig ends, are not tried.
    best = _measure("attention", keys, (tile.rows, tile.keys, tile.widest, *tile[2:4]), order, run, progress)
    return tuning.AttentionConfig(*best)


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
    device = _require_gpu()
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
