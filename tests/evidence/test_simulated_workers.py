"""Simulated workers: against plain loops, and what every side of a comparison must share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.evidence import workers
from bench.evidence.contest import Grid, Point
from bench.evidence.experiment import Scale
from bench.evidence.records import Records
from bench.evidence.workers import ALONE, SIDES, Plan, Side, Task, Workers

PLAN = Plan((1, 4), steps=12, grid=Grid((0.1, 0.2), (0.9,), 0), tuning=2, fresh=6, k=4, batch=16)


def plain(task: Task, side: Side, lr: float, momentum: float, seed: int) -> list[Tensor]:
    """One seed's weights at the end by loops over its workers, the outer step as DiLoCo's paper has it."""
    start = [p[seed, 0].detach().double() for p in task.network(1)]
    agreed, outer = [p.clone() for p in start], [torch.zeros_like(p) for p in start]
    fast = [[p.clone() for p in start] for _ in range(task.count)]
    velocity = [[torch.zeros_like(p) for p in start] for _ in range(task.count)]
    for step in range(PLAN.steps):
        images, labels = task.batch(step, step + 1, together=False)
        for w in range(task.count):
            weights = [p.requires_grad_() for p in fast[w]]
            hidden = torch.tanh(images[seed, w].double() @ weights[0] + weights[1])
            lost = F.cross_entropy(hidden @ weights[2] + weights[3], labels[seed, w])
            gradients = torch.autograd.grad(lost, weights)
            for i, gradient in enumerate(gradients):
                velocity[w][i] = momentum * velocity[w][i] + gradient
                fast[w][i] = fast[w][i].detach() - lr * velocity[w][i]
        if (step + 1) % PLAN.k == 0:
            for i in range(len(agreed)):
                difference = agreed[i] - sum(fast[w][i] for w in range(task.count)) / task.count
                outer[i] = side.outer_momentum * outer[i] + difference
                direction = side.outer_momentum * outer[i] + difference
                agreed[i] = agreed[i] - side.alpha * direction
                for w in range(task.count):
                    fast[w][i] = agreed[i].clone()
    return agreed


@pytest.mark.parametrize("name", ["average", "lookahead", "diloco"])
def test_workers_are_plain_loops_over_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean that is not put in every worker's place, moments that workers share, batches of another worker, an outer
    step that is made of one worker's weights, or made in the optimizer's own rhythm too: each gives other weights."""
    task, side = Task([3, 4], 4, PLAN, 0.3), SIDES[name]
    seen: list[list[Tensor]] = []
    real = Task.evaluate

    def evaluate(self: Task, net: list[Tensor]) -> tuple[Tensor, Tensor]:
        for p in net:
            assert torch.equal(p, p[:, :1].expand_as(p))
        seen.append([p[:, 0].detach().clone() for p in net])
        return real(self, net)

    monkeypatch.setattr(Task, "evaluate", evaluate)
    losses, _ = workers.train(task, PLAN, side, "sgd", Point(0.1, 0.9), cosine=False)
    assert len(losses) == len(seen) == PLAN.steps // PLAN.k
    for seed in range(2):
        for ours, theirs in zip(seen[-1], plain(task, side, 0.1, 0.9, seed), strict=True):
            assert torch.allclose(ours[seed].double(), theirs.view_as(ours[seed]), atol=2e-6)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_synchronous_training_is_one_worker_with_all_batches(rule: str) -> None:
    """The mean of one worker is what it was: local SGD with all samples in one batch is the baseline, and so is
    synchronous training of a worker that syncs in every step."""
    task = Task([0, 1], 1, PLAN, 0.3)
    runs = [
        workers.train(task, PLAN, side, rule, Point(0.01, 0.9), cosine=True)[0]
        for side in (SIDES["base"], SIDES["average"])
    ]
    assert torch.allclose(runs[0][-1], runs[1][-1], rtol=1e-5)


