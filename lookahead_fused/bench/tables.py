"""What the commands found, as tables: for a terminal, and in Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from . import schema
from .opponents import OURS
from .run import Change

BUSY = 0.1


def run_lines(run: schema.Run, markdown: bool) -> list[str]:
    """A run's times and ratios."""
    rows = []
    for result in run.results:
        rows += [
            [str(result.work), name, f"{1e3 * figure.median:.3f} ms", _ratio(result.ratios.get(name))]
            for name, figure in result.seconds.items()
        ]
    heads = ["what", "optimizer", "a step", f"{OURS} is so many times as fast"]
    notes = [
        f"{result.work}: without {name}: {reason}" for result in run.results for name, reason in result.skipped.items()
    ]
    notes += [
        f"{result.work}: threads waited {result.waited:.0%} of their time for a core: measure again on a quiet machine"
        for result in run.results
        if result.waited is not None and result.waited > BUSY
    ]
    return [*table(heads, rows, markdown), *_paragraphs([*notes, _where(run.machine)], markdown)]


def _ratio(figure: schema.Figure | None) -> str:
    return f"{figure.median:.3f} [{figure.q1:.3f} .. {figure.q3:.3f}]" if figure else ""


def change_lines(changes: Sequence[Change], fail_below: float, notes: Sequence[str], markdown: bool) -> list[str]:
    """Figures of a run by those of an earlier one."""
    rows = [
        [
            str(change.work),
            change.of,
            f"{change.before:.4g}",
            f"{change.now:.4g}",
            f"{change.relative:.3f} [{change.low:.3f} .. {change.high:.3f}]",
            change.verdict(fail_below),
        ]
        for change in changes
    ]
    heads = ["what", "figure", "before", "now", "times as good, 98 % interval", f"fails below {fail_below:g}"]
    return [*table(heads, rows, markdown), *_paragraphs(notes, markdown)]


def comparison_lines(found: schema.Comparison, markdown: bool) -> list[str]:
    """A comparison of two installs, with its verdict in words."""
    rows = []
    for clock, ratio in found.ratios.items():
        seconds = found.seconds[clock]
        rows.append(
            [
                {"cores": "time of all cores", "wall": "wall clock"}[clock],
                f"{1e3 * seconds['A']:.3f} ms",
                f"{1e3 * seconds['B']:.3f} ms",
                f"{ratio.median:.4f} [{ratio.low:.4f} .. {ratio.high:.4f}]",
            ]
        )
    heads = ["a step", "A", "B", "B's speed by A's, 98 % interval"]
    installs = [
        f"{name}: {p.version} in {p.folder}, torch {p.torch}, Python {p.python}"
        for name, p in (("A", found.a), ("B", found.b))
    ]
    how = f"{found.pairs} pairs of processes in turns, {found.elapsed:.0f} s"
    verdict = sentence(found)
    return [
        *([f"**{verdict}**", ""] if markdown else [verdict]),
        *table(heads, rows, markdown),
        *_paragraphs([str(found.work), *installs, how, _where(found.machine)], markdown),
    ]


def sentence(found: schema.Comparison) -> str:
    """The verdict in words."""
    # The clock that decided: for "slower" the one on which B is slowest.
    ratio = min(found.ratios.values(), key=lambda r: r.high) if found.verdict == "slower" else found.ratios["cores"]
    interval = f"[{100 * (ratio.low - 1):+.1f} % .. {100 * (ratio.high - 1):+.1f} %]"
    change = 100 * (ratio.median - 1)
    if found.verdict == "undecided":
        return f"undecided: B's speed changed by {change:+.1f} % {interval}, and more time is needed to tell"
    if found.verdict == "slower":
        return f"B is slower by {-change:.1f} %: its speed changed by {interval}"
    if ratio.high < 1:
        return f"B is slower by {-change:.1f} % {interval}, within what --fail-below {found.fail_below:g} allows"
    if ratio.low > 1:
        return f"B is faster by {change:.1f} % {interval}"
    return f"no change: B's speed changed by {change:+.1f} % {interval}"


def _where(machine: schema.Machine) -> str:
    on = machine.gpu or f"{machine.processor}, {machine.threads} threads on {machine.cores} cores"
    return (
        f"{on}; {machine.system}, huge pages {machine.huge_pages}, load before {machine.load_before}; {machine.utc} UTC"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """Rows under their heads."""
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return [lines[0], "|" + "---|" * len(heads), *lines[1:]]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]


def _paragraphs(lines: Sequence[str], markdown: bool) -> list[str]:
    return [part for line in lines for part in (["", line] if markdown else [line])]
