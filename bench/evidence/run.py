"""Runs the jobs of experiments, some at once, and goes on where an earlier run was cut off."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.evidence.experiment import JSON, Experiment, Job, Scale
from bench.evidence.records import Records

# Jobs of a round for each process.
ENOUGH = 8


@dataclass(frozen=True)
class Failure:
    """A job that raised; its experiment went no further."""

    experiment: str
    setting: str
    error: str


def run(
    experiments: Sequence[Experiment], scale: Scale, records: Records, console: Console, at_once: int = 1
) -> list[Failure]:
    """Run what is not recorded yet, round after round. An experiment ends with the round in which a job raised.

    A search names its next trainings only when the last ones are known. So a round takes the jobs of so many
    experiments as keep all processes busy, and the longest first, so that none waits long for the others at its end.

    Args:
        at_once: jobs, each on one thread: 1 runs them in this process, more in so many others.
    """
    begin = time.perf_counter()
    failures: list[Failure] = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f} of about {task.total:.0f} s"),
        TimeElapsedColumn(),
    )
    # Into a log no bar is drawn, and each experiment leaves a line.
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        left = {experiment.name: _Running(experiment, progress) for experiment in experiments}
        while jobs := _round(left, scale, records, at_once):
            for number, done in _done([job for _, job in jobs], at_once):
                running, job = jobs[number]
                if not done.error:
                    running.record(job, done, records)
                elif running.experiment.name in left:  # its first; what else it has in this round goes on
                    print(done.traceback, file=sys.stderr)
                    failures.append(Failure(running.experiment.name, str(dict(job.setting)), done.error))
                    left.pop(running.experiment.name).end("then one failed")
    _say(console, f"all: {time.perf_counter() - begin:.1f} s, {at_once} at once")
    return failures


class _Running:
    """An experiment that has jobs left, and what is shown of it."""

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self.experiment = experiment
        self._progress = progress
        self._bar = progress.add_task(experiment.name, total=0, visible=False)
        self._jobs, self._cost, self._seconds = 0, 0.0, 0.0

    def pending(self, scale: Scale, records: Records) -> list[Job]:
        """What it can name of its jobs and is not recorded."""
        name, revision = self.experiment.name, self.experiment.revision
        jobs = [job for job in self.experiment.jobs(scale, records) if records.get(name, revision, job.setting) is None]
        total = self._cost + sum(job.cost for job in jobs)
        self._progress.update(self._bar, total=total, visible=bool(jobs))
        return jobs

    def record(self, job: Job, done: _Done, records: Records) -> None:
        records.add(self.experiment.name, self.experiment.revision, job.setting, done.result, done.seconds)
        self._jobs, self._cost, self._seconds = self._jobs + 1, self._cost + job.cost, self._seconds + done.seconds
        self._progress.update(self._bar, completed=self._cost, description=f"{self.experiment.name} {_short(job)}")

    def end(self, how: str = "") -> None:
        said = f"{self.experiment.name}: {self._jobs} jobs of {self._seconds:.1f} s on a core"
        _say(self._progress.console, f"{said}, {how}" if how else said)
        self._progress.update(self._bar, visible=False)


def _round(left: dict[str, _Running], scale: Scale, records: Records, at_once: int) -> list[tuple[_Running, Job]]:
    """The next jobs, the longest first, of the experiments in their order; those that have none are taken away."""
    jobs: list[tuple[_Running, Job]] = []
    for name, running in list(left.items()):
        pending = running.pending(scale, records)
        if not pending:
            left.pop(name).end()
        jobs += [(running, job) for job in pending]
        if len(jobs) >= ENOUGH * at_once:
            break
    return sorted(jobs, key=lambda one: -one[1].cost)


@dataclass(frozen=True)
class _Done:
    """What a job gave, or what it raised."""

    result: Mapping[str, JSON]
    seconds: float
    error: str = ""
    traceback: str = ""


def _done(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[int, _Done]]:
    """(place, outcome) of the jobs, in the order in which they end."""
    parallel = Parallel(n_jobs=at_once, return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    yield from parallel(delayed(_one)(number, job) for number, job in enumerate(jobs))


def _one(number: int, job: Job) -> tuple[int, _Done]:
    torch.set_num_threads(1)  # the same sums on every machine, and these networks are too small for two
    begin = time.perf_counter()
    try:
        result = job.run()
    except Exception as error:  # whatever a job raises; the rest of the run is worth having
        return number, _Done({}, 0.0, f"{type(error).__name__}: {error}", traceback.format_exc().rstrip())
    return number, _Done(result, time.perf_counter() - begin)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(job: Job) -> str:
    text = " ".join(str(value) for value in job.setting.values())
    return text if len(text) <= 60 else text[:57] + "..."
