"""The suite over a `_cpu` with AddressSanitizer and UndefinedBehaviorSanitizer in it; `make sanitize-cpu` runs this.

The package is copied to build/sanitize-cpu and the module built there, so the tree's own stays as it is. Before the
suite runs, a step that reads one element too many has to be reported: the module that is run is the one with the
sanitizers in it, and they see the memory that torch allocates. AVX-512's masked loads and stores are the compiler's
own operations, which AddressSanitizer does not look at.

    python tests/sanitize_cpu.py [--quick] [arguments of pytest]
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "sanitize-cpu"
REPORTS = COPY / "reports"
CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
# Of the optimizations the first level: a walk of intrinsics without any takes ten times as long.
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# What builds or compiles something in processes of its own, and what steps on another backend.
LEFT_OUT = ("building", "benchmarks", "clients", "evidence", "test_cuda*", "test_triton*")
# Nor what compares times: a checked access takes several times as long.
CHOSEN = "not compile and not times_the_arithmetic"
# Every access of a walk is in these; the others look at what surrounds it.
QUICK = ("test_layout.py", "test_native.py", "test_moves.py", "test_rules.py", "test_int8_moments.py")

# A gradient of five elements, of which as many are allocated as is told: only a walk reads it.
OVERRUN = """
import ctypes, sys, torch, lookahead_fused
from lookahead_fused._parts import Tuning
from lookahead_fused._table import Table
allocate = ctypes.CDLL(None).malloc
allocate.restype = ctypes.c_void_p
address = allocate(ctypes.c_size_t(4 * int(sys.argv[1])))
param = torch.nn.Parameter(torch.ones(5))
param.grad = torch.frombuffer((ctypes.c_float * 5).from_address(address), dtype=torch.float32)
optimizer = lookahead_fused.LookaheadAdamW([param], backend="cpu")
optimizer._table = Table(optimizer._table.rule, optimizer._table.policy, Tuning(instruction_set=sys.argv[2]))
optimizer.step()
print("stepped by", lookahead_fused.__file__)
"""
INSTRUCTION_SETS = "from lookahead_fused import _cpu; print(*_cpu.instruction_sets())"


def main(arguments: list[str]) -> int:
    quick = "--quick" in arguments
    build()
    prove()
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir()
    command = suite(quick, [word for word in arguments if word != "--quick"])
    done = subprocess.run(command, cwd=COPY, env=sanitized(REPORTS), check=False)
    # pytest catches what a process prints, and loses it where that process ends at once.
    reports = sorted(REPORTS.iterdir())
    for report in reports:
        print(f"== {report.name}\n{report.read_text(errors='replace')}")
    return done.returncode or len(reports) > 0


def build() -> None:
    """Copies the package and builds its module; what did not change is not compiled again."""
    for directory in ("csrc", "lookahead_fused"):
        shutil.rmtree(COPY / directory, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
        shutil.copytree(ROOT / directory, COPY / directory, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, COPY / file)
    env = {**os.environ, "CXXFLAGS": FLAGS, "LOOKAHEAD_FUSED_CPU": "1", "LOOKAHEAD_FUSED_CUDA": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--debug"]
    subprocess.run(command, cwd=COPY, env=env, check=True)


def prove() -> None:
    """Ends the program unless a walk that reads past a gradient's end is reported, and one that does not is none."""
    for instruction_set in python(INSTRUCTION_SETS).stdout.split():
        sound = python(OVERRUN, "5", instruction_set)
        if sound.returncode != 0 or f"stepped by {COPY}" not in sound.stdout:
            sys.exit(f"a step without any fault failed under the sanitizers:\n{sound.stdout}{sound.stderr}")
        overrun = python(OVERRUN, "4", instruction_set)
        told = ("heap-buffer-overflow", f"lookahead_fused::{instruction_set}::Walk")
        if not all(words in overrun.stderr for words in told):
            sys.exit(f"no walk that read past a gradient's end was reported:\n{overrun.stdout}{overrun.stderr}")
        print(f"{instruction_set}: a read of one element past a gradient's end is reported", flush=True)


def suite(quick: bool, arguments: list[str]) -> list[str]:
    tests = ROOT / "tests"
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "--benchmark-disable", "--backend", "cpu", "-k", CHOSEN]
    if quick:
        return [*command, "-m", "not slow and not large", *arguments, *(str(tests / name) for name in QUICK)]
    ignored = [f"--ignore-glob={tests / name}" for name in LEFT_OUT]
    return [*command, *ignored, *arguments, str(tests)]


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=COPY, env=sanitized(), capture_output=True, text=True, check=False)


def sanitized(reports: Path | None = None) -> dict[str, str]:
    """The environment of a process that loads the module: Python itself is not linked with the sanitizers."""
    names = ("libasan.so", "libubsan.so")
    runtimes = [
        subprocess.run([*CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        sys.exit(f"{shlex.join(CXX)} has no {' or no '.join(names)}")
    log = [f"log_path={reports / 'report'}"] if reports else []
    return {
        **os.environ,
        "PYTHONPATH": str(COPY),
        "LD_PRELOAD": ":".join(runtimes),
        # Python leaves much to the end of the process, which looks like leaks.
        "ASAN_OPTIONS": ":".join(["detect_leaks=0", *log]),
        "UBSAN_OPTIONS": ":".join(["print_stacktrace=1", *log]),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
