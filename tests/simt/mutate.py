"""Plants bugs: copies the device code with a switch at every barrier, predicate and loop bound.

    python mutate.py SOURCE TARGET      (csrc, a folder of the build)

Each place becomes a mutation point with a number, which the emulator's `planted` turns on at run time:

    __syncthreads();      ->  if (!simt::mutant(N)) __syncthreads();        the barrier is missing
    if (a < b)            ->  if (simt::mutant(N) || (a < b))               the predicate is missing
    x = a < b ? y : z     ->  x = simt::mutant(N) || (a < b) ? y : z        likewise
    for (...; a < b; ...) ->  for (...; a < b + simt::mutant(N); ...)       one turn too many

So one build serves all of them. With no point planted the program is the one that was copied.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# Device code, and the family whose cases hunt its bugs (hunt.py); host code (launchers, plans) has no threads to lose.
FILES = {
    "device/philox.h": "norm",
    "device/reduce.h": "norm",
    "device/vector.h": "norm",
    "norm_backward.cuh": "norm",
    "norm_forward.cuh": "norm",
    "norm_rows.cuh": "norm",
    "attention_backward.cuh": "attention",
    "attention_backward_general.cuh": "attention",
    "attention_dropout.cuh": "attention",
    "attention_entry.cuh": "attention",
    "attention_forward.cuh": "attention",
    "attention_general.cuh": "attention",
    "attention_gradients.cuh": "attention",
    "attention_merge.cuh": "attention",
    "attention_options.cuh": "attention",
    "attention_products.cuh": "attention",
    "attention_scores.cuh": "attention",
    "attention_tile.cuh": "attention",
    "attention_warp.cuh": "attention",
    "device/grid.h": "rnn",
    "product.cuh": "rnn",
    "rnn_backward.cuh": "rnn",
    "rnn_elements.cuh": "rnn",
    "rnn_forward.cuh": "rnn",
    "rnn_gradients.cuh": "rnn",
    "rnn_rows.cuh": "rnn",
    "rnn_slice.cuh": "rnn",
}

# Places that may go without changing a result, and why. A third part says which of a file's places of that text, from 0
# on; else it is all of them.
EQUIVALENT: dict[tuple[str, str] | tuple[str, str, int], str] = {
    ("norm_backward.cuh", "first_row < end"): "a last turn in which no thread has a row",
    ("norm_backward.cuh", "p.grad_new_residual.data != nullptr"): "saves registers: that row is nullptr anyway",
    ("norm_rows.cuh", "left < kLanes<T>"): "keeps the count an int for rows of more than 2^31 elements",
    ("product.cuh", "k < depth"): "a last turn that brings zeros alone",
    ("rnn_backward.cuh", "zones"): "keeps infinities: without zoneout the share is 1",
    ("rnn_forward.cuh", "y.noise.zones_cell"): "likewise",
    ("rnn_gradients.cuh", "direction == 0"): "an order of additions",
    ("rnn_gradients.cuh", "from < rows"): "a last turn without rows",
    ("rnn_gradients.cuh", "y.noise.drops_weight"): "saves time: at p = 0 every element is kept and scaled by 1",
    ("rnn_rows.cuh", "n < 8"): "numbers are below 8",
    ("rnn_slice.cuh", "count > from + r"): "saves time: states that are not there are 0",
    ("rnn_slice.cuh", "from < count"): "a last turn without rows",
    ("rnn_slice.cuh", "from < places"): "a last turn without rows",
    ("rnn_slice.cuh", "nth < kChunksHeld"): "no part has more chunks",
    ("attention_backward.cuh", "careful"): "saves time: sums with care are right where nothing asks for it",
    ("attention_backward.cuh", "drops", 1): "saves time: nobody asks then what is kept",
    ("attention_backward.cuh", "half < 2", 3): "a bit that nobody asks for",
    ("attention_backward.cuh", "n == 0"): "saves time: the same fragments again",
    ("attention_backward.cuh", "of < 4"): "the first call again, with the same bits",
    ("attention_backward.cuh", "of_key", 2): "saves time: dP that nobody asks for",
    ("attention_backward_general.cuh", "r < kOwn", 3): "the keys of a tile end before",
    ("attention_backward_general.cuh", "which < 2"): "a last turn that fills the second table again",
    ("attention_entry.cuh", "from < entries"): "a last turn without entries",
    ("attention_entry.cuh", "step < kWarp"): "a last turn in which no lane has another so far before it",
    ("attention_forward.cuh", "!idle"): "saves time: no row of such a warp exists, and none is stored",
    ("attention_forward.cuh", "first == begin"): "saves time: the same fragments again",
    ("attention_forward.cuh", "first < end"): "saves time: no row of such a tile exists, and zeros are no bytes",
    ("attention_forward.cuh", "keep_.seed_address != nullptr"): "saves time: at p = 0 every weight is kept, times 1",
    ("attention_forward.cuh", "n < W / 4"): "a last turn beyond the width, which is left out",
    ("attention_forward.cuh", "careful"): "saves time: sums with care are right where nothing asks for it",
    ("attention_general.cuh", "keep.seed_address != nullptr"): "likewise",
    ("attention_products.cuh", "from < count"): "a last turn of no rows",
    ("attention_products.cuh", "from < width"): "a last turn of no depth",
    ("attention_scores.cuh", "p.device.slopes.data != nullptr", 1): "saves time: slopes are 0",
    ("attention_options.cuh", "c < kOwn", 0): "clears what lies between two rows of the weights as well",
    ("attention_options.cuh", "which < 2"): "a last turn that fills the second table again",
    ("attention_products.cuh", "careful"): "saves time: sums with care are right where nothing asks for it",
    ("attention_scores.cuh", "hides"): "saves time: each key is asked then",
    ("attention_tile.cuh", "count > 0"): "an address that nothing is read from",
    ("attention_warp.cuh", "16 * k < width"): "saves time: what is beyond a width is 0",
    ("attention_warp.cuh", "16 * n < width"): "likewise",
    ("attention_warp.cuh", "count < 8"): "a pack ends after 8 by itself",
    ("attention_warp.cuh", "k < W / 16", 1): "a last turn beyond the width, which is left out",
    ("attention_warp.cuh", "n < W / 16"): "likewise",
    ("norm_forward.cuh", "keep.seed_address != nullptr"): "saves time: at p = 0 every element is kept and scaled by 1",
}

BARRIER = re.compile(
    r"__sync(threads|warp)\(\);|cp_async_(wait<\d>|commit)\(\);|blocks\.meet\(\);|signal\(\w+\);|wait_for\([^;]+\);"
)
IF = re.compile(r"\bif \(")
FOR = re.compile(r"\bfor \(")
TERNARY = re.compile(r"(?:= |return |\(|, |: )((?:[^=(),;?{}]|\([^()]*\)|[<>=!]=)+) \? ")


@dataclass(frozen=True)
class Point:
    number: int
    file: str
    line: int
    kind: str  # "barrier", "predicate" or "bound"
    text: str
    nth: int  # of this file's places of the same text

    @property
    def name(self) -> str:
        return f"{self.number}-{self.file}:{self.line}-{self.kind}-{self.text}"

    @property
    def family(self) -> str:
        return FILES[self.file]

    @property
    def equivalent(self) -> str | None:
        """Why this mutant changes no result; None for one that a test has to catch."""
        return EQUIVALENT.get((self.file, self.text)) or EQUIVALENT.get((self.file, self.text, self.nth))


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one before `start`."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced: {text}")


def instrument(file: str, text: str, first: int) -> tuple[str, list[Point]]:
    """The file with its mutation points, numbered from `first`."""
    edits: list[tuple[int, int, str]] = []  # begin, end, replacement
    points: list[Point] = []

    def plant(begin: int, end: int, kind: str, what: str, replacement: str) -> None:
        number = first + len(points)
        nth = sum(point.text == what for point in points)
        points.append(Point(number, file, text.count("\n", 0, begin) + 1, kind, what, nth))
        edits.append((begin, end, replacement.replace("#", f"simt::mutant({number})")))

    code = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)  # comments keep their length and lose their words
    for match in BARRIER.finditer(code):
        plant(match.start(), match.end(), "barrier", match[0], f"if (!#) {match[0]}")
    for match in IF.finditer(code):
        end = closing(code, match.end())
        condition = text[match.end() : end]
        plant(match.end(), end, "predicate", condition, f"# || ({condition})")
    for match in TERNARY.finditer(code):
        if "constexpr" in code[max(code.rfind(c, 0, match.start()) for c in ";{}") : match.start()]:
            continue  # nothing that happens at run time
        plant(*match.span(1), "predicate", match[1], f"# || ({match[1]})")
    for match in FOR.finditer(code):
        condition = code[match.end() : closing(code, match.end())].split(";")[1]
        bound = re.fullmatch(r"( \w+) ([<>]) (.+)", condition)
        if bound is None:
            raise ValueError(f"{file}: a loop's condition must be one comparison, not{condition}")
        begin = code.index(condition, match.end())
        sign = "+" if bound[2] == "<" else "-"
        plant(begin, begin + len(condition), "bound", condition.strip(),
              f"{bound[1]} {bound[2]} {bound[3]} {sign} int(#)")  # fmt: skip
    edits.sort()
    for (_, end, what), (begin, _, _) in pairwise(edits):
        if begin < end:
            raise ValueError(f"{file}: a point within a point, {what}: give its condition a line of its own")
    for begin, end, replacement in reversed(edits):
        text = text[:begin] + replacement + text[end:]
    return text, points


def points(source: Path) -> list[Point]:
    """All mutation points of csrc, in the order of their numbers."""
    found: list[Point] = []
    for file in FILES:
        found += instrument(file, (source / "cuda" / file).read_text(), len(found))[1]
    return found


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(target, ignore_errors=True)
    # Fresh times, so that the build sees new files.
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("cpu"), copy_function=shutil.copyfile)
    number = 0
    for file in FILES:
        text, found = instrument(file, (source / "cuda" / file).read_text(), number)
        (target / "cuda" / file).write_text(text)
        number += len(found)


if __name__ == "__main__":
    main()
