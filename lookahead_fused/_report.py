"""What a maintainer asks for first: versions, machine, what was built, which backends serve, and a self-test.

What the standard library can tell comes first. The rest imports torch where it needs it, and is left out where the
package could not be imported: of a torch that failed once, a second import tells something else.
"""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

import lookahead_fused

from . import _build as build

if TYPE_CHECKING:
    import torch

Lines = list[tuple[str, str]]
Section = tuple[str, Lines]

# Two syncs at k = 3.
STEPS = 6


def collect() -> tuple[list[Section], bool]:
    """The report's sections, and whether nothing in them failed. Never raises: what fails is told in its place."""
    healthy = True
    sections: list[Section] = []
    tellers = [("versions", _versions), ("machine", _machine), ("build", _build), ("import", _import)]
    if lookahead_fused._import_error is None:
        tellers += [("torch", _torch), ("backends", _backends), ("self-test", _self_test)]
    for title, tell in tellers:
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


def _told(tell: Callable[[], tuple[Lines, bool]]) -> tuple[Lines, bool]:
    try:
        return tell()
    except Exception as error:
        return [("failed", _last_frames(error))], False


def _last_frames(error: Exception) -> str:
    return "".join(traceback.format_exception(error, limit=-2)).strip().replace("\n", " | ")


def _versions() -> tuple[Lines, bool]:
    return [
        ("lookahead_fused", build.version()),
        ("torch", _installed("torch")),
        ("python", sys.version.replace("\n", " ")),
        ("platform", platform.platform()),
    ], True


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> tuple[Lines, bool]:
    return [
        ("processor", _processor()),
        ("cores", str(os.cpu_count())),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
    ], True


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _build() -> tuple[Lines, bool]:
    recorded = build.info()
    fault = recorded.get("fault", "")
    lines = [("record", fault)] if fault else []
    for name, facts in recorded["modules"].items():
        lines += [(f"{name} {key}", str(value)) for key, value in facts.items()]
    return lines, not fault


def _import() -> tuple[Lines, bool]:
    error = lookahead_fused._import_error
    return [("lookahead_fused", "imports" if error is None else _last_frames(error))], error is None


def _torch() -> tuple[Lines, bool]:
    import torch

    from .backends import triton

    lines = [
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {getattr(torch.version, 'hip', None)})"),
        ("triton", triton.version()),
        ("torch threads", str(torch.get_num_threads())),
    ]
    module = build.module("_cpu")
    if module is not None:
        lines.append(("instruction sets", ", ".join(module.instruction_sets())))
        lines.append(("threads of a step", "torch's" if module.torch_threads_serve() else "a pool of its own"))
    if not torch.cuda.is_available():
        return [*lines, ("GPU", "none that torch can use")], True
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append((f"GPU {index}", f"{card.name}, compute {card.major}.{card.minor}, {card.total_memory >> 20} MiB"))
    return lines, True


def _backends() -> tuple[Lines, bool]:
    statuses = lookahead_fused.backends()
    return [(name, "serves" if status.available else status.reason) for name, status in statuses.items()], True


def _self_test() -> tuple[Lines, bool]:
    """Every backend that serves takes the same steps as the reference, and must give its bits."""
    import torch

    expected = _weights_after_steps("reference", torch.device("cpu"))
    lines, well = [], True
    for name, status in lookahead_fused.backends().items():
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
    import torch

    param = torch.nn.Parameter(torch.linspace(-1, 1, 1001, device=device))
    optimizer = lookahead_fused.LookaheadAdamW([param], lr=0.1, weight_decay=0.1, k=3, backend=backend)
    for step in range(STEPS):
        param.grad = (param.detach() - 0.25) * (step + 1)
        optimizer.step()
    return param.detach()
