"""The pages: what they say is what was found, they stand alone, and the command makes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.evidence import __main__ as command
from bench.evidence import results
from bench.evidence.claims import Claim, Condition, Finding, Relation, judge
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture, exact
from bench.evidence.forest import _margins, forest, interval, number
from bench.evidence.records import Records
from bench.evidence.report import to_html, to_markdown

CONDITIONS = {
    "machine": "A processor <of one's own>",
    "cores": 2,
    "memory_gib": 4.0,
    "system": "Linux",
    "threads": 1,
    "utc": "2026-01-01 00:00",
    "torch": "2.13.0",
    "scale": "quick",
}
FIGURES = [
    Figure("cnn.final", -0.031, -0.042, -0.02, 1e-5, 20, "nats", -1, "A note & more."),
    Figure("cnn.steps", 0.8, 0.7, 0.9, 1e-5, 20, "ratio", -1),
    Figure("gpt.final", 0.01, -0.05, 0.07, 0.4, 20, "nats", -1),
]
CLAIMS = [
    Claim("all", "Trains a | <b>.", "a paper", "networks", (Condition("cnn.final", "better", 0.01, "constant"),)),
    Claim("many", "Trains all.", "a paper", "networks", (Condition("*", "better", 0.0, "any"),)),
    Claim("none", "Flies.", "a paper", "other things", untested="nothing here flies"),
]


@pytest.fixture
def found() -> results.Results:
    return results.Results(CONDITIONS, {"networks": 90.0}, FIGURES)


def test_markdown_has_a_row_a_claim(found: results.Results):
    text = to_markdown(judge(CLAIMS, FIGURES), found)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3
    cells = [row.replace(r"\|", "/").strip("| ").split(" | ") for row in rows]
    assert cells[0] == [
        "Trains a / <b>. (a paper)",
        "holds",
        "−0.0310 nats [−0.0420, −0.0200]",
        "**yes** constant.",
    ]
    answers = "**yes** any (cnn.final); any (cnn.steps). **open** any (gpt.final)."
    assert cells[1][1:] == ["undecided", "2 yes, 1 open", answers]
    assert "untested here, because nothing here flies" in rows[2]
    assert "3 claims: 1 holds, 1 undecided, 1 untested here" in text
    for said in ("Scale quick, 90 s of jobs", "2 cores", "torch 2.13.0", "This is a quick run"):
        assert said in text


class Page(HTMLParser):
    """What a page shows, and what it asks for from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_needs_no_other_file_and_escapes(found: results.Results):
    picture = Picture("one", "A picture", '<svg xmlns="http://www.w3.org/2000/svg"/>')
    text = to_html(judge(CLAIMS, FIGURES), found, [picture])
    page = Page(text)
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in page.sources)
    assert any(source.startswith("data:") for source in page.sources)
    for said in ("Trains a | <b>.", "A processor <of one's own>", "A note & more.", "untested here, because"):
        assert said in page.text
    assert page.text.count("Trains a | <b>.") == 2  # in the table and over its figures
    assert text.count("<svg") == 3  # nats of the first claim; nats and ratios of the second
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Verdicts",
        "networks",
        "other things",
        "Pictures",
        "All 3 figures",
    ]


def test_a_picture_has_intervals_where_they_are():
    verdict = judge([Claim("c", "c", "s", "s", (Condition("cnn.final", "better", 0.01, "w"),))], FIGURES)[0]
    (text,) = forest(verdict.findings)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    margin, low_to_high = root.findall(f"{space}line")
    (mark,) = root.findall(f"{space}circle")
    left, right = float(low_to_high.get("x1", "")), float(low_to_high.get("x2", ""))
    # -0.042, -0.031, -0.02, and the margin on the better side at -0.01: all on one scale.
    scale = (right - left) / 0.022
    assert float(mark.get("cx", "")) == pytest.approx(left + 0.011 * scale, abs=0.2)
    assert float(margin.get("x1", "")) == pytest.approx(left + 0.032 * scale, abs=0.2)


@pytest.mark.parametrize(
    ("relation", "places"),
    [
        ("better", [-0.01]),
        ("not better", [-0.01]),
        ("worse", [0.01]),
        ("not worse", [0.01]),
        ("equivalent", [-0.01, 0.01]),
        ("above", [0.01]),
    ],
)
def test_margins_are_drawn_where_the_rule_has_them(relation: Relation, places: list[float]):
    finding = Finding(Condition("x", relation, 0.01, "w"), "w", "open", FIGURES[0])
    assert _margins(finding, FIGURES[0]) == places


