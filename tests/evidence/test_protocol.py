"""Arms are tuned alike, compared on fresh seeds, and what is made of the record is what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.evidence import protocol, tuned
from bench.evidence.arms import ARMS, RULES, Arm, build, has_muon
from bench.evidence.claims import pattern
from bench.evidence.data import Part
from bench.evidence.experiment import Scale
from bench.evidence.protocol import Comparison
from bench.evidence.records import Records
from bench.evidence.search import EXTRA, Found, Space, search
from bench.evidence.tasks import TASKS
from bench.evidence.training import Point, Schedule, Task, Trained

TASK = next(task for task in TASKS if task.name == "digits-cnn-adamw")
SGD_TASK = next(task for task in TASKS if task.name == "digits-cnn-sgd")

Score = Callable[[Point], float]


def searched(space: Space, score: Score, budget: int = 40) -> tuple[Found, list[Point]]:
    """Where a search ends, and what it trained."""
    scores: dict[Point, float] = {}
    searching = search(space, scores.get, budget)
    while True:
        try:
            point = next(searching)
        except StopIteration as end:
            found: Found = end.value
            return found, list(scores)
        assert point not in scores
        scores[point] = score(point)


def bowl(lr: float, beta: float, beta2: float = 0.99) -> Score:
    """Lowest at these settings."""
    return lambda p: math.log2(p.lr / lr) ** 2 + 40 * (p.beta - beta) ** 2 + 100 * abs((p.beta2 or beta2) - beta2)


@pytest.mark.parametrize(("lr", "beta"), [(0.004, 0.9), (0.064, 0.5), (0.0005, 0.98), (0.5, 0.0)])
def test_a_search_ends_at_the_lowest_point_wherever_it_lies(lr: float, beta: float) -> None:
    found, trained = searched(Space(ARMS["base"], RULES["adamw"], 0.004), bowl(lr, beta))
    assert abs(math.log2(found.point.lr / lr)) < 0.3
    assert (found.point.beta, found.point.beta2) == (beta, 0.99)
    assert found.bracketed
    assert found.trainings == len(trained)


@pytest.mark.parametrize(("arm", "rule"), [(a, r) for a in ARMS for r in RULES if ARMS[a].serves(RULES[r])])
def test_a_search_stays_where_its_arm_can_be_built(arm: str, rule: str) -> None:
    if rule == "muon" and not has_muon():
        pytest.skip("torch.optim.Muon came with torch 2.9")
    for aim in (-1.0, 2.0):  # beyond both ends of every coordinate but the learning rate
        _, trained = searched(
            Space(ARMS[arm], RULES[rule], 0.004),
            lambda p, aim=aim: (p.beta - aim) ** 2 + ((p.beta2 or aim) - aim) ** 2 + ((p.own or aim) - aim) ** 2,
        )
        for point in trained:
            params = [torch.zeros(2, 2, requires_grad=True)]
            build(
                ARMS[arm], RULES[rule], params, lr=point.lr, beta=point.beta, steps=2, beta2=point.beta2, own=point.own
            )
        assert len({point.beta for point in trained}) >= 2


def test_a_search_goes_round_until_nothing_is_better() -> None:
    # A valley across two coordinates: with momentum .5 the best learning rate is 2^1.6 times that with .9.
    def valley(p: Point) -> float:
        return (math.log2(p.lr / 0.004) - 4 * (0.9 - p.beta)) ** 2 + 20 * (p.beta - 0.5) ** 2

    found, _ = searched(Space(ARMS["base"], RULES["adamw"], 0.004), valley)
    assert found.point.beta == 0.5
    assert found.score < 0.02


def test_all_arms_of_a_rule_search_from_one_start_with_one_budget() -> None:
    for rule in (RULES["adamw"], RULES["sgd"]):
        both = [searched(Space(ARMS[arm], rule, 0.01), bowl(0.06, 0.8), 12) for arm in ("base", "lookahead")]
        assert both[0] == both[1]
        assert both[0][0].trainings <= 12 + EXTRA


def test_an_arms_own_setting_is_tuned_too() -> None:
    found, _ = searched(Space(ARMS["ema"], RULES["adamw"], 0.01), lambda p: abs((p.own or 0) - 0.9) + p.beta2)  # type: ignore[operator]
    assert found.point.own == 0.9
    assert found.point.beta2 == 0.95


def test_a_learning_rate_that_never_stops_falling_is_not_found() -> None:
    for sign in (1, -1):
        found, trained = searched(Space(ARMS["base"], RULES["adamw"], 0.01), lambda p, s=sign: s * math.log(p.lr), 10)  # type: ignore[misc]
        assert not found.bracketed
        assert len(trained) <= 10 + EXTRA
    # Neither is one that nobody looked beyond, because the budget was used up.
    assert not searched(Space(ARMS["base"], RULES["adamw"], 0.01), lambda p: 1.0, 1)[0].bracketed


def test_a_search_that_begins_where_runs_diverge_goes_down() -> None:
    found, _ = searched(Space(ARMS["base"], RULES["sgd"], 5.0), lambda p: math.inf if p.lr > 0.1 else 1 / p.lr)
    assert 0.05 < found.point.lr <= 0.1
    assert found.bracketed


def test_a_search_waits_for_what_is_not_trained() -> None:
    asked = list(search(Space(ARMS["base"], RULES["adamw"], 0.01), lambda point: None, 10))
    assert asked == [Point(0.01, 0.9, 0.999, None)]


def test_momentum_is_tuned_at_one_length_of_steps() -> None:
    def lengths(arm: str, rule: str) -> set[float]:
        space = Space(ARMS[arm], RULES[rule], 0.01)
        points = [space.point(replace(space.start(), beta=i)) for i in range(6)]
        momenta = [0.0 if arm == "schedule-free" else p.beta for p in points]
        sums = RULES[rule].accumulates
        return {round(p.lr / (1 - beta if sums else 1), 3) for p, beta in zip(points, momenta, strict=True)}

    assert lengths("base", "sgd") == lengths("lookahead", "sgd") == lengths("schedule-free", "sgd") == {0.1}
    assert lengths("base", "adamw") == lengths("lookahead", "adamw") == {0.01}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Point, tuple[int, ...]]]:
    """Training replaced by a formula; what was trained, in order."""
    trained: list[tuple[str, Point, tuple[int, ...]]] = []

    def train(
        task: Task, arm: Arm, point: Point, schedule: Schedule, seeds: Sequence[int], steps: int, only: Part | None
    ) -> Trained:
        trained.append((f"{arm.name} {schedule}", point, tuple(seeds)))
        best = {"base": 0.004, "base-small-lr": 0.004, "lookahead": 0.016, "ema": math.inf}.get(arm.name, 0.008)
        far = math.log2(point.lr * arm.lr_factor / best) ** 2 if best < math.inf else -math.log(point.lr)
        gain = 0.2 if arm.name == "lookahead" else 0.0
        # Tuning seeds flatter whoever is judged on them.
        losses = [1 + 0.1 * far - gain + 0.01 * math.sin(seed + len(arm.name)) - (seed < 100) for seed in seeds]
        evaluated = list(range(3, steps + 1, 10))
        curve = [[2 + loss - i / len(evaluated) for i in range(len(evaluated))] for loss in losses]
        test = {"loss": losses, "accuracy": [100 - 10 * loss for loss in losses]}
        start = {"loss": [9.0] * len(seeds), "accuracy": [10.0] * len(seeds)}
        assert only == (None if seeds[0] >= 1000 else "validation")
        return Trained("made up", evaluated, curve, losses, start, test)

    monkeypatch.setattr(protocol, "train", train)
    return trained


def finish(experiment: Comparison, scale: Scale, records: Records, limit: float = math.inf) -> int:
    """Runs jobs as the runner does; how many."""
    count = 0
    while count < limit:
        pending = [
            job
            for job in experiment.jobs(scale, records)
            if records.get(experiment.name, experiment.revision, job.setting) is None
        ]
        if not pending:
            break
        for job in pending:
            if count < limit:
                result = json.loads(json.dumps(job.run(), allow_nan=False))
                records.add(experiment.name, experiment.revision, job.setting, result, 0.0)
                count += 1
    return count


def test_a_full_run_tunes_confirms_and_judges(runs: list[tuple[str, Point, tuple[int, ...]]]) -> None:
    experiment, records = Comparison(TASK, settings={}), Records(None)
    assert finish(experiment, Scale.FULL, records) == len(runs) == len(set(runs))
    fresh = [run for run in runs if run[2][0] >= 1000]
    assert all(run[2] == tuple(range(6)) for run in runs if run not in fresh)
    assert all(len(run[2]) == 20 for run in fresh)
    points = {(arm.split()[0], point.lr) for arm, point, _ in fresh}
    # Both sides at their own best, the small learning rate at Lookahead's, and Lookahead at the base's.
    assert {("base", 0.004), ("lookahead", 0.016), ("base-small-lr", 0.016), ("lookahead", 0.004)} <= points
    figures = {figure.name: figure for figure in experiment.figures(records)}
    final = figures["digits-cnn-adamw.constant.lookahead-base.final"]
    assert final.value == pytest.approx(-0.2, abs=0.01)
    assert (final.n, final.better, final.unit) == (20, -1, "nats")
    assert final.high < 0
    accuracy = figures["digits-cnn-adamw.cosine.lookahead-base.accuracy"]
    assert accuracy.value == pytest.approx(2.0, abs=0.1)
    assert accuracy.better == 1
    assert figures["digits-cnn-adamw.constant.lookahead-untuned-base.final"].value == pytest.approx(0.2, abs=0.02)
    assert figures["digits-cnn-adamw.constant.base-small-lr-base.final"].value == pytest.approx(0.1, abs=0.02)
    assert figures["digits-cnn-adamw.constant.lookahead-base.steps-ratio"].value < 1
    # At its own best Schedule-Free comes to what the base does, whose cosine runs it is compared with.
    unscheduled = figures["digits-cnn-adamw.constant.schedule-free-cosine-base.final"]
    assert unscheduled.value == pytest.approx(0.0, abs=0.01)
    assert unscheduled.n == 20
    # The average's best learning rate is always the largest: nothing is said of it.
    assert not [name for name in figures if "ema" in name]
    drawn = {picture.name: picture.svg for picture in experiment.pictures(records)}
    assert list(drawn) == ["digits-cnn-adamw.constant.curves", "digits-cnn-adamw.cosine.curves"]
    for text in drawn.values():
        assert all(f">{arm}<" in text for arm in ("base", "lookahead", "gpa"))
        assert not any(f">{arm}<" in text for arm in ("ema", "lookahead-untuned", "base-small-lr"))
    assert all(any(pattern(name).fullmatch(made) for name in experiment.names()) for made in figures)


def test_a_run_goes_on_where_it_was_cut_off(runs: list[tuple[str, Point, tuple[int, ...]]], tmp_path: Path) -> None:
    experiment, whole = Comparison(TASK, settings={}), Records(None)
    finish(experiment, Scale.FULL, whole)
    uncut = list(runs)
    runs.clear()
    finish(experiment, Scale.FULL, Records(tmp_path / "record"), limit=50)
    finish(experiment, Scale.FULL, Records(tmp_path / "record"))
    # In whichever order: each once.
    assert sorted(map(repr, runs)) == sorted(map(repr, uncut))
    assert experiment.figures(Records(tmp_path / "record")) == experiment.figures(whole)


def test_a_quick_run_confirms_what_a_full_one_found(
    runs: list[tuple[str, Point, tuple[int, ...]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, kept = tmp_path / "record", tmp_path / "tuned.json"
    finish(Comparison(TASK, settings={}), Scale.FULL, Records(record))
    assert tuned.main([str(record), "--to", str(kept)]) == 0
    settings = tuned.read(kept)
    assert settings["digits-cnn-adamw", "cosine", "lookahead"] == Point(0.016, 0.9, 0.999)
    assert ("digits-cnn-adamw", "cosine", "ema") not in settings
    runs.clear()
    quick, records = Comparison(TASK, settings=settings), Records(None)
    with pytest.warns(UserWarning, match="no settings are kept of constant ema, cosine ema, whose"):
        finish(quick, Scale.QUICK, records)
    assert len(runs) == 6  # three arms, two schedules
    assert all(len(seeds) == 20 and seeds[0] >= 1000 for _, _, seeds in runs)
    figures = [figure for figure in quick.figures(records) if figure.name.endswith("lookahead-base.final")]
    assert [figure.value for figure in figures] == pytest.approx([-0.2, -0.2], abs=0.01)


def test_what_diverged_counts_as_untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(
        task: Task, arm: Arm, point: Point, schedule: Schedule, seeds: Sequence[int], steps: int, only: Part | None
    ) -> Trained:
        lost = arm.name == "base" and seeds[0] >= 1000
        losses = [math.inf if lost and i == 0 else 1.0 + 0.01 * i for i in range(len(seeds))]
        curve = [[loss] * 31 for loss in losses]
        far = math.log2(point.lr / 0.05) ** 2
        test = {"loss": losses, "accuracy": [90.0 if loss < math.inf else math.nan for loss in losses]}
        start = {"loss": [3.0] * len(seeds), "accuracy": [10.0] * len(seeds)}
        return Trained("made up", list(range(3, 304, 10)), curve, [loss + far for loss in losses], start, test)

    monkeypatch.setattr(protocol, "train", train)
    experiment, records = Comparison(SGD_TASK, settings={}), Records(None)
    finish(experiment, Scale.FULL, records)
    figures = {figure.name: figure for figure in experiment.figures(records)}
    final = figures["digits-cnn-sgd.constant.lookahead-base.final"]
    assert final.value == pytest.approx((1.0 - 3.0) / 20)
    assert "1 of 20 seeds of base diverged" in final.note
    assert figures["digits-cnn-sgd.constant.lookahead-base.accuracy"].value == pytest.approx((90 - 10) / 20)
    assert figures["digits-cnn-sgd.constant.lookahead-base.steps-ratio"].value < 1


def test_every_task_has_a_plan_and_no_seed_both_tunes_and_confirms() -> None:
    for experiment in protocol.EXPERIMENTS:
        plan = experiment.plan(Scale.FULL)
        assert plan is not None
        assert not set(experiment.tuning(plan)) & set(experiment.fresh(plan))
        arms = [arm.name for arm in experiment.arms(plan)]
        assert arms[:2] == ["base", "lookahead"]
        assert "ema" in arms
        assert experiment.task.steps % 10 == 3
        momenta = {"lookahead-pullback", "lookahead-reset"}
        assert (momenta <= set(arms)) == experiment.name.endswith("sgd")
    assert {*protocol.QUICK_TASKS, *protocol.SMOKE_TASKS, *protocol.COMPARED} <= {task.name for task in TASKS}
