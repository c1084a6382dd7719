"""What a maintainer asks for first: versions, machine, what was built, which backends serve, and a self-test.

What the standard library can tell comes first. The rest imports torch, and is left out where the package cannot be
imported: of a torch that failed once, a second import tells something else.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

import lookahead_fused

from . import _build as build

if TYPE_CHECKING:
    import torch

# A name and what is told of it.
Lines = list[tuple[str, str]]

# Two syncs at k = 3.
STEPS = 6


class Section(NamedTuple):
    """A part of the report, and whether nothing in it failed."""

    title: str
    lines: Lines
    healthy: bool


def sections() -> Iterator[Section]:
    """The report, each section made when it is asked for. Never raises: what fails is told in its place."""
    yield _told("versions", _versions)
    yield _told("machine", _machine)
    yield _told("build", _build)
    imported = _told("import", _import)
    yield imported
    if imported.healthy:
        yield _told("torch", _torch)
        yield _told("backends", _backends)
        yield _told("self-test", _self_test)


def render(section: Section) -> str:
    """A section as text, one fact a line."""
    width = max((len(name) for name, _ in section.lines), default=0)
    return "\n".join([section.title, *(f"  {name:<{width}}  {value}" for name, value in section.lines)])


def _told(title: str, tell: Callable[[Lines], bool]) -> Section:
    """A section by a function that adds its lines to a list, one by one, and returns whether all is well."""
    lines: Lines = []
    try:
        healthy = tell(lines)
    except Exception as error:
        lines.append(("failed", _last_frames(error)))
        healthy = False
    return Section(title, lines, healthy)


def _last_frames(error: Exception) -> str:
    return "".join(traceback.format_exception(error, limit=-2)).strip().replace("\n", " | ")


def _versions(lines: Lines) -> bool:
    lines.append(("lookahead_fused", build.version()))
    lines.append(("python", sys.version.replace("\n", " ")))
    lines.append(("platform", platform.platform()))
    lines.append(("torch", _installed("torch")))
    return True


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine(lines: Lines) -> bool:
    lines.append(("cores", str(os.cpu_count())))
    lines.append(("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")))
    lines.append(("processor", _processor()))
    return True


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _build(lines: Lines) -> bool:
    recorded = build.info()
    fault = recorded.get("fault", "")
    if fault:
        lines.append(("record", fault))
    for name, facts in recorded["modules"].items():
        lines += [(f"{name} {key}", str(value)) for key, value in facts.items()]
    return not fault


def _import(lines: Lines) -> bool:
    # In the first half of -m the package imported nothing; it does now, since sys.argv no longer holds "-m".
    if not hasattr(lookahead_fused, "__version__"):
        importlib.reload(lookahead_fused)
    lines.append(("lookahead_fused", "imports"))
    return True


def _torch(lines: Lines) -> bool:
    import torch

    from .backends import triton

    cuda, hip = (getattr(torch.version, name, None) for name in ("cuda", "hip"))
    lines.append(("torch", f"{torch.__version__} (CUDA {cuda}, HIP {hip})"))
    lines.append(("torch threads", str(torch.get_num_threads())))
    lines.append(("triton", triton.version()))
    module = build.module("_cpu")
    if module is not None:
        lines.append(("instruction sets", ", ".join(module.instruction_sets())))
        lines.append(("threads of a step", "torch's" if module.torch_threads_serve() else "a pool of its own"))
    if not torch.cuda.is_available():
        lines.append(("GPU", "none that torch can use"))
        return True
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append((f"GPU {index}", f"{card.name}, compute {card.major}.{card.minor}, {card.total_memory >> 20} MiB"))
    return True


def _backends(lines: Lines) -> bool:
    statuses = lookahead_fused.backends()
    lines += [(name, "serves" if status.available else status.reason) for name, status in statuses.items()]
    return True


def _self_test(lines: Lines) -> bool:
    """Every backend that serves takes the same steps as the reference, and must give its bits."""
    import torch

    expected = _weights_after_steps("reference", torch.device("cpu"))
    lines.append(("reference", f"runs: {expected[0].item()!r}"))
    well = True
    for name, status in lookahead_fused.backends().items():
        if not status.available or name == "reference":
            continue
        device = torch.device("cpu")
        if name != "cpu":
            device = torch.accelerator.current_accelerator() or device
        same = torch.equal(_weights_after_steps(name, device).cpu(), expected)
        lines.append((name, "the reference's bits" if same else "differs from the reference"))
        well = well and same
    return well


def _weights_after_steps(backend: str, device: torch.device) -> torch.Tensor:
    import torch

    param = torch.nn.Parameter(torch.linspace(-1, 1, 1001, device=device))
    optimizer = lookahead_fused.LookaheadAdamW([param], lr=0.1, weight_decay=0.1, k=3, backend=backend)
    for step in range(STEPS):
        param.grad = (param.detach() - 0.25) * (step + 1)
        optimizer.step()
    return param.detach()
