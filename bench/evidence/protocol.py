"""How slow weights are compared on a network: every arm is tuned alike, then run once on seeds that no choice has seen.

For each task, schedule and arm: a search over learning rate, momentum, second decay and the arm's own setting
(search.py) on tuning seeds, judged by the validation loss at the end; then one run on fresh seeds, judged on the test
data. Controls, which are not tuned:

    base-small-lr        the base at alpha times the learning rate, and at the momentum, that Lookahead was tuned to
    lookahead-untuned    Lookahead at what the base was tuned to: put around an optimizer that works already

Figures, of each "<task>.<schedule>.<arm>-base" and of "lookahead-ema" and "lookahead-base-small-lr":

    .final               test loss at the end
    .accuracy, .psnr     where the task has them
    .steps-ratio         evaluations until the loss at which the worse of the two ends, arm over base
    .seed-variance       of the final losses between seeds: only lookahead-base, both at the base's settings
    .fluctuation         variance of the loss within a run around its trend, over the last quarter; the same runs

A comparison is left out where a side's learning rate is the smallest or the largest that it was tried with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.evidence import curves, tuned
from bench.evidence.arms import ARMS, Arm, has_muon
from bench.evidence.data import NotHere, Part
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.search import Found, Search, Space, found, search
from bench.evidence.statistics import FEWEST, paired, ratio, variance_ratio
from bench.evidence.tasks import TASKS
from bench.evidence.training import SCHEDULES, Point, Schedule, Task, Trained, floats, from_json, to_json, train

SMALL_LR, UNTUNED = "base-small-lr", "lookahead-untuned"
UNITS = {"loss": ("final", "nats", -1), "accuracy": ("accuracy", "points", 1), "psnr": ("psnr", "dB", 1)}
FIRST_FRESH = 1000  # tuning seeds count from 0

# Of every task; some have further ones.
ALL = ("base", "lookahead", "outer-momentum", "ema", "gpa", "schedule-free")
COMPARED: Mapping[str, tuple[str, ...]] = {
    "digits-cnn-sgd": (*ALL, "lookahead-pullback", "lookahead-reset"),
    "digits-cnn-adamw": (*ALL, "tail-average"),
    "fashion-cnn-sgd": (*ALL, "lookahead-pullback", "lookahead-reset"),
    "char-gpt": (*ALL, "tail-average"),
}


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        arms: of which those that the task compares.
        schedules: of the learning rate.
        tuning, fresh: how many seeds.
        budget: trainings of an arm's search; 0: its settings are those of tuned.json.
        steps: of a run; None: the task's.
        controls: whether they are run.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    schedules: tuple[Schedule, ...] = SCHEDULES
    tuning: int = 6
    fresh: int = 20
    budget: int = 20
    steps: int | None = None
    controls: bool = True


# Muon orthogonalises matrix after matrix, so that seeds cost as much as they do alone: a smaller search.
MUON = Plan(tuning=3, budget=10)
QUICK = Plan(("base", "lookahead", "ema", "outer-momentum"), budget=0, controls=False)
SMOKE = Plan(("base", "lookahead"), schedules=("constant",), tuning=2, fresh=FEWEST, budget=2, steps=13)

QUICK_TASKS = ("digits-cnn-sgd", "digits-cnn-adamw", "char-lstm", "char-gpt", "conv-ae", "conv-vae")
SMOKE_TASKS = ("digits-cnn-sgd", "char-gpt")


@dataclass(frozen=True)
class Comparison:
    """The experiment of one task."""

    task: Task
    revision: int = 1
    settings: tuned.Settings = field(default_factory=tuned.read)

    @property
    def name(self) -> str:
        return self.task.name

    def names(self) -> tuple[str, ...]:
        kinds = [UNITS[metric][0] for metric in ("loss", *self.task.metrics)]
        kinds += ["steps-ratio", "seed-variance", "fluctuation"]
        pairs = ("*-base", "lookahead-ema", f"lookahead-{SMALL_LR}")
        return tuple(f"{self.name}.*.{pair}.{kind}" for pair in pairs for kind in kinds)

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        plan = self.plan(scale)
        if plan is None or not self._can_run():
            return
        unknown: list[str] = []
        for schedule in plan.schedules:
            confirmed: dict[Arm, Point] = {}
            for arm in self.arms(plan):
                if plan.budget:
                    for tried in self.search(plan, schedule, arm, records):
                        yield self._job(plan, schedule, arm, tried, self.tuning(plan), only="validation")
                point = self.point(plan, schedule, arm, records)
                if point is None:
                    unknown.append(f"{schedule} {arm.name}")
                if point is not None:
                    confirmed[arm] = point
                    yield self._job(plan, schedule, arm, point, self.fresh(plan))
            if plan.controls:
                for label, (arm, point) in _controls(confirmed).items():
                    yield self._job(plan, schedule, arm, point, self.fresh(plan), label)
        if unknown and not plan.budget:
            warnings.warn(
                f"{self.name}: no settings are kept of {', '.join(unknown)}, whose figures are missing; run the full "
                "scale, then python -m bench.evidence.tuned",
                stacklevel=2,
            )

    def figures(self, records: Records) -> list[Figure]:
        """Of the largest scale at which there is anything."""
        for plan in self._plans():
            if made := [figure for schedule in plan.schedules for figure in self._figures(plan, schedule, records)]:
                return [*made, *self._unscheduled(plan, records)]
        return []

    def pictures(self, records: Records) -> list[Picture]:
        """As figures(), the curves of each schedule."""
        for plan in self._plans():
            runs = {schedule: self._runs(plan, schedule, records)[0] for schedule in plan.schedules}
            if any(runs.values()):
                return [
                    curves.picture(
                        f"{self.name}.{schedule}.curves",
                        f"{self.name}, {schedule} learning rate, each arm at its best settings",
                        {arm: trained for arm, trained in of.items() if arm not in (SMALL_LR, UNTUNED)},
                    )
                    for schedule, of in runs.items()
                    if of
                ]
        return []

    def _plans(self) -> Iterator[Plan]:
        """What may be recorded, the largest first."""
        for scale in (Scale.FULL, Scale.QUICK, Scale.SMOKE):
            plan = self.plan(scale)
            if plan is not None:
                yield plan

    def plan(self, scale: Scale) -> Plan | None:
        """How much of this task a scale runs; None: nothing."""
        if scale is Scale.SMOKE:
            return SMOKE if self.name in SMOKE_TASKS else None
        if scale is Scale.QUICK:
            return QUICK if self.name in QUICK_TASKS else None
        return Plan() if self.task.rule.elementwise else MUON

    def arms(self, plan: Plan) -> list[Arm]:
        """What is tuned, the base first."""
        compared = COMPARED.get(self.name, ALL)
        return [ARMS[name] for name in compared if name in plan.arms and ARMS[name].serves(self.task.rule)]

    def tuning(self, plan: Plan) -> list[int]:
        return list(range(plan.tuning))

    def fresh(self, plan: Plan) -> list[int]:
        return list(range(FIRST_FRESH, FIRST_FRESH + plan.fresh))

    def search(self, plan: Plan, schedule: Schedule, arm: Arm, records: Records) -> Search:
        """The search of an arm, as far as it is recorded and one training further."""

        def score(point: Point) -> float | None:
            setting = self._setting(plan, schedule, arm.name, point, self.tuning(plan))
            result = records.get(self.name, self.revision, setting)
            return None if result is None else float(np.mean(floats(result, "validation")))

        return search(Space(arm, self.task.rule, self.task.lr), score, plan.budget)

    def found(self, plan: Plan, schedule: Schedule, arm: Arm, records: Records) -> Found | None:
        """Where the search of an arm ended; None where it has not."""
        return found(self.search(plan, schedule, arm, records))

    def point(self, plan: Plan, schedule: Schedule, arm: Arm, records: Records) -> Point | None:
        """What an arm is run at on fresh seeds."""
        if not plan.budget:
            return self.settings.get((self.name, schedule, arm.name))
        ended = self.found(plan, schedule, arm, records)
        return None if ended is None else ended.point

    def _can_run(self) -> bool:
        reason = "" if self.task.rule.name != "muon" or has_muon() else "torch.optim.Muon came with torch 2.9"
        try:
            self.task.source()
        except NotHere as error:
            reason = str(error)
        if reason:
            warnings.warn(f"{self.name} is skipped: {reason}", stacklevel=2)
        return not reason

    def _figures(self, plan: Plan, schedule: Schedule, records: Records) -> list[Figure]:
        runs, notes = self._runs(plan, schedule, records)
        pairs = [(name, "base") for name in runs if name != "base"]
        pairs += [("lookahead", "ema"), ("lookahead", SMALL_LR)]
        return [
            figure
            for arm, other in pairs
            if arm in runs and other in runs
            for figure in _compare(
                f"{self.name}.{schedule}.{arm}-{other}",
                self.task,
                runs,
                (arm, other),
                f"{runs[arm].data}. {'Smoke test, not tuned. ' if plan is SMOKE else ''}"
                f"{arm}: {notes[arm]}; {other}: {notes[other]}.",
            )
        ]

    def _runs(self, plan: Plan, schedule: Schedule, records: Records) -> tuple[dict[str, Trained], dict[str, str]]:
        """By arm and control, the run on fresh seeds and what it was run at."""
        runs: dict[str, Trained] = {}
        notes: dict[str, str] = {}
        points: dict[str, Point] = {}
        for arm in self.arms(plan):
            point = self.point(plan, schedule, arm, records)
            if point is None:
                continue
            points[arm.name], notes[arm.name] = point, _words(point)
            trained = self._trained(plan, schedule, arm.name, point, self.fresh(plan), records)
            # At the smoke scale there is no search to speak of, and its figures say so.
            ended = self.found(plan, schedule, arm, records) if plan.budget and plan is not SMOKE else None
            if trained is not None and (ended is None or ended.bracketed):
                runs[arm.name] = trained
        for label, (_, point) in _controls({ARMS[name]: point for name, point in points.items()}).items():
            trained = self._trained(plan, schedule, label, point, self.fresh(plan), records)
            origin = "lookahead" if label == SMALL_LR else "base"
            if trained is not None and origin in runs:
                runs[label], notes[label] = trained, f"at the settings of {origin}"
        return runs, notes

    def _unscheduled(self, plan: Plan, records: Records) -> Iterator[Figure]:
        """Schedule-Free at a constant learning rate against the base at a cosine schedule, as its authors compare."""
        runs: dict[str, Trained] = {}
        notes = []
        sides: tuple[tuple[str, Schedule, str], ...] = (
            ("schedule-free", "constant", "schedule-free"),
            ("base", "cosine", "cosine-base"),
        )
        for name, schedule, label in sides:
            if name not in plan.arms or schedule not in plan.schedules or not ARMS[name].serves(self.task.rule):
                return
            point = self.point(plan, schedule, ARMS[name], records)
            ended = self.found(plan, schedule, ARMS[name], records) if plan.budget else None
            if point is None or not (ended is None or ended.bracketed):
                return
            trained = self._trained(plan, schedule, name, point, self.fresh(plan), records)
            if trained is None:
                return
            runs[label] = trained
            notes.append(f"{label}: {_words(point)}")
        pair = ("schedule-free", "cosine-base")
        note = f"{runs[pair[0]].data}. {'; '.join(notes)}."
        yield from _compare(f"{self.name}.constant.{'-'.join(pair)}", self.task, runs, pair, note)

    def _trained(
        self, plan: Plan, schedule: Schedule, label: str, point: Point, seeds: Sequence[int], records: Records
    ) -> Trained | None:
        result = records.get(self.name, self.revision, self._setting(plan, schedule, label, point, seeds))
        return None if result is None else from_json(result)

    def _job(
        self,
        plan: Plan,
        schedule: Schedule,
        arm: Arm,
        point: Point,
        seeds: Sequence[int],
        label: str = "",
        only: Part | None = None,
    ) -> Job:
        steps = plan.steps or self.task.steps
        return Job(
            self._setting(plan, schedule, label or arm.name, point, seeds),
            lambda: to_json(train(self.task, arm, point, schedule, seeds, steps, only)),
            self.task.cost * (1 + len(seeds)) * steps / self.task.steps,
        )

    def _setting(
        self, plan: Plan, schedule: Schedule, label: str, point: Point, seeds: Sequence[int]
    ) -> dict[str, JSON]:
        own = {"beta2": point.beta2, "own": point.own}
        return {
            "schedule": schedule,
            "arm": label,
            "lr": point.lr,
            "beta": point.beta,
            **{name: value for name, value in own.items() if value is not None},
            "seeds": f"{seeds[0]}-{seeds[-1]}",
            "steps": plan.steps or self.task.steps,
        }


def _controls(confirmed: Mapping[Arm, Point]) -> dict[str, tuple[Arm, Point]]:
    """By label, what is run at whose settings."""
    points = {arm.name: point for arm, point in confirmed.items()}
    controls = {}
    if "lookahead" in points:
        controls[SMALL_LR] = (ARMS[SMALL_LR], points["lookahead"])
    if "lookahead" in points and "base" in points:
        controls[UNTUNED] = (ARMS["lookahead"], points["base"])
    return controls


def _compare(name: str, task: Task, runs: Mapping[str, Trained], pair: tuple[str, str], note: str) -> Iterator[Figure]:
    """All figures of an arm and another."""
    arm, other = (runs[side] for side in pair)
    for side in pair:
        count = sum(runs[side].diverged)
        if count:
            note += f" {count} of {len(runs[side].diverged)} seeds of {side} diverged, and count as untrained."
    for metric in ("loss", *task.metrics):
        kind, unit, better = UNITS[metric]
        yield paired(f"{name}.{kind}", arm.scored(metric), other.scored(metric), unit=unit, better=better, note=note)
    ratios = [curves.steps_ratio(a, b, arm.steps) for a, b in zip(arm.curve, other.curve, strict=True)]
    yield ratio(f"{name}.steps-ratio", ratios, [1.0] * len(ratios), better=-1, note=note)
    if pair == ("lookahead", "base") and UNTUNED in runs:
        yield from _variances(name, runs[UNTUNED], other)


def _variances(name: str, arm: Trained, other: Trained) -> Iterator[Figure]:
    """Between seeds and within runs, of two that were run at the same settings."""
    note = "Both at the settings of base."
    finals = arm.scored("loss"), other.scored("loss")
    if all(len(values) >= FEWEST and np.ptp(values) > 0 for values in finals):
        yield variance_ratio(f"{name}.seed-variance", *finals, note=note)
    within = zip(map(curves.fluctuation, arm.curve), map(curves.fluctuation, other.curve), strict=True)
    sound = [(a, b) for a, b in within if 0 < a < math.inf and 0 < b < math.inf]
    if sound:
        note += f" Of {len(sound)} seeds that neither diverged."
        yield ratio(f"{name}.fluctuation", [a for a, _ in sound], [b for _, b in sound], better=-1, note=note)


def _words(point: Point) -> str:
    settings = {"beta": point.beta, "beta2": point.beta2, "own": point.own}
    return ", ".join(
        [f"lr {point.lr:g}", *(f"{name} {value:g}" for name, value in settings.items() if value is not None)]
    )


EXPERIMENTS: tuple[Comparison, ...] = tuple(Comparison(task) for task in TASKS)
