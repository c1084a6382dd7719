"""What is claimed of slow weights, and the verdict on each claim, computed from figures.

claims.toml has an entry for each claim: the sentence, its source, and conditions under which the figures bear it out.
The rule, the only place where a verdict is made:

1. A condition names figures (a name, or a glob that stands for one condition a figure), a relation and a margin. The
   difference d of a figure is its distance from no difference (1 for ratios, 0 else), counted as positive on the side
   that its `better` calls better; its 95 % interval is compared with the margin m:

       better      yes: d > m throughout      no: d <= m throughout
       worse       yes: d < -m throughout     no: d >= -m throughout
       not better  yes: d <= m throughout     no: d > m throughout
       not worse   yes: d >= -m throughout    no: d < -m throughout
       equivalent  yes: |d| < m throughout    no: |d| > m throughout
       above       yes: value > m throughout  no: value <= m throughout
       below       yes: value < m throughout  no: value >= m throughout

   and it is "open" where the interval has values of both kinds. So m is the smallest difference that counts, and an
   interval below it is a "no" to "better", not an absence of evidence.
2. An answer that says "these differ" (yes to better and worse, no to the other three) also needs a p-value of 0.05 at
   most after Holm's correction over all figures that the claims name; without, it is open. `above` and `below` are
   about a quantity, not a comparison, and go by the interval alone.
3. A condition without a figure is "missing".
4. The verdict: every condition missing (or the entry's own reason) - "untested here"; any open or missing -
   "undecided"; all yes - "holds"; some yes and the others no - "holds when" and the labels of the yes;
   all no - "does not hold".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from bench.evidence.figures import Figure
from bench.evidence.statistics import holm, no_difference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENTRIES = Path(__file__).with_name("claims.toml")
SIGNIFICANT = 0.05
NOT_RUN = "its experiment was not run"

Relation = Literal["better", "worse", "not better", "not worse", "equivalent", "above", "below"]
COMPARING = ("better", "worse", "not better", "not worse", "equivalent")
Answer = Literal["yes", "no", "open", "missing"]
FLIPPED: dict[Answer, Answer] = {"yes": "no", "no": "yes", "open": "open"}
Outcome = Literal["holds", "holds when", "does not hold", "undecided", "untested here"]


@dataclass(frozen=True)
class Condition:
    """What a figure must be for the claim to be borne out.

    figure    name or glob of figures
    relation  see the rule above
    margin    the smallest difference that counts, in the figure's unit; for `above` and `below` the value compared with
    when      label of the context, for "holds when"
    """

    figure: str
    relation: Relation
    margin: float
    when: str


@dataclass(frozen=True)
class Claim:
    """An entry of claims.toml.

    id          unique, lower case and dashes
    claim       the sentence claimed
    source      paper, and the equation or section
    subject     what it is about: a heading of the report
    conditions  what is compared with figures; empty only where `untested` says why
    untested    why nothing here can test it, or ""
    must        whether a run that has the figures fails unless the claim holds: exact results
    short       the sentence in a few words, for README's table; "" where the claim is not in it
    """

    id: str
    claim: str
    source: str
    subject: str
    conditions: tuple[Condition, ...] = ()
    untested: str = ""
    must: bool = False
    short: str = ""


@dataclass(frozen=True)
class Finding:
    """One condition's answer: label of its context, the figure (None: missing), and its p-value after Holm."""

    condition: Condition
    when: str
    answer: Answer
    figure: Figure | None = None
    adjusted: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What the figures say of a claim; `reason` is for "untested here"."""

    claim: Claim
    outcome: Outcome
    findings: tuple[Finding, ...] = field(default=())
    reason: str = ""

    @property
    def text(self) -> str:
        """The verdict as a phrase: "holds when constant learning rate"."""
        if self.outcome == "holds when":
            return "holds when " + "; ".join(finding.when for finding in self.findings if finding.answer == "yes")
        if self.outcome == "untested here":
            return f"untested here, because {self.reason}"
        return self.outcome


def judge(claims: Sequence[Claim], figures: Sequence[Figure]) -> list[Verdict]:
    """The verdict on every claim, by the rule above."""
    named: dict[str, Figure] = {}
    for figure in figures:
        if figure.name in named:
            raise ValueError(f"two figures are named {figure.name}")
        named[figure.name] = figure
    adjusted = _adjusted(claims, named)
    return [_verdict(claim, named, adjusted) for claim in claims]


def failed(verdicts: Sequence[Verdict], *, all_run: bool) -> list[Verdict]:
    """Claims that must hold and do not; `all_run`: where every experiment was run, none may be untested either."""
    passing = {"holds"} if all_run else {"holds", "untested here"}
    return [verdict for verdict in verdicts if verdict.claim.must and verdict.outcome not in passing]


def missing(verdicts: Sequence[Verdict]) -> list[str]:
    """Figures, by name or glob, that conditions ask for and that are not there."""
    return sorted({f.condition.figure for verdict in verdicts for f in verdict.findings if f.answer == "missing"})


def load(path: Path = ENTRIES) -> list[Claim]:
    """The entries of a file, in its order; raises ValueError where one is no claim."""
    with path.open("rb") as file:
        entries = tomllib.load(file)["claims"]
    claims = [_claim(entry) for entry in entries]
    ids = [claim.id for claim in claims]
    repeated = sorted({name for name in ids if ids.count(name) > 1})
    if repeated:
        raise ValueError(f"claims named more than once: {', '.join(repeated)}")
    return claims


def answer(condition: Condition, figure: Figure, adjusted: float) -> Answer:
    """Points 1 and 2 of the rule."""
    relation, margin = condition.relation, condition.margin
    if relation in ("above", "below"):
        low, high = figure.low, figure.high
        if relation == "below":
            low, high, margin = -high, -low, -margin
        return "yes" if low > margin else "no" if high <= margin else "open"
    low, high = figure.low - no_difference(figure), figure.high - no_difference(figure)
    significant = adjusted <= SIGNIFICANT
    if relation == "equivalent":
        if -margin < low and high < margin:
            return "yes"
        return "no" if significant and (low > margin or high < -margin) else "open"
    if figure.better == 0:
        raise ValueError(f"{figure.name} calls neither side better, and a claim asks whether it is {relation}")
    if (figure.better < 0) != relation.endswith("worse"):
        low, high = -high, -low
    # By how much the arm is better, or worse.
    beyond: Answer = "open"
    if low > margin and significant:
        beyond = "yes"
    elif high <= margin:
        beyond = "no"
    return FLIPPED[beyond] if relation.startswith("not ") else beyond


def pattern(glob: str) -> re.Pattern[str]:
    """Of a name in which each star stands for any text; nothing else is special."""
    return re.compile("(.*)".join(re.escape(part) for part in glob.split("*")))


def _adjusted(claims: Sequence[Claim], figures: Mapping[str, Figure]) -> dict[str, float]:
    """p-values after Holm's correction over all figures that claims compare; exact ones, of p 0, change none."""
    compared = sorted(
        {
            name
            for claim in claims
            for condition in claim.conditions
            if condition.relation in COMPARING
            for name in _matching(condition, figures)
        }
    )
    corrected = holm([figures[name].p for name in compared])
    return {**{name: figure.p for name, figure in figures.items()}, **dict(zip(compared, corrected, strict=True))}


