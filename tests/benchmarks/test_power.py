"""The measurement of `compare`'s own power: it goes on where it was cut off, and counts what it was to count."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.suites import power
from lookahead_fused.bench import sequential
from lookahead_fused.bench.pairs import Install


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Comparisons that take no time: the copy is found slower, but for the first; the kinds, in order."""
    kinds: list[str] = []

    def compare(a: Install, b: Install, *_: Any, **__: Any) -> str:
        kinds.append("same" if a.given == b.given else "planted")
        return kinds[-1]

    def record(kind: str, *_: Any) -> SimpleNamespace:
        slower = kind == "planted" and len(kinds) > 1
        ratio = SimpleNamespace(median=0.98 if kind == "planted" else 1.0)
        verdict = "slower" if slower else "holds" if kind == "same" else "undecided"
        return SimpleNamespace(verdict=verdict, ratios={"cores": ratio}, pairs=5, elapsed=float(len(kinds)))

    monkeypatch.setattr(power.pairs, "compare", compare)
    monkeypatch.setattr(power.pairs, "record", record)
    return kinds


def test_a_run_goes_on_where_it_was_cut_off(
    compared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "power.jsonl"
    assert power.main(["--runs", "1", "--record", str(file)]) == 0
    assert compared == ["planted", "same"]
    with file.open("a") as record:  # one kind is a comparison ahead, as where a run was cut off
        record.write(json.dumps({**json.loads(file.read_text().splitlines()[0]), "ratio": 0.97}) + "\n")
    capsys.readouterr()
    assert power.main(["--runs", "3", "--record", str(file)]) == 0
    assert compared[2:] == ["same", "planted", "same"]
    table = capsys.readouterr().out.splitlines()[-2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows == [
        ["planted", "3", "1", "0", "2", "0.9800", "0.9700", "0.9800", "1", "4"],
        ["same", "3", "0", "3", "0", "1.0000", "1.0000", "1.0000", "3", "5"],
    ]
    assert power.main(["--runs", "3", "--record", str(file)]) == 0
    assert len(compared) == 5


def test_comparisons_of_another_rule_are_not_mixed(
    compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "power.jsonl"
    power.main(["--runs", "1", "--record", str(file)])
    before = file.read_text()
    with pytest.raises(SystemExit, match=r"no more of this kind .*'slowdown': 2\.0"):
        power.main(["--runs", "2", "--slowdown", "3", "--record", str(file)])
    monkeypatch.setattr(sequential, "BETWEEN", 0.004)
    with pytest.raises(SystemExit, match=r"no more of this kind .*'between'"):
        power.main(["--runs", "2", "--record", str(file)])
    assert file.read_text() == before
    assert len(compared) == 2
