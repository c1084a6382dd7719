"""Runs Python under compute-sanitizer: `python -m bench.gpu.sanitizer CHECK ... -- ARGUMENTS OF PYTHON`.

A check is memcheck, racecheck, initcheck or synccheck; of several, one after the other, and the first that finds
something ends it. Exits with 77 where there is no compute-sanitizer, with a last line that says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.runner import SKIPPED

# Only our kernels, as long as they take; a finding is status 9, which no test's failure is.
OPTIONS = ("--error-exitcode", "9", "--launch-timeout", "0", "--kernel-regex", "kns=lookahead_fused")
# PyTorch's caching of memory would hide from it where a tensor ends.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MISSING = (
    "compute-sanitizer was not found (looked at PATH and CUDA_HOME); it comes with the CUDA toolkit, and with NVIDIA's "
    "package nvidia-cuda-sanitizer-api"
)


def program(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where its parts lie."""
    places = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    nvidia = importlib.util.find_spec("nvidia")
    for place in (nvidia.submodule_search_locations or ()) if nvidia else ():
        places += sorted(Path(place).glob("cu*/bin"), reverse=True)
    return shutil.which(name) or next((str(p / name) for p in places if os.access(p / name, os.X_OK)), None)


def main(words: Sequence[str]) -> int:
    checks, command = list(words[: words.index("--")]), list(words[words.index("--") + 1 :])
    sanitizer = program("compute-sanitizer")
    if sanitizer is None:
        print(MISSING)
        return SKIPPED
    for check in checks:
        print(f"== {check}", flush=True)
        done = subprocess.run(
            [sanitizer, *OPTIONS, "--tool", check, sys.executable, *command],
            env={**os.environ, **ENVIRONMENT}, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
