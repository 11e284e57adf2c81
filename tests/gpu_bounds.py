"""Lower bounds on the time of a CUDA kernel, by architecture: the tables of docs/gpu.md.

    python tests/gpu_bounds.py          prints them; with --write, puts them into docs/gpu.md

Bounds, of which the largest holds:
  bytes       what an op must move, by the bandwidth of the data sheet
  tensor      the products of tensor cores (mma), by their operations a second on bfloat16 of the data sheet
  arithmetic  the floating-point instructions that the kernel's PTX executes, by the multiprocessors' units
  issue       all of those and its loads, stores, shuffles and votes, by the four schedulers of a multiprocessor, each
              of which starts one a cycle. Address arithmetic and branches come on top; how many, ptxas decides, so they
              are left out.
The instructions are counted by the PTX simulator on a sample. A bound is no time: no kernel reaches it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import attention_cases as ac
import cases
import ptx_tools
import rnn_cases as rc
import torch

from handtuned import ops

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- bounds: python tests/gpu_bounds.py --write -->\n", "<!-- end of bounds -->\n"
ROWS, COLS, SAMPLE = 16384, 1024, 16
BATCH, HEADS, LENGTH = 4, 16, 2048
STEPS, ENTRIES, HIDDEN, GATES = 128, 64, 256, 4  # of an LSTM
SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Gpu:
    """Data sheet: bytes a second, multiprocessors, cycles a second at boost, float32 units of a multiprocessor,
    operations of tensor cores a second."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    units: int
    tensor: float


GPUS = (
    Gpu("A100 80 GB", 2.04e12, 108, 1.41e9, 64, 312e12),
    Gpu("H100 SXM", 3.35e12, 132, 1.98e9, 128, 989e12),
    Gpu("B200", 8.0e12, 148, 1.96e9, 128, 2250e12),
)
SCHEDULERS, WARP = 4, 32


