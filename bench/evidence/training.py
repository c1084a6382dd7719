"""Trains one arm on one task for many seeds at once, and evaluates its slow weights all along.

All arms of a seed have one start and one sequence of batches. Evaluation is every `EVERY` steps, at steps that are no
multiple of a period of slow weights (5, 10): right after a sync the weights that are trained are the slow ones, and
between two syncs they are not. A seed that diverges has the loss infinity from there on; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from bench.evidence.arms import Arm, Rule, build, slow_weights
from bench.evidence.data import Part, Source
from bench.evidence.experiment import JSON
from bench.evidence.networks.stack import Batch, Network, Parameters, starts

EVERY, PHASE = 10, 3
WARM_UP = 0.05
CHUNK = 256  # examples of each seed that are evaluated at once

Schedule = Literal["constant", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: "digits-cnn-sgd": the first part of its figures' names.
        rule: the optimizer inside every arm.
        network: of what size.
        source: gives the data; called when they are needed, for they take time to read.
        batch: examples a step.
        steps: of a run; 3 more than a multiple of 10, so that the last one is evaluated.
        lr: where tuning begins (for a momentum of .9).
        metrics: what is reported beside the loss: "accuracy" or "psnr".
        curve: examples of each evaluation along a run.
        final: examples of the validation and of the test at its end.
        cost: seconds of a run of one seed in a stack, on one core.
    """

    name: str
    rule: Rule
    network: Network
    source: Callable[[], Source]
    batch: int
    steps: int
    lr: float
    metrics: tuple[str, ...] = ()
    curve: int = 64
    final: int = 512
    cost: float = 0.3


@dataclass(frozen=True)
class Point:
    """What is tuned. `lr` is the inner rule's at its peak; None: there is no such setting."""

    lr: float
    beta: float
    beta2: float | None = None
    own: float | None = None


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        data: what it was trained on.
        steps: at which the curve was evaluated.
        curve: loss on a part of the validation data, [seed][evaluation].
        validation: loss on the validation data at the end, [seed].
        start: "loss" and the metrics on the test data before the first step, [seed].
        test: the same at the end; of a seed that diverged the loss is infinite and a metric NaN.

    What was not evaluated is empty.
    """

    data: str
    steps: list[int]
    curve: list[list[float]]
    validation: list[float]
    start: dict[str, list[float]]
    test: dict[str, list[float]]

    @property
    def diverged(self) -> list[bool]:
        """Of each seed, whether its run left the finite numbers."""
        return [not math.isfinite(loss) for loss in self.test["loss"]]

    def scored(self, metric: str) -> list[float]:
        """The metric at the end, [seed]; what diverged is worth what its network was before training."""
        pairs = zip(self.test[metric], self.start[metric], self.diverged, strict=True)
        return [start if diverged else end for end, start, diverged in pairs]


def train(
    task: Task,
    arm: Arm,
    point: Point,
    schedule: Schedule,
    seeds: Sequence[int],
    steps: int,
    only: Part | None = None,
) -> Trained:
    """Trains `arm` on `task` for each of the seeds.

    Args:
        point: learning rate and the rest of what is tuned.
        schedule: of the learning rate, after a warm-up over `WARM_UP` of the steps.
        steps: how many; of which `PHASE` more than a multiple of `EVERY` makes the last one evaluated.
        only: of the held-out data, what alone is evaluated at the end, with no curve along the run and with a start
            for "test" alone; the training is the same. None: everything is. Evaluation is a fifth of a whole run.
    """
    torch.set_num_threads(1)
    source = task.source()
    leaves = Leaves(task.network, seeds, apart=not task.rule.elementwise)
    optimizer = build(
        arm,
        task.rule,
        leaves.tensors,
        lr=point.lr,
        beta=point.beta,
        steps=steps,
        beta2=point.beta2,
        own=point.own,
    )
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    parts = get_args(Part) if only is None else (only,)
    along = source.held_out("validation", task.curve, task.curve) if only is None else ()
    ends = {part: source.held_out(part, CHUNK, task.final) for part in parts}
    start = _evaluate(task, leaves.whole(), ends["test"]) if "test" in ends else {}
    evaluated, curve = [], []
    for step, batch in zip(range(1, steps + 1), source.batches(seeds, task.batch), strict=False):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(schedule, step, steps)
        optimizer.zero_grad()
        task.network.losses(leaves.whole(), batch).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if along and step % EVERY == PHASE:
            with slow_weights(optimizer):
                curve.append(_evaluate(task, leaves.whole(), along)["loss"])
            evaluated.append(step)
    with slow_weights(optimizer):
        found = {part: _evaluate(task, leaves.whole(), ends[part]) for part in parts}
    return Trained(
        source.name,
        evaluated,
        [[losses[i] for losses in curve] for i in range(len(seeds))] if curve else [],
        found["validation"]["loss"] if "validation" in found else [],
        start,
        found.get("test", {}),
    )


def factor(schedule: Schedule, step: int, steps: int) -> float:
    """Of the learning rate at a step, from 1 to `steps`: up over the first of them, then on, or down to 0."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Leaves:
    """The parameters of R replicas as an optimizer is to see them: stacked, or the hidden matrices of each apart.

    Attributes:
        tensors: all of them.
    """

    def __init__(self, network: Network, seeds: Sequence[int], *, apart: bool) -> None:
        self._leaves: dict[str, list[Tensor]] = {}
        for name, stack in starts(network, seeds).items():
            parts = stack.unbind() if apart and name in network.hidden else [stack]
            self._leaves[name] = [part.clone().requires_grad_() for part in parts]
        self._apart = {name for name in self._leaves if apart and name in network.hidden}
        self.tensors = [leaf for parts in self._leaves.values() for leaf in parts]

    def whole(self) -> Parameters:
        """By name, [R, ...]."""
        return {name: torch.stack(parts) if name in self._apart else parts[0] for name, parts in self._leaves.items()}


