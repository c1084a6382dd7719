"""The figures of a run as tables, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.codes.errors import Uneven

Figures = Mapping[str, Sequence[Mapping[str, Any]]]
# An error is told by its root of the mean square, what one number in a thousand exceeds, and the largest.
THREE = "rms / 99.9 % / worst"


def shown(title: str, figures: Figures) -> str:
    """All tables of a network."""
    parts = [f"## {title}", "Decades below the block's largest.", _within(figures["within"])]
    for step in dict.fromkeys(one["step"] for one in figures["once"]):
        rows = [one for one in figures["once"] if one["step"] == step]
        parts += [f"Written and read once, moments after {step} steps; errors {THREE}.", _once(rows)]
    parts += ["The same, the last moments, by block.", _once(figures["blocks"])]
    parts += [f"In the code from the first step on, beside fp32; errors {THREE}.", _kept(figures["kept"])]
    return "\n\n".join(parts) + "\n"


def shown_uneven(figures: Mapping[str, Sequence[Uneven]]) -> str:
    """By code, of each size of gradients what its steps have of fp32's."""
    sizes = [one.size for one in next(iter(figures.values()))]
    header = ["code", *("the largest" if size == 1 else f"{size:g} of it" for size in sizes)]
    rows = [
        [code, *(f"{_number(one.along)} ± {_number(one.error)}" for one in found)] for code, found in figures.items()
    ]
    said = "Steps of elements by the size of their gradients in the block, over fp32's, ± the length of their error."
    return f"{said}\n\n{_table(header, rows)}\n"


def _within(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ("moment", "block", "half", "99.9 %", "99.999 %", "worst")
    return _table(
        header,
        [
            (row["moment"], row["block"], *(f"{row[name]:.2f}" for name in ("half", "often", "rarely", "worst")))
            for row in rows
        ],
    )


def _once(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["code", "block", "√v, relative", "m, relative", "step, in lr", "step, of its length", "step, relative"]
    header += ["v to 0", "m to 0"]
    return _table(
        header,
        [
            (
                row["code"],
                row["block"],
                _spread(row["root"]),
                _spread(row["first"]),
                _spread(row["step_error"]),
                _number(row["share"]),
                _spread(row["relative"]),
                _number(row["second_lost"]),
                _number(row["first_lost"]),
            )
            for row in rows
        ],
    )


def _kept(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["code", "block", "mean of v", "√v, relative", "step, in lr", "step, of its length"]
    header += ["v faded together", "v faded alone"]
    return _table(
        header,
        [
            (
                row["code"],
                row["block"],
                f"{row['mean']:.3f}",
                _spread(row["root"]),
                _spread(row["step_error"]),
                _number(row["share"]),
                f"{row['together']:.3f}",
                f"{row['alone']:.3f}",
            )
            for row in rows
        ],
    )


def _spread(found: Mapping[str, float]) -> str:
    return " / ".join(_number(found[name]) for name in ("rms", "often", "worst"))


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value >= 1000 or value < 1e-3 else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
