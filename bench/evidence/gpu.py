"""The measurements that need a GPU and data that no package brings: CIFAR with ResNet-18, and a GPT of 124 million.

    python -m bench.evidence.gpu --data FOLDER [--out FOLDER] [--only cifar10 cifar100 gpt] [--seeds 3]
    python -m bench.evidence.gpu --dry-run

The folder holds CIFAR's binary versions and a text or tokens (bench/evidence/gpu_data.py says in which form). Nothing
is downloaded. Every arm is tuned over one grid on images or text held out from training, with one seed; what it is best
at is then trained on everything with further seeds and tested once. Each epoch leaves a checkpoint and a line in
lines.jsonl: run it again with the same arguments, and it goes on where it was cut off. A dry run does all of it on a
CPU with generated files and tiny networks, in seconds: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.evidence import results
from bench.evidence.figures import Figure
from bench.evidence.gpu_data import Cifar, DataError, Tokens, find, generate
from bench.evidence.gpu_train import Classify, Point, Size, Task, Write, train
from bench.evidence.statistics import paired

TASKS = ("cifar10", "cifar100", "gpt")
# What claims can name.
NAMES = ("gpu.cifar10.*-*.accuracy", "gpu.cifar100.*-*.accuracy", "gpu.gpt.*-adamw.loss")
# GPT: 256 windows of 1024 tokens a step, 5000 steps, 1.3e9 tokens.
SIZES = {"cifar": Size(200, 128, 64), "gpt": Size(20, 256, 768, steps=250, parts=16)}
DRY_SIZES = {
    "cifar": Size(2, 32, 4),
    "gpt": Size(2, 8, 16, steps=4, layers=1, heads=2, context=16, parts=2, held_out=8),
}
TUNING_SEED = 0


@dataclass(frozen=True)
class Run:
    """One training run: what names its lines and its checkpoint."""

    task: str
    arm: str
    point: Point
    seed: int
    final: bool

    def key(self) -> dict[str, Any]:
        stage = "final" if self.final else "tune"
        return {"task": self.task, "arm": self.arm, **asdict(self.point), "seed": self.seed, "stage": stage}

    def file(self) -> str:
        return "-".join(str(value) for value in self.key().values()) + ".pt"


class Lines:
    """lines.jsonl: of every epoch of every run what was measured in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole, end, rest = path.read_text().rpartition("\n")
            # The line in which a run was cut off is no line; its epoch has no other.
            if rest:
                path.write_text(whole + end)
            for line in whole.splitlines():
                self._keep(json.loads(line))

    def add(self, run: Run, line: dict[str, Any]) -> None:
        whole = {**run.key(), **{name: _finite(value) for name, value in line.items()}}
        with self._path.open("a") as file:
            file.write(json.dumps(whole, allow_nan=False) + "\n")
        self._keep(whole)

    def finished(self, run: Run, epochs: int) -> dict[str, Any] | None:
        """The line of a run's last epoch."""
        line = self._last.get(_name(run.key()))
        return line if line is not None and line["epoch"] == epochs else None

    def _keep(self, line: dict[str, Any]) -> None:
        self._last[_name(line)] = line