def _verdict(claim: Claim, figures: Mapping[str, Figure], adjusted: Mapping[str, float]) -> Verdict:
    if claim.untested:
        return Verdict(claim, "untested here", reason=claim.untested)
    findings = []
    for condition in claim.conditions:
        names = _matching(condition, figures)
        if not names:
            findings.append(Finding(condition, condition.when, "missing"))
        for name in names:
            said = answer(condition, figures[name], adjusted[name])
            findings.append(Finding(condition, _label(condition, name), said, figures[name], adjusted[name]))
    answers = [finding.answer for finding in findings]
    if all(said == "missing" for said in answers):
        return Verdict(claim, "untested here", tuple(findings), NOT_RUN)
    outcome: Outcome = "undecided"
    if not {"open", "missing"} & set(answers):
        outcome = "holds" if "no" not in answers else "holds when" if "yes" in answers else "does not hold"
    return Verdict(claim, outcome, tuple(findings))


def _matching(condition: Condition, figures: Mapping[str, Figure]) -> list[str]:
    form = pattern(condition.figure)
    return sorted(name for name in figures if form.fullmatch(name))


def _label(condition: Condition, name: str) -> str:
    """The condition's own label, and for a glob what its stars stand for in this figure's name."""
    found = pattern(condition.figure).fullmatch(name)
    stars = [part for part in found.groups() if part] if found else []
    return f"{condition.when} ({', '.join(stars)})" if stars else condition.when


def _claim(entry: Mapping[str, Any]) -> Claim:
    name = entry.get("id", "an entry without id")
    known = set(Claim.__dataclass_fields__)
    if not {"id", "claim", "source", "subject"} <= set(entry) <= known:
        raise ValueError(f"{name}: an entry has id, claim, source, subject, and of the others only {sorted(known)}")
    if bool(entry.get("conditions")) == bool(entry.get("untested")):
        raise ValueError(f"{name}: a claim has conditions, or says why it is untested")
    conditions = tuple(Condition(**condition) for condition in entry.get("conditions", ()))
    for condition in conditions:
        if condition.relation not in get_args(Relation) or not condition.when:
            raise ValueError(f"{name}: {condition} needs one of {get_args(Relation)} and a label")
        if condition.margin < 0 and condition.relation not in ("above", "below"):
            raise ValueError(f"{name}: a margin is a size, and {condition.margin} is negative")
    return Claim(**{**entry, "conditions": conditions})
