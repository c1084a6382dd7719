"""The record of a run, its small committed form, and what a run that was cut off does again."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from joblib.externals.loky.backend.reduction import dumps
from rich.console import Console

from bench.evidence import results
from bench.evidence.experiment import Experiment, Job, Scale
from bench.evidence.experiments import EXPERIMENTS
from bench.evidence.figures import Figure, Picture, exact
from bench.evidence.records import Records
from bench.evidence.run import ENOUGH, run


def test_what_was_added_is_there_again(tmp_path: Path):
    path = tmp_path / "deep" / "record.jsonl"
    records = Records(path)
    assert records.get("one", 1, {"lr": 0.1}) is None
    records.add("one", 1, {"lr": 0.1, "seeds": [1, 2]}, {"loss": [0.5, math.inf]}, 2.0)
    records.add("one", 1, {"lr": 0.2}, {"loss": [0.4]}, 3.0)
    records.add("two", 1, {"lr": 0.1}, {"loss": [9.0]}, 4.0)
    for kept in (records, Records(path)):
        assert kept.get("one", 1, {"seeds": [1, 2], "lr": 0.1}) == {"loss": [0.5, math.inf]}
        assert kept.get("one", 2, {"lr": 0.2}) is None  # older code's results do not count
        assert [result["loss"] for _, result in kept.of("one", 1)] == [[0.5, math.inf], [0.4]]
        assert kept.seconds("one", 1) == 5.0


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    records = Records(path)
    records.add("one", 1, {"lr": 0.1}, {"loss": 1.0}, 1.0)
    records.add("one", 1, {"lr": 0.2}, {"loss": 2.0}, 1.0)
    path.write_bytes(path.read_bytes()[:-9])
    again = Records(path)
    assert again.get("one", 1, {"lr": 0.2}) is None
    again.add("one", 1, {"lr": 0.2}, {"loss": 3.0}, 1.0)
    assert [result["loss"] for _, result in Records(path).of("one", 1)] == [1.0, 3.0]


def test_a_line_that_is_no_record_is_named(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    Records(path).add("one", 1, {}, {}, 1.0)
    path.write_text(path.read_text() + '{"experiment": "one"}\n')
    with pytest.raises(ValueError, match=r"record\.jsonl:2"):
        Records(path)


@dataclass
class Tuned:
    """Two learning rates, then a confirmation at the better one, which cannot be named before they are known."""

    name: str = "tuned"
    revision: int = 1
    ran: list[float] = field(default_factory=list)
    failing: float = -1.0

    def names(self) -> tuple[str, ...]:
        return ("tuned.best",)

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        losses = {}
        for lr in (0.1, 0.2):
            yield Job({"lr": lr}, lambda lr=lr: self.train(lr), 1.0)  # type: ignore[misc]
            result = records.get(self.name, self.revision, {"lr": lr})
            losses[lr] = None if result is None else float(str(result["loss"]))
        if None not in losses.values():
            best = min(losses, key=lambda lr: losses[lr] or 0.0)
            yield Job({"confirmed": best}, lambda: self.train(best + 1), 1.0)

    def train(self, lr: float) -> dict[str, float]:  # type: ignore[type-arg, unused-ignore]
        if lr == self.failing:
            raise ArithmeticError("it diverged")
        self.ran.append(lr)
        return {"loss": 1 - lr}

    def figures(self, records: Records) -> list[Figure]:
        return [
            exact("tuned.best", float(str(setting["confirmed"])), unit="", better=1)
            for setting, _ in records.of(self.name, self.revision)
            if "confirmed" in setting
        ]

    def pictures(self, records: Records) -> list[Picture]:
        return []


def quiet() -> Console:
    return Console(file=io.StringIO(), width=118)


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    broken = Tuned(failing=0.2)
    failures = run([broken], Scale.SMOKE, Records(path), quiet())
    assert [(one.experiment, one.error) for one in failures] == [("tuned", "ArithmeticError: it diverged")]
    assert broken.ran == [0.1]
    whole = Tuned()
    records = Records(path)
    assert run([whole], Scale.SMOKE, records, quiet()) == []
    assert whole.ran == [0.2, 1.2]  # not 0.1 again; the confirmation after both
    assert [one.value for one in whole.figures(records)] == [0.2]


def test_one_experiments_failure_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = Tuned(name="other")
    console = quiet()
    run([Tuned(failing=0.1), other], Scale.SMOKE, Records(None), console)
    assert other.ran == [0.1, 0.2, 1.2]
    written = console.file.getvalue()  # type: ignore[attr-defined]
    # No bar where nobody watches.
    told = [line.partition(" of ")[0].partition(" s,")[0] for line in written.splitlines()]
    assert told[:2] == ["tuned: 0 jobs", "other: 3 jobs"]
    assert told[2].startswith("all: ")
    assert "it diverged" in capsys.readouterr().err


def test_experiments_share_rounds_and_the_longest_jobs_are_first():
    """Else a process waits at the end of each step of a search, of which every experiment has dozens."""
    began: list[tuple[str, float]] = []

    @dataclass
    class Searched(Tuned):
        steps: int = 3
        cost: float = 1.0

        def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
            for step in range(self.steps):
                yield Job({"step": step}, lambda step=step: self.train(step), self.cost)  # type: ignore[misc]
                if records.get(self.name, self.revision, {"step": step}) is None:
                    return

        def train(self, lr: float) -> dict[str, float]:  # type: ignore[type-arg, unused-ignore]
            began.append((self.name, lr))
            return {}

    some = [Searched(name=f"{i}", cost=i) for i in range(ENOUGH)]
    run([*some, Searched(name="last", steps=1, cost=99)], Scale.SMOKE, Records(None), quiet())
    # The first ones fill a round; the last one comes when one of them has ended, and none of them waits for it.
    longest = [str(i) for i in reversed(range(ENOUGH))]
    assert began == [*((name, step) for step in range(3) for name in longest), ("last", 0)]


def test_jobs_at_once_are_the_same_jobs(capsys: pytest.CaptureFixture[str]):
    """In processes of their own: what they need goes there, what they give comes back, and what they raise too."""
    records, tuned = Records(None), Tuned()
    assert run([tuned], Scale.SMOKE, records, quiet(), at_once=2) == []
    assert tuned.ran == []  # but elsewhere
    assert sorted(records.of("tuned", 1), key=str) == [
        ({"confirmed": 0.2}, {"loss": pytest.approx(-0.2)}),
        ({"lr": 0.1}, {"loss": 0.9}),
        ({"lr": 0.2}, {"loss": 0.8}),
    ]
    failures = run([Tuned(failing=0.2)], Scale.SMOKE, Records(None), quiet(), at_once=2)
    assert [(one.setting, one.error) for one in failures] == [("{'lr': 0.2}", "ArithmeticError: it diverged")]
    assert "in train" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*is skipped")
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_jobs_can_go_to_another_process(experiment: Experiment):
    for scale in (Scale.SMOKE, Scale.FULL):
        for job in experiment.jobs(scale, Records(None)):
            again = pickle.loads(dumps(job))  # as they travel
            assert (again.setting, again.cost) == (job.setting, job.cost)


FIGURES = [
    Figure("a.b", -0.0123456789012, -math.inf, math.inf, 1.0, 1, "nats", -1, "Interval unbounded: 1 seeds."),
    Figure("a.c", 1 / 3, 1 / 3, 1 / 3, 0.0, 0, "ratio", 0),
    Figure("a.d", 2e-17, 1e-17, 3e-17, 0.04, 20, "points", 1),
]


def test_kept_figures_are_the_figures(tmp_path: Path):
    path = tmp_path / "figures.json"
    results.save(results.Results({"scale": "full"}, {"tuned": 12.0}, FIGURES), path)
    found = results.load(path)
    assert (found.conditions, found.seconds) == ({"scale": "full"}, {"tuned": 12.0})
    for one, kept in zip(FIGURES, found.figures, strict=True):
        assert kept.value == pytest.approx(one.value, rel=1e-7)
        assert (kept.low, kept.high) == (pytest.approx(one.low, rel=1e-7), pytest.approx(one.high, rel=1e-7))
        assert (kept.name, kept.n, kept.unit, kept.better, kept.note) == (
            one.name,
            one.n,
            one.unit,
            one.better,
            one.note,
        )
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(path.read_text().splitlines()) < 20  # a line a figure


def test_what_is_no_such_file_raises(tmp_path: Path):
    path = tmp_path / "figures.json"
    for text in (
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1, "conditions": {}, "seconds": {}, "figures": [{"value": 1}]}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no figures"):
            results.load(path)


def test_a_figure_that_is_not_declared_raises():
    class Undeclared(Tuned):
        def names(self) -> tuple[str, ...]:
            return ("tuned.*.best",)

    experiment, records = Undeclared(), Records(None)
    run([experiment], Scale.SMOKE, records, quiet())
    with pytest.raises(ValueError, match=r"made tuned\.best"):
        results.collect([experiment], Scale.SMOKE, records)


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "better"),
    [(1.0, 1.1, 2.0, 0.5, 1), (1.0, 0.0, 0.9, 0.5, 1), (1.0, 0.0, 2.0, 1.5, 1), (1.0, 0.0, 2.0, 0.5, 2),
     (math.nan, 0.0, 2.0, 0.5, 1)],
)  # fmt: skip
def test_what_is_no_figure_raises(value: float, low: float, high: float, p: float, better: int):
    with pytest.raises(ValueError, match="x:"):
        Figure("x", value, low, high, p, 20, "nats", better)