class Measurement:
    """All runs of some tasks.

    Args:
        seeds: of every arm's final runs.
        points: how many of each arm's grid are tried; None: all.
    """

    def __init__(self, tasks: Sequence[Task], out: Path, seeds: int, device: torch.device, points: int | None) -> None:
        self.tasks, self.out, self.device, self.points = tasks, out, device, points
        self.seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds)
        self.lines = Lines(out / "lines.jsonl")

    def run(self) -> None:
        for task in self.tasks:
            for arm in task.arms:
                for run in self.tuning(task, arm):
                    self._run(task, run)
                best = self.best(task, arm)
                for seed in self.seeds:
                    self._run(task, Run(task.name, arm, best, seed, final=True))

    def tuning(self, task: Task, arm: str) -> list[Run]:
        return [Run(task.name, arm, point, TUNING_SEED, False) for point in task.arms[arm].points[: self.points]]

    def best(self, task: Task, arm: str) -> Point:
        """The point with the best metric on what was held out from training; a run that diverged has none."""

        def score(run: Run) -> float:
            line = self.lines.finished(run, task.epochs)
            if line is None:
                raise ValueError(f"{run} has not finished")
            return -math.inf if line[task.metric] is None else task.better * float(line[task.metric])

        return max(self.tuning(task, arm), key=score).point

    def figures(self) -> Iterator[Figure]:
        """Every arm against its baseline, both at their best points, paired by seeds; none where a run diverged."""
        for task in self.tasks:
            for name, arm in task.arms.items():
                ours, theirs = self._final(task, name), self._final(task, arm.against)
                if name == arm.against or None in ours or None in theirs:
                    continue
                yield paired(
                    f"gpu.{task.name}.{name}-{arm.against}.{task.metric}",
                    [value for value in ours if value is not None],
                    [value for value in theirs if value is not None],
                    unit="points" if task.metric == "accuracy" else "nats",
                    better=task.better,
                    note=f"{name}: {self.best(task, name)}; {arm.against}: {self.best(task, arm.against)}.",
                )

    def table(self) -> str:
        """Of every arm its best point and what it came to, by seed."""
        rows = []
        for task in self.tasks:
            rows.append(f"{task.name}: {task.metric} on what no run was trained or tuned on, by seed")
            for arm in task.arms:
                best = self.best(task, arm)
                values = ["diverged" if v is None else f"{v:.3f}" for v in self._final(task, arm)]
                rows.append(f"  {arm:<16} lr {best.lr:<8g} decay {best.weight_decay:<8g} {'  '.join(values)}")
        return "\n".join(rows)

    def _final(self, task: Task, arm: str) -> list[float | None]:
        best = self.best(task, arm)
        lines = [self.lines.finished(Run(task.name, arm, best, seed, True), task.epochs) for seed in self.seeds]
        return [line[task.metric] for line in lines if line is not None]

    def _run(self, task: Task, run: Run) -> None:
        if self.lines.finished(run, task.epochs) is not None:
            return
        checkpoint = self.out / "checkpoints" / run.file()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()

        def told(line: dict[str, Any]) -> None:
            nonlocal began
            seconds, began = time.perf_counter() - began, time.perf_counter()
            self.lines.add(run, {**line, "seconds": round(seconds, 3), "memory_mib": self._memory()})
            value = line[task.metric]
            print(
                f"{run.file()[:-3]}  epoch {line['epoch']}/{task.epochs}  {task.metric} {value:.3f}  "
                f"{seconds:.1f} s  {self._memory()} MiB",
                flush=True,
            )

        line = train(task, run.arm, run.point, run.seed, run.final, checkpoint, told)
        if self.lines.finished(run, task.epochs) is None:
            # It was cut off between the last checkpoint and its line.
            self.lines.add(run, line)
        checkpoint.unlink()

    def _memory(self) -> int:
        """MiB at most: of tensors on the GPU, or of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def make_tasks(
    data: dict[str, Cifar | Tokens], sizes: dict[str, Size], device: torch.device, lrs: dict[str, tuple[float, ...]]
) -> list[Task]:
    tasks: list[Task] = []
    for name, found in data.items():
        if isinstance(found, Cifar):
            tasks.append(Classify(name, found, sizes["cifar"], device, lrs["cifar"]))
        else:
            tasks.append(Write(name, found, sizes["gpt"], device, lrs["gpt"]))
    return tasks


def chosen(folder: Path, only: Sequence[str] | None, dry: bool = False) -> dict[str, Cifar | Tokens]:
    """The data of the tasks that are asked for, or of all that there are.

    Raises:
        DataError: As `find`, or one that is asked for is not there.
    """
    found = find(folder, dry)
    missing = sorted(set(only or ()) - set(found))
    if missing:
        raise DataError(f"{folder} has no data for {', '.join(missing)}, but for {', '.join(found)}")
    return {name: data for name, data in found.items() if not only or name in only}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="where CIFAR's binary versions and a text are")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: build/evidence-gpu; of a dry run, none is kept"
    )
    parser.add_argument("--only", nargs="+", choices=TASKS, help="default: all that the folder has data for")
    parser.add_argument("--seeds", type=int, default=3, help="final runs of each arm")
    parser.add_argument("--cifar-lrs", nargs="+", type=float, default=[0.1], help="SGD's; AdamW gets a hundredth")
    parser.add_argument("--gpt-lrs", nargs="+", type=float, default=[3e-4, 6e-4, 1.2e-3, 2.4e-3])
    parser.add_argument("--dry-run", action="store_true", help="generated files and tiny networks on a CPU, in seconds")
    asked = parser.parse_args(arguments)
    if asked.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {asked.seeds}")
    if asked.data is None and not asked.dry_run:
        parser.error("name the folder that has the data: --data FOLDER (nothing is downloaded), or --dry-run")
    if not asked.dry_run and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        return _refused(f"no GPU: torch {torch.__version__} {built} and finds none; --dry-run takes a CPU")
    lrs = {"cifar": tuple(asked.cifar_lrs), "gpt": tuple(asked.gpt_lrs)}
    try:
        if not asked.dry_run:
            device = torch.device("cuda")
            tasks = make_tasks(chosen(asked.data, asked.only), SIZES, device, lrs)
            return report(Measurement(tasks, asked.out or Path("build/evidence-gpu"), asked.seeds, device, None))
        if asked.data is not None:
            return _refused("--dry-run makes files of its own: leave --data out")
        with TemporaryDirectory() as temporary:
            return dry_run(asked.out or Path(temporary), asked.only, asked.seeds, lrs)
    except (DataError, ValueError) as error:
        return _refused(str(error))


def dry_run(out: Path, only: Sequence[str] | None, seeds: int, lrs: dict[str, tuple[float, ...]]) -> int:
    """All of it on a CPU with generated files, tiny networks, and one point of each arm's grid."""
    # So small that threads would wait for each other longer than they work.
    torch.set_num_threads(1)
    device = torch.device("cpu")
    generate(out / "generated")
    tasks = make_tasks(chosen(out / "generated", only, dry=True), DRY_SIZES, device, lrs)
    return report(Measurement(tasks, out, seeds, device, points=1))


def report(measurement: Measurement) -> int:
    """Runs what has not run, prints table and comparisons, and leaves these in figures.json; the exit status."""
    began = time.perf_counter()
    measurement.run()
    device = measurement.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU: the figures mean nothing"
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s on {where}\n{measurement.table()}")
    figures = list(measurement.figures())
    for figure in figures:
        print(f"{figure.name}  {figure.value:+.3f} [{figure.low:.3f}, {figure.high:.3f}] {figure.unit}")
    told = {**results.conditions("gpu"), "machine": f"{where}; {results.conditions('gpu')['machine']}"}
    results.save(results.Results(told, {"gpu": round(seconds, 1)}, figures), measurement.out / "figures.json")
    return 0


def _refused(reason: str) -> int:
    print(f"bench.evidence.gpu: {reason}", file=sys.stderr)
    return 2


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(line: dict[str, Any]) -> str:
    return json.dumps([line[name] for name in ("task", "arm", "lr", "weight_decay", "seed", "stage")])


if __name__ == "__main__":
    sys.exit(main())
