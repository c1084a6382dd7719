"""What a maintainer asks for first: versions, machine, what was built, which backends serve, and a self-test."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable

import torch

from . import build
from .backends import backends, triton
from .optimizers import LookaheadAdamW

Section = tuple[str, list[tuple[str, str]]]

# Two syncs at k = 3.
STEPS = 6


def collect() -> tuple[list[Section], bool]:
    """The report's sections, and whether nothing in them failed. Never raises: what fails is told in its place."""
    healthy = True
    sections: list[Section] = []
    for title, tell in (
        ("versions", _versions),
        ("machine", _machine),
        ("build", _build),
        ("backends", _backends),
        ("self-test", _self_test),
    ):
        lines, well = _told(tell)
        sections.append((title, lines))
        healthy = healthy and well
    return sections, healthy


def render(sections: list[Section]) -> str:
    """The report as text, one fact a line."""
    text = []
    for title, lines in sections:
        width = max((len(name) for name, _ in lines), default=0)
        text.append(title)
        text += [f"  {name:<{width}}  {value}" for name, value in lines]
    return "\n".join(text)


def _told(tell: Callable[[], tuple[list[tuple[str, str]], bool]]) -> tuple[list[tuple[str, str]], bool]:
    try:
        return tell()
    except Exception:
        return [("failed", traceback.format_exc(limit=-2).strip().replace("\n", " | "))], False


def _versions() -> tuple[list[tuple[str, str]], bool]:
    return [
        ("lookahead_fused", build.version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {getattr(torch.version, 'hip', None)})"),
        ("triton", triton.version()),
        ("python", sys.version.replace("\n", " ")),
        ("platform", platform.platform()),
    ], True


def _machine() -> tuple[list[tuple[str, str]], bool]:
    lines = [
        ("processor", _processor()),
        ("cores", str(os.cpu_count())),
        ("torch threads", str(torch.get_num_threads())),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ]
    if not torch.cuda.is_available():
        return [*lines, ("GPU", "none that torch can use")], True
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append((f"GPU {index}", f"{card.name}, compute {card.major}.{card.minor}, {card.total_memory >> 20} MiB"))
    return lines, True


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _build() -> tuple[list[tuple[str, str]], bool]:
    lines = []
    for name, facts in build.info()["modules"].items():
        lines += [(f"{name} {key}", str(value)) for key, value in facts.items()]
    module = build.module("_cpu")
    if module is not None:
        lines.append(("instruction sets", ", ".join(module.instruction_sets())))
        lines.append(("threads of a step", "torch's" if module.torch_threads_serve() else "a pool of its own"))
    return lines, True


def _backends() -> tuple[list[tuple[str, str]], bool]:
    return [(name, "serves" if status.available else status.reason) for name, status in backends().items()], True


def _self_test() -> tuple[list[tuple[str, str]], bool]:
    """Every backend that serves takes the same steps as the reference, and must give its bits."""
    expected = _weights_after_steps("reference", torch.device("cpu"))
    lines, well = [], True
    for name, status in backends().items():
        if not status.available or name == "reference":
            continue
        device = torch.device("cpu")
        if name != "cpu":
            device = torch.accelerator.current_accelerator() or device
        same = torch.equal(_weights_after_steps(name, device).cpu(), expected)
        lines.append((name, "the reference's bits" if same else "differs from the reference"))
        well = well and same
    return lines or [("reference", f"runs: {expected[0].item()!r}")], well


def _weights_after_steps(backend: str, device: torch.device) -> torch.Tensor:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 1001, device=device))
    optimizer = LookaheadAdamW([param], lr=0.1, weight_decay=0.1, k=3, backend=backend)
    for step in range(STEPS):
        param.grad = (param.detach() - 0.25) * (step + 1)
        optimizer.step()
    return param.detach()
