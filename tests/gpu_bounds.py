"""Lower bounds on the time of a CUDA kernel, by architecture: the tables of docs/gpu.md.

    python tests/gpu_bounds.py          prints them; with --write, puts them into docs/gpu.md

Three bounds, of which the largest holds:
  bytes       what an op must move, by the bandwidth of the data sheet
  arithmetic  the floating-point instructions that the kernel's PTX executes, by the multiprocessors' units
  issue       those and its loads, stores, shuffles and votes, by the four schedulers of a multiprocessor, each of
              which starts one a cycle. Address arithmetic and branches come on top; how many,
              ptxas decides, so they are left out.
The instructions are counted by the PTX simulator on a sample of rows. A bound is no time: no kernel reaches it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cases
import ptx_tools
import torch

from handtuned import ops

DOCS = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- bounds: python tests/gpu_bounds.py --write -->\n", "<!-- end of bounds -->\n"
ROWS, COLS, SAMPLE = 16384, 1024, 128


@dataclass(frozen=True)
class Gpu:
    """Data sheet: bytes a second, multiprocessors, cycles a second at boost, float32 units of a multiprocessor."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    units: int


GPUS = (
    Gpu("A100 80 GB", 2.04e12, 108, 1.41e9, 64),
    Gpu("H100 SXM", 3.35e12, 132, 1.98e9, 128),
    Gpu("B200", 8.0e12, 148, 1.96e9, 128),
)
SCHEDULERS, WARP = 4, 32


@dataclass(frozen=True)
class Work:
    """Of the whole op; instructions are those of warps."""

    bytes: float
    arithmetic: float
    issued: float

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Seconds."""
        cycles = gpu.multiprocessors * gpu.clock
        return {
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


def work(tensors: int, call: Callable[[], object], dtype: torch.dtype) -> Work:
    with ptx_tools.simulated(ptx_tools.cuda_module("norm.cu")):
        call()
        counts = ptx_tools.counts()
    scale = ROWS / SAMPLE
    issued = counts.arithmetic + counts.memory + counts.exchanges
    return Work(tensors * ROWS * COLS * dtype.itemsize, counts.arithmetic * scale, issued * scale)


def tables() -> str:
    """Markdown."""
    lines = [
        f"{ROWS}×{COLS}; which of the three bounds it is stands behind the figure, and behind it the others.",
        "",
        f"| op | dtype | {' | '.join(gpu.name for gpu in GPUS)} |",
        "|---|---|" + "---|" * len(GPUS),
    ]
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for name, (tensors, call) in norm_rows(dtype).items():
            found = work(tensors, call, dtype)
            cells = []
            for gpu in GPUS:
                ordered = sorted(found.bounds(gpu).items(), key=lambda item: -item[1])
                (kind, most), *rest = ordered
                others = ", ".join(f"{other} {seconds * 1e6:.1f}" for other, seconds in rest)
                cells.append(f"≥ {most * 1e6:.1f} µs {kind} ({others})")
            lines.append(f"| {name} | {short} | {' | '.join(cells)} |")
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
