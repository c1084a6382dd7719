"""A run's figures as pages: the verdict on every claim, as one HTML file that needs no other, and as Markdown."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

from bench.evidence.claims import Finding, Outcome, Verdict
from bench.evidence.figures import Figure, Picture
from bench.evidence.forest import forest, interval, number
from bench.evidence.results import Results

STYLE = """body { font: 14px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
color: #1a1a1a } table { border-collapse: collapse; margin: 1em 0 } img, svg { max-width: 100%; height: auto }
td, th { padding: .15em .7em; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top }
th, .source, .note { color: #757575 } td.n { text-align: right; font-variant-numeric: tabular-nums }
.holds, .yes { color: #20639b; font-weight: 600 } .does, .no { color: #b3541e; font-weight: 600 }
.undecided, .untested, .open, .missing { color: #757575 } summary { cursor: pointer }"""

READING = (
    "A verdict is computed from figures by the rule in bench/evidence/claims.py: each condition of a claim is yes, no "
    "or open, as its 95 % interval lies against a margin named beforehand; whatever says that two arms differ needs a "
    "p-value of 0.05 at most after Holm's correction over all claims. All yes: holds. Some yes, the others no: holds "
    "when. All no: does not hold. Else undecided."
)
SHOWN = 2
# What a scale leaves out; a full run leaves out nothing.
CAUTION = {
    "smoke": " This is the smallest run there is, a check of the code: beyond exact results its verdicts mean nothing.",
    "quick": " This is a quick run: fewer tasks, settings and seeds than the protocol asks for.",
}


def to_markdown(verdicts: Sequence[Verdict], results: Results) -> str:
    """The table of verdicts, with machine and versions."""
    lines = [
        "# What slow weights do for training",
        "",
        described(results),
        "",
        f"{summary(verdicts)}. {READING}",
        "",
        "| claim | verdict | figure and 95 % interval | when |",
        "|---|---|---|---|",
    ]
    for verdict in verdicts:
        cells = (f"{verdict.claim.claim} ({verdict.claim.source})", verdict.text, _figures(verdict), _when(verdict))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def to_html(verdicts: Sequence[Verdict], results: Results, pictures: Sequence[Picture] = ()) -> str:
    """One file; `pictures` are those of the experiments, which figures alone do not give."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>What slow weights do for training</title><style>{STYLE}</style>",
        "<h1>What slow weights do for training</h1>",
        f"<p>{html.escape(described(results))}</p><p>{html.escape(summary(verdicts))}. {html.escape(READING)}</p>",
        "<h2>Verdicts</h2>",
        _overview(verdicts),
    ]
    for subject in dict.fromkeys(verdict.claim.subject for verdict in verdicts):
        parts.append(f"<h2>{html.escape(subject)}</h2>")
        parts += [_claim(verdict) for verdict in verdicts if verdict.claim.subject == subject]
    if pictures:
        parts.append("<h2>Pictures</h2>")
    parts += [_picture(picture) for picture in pictures]
    parts += [f"<h2>All {len(results.figures)} figures</h2><details><summary>the table</summary>"]
    parts += [_all_figures(results.figures), "</details></html>"]
    return "\n".join(parts) + "\n"


def described(results: Results) -> str:
    """Machine, versions, date, scale and time."""
    where = results.conditions
    machine = f"{where['machine']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}"
    known = ("machine", "cores", "memory_gib", "system", "threads", "utc", "scale")
    versions = ", ".join(f"{name} {version}" for name, version in where.items() if name not in known)
    spent = sum(results.seconds.values())
    took = f"{spent:.0f} s" if spent < 600 else f"{spent / 60:.0f} min" if spent < 36000 else f"{spent / 3600:.1f} h"
    caution = CAUTION.get(where["scale"], "")
    return f"Scale {where['scale']}, {took} of jobs, {where['utc']} UTC; {machine}; {versions}.{caution}"


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many claims have which verdict."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    return f"{len(verdicts)} claims: " + ", ".join(
        f"{counts[name]} {name}" for name in get_args(Outcome) if counts[name]
    )


def _figures(verdict: Verdict) -> str:
    """Few figures as they are; of many, how many gave which answer."""
    found = [finding for finding in verdict.findings if finding.figure is not None]
    if len(found) <= SHOWN:
        return "; ".join(interval(finding.figure) for finding in found if finding.figure)
    counts = Counter(finding.answer for finding in verdict.findings)
    return ", ".join(f"{counts[name]} {name}" for name in ("yes", "no", "open", "missing") if counts[name])


def _when(verdict: Verdict) -> str:
    groups = {
        name: [finding.when for finding in verdict.findings if finding.answer == name]
        for name in ("yes", "no", "open", "missing")
    }
    return " ".join(f"**{name}** {'; '.join(labels)}." for name, labels in groups.items() if labels)


def _overview(verdicts: Iterable[Verdict]) -> str:
    rows = [
        [
            ("", f'<a href="#{verdict.claim.id}">{html.escape(verdict.claim.claim)}</a>'),
            (verdict.outcome.partition(" ")[0], html.escape(verdict.text)),
            ("", html.escape(_figures(verdict))),
        ]
        for verdict in verdicts
    ]
    return _table(("claim", "verdict", "figure and 95 % interval"), rows)


def _claim(verdict: Verdict) -> str:
    claim = verdict.claim
    parts = [
        f'<h3 id="{claim.id}">{html.escape(claim.claim)}</h3><p class="source">{html.escape(claim.source)}</p>',
        f'<p class="{verdict.outcome.partition(" ")[0]}">{html.escape(verdict.text)}</p>',
    ]
    if verdict.findings:
        header = ("when", "figure", "value", "seeds", "p (Holm)", "asked", "answer")
        parts.append(_table(header, [_finding(finding) for finding in verdict.findings]))
    return "\n".join(parts + forest(verdict.findings))


def _finding(finding: Finding) -> list[tuple[str, str]]:
    figure, condition = finding.figure, finding.condition
    asked = f"{condition.relation} {number(condition.margin)}"
    said = (finding.answer, finding.answer)
    when = ("", html.escape(finding.when))
    if figure is None:
        return [when, ("", f"<code>{html.escape(condition.figure)}</code>"), *[("", "")] * 3, ("", asked), said]
    note = f'<br><span class="note">{html.escape(figure.note)}</span>' if figure.note else ""
    name = f"<code>{html.escape(figure.name)}</code>{note}"
    return [
        when,
        ("", name),
        ("", html.escape(interval(figure))),
        *_sampled(figure, finding.adjusted),
        ("", asked),
        said,
    ]


def _sampled(figure: Figure, p: float) -> list[tuple[str, str]]:
    return [("n", str(figure.n)), ("n", f"{p:.2g}")] if figure.n else [("", "exact"), ("", "")]


def _all_figures(figures: Iterable[Figure]) -> str:
    rows = [
        [
            ("", f"<code>{html.escape(figure.name)}</code>"),
            ("", html.escape(interval(figure))),
            *_sampled(figure, figure.p),
            ("note", html.escape(figure.note)),
        ]
        for figure in figures
    ]
    return _table(("figure", "value and 95 % interval", "seeds", "p", ""), rows)


def _picture(picture: Picture) -> str:
    # As an image, not as elements of the page: pictures made by one library have ids in common.
    data = base64.b64encode(picture.svg.encode("utf-8")).decode("ascii")
    title = html.escape(picture.title)
    return f'<h3>{title}</h3><img alt="{title}" src="data:image/svg+xml;base64,{data}">'


def _table(header: Iterable[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Rows of (class, HTML) cells."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(f'<td class="{kind}">{text}</td>' for kind, text in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
