"""Builds wheels of copies of the source tree, in an environment of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
READ_BY_THE_BUILD = (
    *("CC", "CXX", "CXXFLAGS", "LDFLAGS", "LOOKAHEAD_FUSED_CPU", "MAX_JOBS"),
    *("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "LOOKAHEAD_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST"),
    *("CUDAFLAGS", "CUDAHOSTCXX", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
    *("LOOKAHEAD_FUSED_LOCAL_VERSION", "LOOKAHEAD_FUSED_PYTHONS"),
)

# Seconds after which a command is taken for hung: many times what a build takes, also where its cores are shared.
HUNG = 3600

SMALL_MODULE = """
#include <Python.h>
static PyModuleDef definition{PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
"""

# The modules of the release wheel that the tests build: `_cuda` where there is an nvcc, for one architecture.
RELEASED = ["_cpu", "_cuda"] if shutil.which("nvcc") else ["_cpu"]

needs_compiler = pytest.mark.skipif(not COMPILERS, reason="builds the module, and no C++ compiler is on PATH")


class Result(NamedTuple):
    """A finished build: what it printed, and the wheel if it made one."""

    returncode: int
    output: str
    wheel: Path | None

    def build_info(self) -> dict:
        with zipfile.ZipFile(self.wheel) as wheel:
            return json.loads(wheel.read("lookahead_fused/_build_info.json"))


def environment(**changes: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in READ_BY_THE_BUILD}
    # _cuda has tests of its own, and takes longer to build than all that is built here.
    return env | {"LOOKAHEAD_FUSED_CUDA": "0"} | changes


def keep_rules(source: Path, *rules: str) -> None:
    """Leaves these in a tree's list of rules: each takes a compiler seconds, and no test of a wheel asks for it."""
    path = source / "csrc/rules/all.h"
    text, count = re.subn(r"using Rules = List<[^>]+>;", f"using Rules = List<{', '.join(rules)}>;", path.read_text())
    assert count == 1
    path.write_text(text)


def run(command: list, **options) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in command]
    return subprocess.run(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=HUNG,
        check=False,
        **options,
    )


def native_modules(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith((".so", ".dylib", ".pyd"))]


def wheel_of(source: Path, command: list, **changes: str) -> Result:
    """Has a command, run in a source tree, make its wheel in the directory that it is told last."""
    dist = source.parent / f"{source.name}-dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    done = run([*command, dist], cwd=source, env=environment(**changes))
    return Result(done.returncode, done.stdout, next(dist.glob("*.whl"), None))
