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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler ({CXX[0]}) was found")
    program = tmp_path_factory.mktemp("workspace") / "workspace"
    sources = [Path(__file__).with_name("workspace.cpp")]
    sources += [ROOT / "csrc/cpu" / name for name in ("step.cpp", "parallel.cpp", "pool.cpp")]
    options = ["-std=c++17", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-pthread"]
    command = [*CXX, *options, "-DLOOKAHEAD_FUSED_X86=0", f"-I{ROOT / 'csrc'}", *map(str, sources), "-ldl"]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("case", ["a_table_that_grows", "no_threads_to_be_had", "no_memory_to_be_had"])
def test_workspace(program: Path, case: str) -> None:
    # The pool is never destroyed, and its threads stand when the process ends.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program, case], capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
