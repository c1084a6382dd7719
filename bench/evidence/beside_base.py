"""Every way to keep slow weights beside its tuned base: on how many networks it was better, by the claims' margins.

A network counts as the claims about Lookahead on it count: by the same figure and the same margin, with another arm in
Lookahead's place. Both sides are tuned, and an interval has to lie beyond the margin as a whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.evidence.claims import Condition, Verdict, answer
from bench.evidence.figures import Figure
from bench.evidence.training import SCHEDULES, Schedule

ARMS = {
    "lookahead": "Lookahead",
    "outer-momentum": "outer momentum",
    "ema": "EMA",
    "gpa": "GPA",
    "schedule-free": "Schedule-Free",
}
SUBJECTS = ("Networks", "Hybrids")
LOOKAHEAD = re.compile(r"(?P<task>.+)\.(?P<schedule>constant|cosine)\.lookahead-base\.(?P<kind>\w+)")


def lines(verdicts: Sequence[Verdict], figures: Sequence[Figure]) -> list[str]:
    """A table in Markdown, without spaces beside its bars: an arm a row, a schedule a column."""
    found = counts(verdicts, figures)
    rows = [f"|better than the tuned optimizer alone, of so many networks|{'|'.join(SCHEDULES)}|", "|---|---|---|"]
    for arm, name in ARMS.items():
        cells = (found[arm, schedule] for schedule in SCHEDULES)
        rows.append(f"|{name}|" + "|".join(f"{cell['yes']} of {cell.total()}" for cell in cells) + "|")
    return rows


def counts(verdicts: Sequence[Verdict], figures: Sequence[Figure]) -> Mapping[tuple[str, Schedule], Counter[str]]:
    """By arm and schedule, how many networks have which answer to "better"."""
    named = {figure.name: figure for figure in figures}
    compared: dict[tuple[str, Schedule], dict[str, str]] = {
        (arm, schedule): {} for arm in ARMS for schedule in SCHEDULES
    }
    for condition in _about_lookahead(verdicts):
        told = LOOKAHEAD.fullmatch(condition.figure)
        assert told is not None
        for arm in ARMS:
            name = f"{told['task']}.{told['schedule']}.{arm}-base.{told['kind']}"
            if name in named:
                own = replace(condition, figure=name)
                compared[arm, told["schedule"]][told["task"]] = answer(own, named[name], named[name].p)  # type: ignore[index]
    return {place: Counter(answers.values()) for place, answers in compared.items()}


def _about_lookahead(verdicts: Sequence[Verdict]) -> list[Condition]:
    """Of each network, what is asked of Lookahead there, with the figure's whole name."""
    return [
        replace(finding.condition, figure=finding.figure.name)
        for verdict in verdicts
        if verdict.claim.subject in SUBJECTS
        for finding in verdict.findings
        if finding.figure is not None
        and finding.condition.relation == "better"
        and LOOKAHEAD.fullmatch(finding.figure.name)
    ]