@torch.no_grad()
def _evaluate(task: Task, parameters: Parameters, batches: Iterable[Batch]) -> dict[str, list[float]]:
    """The loss and the task's metrics over all examples, [seed]; a loss that is no number is infinite."""
    replicas = len(next(iter(parameters.values())))
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        size = batch[0].shape[1]
        everyone = tuple(part.expand(replicas, *part.shape[1:]) for part in batch)
        for name, score in task.network.scores(parameters, everyone).items():
            sums[name] = sums.get(name, 0) + size * score.double()
        count += size
    scores = {name: total / count for name, total in sums.items()}
    if "error" in scores:  # of values from 0 to 1, in dB; of all examples together
        scores["psnr"] = -10 * scores["error"].log10()
    sound = scores["loss"].isfinite()
    found = {name: scores[name].where(sound, math.nan).tolist() for name in task.metrics}
    return {"loss": scores["loss"].where(sound, math.inf).tolist(), **found}


Plain: TypeAlias = Mapping[str, JSON]


def to_json(trained: Trained) -> Plain:
    """As a flat dictionary without numbers that JSON has not: "inf" and "nan" are strings."""
    plain: dict[str, JSON] = {
        "data": trained.data,
        "steps": list(trained.steps),
        "validation": _plain(trained.validation),
    }
    for when, scores in (("start", trained.start), ("test", trained.test)):
        plain |= {f"{when} {name}": _plain(values) for name, values in scores.items()}
    return plain | {f"curve {i}": _plain(losses) for i, losses in enumerate(trained.curve)}


def from_json(plain: Plain) -> Trained:
    """The inverse of `to_json`, to seven digits."""

    def scores(when: str) -> dict[str, list[float]]:
        return {name.removeprefix(when): floats(plain, name) for name in plain if name.startswith(when)}

    validation = floats(plain, "validation")
    return Trained(
        data=str(plain["data"]),
        steps=[int(step) for step in floats(plain, "steps")],
        curve=[floats(plain, f"curve {i}") for i in range(len(validation)) if f"curve {i}" in plain],
        validation=validation,
        start=scores("start "),
        test=scores("test "),
    )


def floats(plain: Plain, name: str) -> list[float]:
    """A list of numbers of what `to_json` gave."""
    values = plain[name]
    assert isinstance(values, list)
    return [float(value) for value in values]  # type: ignore[arg-type]


def _plain(values: Sequence[float]) -> list[JSON]:
    return [float(f"{value:.7g}") if math.isfinite(value) else str(value) for value in values]
