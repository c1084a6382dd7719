"""The CUDA sources under AddressSanitizer and UndefinedBehaviorSanitizer, on the host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cuda_on_host

pytestmark = pytest.mark.skipif(bool(cuda_on_host.missing()), reason=f"builds the stand-in: {cuda_on_host.missing()}")


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizer")
def test_under_address_and_undefined_behaviour_sanitizers() -> None:
    """A part of the suite under an instrumented stand-in: no access outside of a tensor, none misaligned."""
    runtimes = [
        subprocess.run([*cuda_on_host.CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("the compiler has no sanitizer runtimes")
    module = cuda_on_host.build(*cuda_on_host.SANITIZE)
    env = {
        **os.environ,
        "LOOKAHEAD_FUSED_CUDA_HOST": str(module),
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    names = ("rules", "layout", "cuda_traffic", "cuda_codes", "cuda_launches", "cuda_graphs")
    files = [str(Path(__file__).parents[1] / f"test_{name}.py") for name in names]
    selected = "cuda-host and (test_views or test_values) or each_array and 4099 or beside_an_array"
    selected += " or test_twelve or test_any_call"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected]
    done = subprocess.run([*command, *files], env=env, capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
