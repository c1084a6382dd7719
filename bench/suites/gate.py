"""The gate against regressions: counts must be equal or better, ratios may not fall by more than their recorded spread.

    python -m bench.suites.gate check [--counts] [--baseline FILE]
    python -m bench.suites.gate baseline [--counts] [--baseline FILE]

The baseline holds counts, and ratios of times with the spread that several runs of the same code had; never a time.
Ratios of times are another machine's business: on another processor, number of cores or GPU they are not compared, and
the gate says so. Instructions are compared where all that they depend on is the same. A ratio that has fallen is
measured again before it counts: noise passes, a slower step stays slower. Each time a process of its own measures
(`processes.apart`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import processes
from bench.harness.figures import Figure
from bench.suites import counts, instructions, suite
from lookahead_fused.bench.conditions import conditions
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Effort, Unavailable
from lookahead_fused.bench.samples import Spread

BASELINE = Path(__file__).with_name("baseline.json")
# Runs of the same code from which a baseline takes a ratio's spread, and tries before a fallen ratio is believed.
RUNS = 3
TRIES = 3
# Fewer rounds than in `make bench`: what the gate must see is a change, not a third digit.
EFFORT = Effort(0.7, budget=15)
WATCHED = ("ratio", "share")


@dataclass
class Verdict:
    """What the gate found: problems fail it, notes are what it did not compare and what became better."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0

    def add(self, other: Verdict) -> None:
        self.problems += other.problems
        self.notes += other.notes
        self.compared += other.compared


