"""The files of the GPU check: one JSON and one self-contained page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .gpu_rows import Row


def summary(rows: Sequence[Row]) -> str:
    count = {status: sum(row.status == status for row in rows) for status in ("ok", "wrong", "failed", "skipped")}
    return ", ".join(f"{number} {status}" for status, number in count.items())


def _figures(row: Row) -> str:
    parts = [f"{name}: {value}" for name, value in row.figures.items() if name != "peers"]
    for name, found in row.figures.get("peers", {}).items():
        if "refused" in found:
            parts.append(f"{name}: – ({found['refused']})")
        elif "seconds" in found:
            share = f", {found['of peak']:.0%} of peak" if "of peak" in found else ""
            parts.append(f"{name}: {found['seconds'] * 1e6:.1f} µs{share}")
        else:
            parts.append(f"{name}: ran")
    return "; ".join(parts)


def page(facts: dict[str, str], rows: Sequence[Row]) -> str:
    """One self-contained HTML page."""
    lines = [
        "<!doctype html><meta charset=utf-8><title>handtuned on a GPU</title>",
        "<style>body{font:14px sans-serif;margin:2em}td,th{padding:2px 8px;text-align:left;vertical-align:top}"
        ".wrong,.failed{background:#fcc}.skipped{color:#777}</style>",
        f"<h1>handtuned on {html.escape(facts.get('device', 'a GPU'))}</h1><p>{html.escape(summary(rows))}</p><ul>",
        *(f"<li>{html.escape(name)}: {html.escape(value)}</li>" for name, value in facts.items()),
        "</ul>",
    ]
    for part, title in (("time", "Times"), ("check", "Checks")):
        lines.append(f"<h2>{title}</h2><table><tr><th>family<th>row<th>kernels<th>status<th>figures<th>why</tr>")
        for row in sorted((r for r in rows if r.part == part), key=lambda r: r.status in ("ok", "skipped")):
            cells = (row.family, row.name, row.kernels, row.status, _figures(row), row.why)
            lines.append(f"<tr class={row.status}>" + "".join(f"<td>{html.escape(c)}" for c in cells) + "</tr>")
        lines.append("</table>")
    return "\n".join(lines)


def write(output: Path, facts: dict[str, str], rows: Sequence[Row]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    data = {"facts": facts, "summary": summary(rows), "rows": [asdict(row) for row in rows]}
    (output / "gpu-check.json").write_text(json.dumps(data, indent=1, default=str) + "\n")
    (output / "gpu-check.html").write_text(page(facts, rows))
