"""No time without a green test: each callable's results on the tensors to be timed, against float64.

handtuned is held to the numerics contract (tests/numerics.py): outputs and gradients, root mean square error at most
1.5 times torch's. The largest error of a single draw is luck, of torch's as of ours; the tests judge it, over many.
Peers only have to compute the same thing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import cases
import numerics
import torch
from numerics import Drawn
from torch import Tensor

__all__ = ["Drawn", "Truth", "draw", "seed", "shape_name"]

PEER_FACTOR = 10  # a peer whose error is more than that many times torch's computes something else
DRAW = 0


def shape_name(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape))


@functools.lru_cache(maxsize=1)
def _mask(case: cases.Case) -> Tensor | None:
    """The reference computes it in seconds, so both dtypes share it."""
    return numerics.keep_mask(case, numerics.draw_seed(DRAW))


@functools.lru_cache(maxsize=1)
def draw(case: cases.Case) -> Drawn:
    """Tensors, torch's results and the float64 truth; the last one is remembered."""
    tensors = cases.tensors(case, DRAW)
    keep = _mask(case.with_(dtype=torch.float32)) if case.dropout else None
    leaves = tensors.leaves()
    torchs = cases.results(cases.run_torch(case, leaves, numerics.torch_factor(case, keep)), leaves, tensors)
    return Drawn(tensors, torchs, numerics.exact(case, tensors, keep))


def seed() -> None:
    """Makes handtuned's next dropout draw the mask that the truth was made with."""
    numerics.draw_seed(DRAW)


@dataclass(frozen=True)
class Truth:
    """What the results of one callable, in the order of `names`, must be: in float64, and torch's in the dtype."""

    names: tuple[str, ...]
    torchs: dict[str, Tensor]
    truth: dict[str, numerics.Array]

    def red(self, results: Sequence[Tensor]) -> str | None:
        """What breaks the contract, or None."""
        found = []
        for name, result in zip(self.names, results, strict=True):
            truth, torchs = self.truth[name], self.torchs[name]
            if result.shape != torchs.shape or result.dtype != torchs.dtype:
                found.append(
                    f"{name}: {result.dtype} {tuple(result.shape)}, torch's {torchs.dtype} {tuple(torchs.shape)}"
                )
                continue
            errors = numerics.Errors(torch.finfo(result.dtype).eps)
            errors.add(result, torchs, truth)
            excess = errors.excess(largest=False)
            if excess:
                found.append(f"{name}: {excess}")
        return "; ".join(found) or None

    def differs(self, results: Sequence[Tensor]) -> str | None:
        """Which result of a peer is something else than the truth, or None."""
        for name, result in zip(self.names, results, strict=True):
            errors = numerics.Errors(torch.finfo(result.dtype).eps)
            errors.add(result, self.torchs[name], self.truth[name])
            theirs, torchs, scale = (square**0.5 for square in errors.squares)
            if not theirs <= PEER_FACTOR * torchs + errors.eps * scale:
                return f"{name} differs: error {theirs / max(torchs, errors.eps * scale / 2):.3g} times torch's"
        return None
