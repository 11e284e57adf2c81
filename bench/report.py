"""The results as a terminal table, as Markdown, and as one self-contained page (python -m bench.report [DIR]).

All three show the same cells. A ratio is the peer's time over handtuned's, the median over interleaved rounds; in
brackets the 10-90 % spread. Rows in which torch eager is faster stay, marked.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from pathlib import Path

from . import machine, plots
from .families import FAMILIES, NORM, Family
from .results import EAGER, OURS, Row, Run, load, losing, verdict

# ---- cells -----------------------------------------------------------------------------------------------------------


def _target(row: Row) -> str:
    wanted = ((row["target"], "g"), (row["share_target"], ".0%"))
    outcome = verdict(row)
    return f"{', '.join(format(value, form) for value, form in wanted if value)} {outcome}" if outcome else ""


def _microseconds(figures: Row) -> str:
    if "seconds" not in figures:
        return "–"
    value = figures["seconds"]["median"] * 1e6
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(figures: Row, with_spread: bool) -> str:
    if "ratio" not in figures:
        return "–"
    r = figures["ratio"]
    return _times(r["median"]) + (f" ({_times(r['low'])}–{_times(r['high'])})" if with_spread else "")


def _torch_to_ours(row: Row, figure: str, scale: float) -> str:
    values = [row["peers"].get(name, {}).get(figure) for name in (EAGER, OURS)]
    return " → ".join("–" if value is None else f"{value * scale:.0f}" for value in values)


def cells(row: Row, family: Family = NORM) -> list[str]:
    """One table line in the order of family.columns; a red row has no figures."""
    shape = "x".join(map(str, row["shape"]))
    peers = row["peers"]
    if row["status"] != "ok":
        return [row["op"], row["dtype"], shape, *["–"] * (len(family.numbers) - 1), "", row["status"]]
    return [
        row["op"],
        row["dtype"],
        shape,
        _microseconds(peers.get(EAGER, {})),
        _microseconds(peers.get(OURS, {})),
        _ratio(peers.get(EAGER, {}), True),
        *(_ratio(peers.get(name, {}), False) for _, name in family.peers),
        _torch_to_ours(row, "share", 100),
        _torch_to_ours(row, "faults_per_call", 1),
        _target(row),
        "slower" if losing(row) else "",
    ]


def summary(run: Run) -> str:
    """One line of counts."""
    timed = [row for row in run.rows if row["status"] == "ok"]
    red = sum(row["status"] == "test red" for row in run.rows)
    outcomes = [verdict(row) for row in timed]
    return (
        f"{len(timed)} rows timed, {sum(map(losing, timed))} slower than torch eager, {red} refused because the test "
        f"is red; targets: {outcomes.count('ok')} reached, {outcomes.count('missed')} missed"
    )


def left_out(run: Run) -> list[str]:
    """Every reason for a missing figure, with the number of rows that it holds for."""
    counts: dict[str, int] = {}
    for row in run.rows:
        if row["why"]:
            counts[f"{row['op']} {row['dtype']} {'x'.join(map(str, row['shape']))}: {row['why']}"] = 1
        for name, figures in row["peers"].items():
            if "refused" in figures:
                reason = f"{name}: {figures['refused']}"
                counts[reason] = counts.get(reason, 0) + 1
    return [f"{reason} ({count} row{'s' * (count > 1)})" for reason, count in counts.items()]


def disturbed(run: Run) -> list[str]:
    """A warning if other processes were running; times of two threads are worthless then."""
    cores = run.machine.get(machine.OTHER_WORK, 0.0)
    if cores < machine.QUIET:
        return []
    return [f"Not a quiet machine: other processes used {cores:.2f} cores during the run; do not rely on these figures"]


def facts_line(run: Run) -> str:
    return ", ".join(f"{name} {value}" for name, value in _facts(run).items())


def _facts(run: Run) -> dict[str, str]:
    facts = {name: str(value) for name, value in run.machine.items()}
    return facts | ({"commit": run.commit} if run.commit else {}) | ({"measured (UTC)": run.when} if run.when else {})


# ---- terminal and Markdown -------------------------------------------------------------------------------------------


def terminal(run: Run, colour: bool) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{run.title} — ratio: peer's time / handtuned's, median (10–90 %)")
    for i, column in enumerate(run.family.columns):
        table.add_column(column, justify="right" if i in run.family.numbers else "left", no_wrap=True)
    for row in run.rows:
        bad = row["status"] != "ok" or losing(row)
        table.add_row(*cells(row, run.family), style="red" if bad else "yellow" if verdict(row) == "missed" else "")
    console = Console(
        width=230, force_terminal=colour, no_color=not colour, color_system="standard" if colour else None
    )
    with console.capture() as capture:
        console.print(table)
        console.print(
            summary(run), *disturbed(run), facts_line(run), *left_out(run), sep="\n", highlight=False, markup=False
        )
    return capture.get()


def markdown(runs: Sequence[Run]) -> str:
    """Of one family."""
    family = runs[0].family
    lines = [f"# {family.title}", "", family.notes, ""]
    for run in runs:
        lines += [
            f"## {run.title}",
            "",
            *(f"{text}.\n" for text in (summary(run), *disturbed(run))),
            "| " + " | ".join(family.columns) + " |",
        ]
        lines.append(
            "|" + "|".join(" ---: " if i in family.numbers else " --- " for i in range(len(family.columns))) + "|"
        )
        lines += ["| " + " | ".join(cells(row, family)) + " |" for row in run.rows]
        lines += ["", *[f"- {reason}" for reason in left_out(run)], "", f"Machine: {facts_line(run)}.", ""]
    return "\n".join(lines)


# ---- the page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1a; --paper: #fdfdfb; --line: #d5d5cf; --soft: #63635d; --bad: #b3261e;
  --miss: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececE6; --paper: #171716; --line: #3b3b38; --soft: #a3a39b;
  --bad: #ff8a80; --miss: #f0b95a; } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; } p { max-width: 46rem; } .soft, dt { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; color: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  font-variant-numeric: tabular-nums; }
.n { text-align: right; } .bad td { color: var(--bad); } .miss td, .warning { color: var(--miss); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def _html_table(run: Run) -> str:
    columns = run.family.columns
    align = ['class="n"' if i in run.family.numbers else "" for i in range(len(columns))]
    head = "".join(f"<th {a}>{html.escape(name)}</th>" for a, name in zip(align, columns, strict=True))
    body = []
    for row in run.rows:
        bad = row["status"] != "ok" or losing(row)
        style = "bad" if bad else "miss" if verdict(row) == "missed" else ""
        line = "".join(
            f"<td {a}>{html.escape(cell)}</td>" for a, cell in zip(align, cells(row, run.family), strict=True)
        )
        body.append(f'<tr class="{style}">{line}</tr>')
    rows = "\n".join(body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _html_run(run: Run) -> str:
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _facts(run).items())
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in left_out(run))
    missing = f"<details><summary>What has no figure, and why</summary><ul>{reasons}</ul></details>" if reasons else ""
    warning = "".join(f'<p class="warning">{html.escape(text)}.</p>' for text in disturbed(run))
    return (
        f"<h2>{html.escape(run.title)}</h2><p>{html.escape(summary(run))}.</p>{warning}{_html_table(run)}{missing}"
        f"<details><summary>Machine</summary><dl>{facts}</dl></details>"
    )


def page(runs: Sequence[Run]) -> str:
    """One family as an HTML document without any external resource."""
    family = runs[0].family
    figures = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>" for title, svg in plots.figures(runs)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>handtuned: {html.escape(family.title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(family.title)}</h1><p>{html.escape(family.notes)}</p>"
        f'<h2>Plots</h2><p class="soft">{html.escape(plots.LEGEND)}</p><div class="plots">{figures}</div>'
        + "".join(map(_html_run, runs))
        + "</body></html>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    directory = Path(arguments[0] if arguments else "bench-results")
    found = {name: runs for name, family in FAMILIES.items() if (runs := load(directory, family))}
    if not found:
        print(f"No results in {directory}: run python -m bench first", file=sys.stderr)
        return 1
    for name, runs in found.items():
        html_path, markdown_path = directory / f"{name}.html", directory / f"{name}.md"
        html_path.write_text(page(runs))
        markdown_path.write_text(markdown(runs))
        print(f"Wrote {html_path} and {markdown_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
