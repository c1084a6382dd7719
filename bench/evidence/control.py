"""Lookahead and its kin in reinforcement learning: double DQN on CartPole, over AdamW.

Two comparisons of the same arms. "one-lr" gives all sides one published learning rate and AdamW's default momentum, as
reports of a gain mostly do. "constant" tunes learning rate and beta1 of each side over one grid, at a constant learning
rate, and compares on seeds that tuning has not seen. Returns are those of the greedy policy of the slow weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from bench.evidence import dqn, svg
from bench.evidence.arms import ADAMW, ARMS, build
from bench.evidence.contest import Contest, Get, Grid, Outcome, Point
from bench.evidence.experiment import Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.statistics import paired

TUNED = ("base", "lookahead", "ema", "outer-momentum", "gpa", "schedule-free")
# Tuned it would be the baseline again, on a grid that is shifted by alpha.
UNTUNED = ("base-small-lr",)
# What the RL Zoo of stable-baselines3 trains DQN on CartPole with, at Adam's default beta1.
PUBLISHED = Point(2.3e-3, 0.9)


@dataclass(frozen=True)
class Size:
    """How much of it: the plan of a run, the grid, and how many seeds tune and confirm."""

    plan: dqn.Plan
    grid: Grid
    tuning: int
    fresh: int


LRS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SIZES: Mapping[Scale, Size] = {
    Scale.SMOKE: Size(dqn.Plan(steps=130, evaluations=2, episodes=2), Grid(LRS[2:3], (0.9,), 0), 2, 6),
    Scale.QUICK: Size(dqn.Plan(steps=1500), Grid(LRS, (0.9,), 2), 3, 20),
    Scale.FULL: Size(dqn.Plan(steps=3000), Grid(LRS, (0.5, 0.9, 0.95), 3), 6, 24),
}


@dataclass(frozen=True)
class Control:
    """The experiment."""

    name: str = "dqn"
    revision: int = 1
    sizes: Mapping[Scale, Size] = field(default_factory=lambda: SIZES)

    def names(self) -> tuple[str, ...]:
        """Figures: "dqn.<one-lr or constant>.<arm>-base.<return or area>"."""
        return (f"{self.name}.one-lr.*-base.*", f"{self.name}.constant.*-base.*")

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        yield from self._contest(scale).jobs(self._get(records))

    def figures(self, records: Records) -> list[Figure]:
        """Of the largest scale at which a comparison is recorded."""
        found: dict[str, Figure] = {}
        get = self._get(records)
        for scale in (Scale.SMOKE, Scale.QUICK, Scale.FULL):
            contest = self._contest(scale)
            for name, arm, base, note in _pairs(contest, get):
                for metric in ("return", "area"):
                    full, said = f"{self.name}.{name}.{metric}", f"{scale.value}; {note}"
                    found[full] = paired(full, arm[metric], base[metric], unit="steps", better=1, note=said)
        return list(found.values())

    def pictures(self, records: Records) -> list[Picture]:
        """Return over the learning rate as tuning found it, at each one's best beta1, of the largest scale recorded."""
        get = self._get(records)
        for scale in (Scale.FULL, Scale.QUICK, Scale.SMOKE):
            contest = self._contest(scale)
            found = {arm: scores for arm in contest.arms if (scores := contest.scores(arm, get))}
            if found:
                return [_picture(self.name, scale, found)]
        return []

    def _contest(self, scale: Scale) -> Contest:
        size = self.sizes[scale]
        return Contest(
            key={"scale": scale.value, "steps": size.plan.steps},
            arms=TUNED,
            untuned=UNTUNED,
            grid=size.grid,
            tuning=tuple(range(1000, 1000 + size.tuning)),
            fresh=tuple(range(size.fresh)),
            run=partial(run, size.plan),
            score=lambda outcome: float(np.mean(outcome["return"])),
            cost=size.plan.steps * 1.5e-4,
            fixed=(("one-lr", PUBLISHED),),
        )

    def _get(self, records: Records) -> Get:
        return partial(records.get, self.name, self.revision)


def run(plan: dqn.Plan, arm: str, point: Point, seeds: Sequence[int]) -> Outcome:
    """Trains an arm for some seeds.

    Returns:
        For each seed "return", the mean of the last quarter of the evaluations (a single one of a policy that still
        learns is mostly noise), and "area", that of all of them: how fast it learned.
    """
    torch.set_num_threads(1)
    returns = dqn.train(
        plan,
        seeds,
        lambda net: build(ARMS[arm], ADAMW, net, lr=point.lr, beta=point.beta, steps=plan.updates),
        schedule=lambda done: 1.0,
    )
    last = max(1, plan.evaluations // 4)
    return {"return": returns[:, -last:].mean(1).tolist(), "area": returns.mean(1).tolist()}


def _picture(name: str, scale: Scale, found: Mapping[str, Mapping[Point, float]]) -> Picture:
    figure, axes = svg.axes()
    for arm, scores in found.items():
        best: dict[float, float] = {}
        for point, score in scores.items():
            best[point.lr] = max(score, best.get(point.lr, -np.inf))
        axes.plot(list(best), list(best.values()), "o-", label=arm)
    axes.axvline(PUBLISHED.lr, color="gray", linestyle=":", label="published learning rate")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("greedy return of the tuning seeds, best beta1")
    axes.legend()
    return Picture(f"{name}-learning-rates", f"Double DQN on CartPole over AdamW ({scale.value})", svg.text(figure))


def _pairs(contest: Contest, get: Get) -> Iterator[tuple[str, Outcome, Outcome, str]]:
    """Name, arm, baseline and a note of every comparison that is recorded."""
    for label, point in contest.fixed:
        base = contest.outcome("base", point, contest.fresh, get)
        for arm in (*contest.arms[1:], *contest.untuned):
            outcome = contest.outcome(arm, point, contest.fresh, get)
            if base is not None and outcome is not None:
                yield f"{label}.{arm}-base", outcome, base, f"both at lr {point.lr:g}, beta1 {point.beta:g}."
    tuned = {arm: _confirmed(contest, arm, get) for arm in contest.arms}
    best = tuned["base"]
    for arm in contest.arms[1:]:
        own = tuned[arm]
        if own is not None and best is not None:
            yield f"constant.{arm}-base", own[0], best[0], f"{own[1]}; {best[1]}."


def _confirmed(contest: Contest, arm: str, get: Get) -> tuple[Outcome, str] | None:
    """What an arm came to on fresh seeds at its best point, and that point in words."""
    point = contest.best(arm, get)
    outcome = None if point is None else contest.outcome(arm, point, contest.fresh, get)
    if point is None or outcome is None:
        return None
    edge = ", at the edge of its grid" if contest.at_edge(arm, get) else ""
    return outcome, f"{arm}: lr {point.lr:g}, beta1 {point.beta:g}{edge}"


EXPERIMENT = Control()
