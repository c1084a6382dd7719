"""A run of the suite for people: a table in the terminal, and one HTML file with tables and pictures.

python bench/report.py build/bench/bench.json [--html FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pictures
import predict
from figures import QUIET, Figure
from measure import Spread
from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLE = """body { font: 14px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; color: #1a1a1a }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .7em; border-bottom: 1px solid #e6e6e6 }
th { text-align: left; color: #757575 } td.n { text-align: right; font-variant-numeric: tabular-nums }
.slower, .missed { color: #b3261e; font-weight: 600 } .tie { color: #757575 } .faster, .met { color: #20639b }
img { max-width: 100% } code { white-space: pre-wrap }"""

Rows = list[list[str]]
RATIOS = ("ratio", "growth", "first step")


def ratio_rows(content: dict[str, Any]) -> Rows:
    """A row for every ratio that was measured, in the order of the suite."""
    rows = []
    for benchmark in content["benchmarks"]:
        info = benchmark["extra_info"]
        doubt = " (machine busy)" if (info.get("others") or 0) > QUIET else ""
        for figure in pictures.of_kind(info, *RATIOS):
            value = figure["value"]
            if figure["unit"] != "x":
                continue
            quartiles, count = f"{value['q1']:.3g} – {value['q3']:.3g}", str(value["samples"])
            where = info.get("short") or info["title"]
            verdict = pictures.verdict(value) + doubt
            rows.append([where, figure["of"], pictures.times(value["median"]), quartiles, count, verdict])
    return rows


def target_rows(content: dict[str, Any]) -> Rows:
    """A row for every figure with a target."""
    rows = []
    for benchmark in content["benchmarks"]:
        for record in benchmark["extra_info"]["figures"]:
            if record["target"] is not None:
                figure = Figure(**{key: value for key, value in record.items() if key not in ("met", "value")},
                                value=Spread(**record["value"]))  # fmt: skip
                value, bound = figure.value, "≥" if figure.at_least else "≤"
                quartiles = f"{value.q1:.3g} – {value.q3:.3g}" if value.samples > 1 else ""
                where = benchmark["extra_info"].get("short") or benchmark["extra_info"]["title"]
                rows.append([where, figure.label, f"{value.median:.3g} {figure.unit}", quartiles,
                             f"{bound} {figure.target:g} {figure.unit}",
                             "met" if figure.met else "missed"])  # fmt: skip
    return rows


def other_rows(content: dict[str, Any]) -> Rows:
    """All other figures: rates, host work, memory, growth, the first step, and what was counted."""
    rows = []
    for benchmark in content["benchmarks"]:
        info = benchmark["extra_info"]
        where = info.get("short") or info["title"]
        for figure in info["figures"]:
            shown = figure["unit"] == "x" and figure["kind"] in RATIOS
            if not shown and figure["target"] is None:
                value = figure["value"]
                quartiles = f"{value['q1']:.3g} – {value['q3']:.3g}" if value["samples"] > 1 else ""
                rows.append([where, figure["label"], f"{value['median']:.4g} {figure['unit']}", quartiles])
        for name, number in info.get("counts", {}).items():
            rows.append([where, name, f"{number:,.10g}", ""])
    return rows


def skipped_rows(content: dict[str, Any]) -> Rows:
    """What was not run, and why: whole benchmarks, and opponents, each reason once."""
    rows = [[name, reason] for name, reason in content.get("skipped", {}).items()]
    seen: set[tuple[str, str]] = set()
    for benchmark in content["benchmarks"]:
        for name, reason in benchmark["extra_info"]["skipped"].items():
            if (name, reason) not in seen:
                seen.add((name, reason))
                rows.append([name, reason])
    return rows


def summary(rows: Rows) -> str:
    """How many ratios are which."""
    kinds = [row[-1].partition(" ")[0] for row in rows]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("faster", "tie", "slower"))
    return f"{len(rows)} ratios: {counted} (a tie: the quartiles lie on both sides of 1)"


def conditions(content: dict[str, Any]) -> str:
    return "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in content["conditions"].items() if value != "")


TABLES: Sequence[tuple[str, tuple[str, ...], Any]] = (
    ("Targets", ("benchmark", "figure", "value", "quartiles", "target", ""), target_rows),
    ("Times faster than", ("list", "opponent", "ratio", "quartiles", "samples", ""), ratio_rows),
    ("Other measures", ("benchmark", "figure", "value", "quartiles"), other_rows),
    ("Not run", ("what", "why"), skipped_rows),
)


def to_terminal(content: dict[str, Any], console: Console) -> None:
    console.print(conditions(content))
    for title, header, make in TABLES:
        shown = Table(title=title, title_justify="left")
        for name in header:
            shown.add_column(name, justify="right" if name in ("value", "ratio", "quartiles", "samples") else "left")
        for row in make(content):
            shown.add_row(*map(escape, row), style="bold" if row[-1].startswith(("slower", "missed")) else "")
        console.print(shown)
    console.print(summary(ratio_rows(content)))


def to_html(content: dict[str, Any], gpu: dict[str, Any] | None = None) -> str:
    """One file that needs no other."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>lookahead_fused: benchmarks</title>",
        f"<style>{STYLE}</style>",
    ]
    parts += ["<h1>lookahead_fused: benchmarks</h1>", f"<p>{html.escape(conditions(content))}</p>"]
    parts.append(f"<p>{html.escape(summary(ratio_rows(content)))}. {READING}</p>")
    parts += [pictures.embedded(picture) for picture in pictures.draw_all(content)]
    for title, header, make in TABLES:
        parts += [f"<h2>{title}</h2>", _table(header, make(content))]
    parts += ["<h2>Step times on GPUs: a prediction</h2>", f"<p>{html.escape(predict.assumptions())}</p>"]
    parts.append(_table(predict.HEADER, predict.table(gpu)))
    return "\n".join(parts) + "\n"


READING = (
    "All sides of a comparison take turns in one process; a ratio is the median over rounds of the ratios within a "
    "round. Times alone are no verdict: they are in the JSON."
)


def _table(header: Iterable[str], rows: Rows) -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="a run of the benchmarks for people", allow_abbrev=False)
    parser.add_argument("report", type=Path, help="the JSON that pytest-benchmark wrote")
    parser.add_argument("--html", type=Path, help="write the report there")
    parser.add_argument(
        "--picture", type=Path, help="write the picture of the ratios to near opponents there, as a PNG"
    )
    parser.add_argument("--gpu", type=Path, help="the JSON of a run on a GPU, to be put beside the prediction")
    options = parser.parse_args()
    content = json.loads(options.report.read_text())
    gpu = json.loads(options.gpu.read_text()) if options.gpu and options.gpu.exists() else None
    to_terminal(content, Console(width=170))
    if options.html:
        options.html.write_text(to_html(content, gpu))
        print(options.html)
    if options.picture:
        title = "Speed of a lookahead_fused step against torch's, syncs included"
        pictures.save(pictures.ratios(content, all_opponents=False, title=title), options.picture)
        print(options.picture)


if __name__ == "__main__":
    main()