def where() -> dict[str, Any]:
    """What ratios of times depend on besides the code."""
    now = conditions()
    return {
        "processor": now.machine,
        "cores": now.cores,
        "threads": now.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


# ------------------------------------------------------------------------------------------------------------
# comparing


def compare_counts(now: Mapping[str, float], baseline: Mapping[str, float], tolerance: float = 0.0) -> Verdict:
    """Counts against the baseline's: none may be higher by more than a share of itself, and none may be missing."""
    verdict = Verdict(compared=len(baseline))
    for name, before in baseline.items():
        if name not in now:
            verdict.problems.append(f"{name}: was {before:,g}, and is no longer counted")
        elif now[name] > before * (1 + tolerance):
            verdict.problems.append(f"{name}: {now[name]:,g}, and was {before:,g}")
        elif now[name] < before * (1 - tolerance):
            verdict.notes.append(f"better: {name}: {now[name]:,g}, and was {before:,g}")
    for name in now.keys() - baseline.keys():
        verdict.notes.append(f"not in the baseline: {name}: {now[name]:,g}")
    return verdict


def compare_instructions(
    count: Callable[[], dict[str, float]], environment: Mapping[str, str], baseline: Any
) -> Verdict:
    """Instructions against the baseline's, if everything is the same that they depend on."""
    if not baseline:
        return Verdict(notes=["instructions: not compared: the baseline has none"])
    other = [f"{key} {environment[key]!r}, was {baseline['environment'].get(key)!r}"
             for key in environment if environment[key] != baseline["environment"].get(key)]  # fmt: skip
    if other:
        return Verdict(notes=[f"instructions: not compared: {'; '.join(other)}"])
    try:
        return compare_counts(count(), baseline["counts"], instructions.TOLERANCE)
    except Unavailable as reason:
        return Verdict(notes=[f"instructions: not compared: {reason}"])


def compare_ratios(run: Callable[[str], dict[str, Figure]], device: Mapping[str, Any], baseline: Any) -> Verdict:
    """Ratios against the baseline's.

    Args:
        run: measures a benchmark's ratios, by opponent.
        device: of this run.
        baseline: what `make_ratios` made; None for none.
    """
    if not baseline:
        return Verdict(notes=["ratios of times: not compared: the baseline has none"])
    other = [f"{key} {device[key]!r}, was {baseline['device'].get(key)!r}"
             for key in device if device[key] != baseline["device"].get(key)]  # fmt: skip
    if other:
        return Verdict(notes=[f"ratios of times: not compared, this is another device: {'; '.join(other)}"])
    verdict = Verdict()
    for name, entries in baseline["benchmarks"].items():
        fallen: dict[str, str] = {}
        left = set(entries)
        for _ in range(TRIES):
            try:
                found = run(name)
            except Unavailable as reason:
                verdict.notes.append(f"{name}: not compared: {reason}")
                left = set()
                break
            fallen = {}
            for label in left:
                floor = entries[label]["median"] - entries[label]["spread"]
                if label not in found:
                    fallen[label] = f"{name}: {label}: is no longer measured"
                elif found[label].value.median < floor:
                    value, before = found[label].value.median, entries[label]
                    fallen[label] = (
                        f"{name}: {label}: {value:.3f}, and was {before['median']:.3f} with a spread of "
                        f"{before['spread']:.3f}"
                    )
            # What has held once has held.
            left = set(fallen)
            if not left:
                break
        verdict.compared += len(entries)
        verdict.problems += [fallen[label] for label in entries if label in left]
    return verdict


# ------------------------------------------------------------------------------------------------------------
# making a baseline


def measure_ratios(name: str) -> dict[str, Figure]:
    """A benchmark's ratios to the near opponents and share of the ceiling, by label."""
    suite_run = suite.without_opponents(name)
    report = suite_run(Cpu(), EFFORT)
    return {figure.of or figure.kind: figure for figure in report.figures if figure.kind in WATCHED}


def measure_apart(name: str) -> dict[str, Figure]:
    """The same, measured by a process of its own.

    Raises:
        Unavailable: it cannot be made here.
    """
    return processes.apart(measure_ratios, name)


def make_ratios(
    run: Callable[[str], dict[str, Figure]], names: Sequence[str], device: Mapping[str, Any]
) -> dict[str, Any]:
    """What a baseline holds of ratios: the median over several runs, and how far below it a run of this code may be."""
    runs = [{name: run(name) for name in names} for _ in range(RUNS)]
    benchmarks = {}
    for name in names:
        entries = {}
        for label in runs[0][name]:
            values = [found[name][label].value for found in runs]
            medians = [value.median for value in values]
            median = statistics.median(medians)
            # Of three runs the lowest is no bound: one time in twenty, three further ones are all below it.
            below = max(
                median - min(value.median - 2 * _uncertainty(value) for value in values),
                1.5 * (max(medians) - min(medians)),
            )
            entries[label] = {
                "median": round(median, 4),
                "spread": round(below, 4),
                "medians": [round(m, 4) for m in medians],
            }
        benchmarks[name] = entries
    return {"device": dict(device), "benchmarks": benchmarks}


def _uncertainty(value: Spread) -> float:
    """About the standard error of a median: rounds scatter by far more than their median does."""
    return (value.q3 - value.q1) / math.sqrt(value.samples)


def make_instructions() -> dict[str, Any] | None:
    try:
        return {"environment": instructions.environment(), "counts": instructions.count()}
    except Unavailable as reason:
        print(f"without {reason}")
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compares with a baseline of counts and ratios", allow_abbrev=False)
    parser.add_argument("command", choices=("check", "baseline"))
    parser.add_argument("--counts", action="store_true", help="counts alone, no ratios of times")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    options = parser.parse_args(arguments)
    before = json.loads(options.baseline.read_text()) if options.baseline.exists() else {}
    try:
        found = counts.all_counts()
    except Unavailable as reason:
        print(f"nothing can be compared without counts: {reason}")
        return 1

    if options.command == "baseline":
        content = {"counts": found, "instructions": make_instructions(), "ratios": before.get("ratios")}
        if not options.counts:
            content["ratios"] = make_ratios(measure_apart, suite.GATED, where())
        options.baseline.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"{options.baseline.name}: {len(found)} counts" + ("" if options.counts else ", and ratios"))
        return 0

    if not before:
        print(f"there is no baseline {options.baseline}: make bench-baseline")
        return 1
    verdict = compare_counts(found, before["counts"])
    verdict.add(compare_instructions(instructions.count, instructions.environment(), before.get("instructions")))
    if not options.counts:
        verdict.add(compare_ratios(measure_apart, where(), before.get("ratios")))
    for note in verdict.notes:
        print(f"  {note}")
    for problem in verdict.problems:
        print(f"  WORSE: {problem}")
    print(f"{verdict.compared} counts and ratios compared, {len(verdict.problems)} worse")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
