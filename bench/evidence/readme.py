"""What the repository's own pages say of the figures that are kept: README's table, and the page of all verdicts.

    python -m bench.evidence.readme [FIGURES ...]

judges the claims by figures.json beside this file, or by the files named, and rewrites VERDICTS.md and the table
between the two marks in README.md, which has a row for each claim with a `short` form. Nobody types a verdict.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.evidence import beside_base, results
from bench.evidence.claims import Verdict, judge, load
from bench.evidence.figures import Figure
from bench.evidence.forest import interval, number
from bench.evidence.report import summary, to_markdown

HERE = Path(__file__).resolve().parent
FIGURES, VERDICTS = HERE / "figures.json", HERE / "VERDICTS.md"
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- python -m bench.evidence.readme writes from here -->", "<!-- to here -->"
SHOWN = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites both pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=[FIGURES], help="figures of runs (figures.json)")
    options = parser.parse_args(arguments)
    try:
        found = results.together([results.load(file) for file in options.files])
        text = inserted(README.read_text(encoding="utf-8"), found)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    README.write_text(text, encoding="utf-8")
    VERDICTS.write_text(page(found), encoding="utf-8")
    return 0


def page(found: results.Results) -> str:
    """All verdicts."""
    return to_markdown(judge(load(), found.figures), found)


def inserted(text: str, found: results.Results) -> str:
    """A page with the table of these figures in the place of the one that it has.

    Raises:
        ValueError: The page has not one place between the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{before}{BEGIN}\n\n{table(judge(load(), found.figures), found.figures)}\n\n{END}{after}"


def table(verdicts: Sequence[Verdict], figures: Sequence[Figure]) -> str:
    """A row for each claim that has a short form, and below one for each way to keep slow weights."""
    # Nobody edits it: bars without spaces keep README within what a word count allows.
    lines = [f"{summary(verdicts)}. Among them:", "", "|claim|verdict|figure|when|", "|---|---|---|---|"]
    for verdict in verdicts:
        if verdict.claim.short:
            lines.append(f"|{verdict.claim.short}|{verdict.outcome}|{_figure(verdict)}|{_when(verdict)}|")
    return "\n".join([*lines, "", *beside_base.lines(verdicts, figures)])


def _figure(verdict: Verdict) -> str:
    """One figure with its interval; of several that share a unit, the least and the greatest value."""
    found = [finding.figure for finding in verdict.findings if finding.figure is not None]
    if len(found) == 1:
        return interval(found[0])
    spans = []
    for unit in dict.fromkeys(figure.unit for figure in found):
        values = [figure.value for figure in found if figure.unit == unit]
        ends = "…".join(dict.fromkeys((number(min(values)), number(max(values)))))
        spans.append(ends if unit == "ratio" else f"{ends} {unit}")
    return "; ".join(spans) or "none"


def _when(verdict: Verdict) -> str:
    """Where the answer is yes, if that is at few places; else at how many."""
    if verdict.outcome == "untested here":
        return f"because {verdict.reason}"
    answers = [finding.answer for finding in verdict.findings]
    counts = Counter(answers)
    if len(counts) == 1:
        return {"yes": "always", "no": "never"}.get(answers[0], answers[0])
    yes = [finding.when for finding in verdict.findings if finding.answer == "yes"]
    if len(yes) <= SHOWN and verdict.outcome == "holds when":
        return "; ".join(yes)
    return f"{counts['yes']} of {len(answers)}"


if __name__ == "__main__":
    sys.exit(main())
