"""What narrow moments do to training: the demo's networks with state in fp32, bf16 and int8, at the same settings.

    python -m bench.evidence.narrow [--scale smoke|full] [--out FOLDER] [--keep FILE] [--at-once JOBS]
    python -m bench.evidence.narrow table [FILE]

The first runs all, or goes on with a run that was cut off (each finished training is a line of record.jsonl), prints
the table and leaves figures.json; --keep writes the figures to a file of the repository too. The second prints the
table of such a file, by default of the one beside this module. beta2 is 0.999 throughout. What an arm is judged by is
the held-out loss of its slow weights at the end, of the same seeds with each kind of state: a seed is the start and the
order of the data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.optim import AdamW

from bench.demo.results import LAST_STEPS, evaluate
from bench.demo.runs import ALPHA, K, Run, Task
from bench.demo.tasks import tasks
from bench.evidence import results
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.run import run
from bench.evidence.statistics import holm, paired
from lookahead_fused import EMA, LookaheadAdamW

OUT = Path(__file__).resolve().parents[2] / "build" / "evidence" / "narrow"
KEPT = Path(__file__).with_name("narrow.json")
BASELINE = "float32"
DTYPES = (BASELINE, "bfloat16", "int8")
# Seconds of a step on one core.
COSTS = {"gpt": 0.28, "digits": 0.016}


def _lookahead(task: Task, model: nn.Module, lr: float, dtype: Any) -> LookaheadAdamW:
    return LookaheadAdamW(task.groups(model), lr=lr, k=K, alpha=ALPHA, state_dtype=dtype)


def _snoo(task: Task, model: nn.Module, lr: float, dtype: Any) -> LookaheadAdamW:
    return LookaheadAdamW(task.groups(model), lr=lr, k=30, alpha=0.7, outer_momentum=0.5, state_dtype=dtype)


def _ema(task: Task, model: nn.Module, lr: float, dtype: Any) -> EMA:
    # As short a memory as arms.py gives it: these runs are short too.
    return EMA(AdamW(task.groups(model), lr=lr), 0.97, warmup=True, state_dtype=dtype)


ARMS: Mapping[str, Callable[[Task, nn.Module, float, Any], LookaheadAdamW | EMA]] = {
    "lookahead": _lookahead,
    "snoo": _snoo,
    "ema": _ema,
}


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        seeds: of every setting.
        factors: of the demo's learning rate, by arm; every kind of state has the same.
        steps: of a run; None: the demo's.
    """

    seeds: int
    factors: Mapping[str, tuple[float, ...]]
    steps: int | None = None


@dataclass(frozen=True)
class Setting:
    """One training."""

    task: str
    arm: str
    factor: float
    dtype: str
    seed: int
    steps: int

    def plain(self) -> dict[str, JSON]:
        return dict(vars(self))


@dataclass(frozen=True)
class Narrow:
    """The experiment, as experiment.py describes it."""

    name: str = "narrow"
    revision: int = 1
    plans: Mapping[Scale, Plan] = field(
        default_factory=lambda: {
            Scale.SMOKE: Plan(2, {arm: (1.0,) for arm in ARMS}, steps=11),
            Scale.FULL: Plan(10, {"lookahead": (0.5, 1.0, 2.0), "snoo": (1.0,), "ema": (1.0,)}),
        }
    )

    def names(self) -> tuple[str, ...]:
        """Figures: "narrow.<task>.<arm>.<learning rate over the demo's>.<what>"."""
        return ("narrow.*.final", "narrow.*.train", "narrow.*.state")

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        plan = self.plans[scale]
        for task, arm, factor in self._contexts(plan):
            for seed in range(plan.seeds):
                for dtype in DTYPES:
                    setting = self._setting(plan, task, arm, factor, dtype, seed)
                    yield Job(setting.plain(), _train(setting), COSTS[task.key] * setting.steps)

    def figures(self, records: Records) -> list[Figure]:
        """Of the largest scale of which there is anything."""
        for scale in (Scale.FULL, Scale.SMOKE):
            plan = self.plans[scale]
            if made := [f for context in self._contexts(plan) for f in self._figures(plan, *context, records)]:
                return made
        return []

    def pictures(self, records: Records) -> list[Picture]:
        return []

    def _contexts(self, plan: Plan) -> Iterator[tuple[Task, str, float]]:
        for task in tasks(quick=False):
            for arm, factors in plan.factors.items():
                for factor in factors:
                    yield task, arm, factor

    def _setting(self, plan: Plan, task: Task, arm: str, factor: float, dtype: str, seed: int) -> Setting:
        return Setting(task.key, arm, factor, dtype, seed, plan.steps or task.steps)

    def _figures(self, plan: Plan, task: Task, arm: str, factor: float, records: Records) -> Iterator[Figure]:
        """Of the seeds that have been run with every kind of state."""
        found = [
            [
                records.get(self.name, self.revision, self._setting(plan, task, arm, factor, dtype, seed).plain())
                for dtype in DTYPES
            ]
            for seed in range(plan.seeds)
        ]
        whole = [cast("list[Mapping[str, float]]", of_seed) for of_seed in found if None not in of_seed]
        if len(whole) < 2:
            return
        name = f"{self.name}.{task.key}.{arm}.{factor:g}"
        note = f"lr {task.lr * factor:g}; {len(whole)} seeds."
        by_dtype = dict(zip(DTYPES, zip(*whole, strict=True), strict=True))
        for dtype, of_dtype in by_dtype.items():
            per_parameter = of_dtype[0]["moments"] / of_dtype[0]["parameters"]
            yield Figure(
                f"{name}.{dtype}.state", per_parameter, per_parameter, per_parameter, 0.0, 0, "bytes", -1,
                "Of the moments, a parameter.",
            )  # fmt: skip
        for metric in ("final", "train"):
            values = {dtype: [one[metric] for one in of_dtype] for dtype, of_dtype in by_dtype.items()}
            yield _level(f"{name}.{BASELINE}.{metric}", values[BASELINE], note)
            for dtype in DTYPES[1:]:
                yield paired(
                    f"{name}.{dtype}-{BASELINE}.{metric}",
                    values[dtype],
                    values[BASELINE],
                    unit="nats",
                    better=-1,
                    note=note,
                )


