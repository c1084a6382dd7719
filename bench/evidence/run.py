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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.evidence.experiment import JSON, Experiment, Job, Scale
from bench.evidence.records import Records


@dataclass(frozen=True)
class Failure:
    """A job that raised; its experiment went no further."""

    experiment: str
    setting: str
    error: str


def run(
    experiments: Sequence[Experiment], scale: Scale, records: Records, console: Console, at_once: int = 1
) -> list[Failure]:
    """Run what is not recorded yet. An experiment ends at its first job that raises; the others are still run.

    Args:
        at_once: jobs, each on one thread: 1 runs them in this process, more in so many others.
    """
    failures = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f} of about {task.total:.0f} s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Into a log no bar is drawn, and each experiment leaves a line.
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        for experiment in experiments:
            begin = time.perf_counter()
            failure, jobs = _run(experiment, scale, records, progress, at_once)
            said = f"{jobs} jobs in {time.perf_counter() - begin:.1f} s" + (", then one failed" if failure else "")
            console.print(f"{experiment.name}: {said}", markup=False, highlight=False, soft_wrap=True)
            if failure:
                failures.append(failure)
    return failures


def _run(
    experiment: Experiment, scale: Scale, records: Records, progress: Progress, at_once: int
) -> tuple[Failure | None, int]:
    """(the job that raised, jobs that were run)."""
    bar = progress.add_task(experiment.name, total=0)
    jobs, spent = 0, 0.0
    while pending := _pending(experiment, scale, records):
        progress.update(bar, total=spent + sum(job.cost for job in pending))
        for number, done in _done(pending, at_once):
            job = pending[number]
            if done.error:
                print(done.traceback, file=sys.stderr)
                return Failure(experiment.name, str(dict(job.setting)), done.error), jobs
            records.add(experiment.name, experiment.revision, job.setting, done.result, done.seconds)
            jobs, spent = jobs + 1, spent + job.cost
            progress.update(bar, completed=spent, description=f"{experiment.name} {_short(job)}")
    progress.remove_task(bar)
    return None, jobs


def _pending(experiment: Experiment, scale: Scale, records: Records) -> list[Job]:
    return [
        job
        for job in experiment.jobs(scale, records)
        if records.get(experiment.name, experiment.revision, job.setting) is None
    ]


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


def _short(job: Job) -> str:
    text = " ".join(str(value) for value in job.setting.values())
    return text if len(text) <= 60 else text[:57] + "..."
