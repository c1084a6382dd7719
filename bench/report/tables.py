"""A run of the suite in tables: rows for the terminal and for the page, and the terminal's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.harness.figures import QUIET, Figure
from bench.report import pictures
from lookahead_fused.bench.samples import Spread

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
