"""The CUDA backend's Python, where no GPU is needed: what a build covers, and what is said where it does not serve."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cuda_on_host
from lookahead_fused import _table as table
from lookahead_fused.backends import cuda, nvml, reference

backends = sys.modules["lookahead_fused.backends"]


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
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),  # of a family
        ("10.3f", (10, 0), False),
        ("10.0f+PTX", (12, 0), False),
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
    """With what was built, and what to do; `auto` then takes the next backend, and says so."""
    pretend(monkeypatch, Module(), (12, 0))
    message = cuda.unavailable(torch.device("cuda", 0))
    for part in ("Some Card 6000", "12.0", "8.0 9.0", "TORCH_CUDA_ARCH_LIST=12.0"):
        assert part in message
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "BACKENDS", {"cuda": cuda, "reference": reference})
    with pytest.warns(RuntimeWarning, match=r"Some Card 6000 has compute capability 12\.0"):
        assert backends.choose("auto", torch.device("cuda", 0)) is reference
    with pytest.raises(RuntimeError, match=r"Some Card 6000 has compute capability 12\.0"):
        backends.choose("cuda", torch.device("cuda", 0))
    pretend(monkeypatch, Module(), (9, 0))
    assert cuda.unavailable(torch.device("cuda", 0)) == ""


def test_the_driver_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses what the numbers promise (a Tegra's generation is not the desktop's); only a success is remembered."""
    module = Module(error="loading the kernels of adam of float32 onto device 0 failed: no kernel image")
    pretend(monkeypatch, module, (9, 0))
    for _ in range(2):
        assert "no kernel image" in cuda.unavailable(torch.device("cuda", 0))
    assert cuda.unavailable() == ""  # who only asks makes no context
    assert module.loaded == 2
    module.error = ""
    for _ in range(2):
        assert cuda.unavailable(torch.device("cuda", 0)) == ""
    assert module.loaded == 3


def test_the_stream_is_that_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is current on another device does not come in."""
    streams = {0: 10, 1: 11}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device.index]))
    assert [cuda._stream(torch.device("cuda", index)) for index in (0, 1)] == [10, 11]


def test_a_capture_is_looked_for_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *exception: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert table.is_capturing(torch.device("cuda", 1))
    assert not table.is_capturing(torch.device("cuda", 0))


class Module:
    """What the compiled module tells of itself."""

    architectures = "8.0 9.0"
    runtime_version = 13000

    def __init__(self, error: str = "") -> None:
        self.error, self.loaded = error, 0

    def load_kernels(self, index: int) -> None:
        self.loaded += 1
        if self.error:
            raise RuntimeError(self.error)


def pretend(monkeypatch: pytest.MonkeyPatch, module: Module, capability: tuple[int, int]) -> None:
    """A machine with one card."""
    monkeypatch.setattr(cuda, "native", lambda: module)
    monkeypatch.setattr(cuda, "_current", lambda device: nullcontext())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "_no_devices", lambda module: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some Card 6000")


NVML = """
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = %(cuda)d; return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = sizeof(cards) / sizeof(*cards) - 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Card** card) { *card = &cards[index]; return 0; }
int nvmlDeviceGetCudaComputeCapability(const Card* card, int* major, int* minor) {
    *major = card->major;
    *minor = card->minor;
    return 0;
}
int nvmlDeviceGetName(const Card* card, char* name, unsigned size) {
    return std::snprintf(name, size, "%%s", card->name) < 0;
}
}
"""


@pytest.mark.parametrize(
    ("driver", "cards", "visible", "reason"),
    [
        (13000, [("Some Card", 9, 0)], 1, ""),
        (13020, [("Some Card", 9, 0)] * 2, 2, ""),
        (14000, [("Some Card", 8, 6)], 1, ""),
        (13000, [], 0, "no CUDA device is visible"),
        (13000, [("Some Card", 9, 0)], 0, "no CUDA device is visible"),
        (12080, [("Some Card", 9, 0)], 1, "the driver is made for CUDA 12.8, and this build for 13.0"),
        (13000, [("Some Card", 12, 0)] * 2, 2, "Some Card has compute capability 12.0"),
        (13000, [("Some Card", 12, 0), ("Other Card", 9, 0)], 2, None),
    ],
)
def test_a_query_leaves_cuda_alone(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: int,
    cards: list[tuple[str, int, int]],
    visible: int,
    reason: str | None,
) -> None:
    """A process that asked which backends serve may fork, and its children use a GPU: NVML tells what there is. Which
    of different cards are visible is CUDA's to say, and it is asked for that alone."""
    if cuda_on_host.missing():
        pytest.skip(f"builds a library in NVML's place: {cuda_on_host.missing()}")
    told = ", ".join(f'{{"{name}", {major}, {minor}}}' for name, major, minor in [*cards, ("", 0, 0)])
    source, library = tmp_path / "nvml.cpp", tmp_path / "libnvidia-ml.so"
    lines = ["#include <cstdio>", "struct Card { const char* name; int major, minor; };"]
    source.write_text("\n".join([*lines, f"const Card cards[] = {{{told}}};", NVML % {"cuda": driver}]))
    subprocess.run([*cuda_on_host.CXX, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(library) if name == "libnvidia-ml.so.1" else name))
    pretend(monkeypatch, Module(), (0, 0))
    monkeypatch.setattr(cuda, "_no_devices", lambda module: "CUDA was asked")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    answer = cuda.unavailable()
    assert answer == "" if reason == "" else answer.startswith(reason or "CUDA was asked")


def test_without_nvml_cuda_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert nvml.machine() is None
    pretend(monkeypatch, Module(), (9, 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert cuda.unavailable() == ""
    pretend(monkeypatch, Module(), (12, 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    cuda._not_covered.cache_clear()
    assert "Some Card 6000 has compute capability 12.0" in cuda.unavailable()


def test_memory_for_a_graph_comes_from_a_stream_that_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch hands its streams out in turn, and those that are captured come by too."""
    current, captured = [0], {0, 1, 2}
    streams = iter(range(1, 5))

    def on(stream: int) -> AbstractContextManager[Any]:
        class Current(nullcontext):  # type: ignore[type-arg]
            def __enter__(self) -> None:
                current.append(stream)

            def __exit__(self, *exception: object) -> None:
                current.pop()

        return Current()

    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(streams))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] in captured)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + current[-1]))
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: made.append((current[-1], size)) or "memory")
    assert cuda._memory_apart(torch.device("cuda", 0), 24) == ("memory", 103)
    assert made == [(3, 24)]
    captured.update(range(1, 100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: 1)
    with pytest.raises(RuntimeError, match=r"all of torch's streams on cuda:0 are captured"):
        cuda._memory_apart(torch.device("cuda", 0), 24)
    assert current == [0]


def test_importing_touches_no_cuda() -> None:
    """Neither torch's nor the module's own: a process that forks later must still be able to use a GPU."""
    script = (
        "import torch, lookahead_fused; from lookahead_fused import _build as build; module = build.module('_cuda')\n"
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
