"""A pass on the CPU apart from what its kernels compute: see `workspace.cpp`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = shlex.split(os.environ.get("CXX", "")) or ["c++"]


CASES = ("a_table_that_grows", "no_threads_to_be_had", "no_memory_to_be_had")


@pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no C++ compiler ({CXX[0]}) was found")
def test_workspace(tmp_path: Path) -> None:
    """All cases in one test, since two workers would compile the program twice."""
    program = tmp_path / "workspace"
    sources = [Path(__file__).with_name("workspace.cpp")]
    sources += [ROOT / "csrc/cpu" / name for name in ("step.cpp", "parallel.cpp", "pool.cpp")]
    options = ["-std=c++17", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-pthread"]
    command = [*CXX, *options, "-DLOOKAHEAD_FUSED_X86=0", f"-I{ROOT / 'csrc'}", *map(str, sources), "-ldl"]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The pool is never destroyed, and its threads stand when the process ends.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    failed = {}
    for case in CASES:
        ran = [program, case]
        done = subprocess.run(ran, capture_output=True, text=True, check=False, env=environment, timeout=600)
        if done.returncode != 0:
            failed[case] = done.stdout + done.stderr
    assert not failed