def test_large_batches_are_the_gradient_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """k batches a step, each sample once, and a step only once in k: as seldom as workers talk."""
    task = Task([0], 4, PLAN, 0.3)
    given: list[tuple[Tensor, Tensor]] = []
    real = workers.loss

    def watched(net: list[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        given.append((inputs, labels))
        return real(net, inputs, labels)

    monkeypatch.setattr(workers, "loss", watched)
    workers.train(task, PLAN, SIDES["large-batch"], "sgd", Point(0.1, 0.9), cosine=False)
    trained = [inputs for inputs, labels in given if labels.shape[-1] == PLAN.k * PLAN.batch]
    assert [len(trained), trained[0].shape[1]] == [PLAN.steps // PLAN.k, 1]
    every = torch.cat([task.batch(i, i + 1, together=True)[0] for i in range(PLAN.steps)], 2)
    ours = torch.cat(trained, 2)
    assert torch.equal(ours.sum((0, 1, 3)).sort().values, every.sum((0, 1, 3)).sort().values)


def test_all_sides_see_the_same_samples() -> None:
    """In every step, in whatever shape; and never one that is held out."""
    task = Task([0, 1], 4, PLAN, 0.3)
    for step in (0, 7):
        apart, together = task.batch(step, step + 1, False), task.batch(step, step + 1, True)
        assert apart[0].shape == (2, 4, 4, 64)
        assert together[0].shape == (2, 1, 16, 64)
        assert torch.equal(apart[0].flatten(1, 2), together[0].flatten(1, 2))
        assert torch.equal(apart[1].flatten(1), together[1].flatten(1))
    images, labels = workers.digits()
    order = np.random.default_rng([1, 1]).permutation(len(labels))
    held_out = {images[i].tobytes() for i in order[: workers.HELD_OUT]}
    seen = {image.numpy().tobytes() for image in task.batch(0, PLAN.steps, True)[0][1, 0]}
    # No two of the digits are alike.
    assert len({image.tobytes() for image in images}) == len(images)
    assert not seen & held_out


def test_seeds_do_not_touch_each_other() -> None:
    together = workers.train(Task([5, 6], 4, PLAN, 0.3), PLAN, SIDES["diloco"], "adamw", Point(0.01, 0.9), False)
    alone = workers.train(Task([6], 4, PLAN, 0.3), PLAN, SIDES["diloco"], "adamw", Point(0.01, 0.9), False)
    assert torch.allclose(together[0][-1][1], alone[0][-1][0], rtol=1e-5)
    assert abs(float(together[0][-1][0] - together[0][-1][1])) > 1e-4


def test_shards_have_every_sample_once_and_their_own_classes() -> None:
    """The less concentrated, the less a shard looks like the whole; evenly spread, it does."""
    _, labels = workers.digits()

    def skew(concentration: float | None) -> float:
        parts = workers.shards(labels, 4, concentration, np.random.default_rng(0))
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
        assert min(map(len, parts)) >= workers.FEWEST
        whole = np.bincount(labels, minlength=10) / len(labels)
        return float(np.mean([np.abs(np.bincount(labels[p], minlength=10) / len(p) - whole).sum() / 2 for p in parts]))

    assert skew(None) < 0.1 < skew(10.0) < 0.3 < skew(0.3)
    with pytest.raises(ValueError, match="no split into 4 shards"):
        workers.shards(labels[:20], 4, 0.3, np.random.default_rng(0))


def test_a_run_that_diverges_has_the_score_of_a_guess() -> None:
    outcome = Workers("w", "sgd", 0.3, False, {}).run(PLAN, 4, "average", Point(1e30, 0.9), [0, 1])
    assert outcome["final"] == pytest.approx([math.log(10)] * 2)
    assert all(0 <= accuracy < 40 for accuracy in outcome["accuracy"])


def test_training_learns_and_the_average_is_another() -> None:
    plan = Plan((4,), steps=80, grid=PLAN.grid, tuning=1, fresh=1)
    experiment = Workers("w", "sgd", 0.3, False, {})
    outcomes = {arm: experiment.run(plan, 4, arm, Point(0.2, 0.9), [0, 1]) for arm in ("base", "ema", "average")}
    assert min(outcomes["base"]["accuracy"]) > 85
    assert min(outcomes["average"]["accuracy"]) > 80
    assert all(
        final < progress for final, progress in zip(*(outcomes["base"][m] for m in ("final", "progress")), strict=True)
    )
    # The same steps, but for rounding: evaluated on what was trained it would be the base.
    assert all(abs(a - b) > 1e-4 for a, b in zip(outcomes["ema"]["final"], outcomes["base"]["final"], strict=True))


def test_figures_compare_with_the_base_large_batches_and_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paired by seeds, each side at its own best point: what is subtracted from what, and in which unit."""

    def run(self: Workers, plan: Plan, count: int, arm: str, point: Point, seeds: Any) -> Mapping[str, list[float]]:
        value = 1.0 + 0.01 * count + 0.1 * list(SIDES).index(arm) + (0.5 if (point.lr == 0.1) == (arm == "base") else 0)
        return {"final": [value + seed % 2 for seed in seeds], "progress": [2 * value] * len(seeds), "accuracy": [
            100 - value + seed for seed in seeds]}  # fmt: skip

    monkeypatch.setattr(Workers, "run", run)
    experiment = Workers("workers", "sgd", 0.3, False, dict.fromkeys(Scale, PLAN))
    records = Records(None)
    assert experiment.figures(records) == []
    while pending := [j for j in experiment.jobs(Scale.QUICK, records) if records.get("workers", 1, j.setting) is None]:
        for job in pending:
            records.add("workers", 1, job.setting, job.run(), 0.0)
    figures = {figure.name: figure for figure in experiment.figures(records)}
    expected = {
        "workers.4.diloco-base.final": (0.6, -1, "nats"),
        "workers.4.diloco-base.accuracy": (-0.6, 1, "points"),
        "workers.4.lookahead-large-batch.progress": (0.4, -1, "nats"),
        "workers.4.average-base.final": (0.3, -1, "nats"),
        "workers.4.diloco-average.final": (0.3, -1, "nats"),
        "workers.4.lookahead-one.final": (0.03, -1, "nats"),
        "workers.1.ema-base.final": (0.1, -1, "nats"),
    }
    for name, (value, better, unit) in expected.items():
        figure = figures[name]
        assert (figure.value, figure.better, figure.unit, figure.n) == (pytest.approx(value), better, unit, 6)
    assert "quick; diloco: lr 0.1, momentum 0.9, at the edge of its grid; base: lr 0.2" in figures[
        "workers.4.diloco-base.final"
    ].note  # fmt: skip
    (picture,) = experiment.pictures(records)
    assert picture.name == "workers-loss"
    assert all(name in picture.svg for name in SIDES)
    assert not any(name.startswith("workers.1.average") or name.startswith("workers.1.base") for name in figures)
    assert all(any(fnmatchcase(name, glob) for glob in experiment.names()) for name in figures)
    assert {name.split(".")[2].split("-base")[0] for name in figures if "workers.1" in name and "-base" in name} == {
        *ALONE
    } - {"base"}
