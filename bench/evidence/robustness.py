"""How much a network's loss depends on the learning rate and the momentum, with slow weights and without.

Each arm is trained over one range of learning rates at one momentum, and over one range of momenta at one learning
rate; nothing is tuned. The range is a power of two to either side of where the task's tuning begins, of which neither
arm was asked. A seed's regret is the mean of its final losses over the range less the least of them: what it costs not
to know the best setting. A run that diverged counts as untrained. "base-small-lr" is the control: the base at α times
the learning rate, whose range is the same one, shifted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.evidence.arms import ARMS
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.statistics import paired
from bench.evidence.tasks import TASKS
from bench.evidence.training import Point, Task, from_json, to_json, train

COMPARED = ("base", "lookahead", "base-small-lr", "ema")
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MOMENTUM, MOMENTA = 0.9, (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
FIRST_SEED = 2000
CHOSEN = {
    Scale.SMOKE: ("digits-cnn-sgd",),
    Scale.QUICK: ("digits-cnn-sgd", "char-gpt"),
    Scale.FULL: ("digits-cnn-sgd", "digits-cnn-adamw", "char-lstm", "char-gpt"),
}


@dataclass(frozen=True)
class Size:
    """Seeds, steps (None: the task's), and how much of both ranges."""

    seeds: int
    steps: int | None
    factors: Sequence[float]
    momenta: Sequence[float]


SIZES = {
    Scale.SMOKE: Size(4, 13, FACTORS[3:5], MOMENTA[2:4]),
    Scale.QUICK: Size(16, None, FACTORS[1::2], MOMENTA[1:5]),
    Scale.FULL: Size(24, None, FACTORS, MOMENTA),
}


class Robustness:
    """The experiment; see the module."""

    name = "robustness"
    revision = 1

    def names(self) -> tuple[str, ...]:
        """ "robustness.<task>.<range>.<arm>-base.regret", and ".mean" of the mean over the range alone."""
        return tuple(
            f"{self.name}.{task}.{over}.{arm}-base.{kind}"
            for task in CHOSEN[Scale.FULL]
            for over in ("learning-rate", "momentum")
            for arm in COMPARED[1:]
            for kind in ("regret", "mean")
        )

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        """A training of all seeds for each arm and setting."""
        size = SIZES[scale]
        for task in _tasks(scale):
            steps = size.steps or task.steps
            for arm in COMPARED:
                for point in _points(task, size):
                    run = _Run(task, arm, point, size.seeds, steps)
                    yield Job(run.setting, run, task.cost * (1 + size.seeds) * steps / task.steps)

    def figures(self, records: Records) -> list[Figure]:
        """Of each task at the largest scale at which the whole range is recorded."""
        found: dict[str, Figure] = {}
        for scale in Scale:
            for task in _tasks(scale):
                for over in ("learning-rate", "momentum"):
                    losses = {arm: self._losses(scale, task, arm, over, records) for arm in COMPARED}
                    for arm in COMPARED[1:]:
                        own, base = losses[arm], losses["base"]
                        if own is not None and base is not None:
                            name = f"{self.name}.{task.name}.{over}.{arm}-base"
                            found |= {figure.name: figure for figure in _compared(name, own, base, scale)}
        return list(found.values())

    def pictures(self, records: Records) -> list[Picture]:
        return []

    def _losses(self, scale: Scale, task: Task, arm: str, over: str, records: Records) -> np.ndarray | None:
        """Final losses [setting, seed] over a range; None where one is not recorded."""
        size = SIZES[scale]
        rows = []
        for point in _range(task, size, over):
            run = _Run(task, arm, point, size.seeds, size.steps or task.steps)
            result = records.get(self.name, self.revision, run.setting)
            if result is None:
                return None
            rows.append(from_json(result).scored("loss"))
        return np.array(rows)


EXPERIMENT = Robustness()


@dataclass(frozen=True)
class _Run:
    """One training, and what it is recorded under."""

    task: Task
    arm: str
    point: Point
    seeds: int
    steps: int

    @property
    def setting(self) -> dict[str, JSON]:
        return {
            "task": self.task.name,
            "arm": self.arm,
            "lr": self.point.lr,
            "beta": self.point.beta,
            "seeds": self.seeds,
            "steps": self.steps,
        }

    def __call__(self) -> dict[str, JSON]:
        seeds = range(FIRST_SEED, FIRST_SEED + self.seeds)
        return dict(to_json(train(self.task, ARMS[self.arm], self.point, "constant", seeds, self.steps, only="test")))


def regret(losses: np.ndarray) -> list[float]:
    """Mean over the settings less the least, of each seed; losses [setting, seed]."""
    return [float(value) for value in losses.mean(axis=0) - losses.min(axis=0)]


def _compared(name: str, own: np.ndarray, base: np.ndarray, scale: Scale) -> Iterator[Figure]:
    note = f"{scale.value}; final test loss at {len(own)} settings, constant learning rate."
    yield paired(f"{name}.regret", regret(own), regret(base), unit="nats", better=-1, note=note)
    yield paired(f"{name}.mean", own.mean(axis=0), base.mean(axis=0), unit="nats", better=-1, note=note)


def _tasks(scale: Scale) -> list[Task]:
    return [task for task in TASKS if task.name in CHOSEN[scale]]


def _points(task: Task, size: Size) -> list[Point]:
    """Both ranges; they cross, and what is in both is trained once."""
    return list(dict.fromkeys(_range(task, size, "learning-rate") + _range(task, size, "momentum")))


def _range(task: Task, size: Size, over: str) -> list[Point]:
    if over == "learning-rate":
        return [Point(task.lr * factor, MOMENTUM) for factor in size.factors]
    return [Point(task.lr, beta) for beta in size.momenta]
