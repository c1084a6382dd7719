"""Train a small GPT and a small convolutional network with Lookahead fused, with Lookahead unfused, without.

    python -m bench.demo [--quick] [--out FOLDER] [--backend NAME]

Prints what each optimizer reached, took and kept in memory, and writes demo.png and demo.json. Ends with
status 1 if the fused and the unfused run differ by more than rounding (check.py), else 0. Nothing is
downloaded: the text is the standard library's source, the images are scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.harness import cores

# Before torch is imported: its OpenMP reads the variable when it loads.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.update(cores.waiting_policy())

try:
    import sklearn  # type: ignore[import-untyped]  # noqa: F401  missed now, not after minutes of training
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bench.demo import report
except ModuleNotFoundError as error:
    sys.exit(f"the demo needs {error.name}: pip install '.[demo]', or run it by `make demo`")

import lookahead_fused
from bench.demo.check import departures
from bench.demo.runs import FUSED, PLAIN, UNFUSED, Task
from bench.demo.tasks import tasks
from bench.demo.train import TaskResult, run_task
from lookahead_fused.bench.conditions import conditions, describe
from lookahead_fused.bench.cores import core_seconds, waited_share

OUT = Path(__file__).resolve().parents[2] / "build" / "demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter training, under a minute")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for picture and figures (%(default)s)")
    parser.add_argument("--backend", default="auto", help="of our optimizer (%(default)s)")
    options = parser.parse_args(arguments)
    return run(tasks(options.quick), options.out, options.backend)


def run(chosen: Sequence[Task], out: Path, backend: str) -> int:
    """Train the tasks, show and write the results.

    Args:
        chosen: the tasks.
        out: folder for the picture and the figures, made if it is not there.
        backend: of our optimizer.

    Returns:
        The exit status: 1 if a fused run differs from its unfused one by more than rounding.
    """
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    # Where nobody watches, a log: 80 columns would break its tables.
    console = Console() if sys.stdout.isatty() else Console(width=118)
    where = conditions()
    used = backend_in_use(backend)
    described = f"{describe(where)}\nlookahead_fused {lookahead_fused.__version__}, backend {used}"

    before = core_seconds()
    results = train(chosen, backend, console)
    waited = waited_share(before, core_seconds())
    described += f"\n{disturbance(waited)}"
    report.print_tables(results, described, console)
    picture, figures = out / "demo.png", out / "demo.json"
    report.draw(results, described, picture)
    further = {
        "lookahead_fused": lookahead_fused.__version__,
        "backend": used,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "waited_for_core": waited,
    }
    report.save_json(results, {**asdict(where), **further}, figures)
    console.print(f"\nPicture: {picture}\nFigures: {figures}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{time.perf_counter() - begin:.0f} s in all", highlight=False)

    differing = [f"{result.task.title}: {line}" for result in results for line in departures(result.deviations)]
    for line in differing:
        print(f"error: the fused and the unfused optimizer do not coincide. {line}", file=sys.stderr)
    return 1 if differing else 0


def train(chosen: Sequence[Task], backend: str, console: Console) -> list[TaskResult]:
    """Train the tasks one after the other, each under a progress bar that shows the three losses."""
    results = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        for task in chosen:
            bar = progress.add_task(task.key, total=task.steps, loss="")

            def show(step: int, losses: dict[str, float], bar: object = bar) -> None:
                shown = ", ".join(
                    f"{word} {losses[name]:.3f}"
                    for word, name in (("fused", FUSED), ("unfused", UNFUSED), ("plain", PLAIN))
                )
                progress.update(bar, completed=step, loss=shown)  # type: ignore[arg-type]

            results.append(run_task(task, backend=backend, progress=show))
    return results


def disturbance(waited: float | None) -> str:
    """What other work on the machine did to the run, in words; ``waited`` as of ``waited_share``."""
    policy = os.environ.get("OMP_WAIT_POLICY", "default")
    said = f"OMP_WAIT_POLICY: {policy}; share of its time that this process waited for a core: "
    if waited is None:
        return said + "not told by this system"
    busy = " (other work held the cores: do not rely on the times)"
    return f"{said}{waited:.0%}{busy if waited > cores.BUSY else ''}"


def backend_in_use(backend: str) -> str:
    """The backend that serves parameters on the CPU, and if it is not the fastest, why."""
    if backend != "auto":
        return backend
    native = lookahead_fused.backends()["cpu"]
    return "cpu (auto)" if native.available else f"reference (auto; cpu: {native.reason})"


if __name__ == "__main__":
    sys.exit(main())
