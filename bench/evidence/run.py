"""Runs the jobs of experiments, one after the other, and goes on where an earlier run was cut off."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.evidence.experiment import Experiment, Job, Scale
from bench.evidence.records import Records


@dataclass(frozen=True)
class Failure:
    """A job that raised; its experiment went no further."""

    experiment: str
    setting: str
    error: str


def run(experiments: Sequence[Experiment], scale: Scale, records: Records, console: Console) -> list[Failure]:
    """Run what is not recorded yet. An experiment ends at its first job that raises; the others are still run."""
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
            failure, jobs = _run(experiment, scale, records, progress)
            said = f"{jobs} jobs in {time.perf_counter() - begin:.1f} s" + (", then one failed" if failure else "")
            console.print(f"{experiment.name}: {said}", markup=False, highlight=False, soft_wrap=True)
            if failure:
                failures.append(failure)
    return failures


def _run(experiment: Experiment, scale: Scale, records: Records, progress: Progress) -> tuple[Failure | None, int]:
    """(the job that raised, jobs that were run)."""
    bar = progress.add_task(experiment.name, total=0)
    jobs, spent = 0, 0.0
    while pending := _pending(experiment, scale, records):
        progress.update(bar, total=spent + sum(job.cost for job in pending))
        for job in pending:
            progress.update(bar, description=f"{experiment.name} {_short(job)}")
            begin = time.perf_counter()
            try:
                result = job.run()
                records.add(experiment.name, experiment.revision, job.setting, result, time.perf_counter() - begin)
            except Exception as error:  # whatever a job raises; the rest of the run is worth having
                traceback.print_exc(file=sys.stderr)
                return Failure(experiment.name, str(dict(job.setting)), f"{type(error).__name__}: {error}"), jobs
            jobs, spent = jobs + 1, spent + job.cost
            progress.update(bar, completed=spent)
    progress.remove_task(bar)
    return None, jobs


def _pending(experiment: Experiment, scale: Scale, records: Records) -> list[Job]:
    return [
        job
        for job in experiment.jobs(scale, records)
        if records.get(experiment.name, experiment.revision, job.setting) is None
    ]


def _short(job: Job) -> str:
    text = " ".join(str(value) for value in job.setting.values())
    return text if len(text) <= 60 else text[:57] + "..."
