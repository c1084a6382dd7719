"""The instructions that the host spends on a step, counted by valgrind's callgrind: no noise, and no time.

    python -m bench.suites.instructions

A process of its own runs under callgrind, which counts only between `start` and `stop` of instructions.cpp. One thread,
a fixed hash seed, tensors of one element: what is counted is the path from Python to the last row, and no arithmetic
to speak of. The count depends on the processor's instruction set, Python, torch and the compiler, so two are comparable
only where `environment` is the same. Two runs of the same code differ by less than `TOLERANCE`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from bench.harness import processes
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.conditions import conditions
from lookahead_fused.bench.measure import Unavailable
from lookahead_fused.bench.opponents import Setting

SOURCE = Path(__file__).with_name("instructions.cpp")
TOLERANCE = 0.02
STEPS = 10
WARM_UP = 10


def unavailable() -> str:
    """Why nothing can be counted here, or ""."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if _compiler() is None:
        return "no C++ compiler was found"
    return ""


def environment() -> dict[str, str]:
    """All that a count depends on besides the code."""
    compiler = _compiler()
    return {
        "processor": conditions().machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libc": " ".join(platform.libc_ver()),
        "compiler": _first_line([compiler, "--version"]) if compiler else "",
        "valgrind": _first_line(["valgrind", "--version"]) if shutil.which("valgrind") else "",
    }


def count() -> dict[str, float]:
    """Instructions a step, by name.

    Raises:
        Unavailable: valgrind or a compiler is missing, or valgrind cannot run this Python.
    """
    reason = unavailable()
    if reason:
        raise Unavailable(f"instructions: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        library, out = Path(folder) / "switch.so", Path(folder) / "callgrind.out"
        build = [str(_compiler()), "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        _run(build, {})
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **processes.search_path()}
        command = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}",
            sys.executable, "-m", "bench.suites.instructions", str(library),
        ]  # fmt: skip
        _run(command, one_thread)
        found = {}
        for dump in sorted(Path(folder).glob("callgrind.out.*")):
            text = dump.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
            if name and total:
                found[f"instructions, {name[1]}"] = int(total[1]) / STEPS
    if not found:
        raise Unavailable("instructions: callgrind wrote no count")
    return found


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def _first_line(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]


def _run(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"instructions: {command[0]} failed: {done.stderr.strip()[-2000:]}")


# ------------------------------------------------------------------------------------------------------------
# under callgrind


def inside(library: str) -> None:
    """What is counted."""
    switch = ctypes.CDLL(library)
    switch.stop.argtypes = [ctypes.c_char_p]
    torch.set_num_threads(1)
    gc.disable()  # or a collection falls into one run and not into another
    gc.freeze()  # what was imported takes valgrind seconds to look through
    for name, tensors, layout, move in (
        ("1 tensor", 1, "one", False),
        ("1000 tensors, gradients stay", 1000, "one", False),
        ("1000 tensors, gradients move", 1000, "one", True),
        ("400 tensors, a group per tensor", 400, "each", False),
    ):
        params = parameters.make(parameters.Case("", parameters.equal(tensors, 1)))
        step = opponents.make_ours("cpu", Setting(), parameters.groups(params, layout)).step
        prepare = partial(parameters.renew_gradients, params) if move else lambda: None
        for _ in range(WARM_UP):
            prepare()
            step()
        gradients = [[p.grad.clone() for p in params] for _ in range(STEPS)] if move else []
        gc.collect()
        switch.start()
        for number in range(STEPS):
            # Setting them is counted too, and is the same at every run.
            if move:
                for p, gradient in zip(params, gradients[number], strict=True):
                    p.grad = gradient
            step()
        switch.stop(name.encode())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        inside(sys.argv[1])
    else:
        for label, number in count().items():
            print(f"{number:14,.0f}  {label}")
