"""The CUDA backend's Python, where no GPU is needed: what a build covers, and what is said where it does not serve."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lookahead_fused.backends import cuda


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # machine code serves later devices of its generation
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),  # made for the features of one architecture
        ("7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", (7, 5), True),
        ("7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", (10, 3), True),
        ("7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", (11, 0), False),
        ("7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX", (13, 0), True),
        ("7.5", (7, 0), False),
    ],
)
def test_which_devices_a_build_covers(architectures: str, capability: tuple[int, int], covered: bool) -> None:
    assert cuda.covers(architectures, capability) is covered


def test_a_card_that_is_not_covered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was built, and what to do."""
    module = SimpleNamespace(architectures="8.0 9.0", device_count=lambda: 1)
    monkeypatch.setattr(cuda, "native", lambda: module)
    monkeypatch.setattr(cuda, "_no_devices", lambda module: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some Card 6000")
    monkeypatch.setattr(cuda, "_not_covered", cuda._not_covered.__wrapped__)
    message = cuda.unavailable(torch.device("cuda", 0))
    for part in ("Some Card 6000", "12.0", "8.0 9.0", "TORCH_CUDA_ARCH_LIST=12.0"):
        assert part in message
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda.unavailable(torch.device("cuda", 0)) == ""


def test_importing_touches_no_cuda() -> None:
    """Neither torch's nor the module's own: a process that forks later must still be able to use a GPU."""
    script = (
        "import torch; import lookahead_fused; from lookahead_fused import build; module = build.module('_cuda')\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "lookahead_fused.LookaheadAdamW([p]).step()\n"
        "assert not torch.cuda.is_initialized()\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda.so' not in maps, 'the driver was loaded'\n"
    )
    if sys.platform != "linux":
        pytest.skip("looks into /proc/self/maps")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
