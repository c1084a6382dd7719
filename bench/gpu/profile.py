"""What Nsight Compute counts of one step of a list: `python -m bench.gpu.profile LIST [--out FOLDER]`.

Registers, the bytes that DRAM moved beside those that the step must move, and the share of its bandwidth. Exits with 77
where there is no ncu or no permission to count, with a last line that says what to do.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.results import Results
from bench.gpu.runner import SKIPPED
from bench.gpu.sanitizer import program

# Lists of lookahead_fused.bench.parameters, and their dtypes. What needs torch is imported where it is used: the stages
# are named by these, also where torch is broken.
LISTS = {"one-large": "fp32", "gpt2-small": "bf16-master", "many-small": "fp32"}
METRICS = {
    "launch__registers_per_thread": "registers a thread",
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "DRAM bytes read",
    "dram__bytes_write.sum": "DRAM bytes written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of DRAM's bandwidth",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps active",
}
MISSING = "ncu was not found (looked at PATH and CUDA_HOME); it comes with the CUDA toolkit, as Nsight Compute"
FORBIDDEN = (
    "the driver lets the administrator alone read the counters (ERR_NVGPUCTRPERM): run as root, give the container "
    "SYS_ADMIN, or load the module nvidia with NVreg_RestrictProfilingToAdminUsers=0"
)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.profile", description="counters of one step", allow_abbrev=False)
    parser.add_argument("list", choices=LISTS)
    parser.add_argument("--out", type=Path, help="the folder for the JSON, and for all that ncu tells")
    parser.add_argument("--step", action="store_true", help="take the step: what ncu runs")
    options = parser.parse_args(words)
    if options.step:
        step(options.list)
        return 0
    ncu = program("ncu")
    if ncu is None:
        print(MISSING)
        return SKIPPED
    command = [
        ncu, "--set", "basic", "--metrics", ",".join(METRICS), "--profile-from-start", "off", "--csv",
        "--print-units", "base", "--kernel-name-base", "demangled", "--kernel-name", "regex:lookahead_fused",
        sys.executable, "-m", "bench.gpu.profile", options.list, "--step",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if options.out:
        (options.out / f"profile-{options.list}.csv").write_text(done.stdout)
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        print(FORBIDDEN)
        return SKIPPED
    kernels = counted(done.stdout)
    if done.returncode != 0 or not kernels:
        print(done.stdout[-4000:] + done.stderr[-2000:])
        print(f"ncu ended with status {done.returncode} and told of {len(kernels)} kernels")
        return 1
    path = options.out / f"profile-{options.list}.json" if options.out else None
    results = Results(path, list=options.list, dtype=LISTS[options.list])
    for kernel, found in kernels:
        told = "; ".join(f"{METRICS[name]} {value:,.1f}" for name, value in found.items())
        results.add(f"{kernel[:100]}\n  {told}", kernel=kernel, **found)
    results.close(must_move(options.list))
    return 0


def must_move(name: str) -> str:
    """The bytes that the counters are to be held against: those of a second step, which does not sync."""
    from bench.cases import traffic
    from lookahead_fused.bench import parameters
    from lookahead_fused.bench.opponents import Setting

    case = parameters.CASES[name]
    return f"a step of {case} must move {case.elements * traffic.step_bytes(Setting(dtype=LISTS[name])):,} bytes"


def step(name: str) -> None:
    """The second step of a list, and nothing else, for the profiler to see."""
    import torch

    from lookahead_fused.bench import opponents, parameters

    setting = opponents.Setting(dtype=LISTS[name], device="cuda")
    params = parameters.make(parameters.CASES[name], dtype=setting.param_dtype, device="cuda")
    optimizer = opponents.make_ours("cuda", setting, parameters.groups(params, "one"))
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counted(told: str) -> list[tuple[str, dict[str, float]]]:
    """For each kernel of ncu's CSV, in the order of their launches, the metrics that are asked for."""
    lines = told.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(os.linesep.join(lines[head:]))):
        if row.get("Metric Name") in METRICS:
            _, own = found.setdefault(row["ID"], (row["Kernel Name"], {}))
            own[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