def _level(name: str, values: Sequence[float], note: str) -> Figure:
    mean, deviation = (f(torch.tensor(values, dtype=torch.float64)).item() for f in (torch.mean, torch.std))
    said = f"{note} Mean over the seeds; the interval is their standard deviation."
    return Figure(name, mean, mean - deviation, mean + deviation, 1.0, len(values), "nats", -1, said)


def _train(setting: Setting) -> Callable[[], Mapping[str, JSON]]:
    def job() -> Mapping[str, JSON]:
        (task,) = (task for task in tasks(quick=False, seed=setting.seed) if task.key == setting.task)
        torch.manual_seed(setting.seed)
        model = task.model()
        optimizer = ARMS[setting.arm](task, model, task.lr * setting.factor, setting.dtype)
        whole = Run(model, optimizer, task.schedule(optimizer), optimizer.slow_weights)
        data = task.data()
        for batch in islice(data.train, setting.steps):
            whole.advance(batch)
        with optimizer.slow_weights():
            score = evaluate(model, data.held_out)
        last = whole.losses[-LAST_STEPS:]
        params = list(model.parameters())
        return {
            "final": score.loss,
            "accuracy": score.accuracy,
            "train": sum(last) / len(last),
            "parameters": sum(p.numel() for p in params),
            "moments": moment_bytes(optimizer),
        }

    return job


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What AdamW's moments take, scales of codes among them."""
    return sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    )


def table(figures: Sequence[Figure]) -> str:
    """A line for each task, arm and learning rate, in Markdown; p-values are Holm's, over all lines and both dtypes."""
    by_name = {figure.name: figure for figure in figures}
    compared = [figure for figure in figures if figure.name.endswith(f"-{BASELINE}.final")]
    adjusted = dict(zip((figure.name for figure in compared), holm([figure.p for figure in compared]), strict=True))
    header = ["task", "arm", "lr", "fp32: loss ± between seeds"]
    header += [f"{dtype}: difference [95 %], p" for dtype in DTYPES[1:]]
    header += [f"bytes a parameter, {', '.join(DTYPES)}"]
    lines = [header, ["---"] * len(header)]
    for context in dict.fromkeys(figure.name.removesuffix(f".{BASELINE}.final") for figure in figures):
        level = by_name.get(f"{context}.{BASELINE}.final")
        if level is None:
            continue
        _, task, arm, _ = context.split(".", 3)
        line = [task, arm, level.note.partition(";")[0].removeprefix("lr ")]
        line += [f"{level.value:.4f} ± {level.high - level.value:.4f}"]
        for dtype in DTYPES[1:]:
            found = by_name[f"{context}.{dtype}-{BASELINE}.final"]
            line += [f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {adjusted[found.name]:.2g}"]
        line += [", ".join(f"{by_name[f'{context}.{dtype}.state'].value:.3g}" for dtype in DTYPES)]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs or shows, as the arguments say; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if given[:1] == ["table"]:
        parser.add_argument("table", choices=["table"])
        parser.add_argument("file", type=Path, nargs="?", default=KEPT, help="figures.json of a run (%(default)s)")
        file = parser.parse_args(given).file
        try:
            print(table(results.load(file).figures))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    scales = [scale.value for scale in EXPERIMENT.plans]
    parser.add_argument("--scale", choices=scales, default=Scale.FULL.value, help="%(default)s")
    parser.add_argument("--out", type=Path, help=f"folder of the record ({OUT}/SCALE)")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="also write the figures there")
    parser.add_argument(
        "--at-once", metavar="JOBS", type=int, default=os.cpu_count() or 1, help="on a thread each (%(default)s)"
    )
    options = parser.parse_args(given)
    if options.at_once < 1:
        parser.error(f"--at-once must be 1 or more, got {options.at_once}")
    scale = Scale(options.scale)
    out = options.out or OUT / scale.value
    records = Records(out / "record.jsonl")
    failures = run([EXPERIMENT], scale, records, Console(), options.at_once)
    found, _ = results.collect([EXPERIMENT], scale, records)
    for path in (out / "figures.json", *([options.keep] if options.keep else [])):
        results.save(found, path)
    print(table(found.figures))
    for failure in failures:
        print(f"error: a job failed, {failure.setting}: {failure.error}", file=sys.stderr)
    return 1 if failures else 0


EXPERIMENT = Narrow()

if __name__ == "__main__":
    sys.exit(main())
