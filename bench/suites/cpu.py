"""The CPU benchmarks that have targets: every figure with its spread, its target and whether it is met.

    python -m bench.suites.cpu [--only NAME ...] [--json FILE] [--rounds N] [--threads N] [--strict]

All sides of a benchmark live in one process of its own and take turns; `lookahead_fused.bench.measure` says how, and
why only ratios count. The same benchmarks with less effort, and the rest of them, are in `make bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

import lookahead_fused
from bench.suites import suite
from lookahead_fused.bench.conditions import conditions, describe
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Effort, Unavailable

# Times as many rounds as in `make bench`, and no end to them: here nothing else is measured.
SCALE = 2.5


def package() -> str:
    """What was measured, and where it came from."""
    return f"lookahead_fused {lookahead_fused.__version__} ({Path(lookahead_fused.__file__).parent})"


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU benchmarks of lookahead_fused", allow_abbrev=False)
    parser.add_argument("--only", action="append", choices=suite.BENCHMARKS, help="run this one (may be repeated)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, samples and conditions there")
    parser.add_argument("--rounds", type=int, help="rounds of each benchmark, instead of its own number")
    parser.add_argument("--threads", type=int, help="threads of every side, instead of torch's default")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    where = conditions()
    print(f"{describe(where)}\n{package()}\n", flush=True)
    start = time.perf_counter()
    effort = Effort(SCALE, options.rounds)
    reports = {}
    skipped = []
    for name in options.only or suite.TARGETED:
        try:
            reports[name] = suite.run_apart(name, Cpu(), effort)
            print(f"[{name}] {reports[name]}\n", flush=True)
        except Unavailable as reason:
            skipped.append(name)
            print(f"[{name}] not run: {reason}\n", flush=True)
    seconds = time.perf_counter() - start
    load_after = round(os.getloadavg()[0], 2)

    missed = [
        f"{name}: {figure.label}"
        for name, report in reports.items()
        for figure in report.figures
        if figure.met is False
    ]
    print(f"{seconds:.0f} s; load after: {load_after}")
    print("missed:\n  " + "\n  ".join(missed) if missed else "all targets met")
    if skipped:
        print("not run: " + ", ".join(skipped))
    busy = [name for name, report in reports.items() if report.busy]
    if busy:
        print("measure again on a quiet machine: " + ", ".join(busy))
    if options.json:
        content = {
            "conditions": {**asdict(where), "load_after": load_after, "package": package()},
            "seconds": round(seconds, 1),
            "benchmarks": {name: report.record() for name, report in reports.items()},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 1 if options.strict and (missed or skipped) else 0


if __name__ == "__main__":
    raise SystemExit(main())
