"""A run of the suite as one HTML file, with its tables and pictures and the prediction for GPUs."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from bench.report import pictures, predict, tables

STYLE = """body { font: 14px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; color: #1a1a1a }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .7em; border-bottom: 1px solid #e6e6e6 }
th { text-align: left; color: #757575 } td.n { text-align: right; font-variant-numeric: tabular-nums }
.slower, .missed { color: #b3261e; font-weight: 600 } .tie { color: #757575 } .faster, .met { color: #20639b }
img { max-width: 100% } code { white-space: pre-wrap }"""

READING = (
    "All sides of a comparison take turns in one process; a ratio is the median over rounds of the ratios within a "
    "round. Times alone are no verdict: they are in the JSON."
)


def to_html(content: dict[str, Any], gpu: dict[str, Any] | None = None) -> str:
    """One file that needs no other."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>lookahead_fused: benchmarks</title>",
        f"<style>{STYLE}</style>",
    ]
    parts += ["<h1>lookahead_fused: benchmarks</h1>", f"<p>{html.escape(tables.conditions(content))}</p>"]
    parts.append(f"<p>{html.escape(tables.summary(tables.ratio_rows(content)))}. {READING}</p>")
    parts += [pictures.embedded(picture) for picture in pictures.draw_all(content)]
    for title, header, make in tables.TABLES:
        parts += [f"<h2>{title}</h2>", _table(header, make(content))]
    parts += ["<h2>Step times on GPUs: a prediction</h2>", f"<p>{html.escape(predict.assumptions())}</p>"]
    parts.append(_table(predict.HEADER, predict.table(gpu)))
    return "\n".join(parts) + "\n"


def _table(header: Iterable[str], rows: tables.Rows) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    for row in rows:
        cells = []
        for text in row:
            numeric = bool(text) and text[0].isdigit()
            kind = (
                text.partition(" ")[0] if text.partition(" ")[0] in ("slower", "tie", "faster", "missed", "met") else ""
            )
            cells.append(f'<td class="{"n" if numeric else kind}">{html.escape(text)}</td>')
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
