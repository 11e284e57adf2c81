"""The page's plots as inline SVG: per op the ratio to torch eager, and the share of the machine's limit.

Text and axes take the page's colour (currentColor), so one SVG serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import machine
from .results import EAGER, OURS, Row, Run, losing

INK = "#010203"  # stands for the page's colour until the SVG is written
COLOURS = ("#4a86e8", "#e07b39")  # by allocator setting; both readable on white and on black
LEGEND = (
    "Left of each pair: times faster than torch eager; the line on a bar is the 10–90 % spread, the thin line at 1 is "
    "torch, a diamond is the target. Right: % of what the machine can do at most, from torch (hollow) to handtuned "
    "(filled). Blue: default allocator; orange: page faults removed for all sides."
)


def _label(row: Row) -> str:
    return f"{row['dtype']} {'x'.join(map(str, row['shape']))}"


def _ratio_panel(axes: Any, place: float, height: float, row: Row, colour: str) -> None:
    ratio = row["peers"][EAGER]["ratio"]
    axes.barh(place, ratio["median"], height * 0.9, color=colour)
    axes.plot([ratio["low"], ratio["high"]], [place, place], color=INK, linewidth=1.2)
    text = f"{ratio['median']:.2f}" + (" slower" if losing(row) else "")
    end = max(ratio["median"], ratio["high"], row["target"] or 0)
    axes.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=7)
    if row["target"] is not None:
        axes.plot(row["target"], place, "D", color=INK, markersize=3.5)


def _share_panel(axes: Any, place: float, height: float, row: Row, colour: str) -> None:
    shares = [100 * row["peers"][name]["share"] for name in (EAGER, OURS)]
    axes.plot(shares, [place, place], color=colour, linewidth=1.5)
    axes.plot(shares[0], place, "o", markersize=5, markerfacecolor="none", markeredgecolor=colour)
    axes.plot(shares[1], place, "o", markersize=5, color=colour)


def _figure(runs: Sequence[Run], op: str, panel: Callable[..., None], reference: float, label: str, prefix: str) -> str:
    """Rows of one op down the page, one bar or dumbbell per allocator setting."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(_label(row) for run in runs for row in run.rows if row["op"] == op))
    figure = Figure(figsize=(5.2, 0.9 + 0.34 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(runs)
    for number, run in enumerate(runs):
        colour = COLOURS[list(machine.ALLOCATORS).index(run.allocator) % len(COLOURS)]
        for row in run.rows:
            if row["op"] == op and row["status"] == "ok":
                place = labels.index(_label(row)) + (number - (len(runs) - 1) / 2) * height
                panel(axes, place, height, row, colour)
    axes.axvline(reference, color=INK, linewidth=0.7)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.grid(axis="x", color=INK, alpha=0.15)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return _svg(figure, prefix)


def _svg(figure: Any, prefix: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        for axes in figure.axes:
            axes.tick_params(colors=INK, labelcolor=INK)
            axes.xaxis.label.set_color(INK)
            for spine in axes.spines.values():
                spine.set_edgecolor(INK)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    return text.replace(INK, "currentColor")


def figures(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """(title, SVG) for every op that has figures."""
    ops = {row["op"]: row["limit"] for run in runs for row in run.rows if row["status"] == "ok"}
    for number, (op, limit) in enumerate(ops.items()):
        share = f"% of {machine.LIMITS[limit]}"
        yield f"{op}: times faster than torch eager", _figure(runs, op, _ratio_panel, 1, "ratio", f"r{number}")
        yield f"{op}: {share}", _figure(runs, op, _share_panel, 100, share, f"c{number}")
