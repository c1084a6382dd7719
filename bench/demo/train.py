"""Three optimizers train one network in lockstep; what they did is measured, and two of them must agree.

Every step draws one batch, and each run in turn does a forward, a backward and a timed ``optimizer.step()``
on it. So the runs differ in nothing but the optimizer, and other work on the machine slows all three alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.demo.data import Data
from bench.demo.results import RunResult, result_of
from bench.demo.runs import FUSED, UNFUSED, K, Run, Task, make_runs

Progress = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Deviations:
    """How far the fused run is from the unfused one.

    Attributes:
        loss: absolute difference of the training losses, of every step.
        weights: distance of the weights at every ``K``-th step, in units of the way that the unfused ones
            have come from the start.
    """

    loss: list[float]
    weights: list[float]


@dataclass(frozen=True)
class TaskResult:
    """All of one task."""

    task: Task
    source: str
    parameters: int
    tensors: int
    runs: dict[str, RunResult]
    deviations: Deviations

    def speedup(self, name: str) -> float:
        """How many times as fast as run ``name`` ours takes a step."""
        return self.runs[name].step.median / self.runs[FUSED].step.median


def run_task(task: Task, *, backend: str = "auto", progress: Progress = lambda step, losses: None) -> TaskResult:
    """Train a task with all three optimizers and measure them.

    Args:
        task: what to train.
        backend: of our optimizer.
        progress: called after every step with its number, from 1, and the loss of every run by name.

    Raises:
        FloatingPointError: a training loss is not finite.
    """
    data = task.data()
    runs = make_runs(task, backend)
    deviations = _train(task, data, runs, progress)
    results = {name: result_of(run, data.held_out) for name, run in runs.items()}
    weights = list(runs[FUSED].model.parameters())
    return TaskResult(
        task=task,
        source=data.source,
        parameters=sum(p.numel() for p in weights),
        tensors=len(weights),
        runs=results,
        deviations=deviations,
    )


def _train(task: Task, data: Data, runs: dict[str, Run], progress: Progress) -> Deviations:
    start = [p.detach().clone() for p in runs[UNFUSED].model.parameters()]
    deviations = Deviations([], [])
    names = list(runs)
    for step, batch in zip(range(1, task.steps + 1), data.train, strict=False):
        # Every run comes at every place and after every other.
        order = [*names[step % 3 :], *names[: step % 3]]
        for name in order if step // 3 % 2 else reversed(order):
            runs[name].advance(batch)
        losses = {name: run.losses[-1] for name, run in runs.items()}
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise FloatingPointError(f"{task.title}: the loss of '{name}' at step {step} is {loss}")
        deviations.loss.append(abs(losses[FUSED] - losses[UNFUSED]))
        if step % K == 0:
            ours, theirs = (list(runs[name].model.parameters()) for name in (FUSED, UNFUSED))
            deviations.weights.append(_distance(ours, theirs) / _distance(theirs, start))
        progress(step, losses)
    return deviations


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return math.sqrt(sum((p - q).square().sum(dtype=torch.float64).item() for p, q in zip(a, b, strict=True)))
