"""What recurrent layers gain from threads that this machine does not have (python -m bench.teams).

The kernel cuts a layer into slices of hidden units by a model of the time (csrc/cpu/rnn_team.h, stated in docs/rnn.md);
`slices` is that rule. Then the time of that many slices on a thread each is simulated from what is measured here:

    region + steps * (work * share of the largest slice * (1 + loss) + meeting * log2(slices), rounded up)

work is a step on one thread. loss is what a step on two threads takes more than its share and a meeting. It grows with
the work, so it comes of neighbours at work and of waiting for the slower, not of the meeting, and is taken to be the
same for many threads. region and meeting are the rule's own. Reported are the slices, the speed-up over one thread, and
in brackets what part that is of the best speed-up of any number of slices in the simulation: 100 % says that the rule,
which knows none of the measurements, chose well. Left out: that a smaller slice fits a nearer cache, and that threads
share outer caches and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

import handtuned.nn.functional as H
from handtuned import _C

# csrc/cpu/rnn_team.h; microseconds, and operations and bytes a microsecond
FLOPS, BYTES, REGION, MEET, MOST_SLICES = 1e5, 1e5, 4.0, 0.3, 64
GATES = 4
THREADS = (2, 8, 32, 64)
ROUNDS = 50


@dataclass(frozen=True)
class Layer:
    """An LSTM of one direction, in float32."""

    steps: int
    batch: int
    input_size: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.steps}×{self.batch}×{self.input_size}×{self.hidden}"

    @property
    def panels(self) -> int:
        """A panel is a vector of hidden units with all their gates."""
        bits = next(row["vector_bits"] for row in _C.isa_table() if row["name"] == _C.isa())
        return ceil(self.hidden / (bits // 32))


LAYERS = tuple(
    Layer(*sizes)
    for sizes in ((128, 1, 256, 256), (128, 16, 256, 256), (64, 64, 512, 512), (128, 1, 512, 512), (512, 1, 128, 128))
)


def simulated(layer: Layer, slices: int, work: float, loss: float = 0.0) -> float:
    """Microseconds of the layer in that many slices."""
    if slices == 1:
        return layer.steps * work
    share = ceil(layer.panels / slices) / layer.panels
    return REGION + layer.steps * (work * share * (1 + loss) + MEET * (slices - 1).bit_length())


def best_slices(layer: Layer, threads: int, work: float, loss: float = 0.0) -> int:
    """The first of the numbers of slices with the least time."""
    most = min(threads, layer.panels, MOST_SLICES)
    return min(range(1, most + 1), key=lambda slices: simulated(layer, slices, work, loss))


def slices(layer: Layer, threads: int) -> int:
    """The kernel's rule: slices_for."""
    columns = GATES * layer.hidden
    read = columns * (layer.hidden + (layer.input_size if layer.steps == 1 else 0)) * 4
    work = 2 * columns * (layer.input_size + layer.hidden) * layer.batch / FLOPS + read / BYTES
    return best_slices(layer, threads, work)


@torch.no_grad()
def call_of(layer: Layer) -> Callable[[], object]:
    """The op on packed weights."""
    columns, hidden = GATES * layer.hidden, layer.hidden
    shapes = ((columns, layer.input_size), (columns, hidden), (columns,), (columns,))
    weights = [torch.randn(shape) / hidden**0.5 for shape in shapes]
    packed = H.pack_rnn_weights("LSTM", weights)
    x = torch.randn(layer.steps, layer.batch, layer.input_size)
    return partial(H.lstm, x, None, weights, packed=packed)


@torch.no_grad()
def measure(layer: Layer, threads: Iterable[int] = (1, 2)) -> list[float]:
    """Microseconds on each number of threads, the fastest of some calls in turns."""
    call, counts = call_of(layer), list(threads)
    best = [float("inf")] * len(counts)
    for _ in range(ROUNDS):
        for i, count in enumerate(counts):
            torch.set_num_threads(count)
            call()  # which wakes the threads
            start = time.perf_counter()
            call()
            best[i] = min(best[i], (time.perf_counter() - start) * 1e6)
    return best


def costs(layer: Layer, one: float, two: float) -> tuple[float, float]:
    """work and loss, from the times on one and two threads."""
    work, share = one / layer.steps, ceil(layer.panels / 2) / layer.panels
    return work, max(0.0, ((two - REGION) / layer.steps - MEET) / (work * share) - 1)


def row(layer: Layer, one: float, two: float) -> str:
    work, loss = costs(layer, one, two)
    cells = []
    for threads in THREADS:
        chosen, best = slices(layer, threads), best_slices(layer, threads, work, loss)
        found, least = (simulated(layer, count, work, loss) for count in (chosen, best))
        cells.append(f"{chosen}: {layer.steps * work / found:.1f} ({least / found:.0%})")
    return f"| {layer.name} | {layer.panels} | {work:.1f} | {loss:.0%} | " + " | ".join(cells) + " |"


def main() -> None:
    print(
        "| layer | panels | µs of a step | loss of two | "
        + " | ".join(f"{threads} threads" for threads in THREADS)
        + " |"
    )
    print("| --- |" + " ---: |" * (3 + len(THREADS)))
    for layer in LAYERS:
        print(row(layer, *measure(layer)))


if __name__ == "__main__":
    main()
