"""Runs stages and writes one report of them: `python -m bench.gpu.stages FILE [--gpu] NAME COMMAND ...`.

A stage after `--gpu` needs a GPU. Where there is none, it is skipped, and the report says so and why; where there is
one that the CUDA backend does not serve, that is a failure. A stage that fails does not keep the others from running;
the report ends with what became of each, and the exit status is 1 if any failed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO


class Stage(NamedTuple):
    """A shell command, and whether it is for a GPU."""

    name: str
    command: str
    needs_gpu: bool


def parse(words: Sequence[str]) -> list[Stage]:
    """The stages of a command line; `--gpu` before a name is for that stage."""
    stages, left = [], list(words)
    while left:
        needs_gpu = left[0] == "--gpu"
        name, command, *left = left[1:] if needs_gpu else left
        stages.append(Stage(name, command, needs_gpu))
    return stages


def gpu_found() -> tuple[bool, str]:
    """Whether there is a GPU that serves, and if not, why; an error where there is one and it does not."""
    import torch

    import lookahead_fused

    status = lookahead_fused.backends()["cuda"]
    if status.available:
        return True, ""
    # Not torch's word alone: a build of torch without CUDA sees no GPU where there is one.
    driver = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True, check=False)
    if torch.cuda.is_available() or (driver.returncode == 0 and "GPU" in driver.stdout):
        raise RuntimeError(f"there is a GPU, and the CUDA backend does not serve it: {status.reason}")
    return False, f"no GPU here: {status.reason}"


def run(stages: Iterable[Stage], report: TextIO) -> bool:
    """Runs the stages, their output to the terminal and into the report; True where none failed."""

    def tell(text: str) -> None:
        for stream in (sys.stdout, report):
            stream.write(text)
            stream.flush()

    try:
        serves, reason = gpu_found()
        failure = ""
    except RuntimeError as error:
        serves, reason, failure = False, "", str(error)
    outcomes = []
    for stage in stages:
        tell(f"\n== {stage.name}: {stage.command}\n")
        if stage.needs_gpu and not serves:
            outcome = f"FAILED: {failure}" if failure else f"skipped: {reason}"
        else:
            process = subprocess.Popen(
                stage.command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            assert process.stdout is not None
            for line in process.stdout:
                tell(line)
            status = process.wait()
            outcome = f"FAILED with exit status {status}" if status else "passed"
        tell(f"== {stage.name} {outcome}\n")
        outcomes.append((stage.name, outcome))
    tell("\n== all stages\n" + "".join(f"{name}: {outcome}\n" for name, outcome in outcomes))
    return not any(outcome.startswith("FAILED") for _, outcome in outcomes)


def main(file: str, *words: str) -> int:
    with Path(file).open("w", encoding="utf-8") as report:
        return 0 if run(parse(words), report) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
