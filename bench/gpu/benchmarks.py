"""The benchmark suite on a GPU in a given time: `python -m bench.gpu.benchmarks FILE [--budget SECONDS]`.

The comparisons come first, and FILE is whole after each: what the time does not reach is missing, and what it reached
is there though the machine is not. FILE is what pytest-benchmark writes, as far as bench.report reads it;
pytest-benchmark itself writes at the end alone. `--report FILE` prints its tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu.runner import SKIPPED
from bench.suites import suite
from bench.suites.cpu import package
from lookahead_fused.bench.conditions import conditions
from lookahead_fused.bench.device import Cuda, Device
from lookahead_fused.bench.measure import Effort, Unavailable

# Rounds of a benchmark are as many as these seconds allow.
SECONDS_EACH = 2.0


def measure(
    names: Sequence[str], device: Device, path: Path, budget: float, seconds_each: float = SECONDS_EACH
) -> bool:
    """Whether some were made and none failed."""
    end = time.perf_counter() + budget
    gpu = torch.cuda.get_device_name() if device.name == "cuda" else ""
    content: dict[str, Any] = {
        "conditions": {**asdict(conditions()), "device": device.name, "gpu": gpu, "package": package()},
        "benchmarks": [],
        "skipped": {},
    }
    failed = []
    for name in names:
        if time.perf_counter() > end:
            content["skipped"][name] = "no time was left for it"
        else:
            try:
                report = suite.run(name, device, Effort(budget=seconds_each))
            except Unavailable as reason:
                content["skipped"][name] = str(reason)
            except Exception as error:
                traceback.print_exc()
                content["skipped"][name] = f"{type(error).__name__}: {error}"
                failed.append(name)
            else:
                print(f"[{name}] {report}\n", flush=True)
                content["benchmarks"].append({"name": f"bench[{name}]", "extra_info": report.record()})
        if name in content["skipped"]:
            print(f"[{name}] not run: {content['skipped'][name]}\n", flush=True)
        _write(content, path)
    print(f"{len(content['benchmarks'])} of {len(names)} benchmarks were made, {len(failed)} failed: {failed}")
    return bool(content["benchmarks"]) and not failed


def _write(content: dict[str, Any], path: Path) -> None:
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def report(path: Path) -> int:
    """The tables of a run, and the prediction beside it."""
    if importlib.util.find_spec("rich") is None:
        print(f"the tables need the package rich; bench.report prints them of {path.name} where it is")
        return SKIPPED
    from rich.console import Console

    from bench.report import predict, tables

    content = json.loads(path.read_text(encoding="utf-8"))
    console = Console(width=170)
    tables.to_terminal(content, console)
    sys.argv = ["bench.report.predict", str(path)]
    predict.main()
    return 0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.benchmarks", description="benchmarks on a GPU", allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none is begun")
    parser.add_argument("--report", action="store_true", help="print the tables of a file that is there")
    options = parser.parse_args(words)
    if options.report:
        return report(options.file)
    # The comparisons are what a GPU is asked for; the rest are measures of the host and of memory.
    names = [*suite.COMPARISONS, *(name for name in suite.BENCHMARKS if name not in suite.COMPARISONS)]
    return 0 if measure(names, Cuda(), options.file, options.budget) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
