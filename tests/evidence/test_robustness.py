"""Regret over a range of settings: what is trained, and what is made of its losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench.evidence import robustness
from bench.evidence.experiment import Scale
from bench.evidence.records import Records
from bench.evidence.robustness import COMPARED, EXPERIMENT, MOMENTUM, SIZES, regret
from bench.evidence.training import Trained, to_json


def test_regret_is_of_each_seed():
    # The first seed loses 0, 1, 2 over the least, the second 2, 0, 1.
    assert regret(np.array([[1.0, 5.0], [2.0, 3.0], [3.0, 4.0]])) == pytest.approx([1.0, 1.0])
    assert regret(np.array([[1.0, 3.0], [1.0, 5.0]])) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("scale", list(Scale))
def test_arms_share_their_settings_and_none_is_trained_twice(scale: Scale):
    settings = [dict(job.setting) for job in EXPERIMENT.jobs(scale, Records(None))]
    assert len({str(setting) for setting in settings}) == len(settings)
    of: dict[Any, list[tuple[Any, Any, Any]]] = {arm: [] for arm in COMPARED}
    for setting in settings:
        of[setting["arm"]].append((setting["task"], setting["lr"], setting["beta"]))
    assert all(points == of["base"] for points in of.values())
    # Both ranges cross where the task's tuning begins.
    size = SIZES[scale]
    tasks = {task for task, _, _ in of["base"]}
    assert len(of["base"]) == len(tasks) * (len(size.factors) + len(size.momenta) - 1)


def recorded(loss: Any) -> Records:
    """A record of the smoke scale whose test losses are loss(setting), of four seeds."""
    records = Records(None)
    for job in EXPERIMENT.jobs(Scale.SMOKE, records):
        losses = [loss(job.setting) + 0.01 * seed for seed in range(4)]
        trained = Trained("made up", [1], [[one] for one in losses], losses, {"loss": [9.0] * 4}, {"loss": losses})
        records.add("robustness", 1, job.setting, to_json(trained), 0.0)
    return records


def test_figures_are_of_the_range_that_they_name():
    lowest = min(
        point.lr for point in robustness._range(robustness._tasks(Scale.SMOKE)[0], SIZES[Scale.SMOKE], "learning-rate")
    )

    def loss(setting: Any) -> float:
        if setting["arm"] != "base":
            return 1.0
        # The base alone is worse away from one learning rate, by 0.5, and from one momentum, by 0.1.
        return 1.0 + 0.5 * (setting["lr"] > lowest) + 0.1 * (setting["beta"] != MOMENTUM)

    found = {figure.name: figure.value for figure in EXPERIMENT.figures(recorded(loss))}
    assert found["robustness.digits-cnn-sgd.learning-rate.lookahead-base.regret"] == pytest.approx(-0.25)
    assert found["robustness.digits-cnn-sgd.learning-rate.lookahead-base.mean"] == pytest.approx(-0.25)
    assert found["robustness.digits-cnn-sgd.momentum.lookahead-base.regret"] == pytest.approx(-0.05)
    assert set(found) <= set(EXPERIMENT.names())
    assert len(found) == 12


def test_a_run_that_diverged_counts_as_untrained_and_a_missing_one_as_unknown():
    def loss(setting: Any) -> float:
        return float("inf") if setting["arm"] == "base" and setting["beta"] != MOMENTUM else 1.0

    records = recorded(loss)
    found = {figure.name: figure.value for figure in EXPERIMENT.figures(records)}
    assert found["robustness.digits-cnn-sgd.momentum.lookahead-base.mean"] == pytest.approx(-4.0, abs=0.1)
    partly = Records(None)
    for setting, result in records.of("robustness", 1)[1:]:
        partly.add("robustness", 1, setting, result, 0.0)
    assert EXPERIMENT.figures(partly) == []


def first_two(jobs: Iterator[Any]) -> list[Any]:
    return [next(jobs), next(jobs)]


def test_a_job_trains_at_its_setting():
    one, other = first_two(EXPERIMENT.jobs(Scale.SMOKE, Records(None)))
    results = one.run(), other.run(), one.run()
    assert results[0] == results[2]
    assert results[0]["start loss"] == results[1]["start loss"]  # the same starts
    assert results[0]["test loss"] != results[1]["test loss"]  # at another learning rate
    assert len(results[0]["test loss"]) == SIZES[Scale.SMOKE].seeds