@dataclass(frozen=True)
class Work:
    """Of the whole op; instructions are those of warps. blocks: that there are, if fewer than multiprocessors."""

    bytes: float
    arithmetic: float
    issued: float
    products: float = 0.0
    blocks: float = math.inf

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Seconds."""
        cycles = min(self.blocks, gpu.multiprocessors) * gpu.clock
        tensor = {"tensor": self.products * 2 * 16 * 8 * 16 / gpu.tensor} if self.products else {}
        return tensor | {
            "bytes": self.bytes / gpu.bandwidth,
            "arithmetic": self.arithmetic * WARP / gpu.units / cycles,
            "issue": self.issued / SCHEDULERS / cycles,
        }


def norm_rows(dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], object]]]:
    """Op -> (tensors that it must move, the op on a sample of rows)."""
    t = cases.tensors(cases.FORMS[2].with_(shape=(SAMPLE, COLS), dtype=dtype))
    x, residual, w, b, dy, dh = t.input, t.residual, t.weight, t.bias, t.grad_output, t.grad_new_residual
    stats = torch.ones(2, SAMPLE)
    seed = torch.zeros(1, dtype=torch.int64)
    return {
        "LayerNorm forward": (2, lambda: ops.layer_norm(x, 1, w, b, 1e-5)),
        "RMSNorm forward": (2, lambda: ops.rms_norm(x, 1, w, 1e-6)),
        "add + LayerNorm forward": (4, lambda: ops.add_layer_norm(x, residual, 1, w, b, 1e-5, 0.0, None)),
        "dropout + add + LayerNorm forward": (
            4,
            lambda: ops.add_layer_norm(x, residual, 1, w, b, 1e-5, 0.1, seed),
        ),
        "LayerNorm backward, dx": (3, lambda: ops.layer_norm_backward(dy, x, 1, stats, w, True, False, False)),
        "add + LayerNorm backward, dx": (
            4,
            lambda: ops.add_layer_norm_backward(dy, dh, x, 1, stats, w, 0.0, None, True, False, False, False),
        ),
    }


def norms() -> Iterator[tuple[str, torch.dtype, Work]]:
    for dtype in SHORT:
        for name, (tensors, call) in norm_rows(dtype).items():
            with ptx_tools.simulated(ptx_tools.cuda_module("norm.cu")):
                call()
                counts = ptx_tools.counts()
            yield name, dtype, work(tensors * ROWS * COLS * dtype.itemsize, counts, ROWS / SAMPLE)


def attentions() -> Iterator[tuple[str, torch.dtype, Work]]:
    """Keys of the sample are too few to be cut into chunks, as are those of the whole."""
    rows, keys = 128, 448
    for dtype in SHORT:
        for width in (64, 128):
            case = ac.Case((1, 1, rows, keys, width), dtype=dtype)
            t = ac.tensors(case)
            tensor, scale = BATCH * HEADS * LENGTH * width * dtype.itemsize, BATCH * HEADS * LENGTH**2 / (rows * keys)
            with ptx_tools.simulated(ptx_tools.cuda_module(("attention.cu", "attention_backward.cu"))):
                with torch.no_grad():
                    ac.run(case, t)
                forward = ptx_tools.counts()
                ptx_tools.reset_counts()
                ac.results(case, t)
                both = ptx_tools.counts()
            backward = ptx_tools.Counts(*(getattr(both, n) - getattr(forward, n) for n, _ in both._fields_))
            yield f"forward, head dim {width}", dtype, work(4 * tensor, forward, scale)
            yield f"backward, head dim {width}", dtype, work(8 * tensor, backward, scale)


# The kernels of an LSTM, by a part of their names: what they read and write, in elements of rows and of weights.
ROWS_OF_STEPS, WEIGHTS = STEPS * ENTRIES * HIDDEN, GATES * HIDDEN * HIDDEN
KEPT = GATES + 1  # gates and cell state of each row, for the backward
LSTM_KERNELS = {
    "rnn_input_kernel": ("products of the input", ROWS_OF_STEPS * (1 + GATES) + WEIGHTS),
    "rnn_steps_kernel": ("steps, forward", ROWS_OF_STEPS * (GATES + KEPT + 2) + WEIGHTS),
    "rnn_steps_back_kernel": ("steps, backward", ROWS_OF_STEPS * (KEPT + 1 + GATES) + WEIGHTS),
    "rnn_grad_w": ("gradients of W_ih and W_hh", ROWS_OF_STEPS * (GATES + 2) + 2 * WEIGHTS),
    "rnn_grad_input_kernel": ("gradient of the input", ROWS_OF_STEPS * (GATES + 1) + WEIGHTS),
}
HELD = WEIGHTS / (4 * WARP)  # loads of W_hh, once, where it stays in registers
# Multiprocessors and bytes of shared memory: one launch does all steps; each step is a launch.
LARGE, SMALL = (108, 163 << 10), (1, 18 << 10)


def layers() -> Iterator[tuple[str, torch.dtype, Work]]:
    """The sample is one step, with no barrier that blocks would wait at."""
    case = rc.Case("LSTM", (1, ENTRIES, HIDDEN, HIDDEN))
    t = rc.tensors(case)
    for device in (LARGE, SMALL):
        with ptx_tools.simulated(ptx_tools.cuda_module(("rnn.cu", "rnn_backward.cu")), device=device):
            rc.results(case, t)
            for kernel, (name, elements) in LSTM_KERNELS.items():
                counts = ptx_tools.counts(kernel)
                found = work(elements * case.dtype.itemsize, counts, STEPS)
                if "steps" in kernel:
                    way = "one launch" if device == LARGE else "a launch a step"
                    again = (STEPS - 1) * HELD if device == LARGE else 0
                    found = replace(found, issued=found.issued - again, blocks=counts.blocks / counts.launches)
                    yield f"{name}, {way}", case.dtype, found
                elif device == LARGE:
                    yield name, case.dtype, found


def work(bytes: float, counts: ptx_tools.Counts, scale: float) -> Work:
    """scale: what the whole is of the sample."""
    issued = counts.arithmetic + counts.memory + counts.exchanges + counts.products
    return Work(bytes, counts.arithmetic * scale, issued * scale, counts.products * scale)


def table(head: str, rows: Iterator[tuple[str, torch.dtype, Work]]) -> list[str]:
    lines = [f"| {head} | dtype | {' | '.join(gpu.name for gpu in GPUS)} |", "|---|---|" + "---|" * len(GPUS)]
    for name, dtype, of in rows:
        cells = []
        for gpu in GPUS:
            ordered = sorted(of.bounds(gpu).items(), key=lambda item: -item[1])
            (kind, most), *rest = ordered
            others = ", ".join(f"{other} {seconds * 1e6:.1f}" for other, seconds in rest)
            cells.append(f"≥ {most * 1e6:.1f} µs {kind} ({others})")
        lines.append(f"| {name} | {SHORT[dtype]} | {' | '.join(cells)} |")
    return lines


def tables() -> str:
    """Markdown."""
    lines = [
        f"{ROWS}×{COLS}; which of the bounds it is stands behind the figure, and behind it the others.",
        "",
        *table("norms", norms()),
        "",
        f"{BATCH} entries of {HEADS} heads, {LENGTH} queries and keys, every key seen:",
        "",
        *table("attention", attentions()),
        "",
        f"LSTM {HIDDEN}→{HIDDEN}, {STEPS} steps of {ENTRIES} rows, training; 16 bits differ in the bytes alone. "
        "Its steps are",
        "64 blocks, a multiprocessor each; neither the bytes that blocks exchange nor their barrier are counted:",
        "",
        *table("recurrent layer", layers()),
    ]
    return "\n".join(lines) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """What stands before, between and behind the marks."""
    before, rest = text.split(BEGIN)
    between, behind = rest.split(END)
    return before + BEGIN, between, END + behind


def main() -> None:
    parser = argparse.ArgumentParser(description="Lower bounds on times, from what the PTX executes")
    parser.add_argument("--write", action="store_true", help="put them into docs/gpu.md")
    found = tables()
    if parser.parse_args().write:
        before, _, behind = parts(DOCS.read_text())
        DOCS.write_text(before + found + behind)
    else:
        print(found)


if __name__ == "__main__":
    main()
