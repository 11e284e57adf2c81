"""A comparison as one self-contained HTML page: inline CSS and SVG, light and dark, from a phone's width up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

from . import report
from .result import Comparison, Row

CSS = """
:root { color-scheme: light dark; --text: #1c2128; --back: #ffffff; --soft: #656d76; --line: #d0d7de; --torch: #b35900;
  --ours: #0860ca; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --back: #0d1117; --soft: #9198a1; --line: #3d444d;
  --torch: #f0a35e; --ours: #6cb0ff; } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--text); background: var(--back);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
p, li { color: var(--soft); margin: .2rem 0; } ul { padding-left: 1.1rem; font-size: .9rem; }
.plots { display: grid; gap: 1.5rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; max-width: 34rem; } figcaption { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--text); font-size: 11px;
  paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
svg .soft { fill: var(--soft); font-size: 10px; } svg .grid { stroke: var(--line); } svg .one { stroke: var(--text); }
svg .torch { fill: var(--back); stroke: var(--torch); stroke-width: 1.6; } svg .ours { fill: var(--ours); }
svg .span { stroke: var(--ours); stroke-width: 3; stroke-opacity: .45; stroke-linecap: round; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td { white-space: nowrap; } td:first-child, td:last-child { white-space: normal; }
td:first-child { min-width: 11rem; }
td small { color: var(--soft); display: block; }
@media (max-width: 48rem) { thead { display: none; } table, tbody, tr, td { display: block; }
  tr { border-bottom: 2px solid var(--line); padding: .5rem 0; } td { border: 0; padding: .1rem 0; display: flex;
  white-space: normal; justify-content: space-between; gap: 1rem; }
  td:last-child { text-align: right; } td::before { content: attr(data-label); color: var(--soft);
  white-space: nowrap; }
  td:first-child { display: block; font-weight: 600; } td:first-child::before { content: none; } }
"""


def page(comparison: Comparison) -> str:
    compared, machine = report.heading(comparison)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes(comparison))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>handtuned compare</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{escape(compared)}</h1><p>{escape(machine)}</p></header>
<div class="plots">
{_speed_plot(comparison.rows)}
{_error_plot(comparison.rows)}
</div>
{_table(comparison.rows)}
<ul>{notes}</ul>
</body>
</html>
"""


# ---- table ----------------------------------------------------------------------------------------------------------


def _table(rows: list[Row]) -> str:
    labels = ("module, input", "pass", "error torch", "error handtuned", "time torch", "time handtuned",
              "ratio torch / handtuned", "served by")  # fmt: skip
    head = "".join(f"<th>{label}</th>" for label in labels)
    body = "\n".join(f"<tr>{_cells(row, labels)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _cells(row: Row, labels: tuple[str, ...]) -> str:
    texts = (report.direction_text(row), f"{row.error_torch:.1e}", f"{row.error_handtuned:.1e}",
             report.seconds_text(row.seconds_torch), report.seconds_text(row.seconds_handtuned),
             report.ratio_text(row), _served(row))  # fmt: skip
    name = escape(report.name_text(row)).replace(".", ".<wbr>")
    what = f"{name}<small>{escape(report.input_text(row))}</small>"
    first = f'<td data-label="{labels[0]}">{what}</td>'
    rest = (f'<td data-label="{label}">{escape(text)}</td>' for label, text in zip(labels[1:], texts, strict=True))
    return first + "".join(rest)


def _served(row: Row) -> str:
    by_kernel: dict[str, list[str]] = {}
    for kernel in row.kernels:
        by_kernel.setdefault(f"{kernel.backend}/{kernel.kernel}", []).append(f"{kernel.op} ×{kernel.calls}")
    return "; ".join(f"{kernel}: {', '.join(ops)}" for kernel, ops in by_kernel.items()) or "none"


# ---- plots ----------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 360, 54, 340  # of the drawing and of the axis, in units of about a pixel at phone width
NAME, BAND = 18, 16  # heights of a name and of a row under it


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis over [low, high]; values outside lie on its ends."""

    low: float
    high: float

    def x(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return LEFT + (RIGHT - LEFT) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self, steps: tuple[int, ...]) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = (step * 10.0**power for power, step in itertools.product(powers, steps))
        return [value for value in values if self.low <= value <= self.high]


def _speed_plot(rows: list[Row]) -> str:
    axis = Axis(min(0.8, *(row.ratio.p10 for row in rows)) / 1.1, max(1.25, *(row.ratio.p90 for row in rows)) * 1.1)
    ticks = axis.ticks((1, 2, 5) if axis.high / axis.low > 4 else (1, 2, 3, 4, 5, 6, 7, 8, 9))

    def mark(row: Row, y: float) -> str:
        low, high = axis.x(row.ratio.p10), axis.x(row.ratio.p90)
        span = f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
        dot = f'<circle class="ours" cx="{axis.x(row.ratio.median):.1f}" cy="{y}" r="3.5"/>'
        return f"<g><title>{report.ratio_text(row)}</title>{span}{dot}</g>"

    one = f'<line class="one" x1="{axis.x(1):.1f}" x2="{axis.x(1):.1f}" y1="4" y2="{{bottom}}"/>'
    return _figure(
        "Speed against torch", "torch's time / handtuned's: right of 1, handtuned is faster. Dot: median of the "
        "rounds; bar: 10..90 percentile.", rows, axis, ((tick, f"{tick:g}x") for tick in ticks), mark, one,
    )  # fmt: skip


def _error_plot(rows: list[Row]) -> str:
    positive = [error for row in rows for error in (row.error_torch, row.error_handtuned) if error > 0] or [1e-16]
    axis = Axis(min(positive) / 1.5, max(positive) * 1.5)
    steps = (1,) if axis.high / axis.low > 100 else (1, 2, 5)

    def mark(row: Row, y: float) -> str:
        title = f"torch {row.error_torch:.1e}, handtuned {row.error_handtuned:.1e}"
        theirs = f'<circle class="torch" cx="{axis.x(row.error_torch):.1f}" cy="{y}" r="4"/>'
        ours = f'<circle class="ours" cx="{axis.x(row.error_handtuned):.1f}" cy="{y}" r="3"/>'
        return f"<g><title>{title}</title>{theirs}{ours}</g>"

    return _figure(
        "Worst error against float64", "Relative to the largest value: left is better. Ring: torch; filled: handtuned.",
        rows, axis, ((tick, f"{tick:.0e}") for tick in axis.ticks(steps)), mark, "",
    )  # fmt: skip


def _figure(
    title: str,
    caption: str,
    rows: list[Row],
    axis: Axis,
    ticks: Iterable[tuple[float, str]],
    mark: Callable[[Row, float], str],
    over_grid: str,
) -> str:
    """A name per group of rows, under it one line per row with its mark; the axis at the bottom."""
    y, marks = 0.0, []
    for name, group in itertools.groupby(rows, report.name_text):
        y += NAME
        marks.append(f'<text x="2" y="{y - 4}">{escape(name)}</text>')
        for row in group:
            y += BAND
            marks.append(f'<text class="soft" x="2" y="{y - 4}">{report.direction_text(row)}</text>')
            marks.append(mark(row, y - 7))
    grid = []
    for value, label in ticks:
        x = f"{axis.x(value):.1f}"
        grid.append(f'<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{y}"/>')
        grid.append(f'<text class="soft" x="{x}" y="{y + 11}" text-anchor="middle">{label}</text>')
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {y + 16:.0f}" role="img" aria-label="{escape(title)}">'
        + "\n".join((*grid, over_grid.format(bottom=y), *marks))
        + "</svg>"
    )
    return f"<figure><h2>{escape(title)}</h2>\n{svg}\n<figcaption>{escape(caption)}</figcaption></figure>"
