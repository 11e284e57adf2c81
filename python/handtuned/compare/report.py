"""The table of a comparison, its heading and its notes, for a terminal. The words are shared with the HTML page."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .result import Comparison, Row

NARROW = 112  # columns; below, the kernels stand only in the notes


# ---- words ----------------------------------------------------------------------------------------------------------


def heading(comparison: Comparison) -> tuple[str, str]:
    """(what was compared, on which machine)."""
    m, s = comparison.machine, comparison.settings
    models = ", ".join(dict.fromkeys(row.model for row in comparison.rows))
    return (
        f"handtuned {m.handtuned} against torch {m.torch}: {models}, {s.dtype}, batch {s.batch}",
        f"{m.cpu}, {m.isa}, {m.threads} thread{'s' * (m.threads != 1)}",
    )


def notes(comparison: Comparison) -> list[str]:
    """What the columns are, and what the table has no column for."""
    found = [
        "error: largest |result − float64 result| / largest |float64 result|; the float64 result comes from the same "
        "weights and inputs, as rounded to the dtype. forward: outputs, of a whole model its "
        "embeddings; fwd+bwd: gradients of input and parameters for a fixed random gradient of the output, each "
        "against its own largest value. ×k: the worst of k modules, each on its own input in the model.",
        "time: median of one call (×k: mean over the modules). ratio: torch / handtuned, above 1 handtuned is faster; "
        "median [10..90 percentile] over rounds. Both run in this process in turn, the first of each round "
        "alternating.",
    ]
    m = comparison.machine
    if m.load > m.cpus / 2:
        found.append(
            f"The load average was {m.load:.1f} on {m.cpus} CPUs when this began: something else computes or had just "
            "done so. Do not trust these times; run it again on a quiet machine."
        )
    if comparison.settings.dtype == "float64":
        found.append("At float64, torch's own run is the reference: its error is 0 by definition.")
    for row in comparison.rows:
        if row.cosine:
            found.append(
                f"{name_text(row)}: 1 − cosine between the embeddings of torch and handtuned is at most "
                f"{row.cosine.between_sides:.1e}; to float64, torch {row.cosine.torch:.1e}, "
                f"handtuned {row.cosine.handtuned:.1e}."
            )
    for row in comparison.rows:
        if row.tokens:
            found.append(
                f"{name_text(row)}: {row.tokens / row.seconds_torch:.0f} tokens per second with torch, "
                f"{row.tokens / row.seconds_handtuned:.0f} with handtuned."
            )
    found.append(f"kernels: {'; '.join(_served(comparison.rows))}.")
    if comparison.left:
        found.append("not compared: " + "; ".join(f"{x.name} ({x.type}): {x.why}" for x in comparison.left) + ".")
    return found


def _served(rows: list[Row]) -> list[str]:
    by_kernel: dict[str, dict[str, None]] = {}
    for kernel in (kernel for row in rows for kernel in row.kernels):
        by_kernel.setdefault(f"{kernel.backend}/{kernel.kernel}", {})[kernel.op] = None
    return [f"{', '.join(ops)} served by {kernel}" for kernel, ops in by_kernel.items()]


def name_text(row: Row) -> str:
    return row.title if row.modules else f"{row.name} ({row.model})"


def input_text(row: Row) -> str:
    return f"{row.kind}, input {'×'.join(str(size) for size in row.shape)}"


def direction_text(row: Row) -> str:
    return "forward" if row.direction == "forward" else "fwd+bwd"


def kernel_text(row: Row) -> str:
    """cpu/avx2 ×6: backend, kernel and number of calls."""
    counts: Counter[str] = Counter()
    for kernel in row.kernels:
        counts[f"{kernel.backend}/{kernel.kernel}"] += kernel.calls
    return ", ".join(f"{kernel} ×{calls}" for kernel, calls in counts.items()) or "none"


def seconds_text(seconds: float) -> str:
    """Three digits and a unit."""
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e3, "ms")) if seconds * s >= 1), (1e6, "µs"))
    value = seconds * scale
    return f"{value:.0f} {unit}" if value >= 999.5 else f"{value:#.3g}".rstrip(".") + f" {unit}"


def ratio_text(row: Row) -> str:
    return f"{row.ratio.median:.2f}x [{row.ratio.p10:.2f}..{row.ratio.p90:.2f}]"


# ---- table ----------------------------------------------------------------------------------------------------------


def render(comparison: Comparison, width: int) -> Any:
    """The report for a terminal of `width` columns."""
    compared, machine = heading(comparison)
    table = Table(box=box.SIMPLE_HEAD if width >= NARROW else None, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("module\n  input", overflow="fold")
    table.add_column("pass", no_wrap=True)
    for quantity in ("error", "time"):
        for side in ("torch", "handtuned"):
            table.add_column(f"{quantity}\n{side}", justify="right", no_wrap=True)
    table.add_column("ratio\ntorch / handtuned", no_wrap=True)
    if width >= NARROW:
        table.add_column("served by", no_wrap=True)
    for _, group in itertools.groupby(comparison.rows, name_text):
        rows = list(group)
        table.add_row(*_cells(rows, width), end_section=True)
    bullets = Table.grid(padding=(0, 1))
    for note in notes(comparison):
        bullets.add_row("·", Text(note))
    return Group(Text(compared, style="bold"), Text(machine), "", table, "", bullets)


def _cells(rows: list[Row], width: int) -> list[Text]:
    """The cells of the rows of one name, a line for each row; the name takes two."""
    columns: list[list[Text]] = [
        [Text(direction_text(row)) for row in rows],
        [Text(f"{row.error_torch:.1e}") for row in rows],
        [Text(f"{row.error_handtuned:.1e}") for row in rows],
        [Text(seconds_text(row.seconds_torch)) for row in rows],
        [Text(seconds_text(row.seconds_handtuned)) for row in rows],
        [Text(ratio_text(row), style=_ratio_style(row)) for row in rows],
    ]
    if width >= NARROW:
        columns.append([Text(kernel_text(row)) for row in rows])
    name = Text.assemble(name_text(rows[0]), "\n", (f"  {input_text(rows[0])}", "dim"))
    return [name, *(Text("\n").join(column) for column in columns)]


def _ratio_style(row: Row) -> str:
    return "green" if row.ratio.p10 > 1 else "red" if row.ratio.p90 < 1 else ""
