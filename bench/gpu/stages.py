"""All that a first GPU is for, in stages with limits of their own, the one that tells most first.

    python -m bench.gpu.stages --out FOLDER [--build] [--only STAGE ...] [-- ARGUMENTS OF PYTEST]

bench/gpu/README.md tells what the stages are and what they leave. Where there is no GPU, what needs one is skipped and
says why; where there is one that the CUDA backend does not serve, that is a failure. The exit status is 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import card, profile
from bench.gpu.runner import Outcome, Piece, run_stage

PYTHON = sys.executable
STAGES = ("quick", "tests", "sanitize", "bench", "profile")
# Importing torch from a disk that has just been mounted, and what had been begun when a budget was spent.
SLACK = 12.0


def quick(out: Path) -> list[Piece]:
    def room(name: str, limit: float, needs: str, *options: str) -> Piece:
        command = [PYTHON, "-m", "bench.gpu.quick", name.partition("-")[0], "--out", str(out), "--name", name]
        return Piece(name, [*command, "--budget", f"{limit - SLACK:.0f}", *options], limit, needs)

    return [
        Piece("environment", [PYTHON, "-m", "lookahead_fused"], 30),
        Piece("driver", ["nvidia-smi"], 10),
        room("bits", 55, "cuda"),
        room("bandwidth", 55, "cuda"),
        room("graphs", 25, "cuda"),
        room("times", 25, "cuda"),
        room("bits-triton", 40, "triton", "--backend", "triton"),
    ]


def tests(out: Path, arguments: Sequence[str]) -> list[Piece]:
    """The tests that launch kernels, of one backend after the other."""
    workers = ["-n", "4", "--dist", "loadgroup"] if _installed("xdist") else []
    quiet = ["-q", "-p", "no:cacheprovider", *(["--benchmark-disable"] if _installed("pytest_benchmark") else [])]
    left_out = [part for name in ("building", "benchmarks", "evidence") for part in ("--ignore", f"tests/{name}")]
    pytest = [PYTHON, "-m", "pytest", *quiet, *workers, *left_out]

    def of(backend: str, limit: float, needs: str, selected: str) -> Piece:
        chosen = ["--backend", backend, "-k", selected, f"--junitxml={out / f'tests-{backend}.xml'}"]
        return Piece(backend, [*pytest, *chosen, *arguments, "tests"], limit, needs)

    return [
        of("cuda", 330, "cuda", "cuda-cuda or test_cuda_gpu"),
        of("triton", 240, "triton", "triton-cuda"),
    ]


def sanitize() -> list[Piece]:
    limits = {"memcheck": 220.0, "racecheck": 200.0, "initcheck": 150.0}
    return [
        Piece(
            check,
            [PYTHON, "-m", "bench.gpu.sanitizer", check, "--", "-m", "bench.gpu.quick", "bits",
             "--budget", f"{limit - 4 * SLACK:.0f}"],
            limit,
            "cuda",
        )
        for check, limit in limits.items()
    ]  # fmt: skip


def bench(out: Path) -> list[Piece]:
    measured = str(out / "benchmarks.json")
    return [
        Piece("benchmarks", [PYTHON, "-m", "bench.gpu.benchmarks", measured, "--budget", "480"], 540, "cuda"),
        Piece("ratios", [PYTHON, "-m", "bench.gpu.benchmarks", "--report", measured], 30, "cuda"),
    ]


def profiled(out: Path) -> list[Piece]:
    return [
        Piece(name, [PYTHON, "-m", "bench.gpu.profile", name, "--out", str(out)], 120, "cuda") for name in profile.LISTS
    ]


def build(architectures: Sequence[str]) -> list[Piece]:
    """The modules in the source tree, for the cards that are here alone; without one, for what the environment says."""
    environment = {"TORCH_CUDA_ARCH_LIST": " ".join(architectures)} if architectures else {}
    return [Piece("build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 300, environment=environment)]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run(out: Path, chosen: Sequence[str], build_first: bool, arguments: Sequence[str] = ()) -> bool:
    """Runs stages in their order; True where nothing failed."""
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    made = {
        "quick": lambda: quick(out),
        "tests": lambda: tests(out, arguments),
        "sanitize": sanitize,
        "bench": lambda: bench(out),
        "profile": lambda: profiled(out),
    }
    asked = functools.cache(card.ask)
    outcomes: dict[str, list[Outcome]] = {}
    try:
        if build_first:
            outcomes["build"] = run_stage("build", build(asked().architectures), out, asked().refusal)
            asked.cache_clear()
        for name in STAGES:
            if name in chosen:
                outcomes[name] = run_stage(name, made[name](), out, lambda needs: asked().refusal(needs))
    finally:
        lines = [f"{stage}: {outcome.piece}: {outcome}" for stage, own in outcomes.items() for outcome in own]
        summary = "\n".join(["", "== all stages", *lines, ""])
        print(summary, flush=True)
        with (out / "report.txt").open("a", encoding="utf-8") as report:
            report.write(summary)
    return not any(outcome.is_failure for own in outcomes.values() for outcome in own)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.stages", description="a report of a GPU", allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="the folder for all that the stages leave")
    parser.add_argument("--only", nargs="+", choices=(*STAGES, "all"), default=["all"], metavar="STAGE",
                        help=f"{', '.join(STAGES)} or all")  # fmt: skip
    parser.add_argument("--build", action="store_true", help="build the modules for the cards that are here first")
    parser.add_argument("arguments", nargs="*", help="further arguments of pytest in the stage of the tests")
    options = parser.parse_args(words)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    chosen = STAGES if "all" in options.only else options.only
    return 0 if run(options.out, chosen, options.build, options.arguments) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