def test_unbounded_intervals_can_be_drawn():
    lone = Figure("x", 1.0, float("-inf"), float("inf"), 1.0, 1, "nats", -1)
    verdict = judge([Claim("c", "c", "s", "s", (Condition("x", "better", 0.0, "w"),))], [lone])[0]
    assert verdict.text == "undecided"
    root = ElementTree.fromstring(forest(verdict.findings)[0])
    places = [float(value) for element in root for name, value in element.items() if name in ("x1", "x2", "cx")]
    assert places
    assert all(0 <= place <= 960 for place in places)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-0.0265, "−0.0265"), (1.0, "1.00"), (95.23, "95.2"), (512.0, "512"), (2e-8, "2.00e−08"),
     (12345.0, "1.23e+04"), (float("-inf"), "−∞")],
)  # fmt: skip
def test_numbers_as_people_read_them(value: float, text: str):
    assert number(value) == text


def test_exact_figures_have_no_interval():
    assert interval(Figure("x", 0.5, 0.5, 0.5, 0.0, 0, "nats", -1)) == "0.500 nats"


def test_the_command_makes_pages_from_kept_figures(
    found: results.Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kept = tmp_path / "kept.json"
    results.save(found, kept)
    assert command.main(["report", str(kept), "--out", str(tmp_path / "pages")]) == 0
    assert "Scale quick" in (tmp_path / "pages" / "report.md").read_text()
    assert (tmp_path / "pages" / "report.html").read_text().startswith("<!doctype html>")
    # Beside the figures of another machine.
    others = [Figure("nothing.else", 1.0, 1.0, 1.0, 0.0, 0, "ratio", 0)]
    results.save(results.Results({**CONDITIONS, "scale": "gpu", "machine": "A GPU"}, {}, others), tmp_path / "gpu.json")
    both = [str(kept), str(tmp_path / "gpu.json")]
    assert command.main(["report", *both, "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "report.html").read_text()
    assert "figures of gpu: A GPU" in page
    assert "All 4 figures" in page
    capsys.readouterr()
    assert command.main(["report", str(tmp_path / "absent.json"), "--out", str(tmp_path)]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_an_experiment_that_is_not_there_is_a_wrong_call(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "no-such-thing"])
    assert ended.value.code == 2
    assert "no-such-thing" in capsys.readouterr().err


@dataclass
class Measured:
    """One job, whose error is a figure that must be below 0.01."""

    error: float
    name: str = "measured"
    revision: int = 1

    def names(self) -> tuple[str, ...]:
        return ("measured.error",)

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        yield Job({"scale": scale.value}, self.measure, 1.0)

    def measure(self) -> dict[str, JSON]:
        if self.error < 0:
            raise ArithmeticError("it diverged")
        return {"error": self.error}

    def figures(self, records: Records) -> list[Figure]:
        found = [float(str(result["error"])) for _, result in records.of(self.name, self.revision)]
        return [exact("measured.error", error, unit="ratio", better=-1) for error in found]

    def pictures(self, records: Records) -> list[Picture]:
        return []


@pytest.mark.parametrize(
    ("error", "status", "said"), [(0.001, 0, ""), (0.1, 1, "one must hold"), (-1, 1, "it diverged")]
)
def test_the_command_fails_where_an_exact_result_or_a_job_does(
    error: float,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    must = Claim("one", "It is so.", "s", "s", (Condition("measured.error", "below", 0.01, "w"),), must=True)
    monkeypatch.setattr(command, "load", lambda: [must])
    monkeypatch.setattr(command, "EXPERIMENTS", (Measured(error),))
    out, kept = tmp_path / "out", tmp_path / "kept.json"
    arguments = ["--scale", "smoke", "--out", str(out), "--keep", str(kept)]
    assert command.main(arguments) == status
    told = capsys.readouterr().err
    assert said in told
    assert ("error:" in told) == bool(status)
    assert {path.name for path in out.iterdir()} >= {"report.html", "report.md", "figures.json"}
    assert [figure.name for figure in results.load(kept).figures] == ([] if error < 0 else ["measured.error"])
    if error >= 0:  # what was measured is not measured again, and judged all the same
        monkeypatch.setattr(command, "EXPERIMENTS", (Measured(-1),))
        assert command.main(arguments) == status
