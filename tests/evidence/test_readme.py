"""The repository's own pages say what the kept figures say: a table that somebody edited, or forgot, fails here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evidence import beside_base, readme, results
from bench.evidence.claims import Claim, Condition, judge, load
from bench.evidence.figures import Figure
from bench.evidence.results import Results

CONDITIONS = {"machine": "A processor", "torch": "2.13.0", "utc": "2026-01-01 00:00", "scale": "full"}


def figure(name: str, value: float, unit: str = "nats", width: float = 0.001, better: int = -1) -> Figure:
    return Figure(name, value, value - width, value + width, 1e-9, 20, unit, better)


def claim(name: str, *conditions: tuple[str, str], short: str = "short", untested: str = "") -> Claim:
    asked = tuple(Condition(glob, "better", 0.01, when) for glob, when in conditions)
    return Claim(name, "The whole sentence.", "a paper", "a subject", asked, untested, short=short)


def rows(claims: list[Claim], figures: list[Figure]) -> list[list[str]]:
    text = readme.table(judge(claims, figures), figures).split("\n\n")[1]
    return [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]


def test_the_pages_are_those_of_the_kept_figures() -> None:
    found = results.load(readme.FIGURES)
    text = readme.README.read_text(encoding="utf-8")
    assert readme.inserted(text, found) == text, "README.md: run python -m bench.evidence.readme"
    assert readme.VERDICTS.read_text(encoding="utf-8") == readme.page(found), "run python -m bench.evidence.readme"


def test_the_kept_figures_are_those_of_a_whole_run() -> None:
    found = results.load(readme.FIGURES)
    assert found.conditions["scale"] == "full"
    verdicts = judge(load(), found.figures)
    for verdict in verdicts:
        assert verdict.outcome == "holds" or not verdict.claim.must, verdict.claim.id


def test_a_row_has_verdict_figure_and_context() -> None:
    figures = [figure("cnn.final", -0.05), figure("gpt.final", 0.02), figure("rnn.final", -0.011, width=0.01)]
    claims = [
        claim("one", ("cnn.final", "CNN")),
        claim("some", ("cnn.final", "CNN"), ("gpt.final", "GPT")),
        claim("open", ("cnn.final", "CNN"), ("rnn.final", "RNN")),
        claim("no", ("gpt.final", "GPT")),
        claim("none", untested="nothing here flies"),
        claim("unnamed", ("cnn.final", "CNN"), short=""),
    ]
    assert rows(claims, figures) == [
        ["short", "holds", "−0.0500 nats [−0.0510, −0.0490]", "always"],
        ["short", "holds when", "−0.0500…0.0200 nats", "CNN"],
        ["short", "undecided", "−0.0500…−0.0110 nats", "1 of 2"],
        ["short", "does not hold", "0.0200 nats [0.0190, 0.0210]", "never"],
        ["short", "untested here", "none", "because nothing here flies"],
    ]


def test_many_contexts_are_counted_and_units_stay_apart() -> None:
    figures = [figure(f"n{i}.final", -0.05 * (i + 1)) for i in range(3)] + [figure("m.steps", 0.8, "ratio")]
    claims = [claim("many", ("n*.final", "networks")), claim("units", ("*", "all"))]
    assert rows(claims, figures) == [
        ["short", "holds", "−0.150…−0.0500 nats", "always"],
        ["short", "holds", "0.800; −0.150…−0.0500 nats", "always"],
    ]


def test_arms_are_counted_by_the_figure_and_margin_that_count_for_lookahead() -> None:
    figures = [
        figure("cnn.constant.lookahead-base.accuracy", 0.8, "points", better=1),
        figure("cnn.constant.lookahead-base.final", -0.9),
        figure("cnn.constant.ema-base.accuracy", 0.4, "points", better=1),  # less than the margin
        figure("gpt.constant.ema-base.final", -0.05),
        figure("gpt.constant.lookahead-base.final", 0.05),
        figure("gpt.constant.gpa-base.final", -0.05, width=0.045),  # not beyond the margin as a whole
        figure("gpt.cosine.ema-base.final", -0.05),  # nothing is asked of Lookahead there
    ]
    asked = (
        Condition("cnn.constant.lookahead-base.accuracy", "better", 0.5, "constant"),
        Condition("gpt.*.lookahead-base.final", "better", 0.01, "any"),
    )
    claims = [
        Claim("a", "A.", "a paper", "Networks", asked),
        Claim("b", "B.", "a paper", "Speed", (Condition("cnn.constant.lookahead-base.final", "better", 0.01, "c"),)),
    ]
    found = beside_base.counts(judge(claims, figures), figures)
    assert {place: dict(counted) for place, counted in found.items() if counted} == {
        ("lookahead", "constant"): {"yes": 1, "no": 1},
        ("ema", "constant"): {"no": 1, "yes": 1},
        ("gpa", "constant"): {"open": 1},
    }
    lines = beside_base.lines(judge(claims, figures), figures)
    assert lines[2:5] == ["|Lookahead|1 of 2|0 of 0|", "|outer momentum|0 of 0|0 of 0|", "|EMA|1 of 2|0 of 0|"]


@pytest.mark.parametrize(
    "text",
    ["no mark", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)],
    ids=["none", "begin", "swapped", "twice"],
)
def test_a_page_without_one_place_for_the_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        readme.inserted(text, Results(CONDITIONS, {}, []))


def test_the_command_writes_both_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, verdicts, kept = tmp_path / "README.md", tmp_path / "VERDICTS.md", tmp_path / "figures.json"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(readme, "README", page)
    monkeypatch.setattr(readme, "VERDICTS", verdicts)
    assert readme.main([str(kept)]) == 2  # there is no such file, and nothing is written
    assert "old" in page.read_text(encoding="utf-8")
    assert not verdicts.exists()
    found = results.load(readme.FIGURES)
    results.save(found, kept)
    assert readme.main([str(kept)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith(f"{readme.END}\nafter\n")
    assert "\nold\n" not in text
    assert "|claim|verdict|figure|when|" in text
    assert verdicts.read_text(encoding="utf-8") == readme.page(found)
