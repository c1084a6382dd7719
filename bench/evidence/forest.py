"""One claim's figures as a picture: a line a figure, its interval, and the margin that it is compared with."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from bench.evidence.claims import Finding
from bench.evidence.figures import Figure
from bench.evidence.statistics import no_difference

# Colours that stay apart for colour-blind readers and in grey; the shape of the mark says it too.
COLOURS = {"yes": "#20639b", "no": "#d1731e", "open": "#757575"}
INK, RULE = "#1a1a1a", "#cfcfcf"
LABELS, AXIS, NUMBERS, ROW = 330, 440, 190, 20


def forest(findings: Sequence[Finding]) -> list[str]:
    """SVG texts, one for each unit among the findings that have a figure."""
    units = dict.fromkeys(finding.figure.unit for finding in findings if finding.figure is not None)
    return [
        _picture([(finding, finding.figure) for finding in findings if finding.figure and finding.figure.unit == unit])
        for unit in units
    ]


def interval(figure: Figure) -> str:
    """Value, unit and interval as people read them; exact figures have no interval."""
    unit = "" if figure.unit == "ratio" else f" {figure.unit}"
    if figure.low == figure.value == figure.high:
        return f"{number(figure.value)}{unit}"
    return f"{number(figure.value)}{unit} [{number(figure.low)}, {number(figure.high)}]"


def number(value: float) -> str:
    """Three digits, with a minus that is one."""
    if math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif value == 0 or 1e-3 <= abs(value) < 1e4:
        text = f"{value:.{max(0, min(5, 2 - math.floor(math.log10(abs(value)))))}f}" if value else "0"
    else:
        text = f"{value:.2e}"
    return text.replace("-", "−")


def _picture(rows: Sequence[tuple[Finding, Figure]]) -> str:
    figures = [figure for _, figure in rows]
    marks = [place for finding, figure in rows for place in _margins(finding, figure)]
    ends = [end for f in figures for end in (f.low, f.value, f.high) if math.isfinite(end)] + marks
    # Ratios that span more than a few times are read as logarithms.
    logarithmic = all(f.unit == "ratio" for f in figures) and min(ends) > 0 and max(ends) > 4 * min(ends)
    first, last = (math.log(min(ends)), math.log(max(ends))) if logarithmic else (min(ends), max(ends))
    room = 0.06 * (last - first) or abs(first) or 1.0
    first, last = first - room, last + room

    def x(value: float) -> float:
        if math.isinf(value):
            return LABELS + (AXIS if value > 0 else 0)
        place = math.log(value) if logarithmic else value
        return LABELS + AXIS * (place - first) / (last - first)

    width, height = LABELS + AXIS + NUMBERS, ROW * (len(rows) + 1) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11.5" role="img">',
        f"<title>{html.escape(', '.join(f'{finding.when}: {interval(figure)}' for finding, figure in rows))}</title>",
    ]
    for place, (finding, figure) in enumerate(rows):
        y = ROW * (place + 0.5) + 4
        colour = COLOURS[finding.answer]
        for margin in _margins(finding, figure):
            parts.append(_line(x(margin), y - ROW / 2, x(margin), y + ROW / 2, RULE, 1.2, dashed=True))
        if finding.condition.relation not in ("above", "below") and min(ends) <= no_difference(figure) <= max(ends):
            nothing = x(no_difference(figure))
            parts.append(_line(nothing, y - ROW / 2, nothing, y + ROW / 2, RULE, 1.2))
        parts.append(_line(x(figure.low), y, x(figure.high), y, colour, 2.4))
        parts.append(_mark(finding.answer, x(figure.value), y, colour))
        label = finding.when if len(finding.when) <= 52 else finding.when[:51] + "…"
        parts.append(_text(LABELS - 10, y + 4, label, "end"))
        parts.append(_text(LABELS + AXIS + 10, y + 4, interval(figure), "start"))
    foot = "dashed: margin; line: no difference; ● yes ◆ no ○ open" + (" (logarithmic)" if logarithmic else "")
    parts.append(_text(LABELS, height - 6, foot, "start", "#757575"))
    return "\n".join([*parts, "</svg>"])


def _margins(finding: Finding, figure: Figure) -> list[float]:
    """Where on the figure's axis the margins of its condition lie."""
    condition = finding.condition
    if condition.relation in ("above", "below"):
        return [condition.margin]
    middle = no_difference(figure)
    if condition.relation == "equivalent":
        return [middle - condition.margin, middle + condition.margin]
    side = figure.better if condition.relation.endswith("better") else -figure.better
    return [middle + side * condition.margin]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="3 2"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width}"{dashes}/>'
    )


def _mark(answer: str, x: float, y: float, colour: str) -> str:
    if answer == "no":
        return f'<path d="M{x - 5:.1f} {y:.1f}l5 -5l5 5l-5 5z" fill="{colour}"/>'
    fill = colour if answer == "yes" else "white"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.8"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'
