"""What a process and an optimizer have in memory, and what a function takes of it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def resident_bytes() -> int:
    """Resident memory of this process, without garbage and without what malloc only keeps for later."""
    gc.collect()
    # What earlier benchmarks freed may stay in the heap, where a later allocation would hide in it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def resident_growth(run: Callable[[], object]) -> int:
    """By how many bytes resident memory rises at its highest during ``run``. Linux only.

    It sees memory however it was allocated, also what is given back before the end, but in pages: expect some
    ten kilobytes of noise.
    """
    before = resident_bytes()
    # 5 sets the high-water mark back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def available_bytes() -> int:
    """Memory that a process can have now without anything being swapped out. Linux; elsewhere all there is."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def allocated_bytes(run: Callable[[], object]) -> int:
    """The bytes that torch's CPU allocator hands out during ``run``, given back or not, to the byte."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The trace file is the only public place where single allocations, and not sums per operator, are found.
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    return sum(size for size in sizes if size > 0)


def state_bytes(optimizer: object, params: Sequence[Tensor]) -> int:
    """The bytes of all tensors that an optimizer holds, of whatever class it is, its parameters and gradients left out.

    Each storage counts once, however many tensors look at it.
    """
    own = {id(p) for p in params}
    given = {t.untyped_storage().data_ptr() for p in params for t in (p, p.grad) if t is not None}
    seen: set[int] = set()
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            if id(value) not in own and storage.data_ptr() not in given:
                storages[storage.data_ptr()] = storage.nbytes()
                if value.grad is not None:
                    visit(value.grad)
            return
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type)):
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(key)
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        # Optimizers and what is built like one; no further, or torch's own modules would be walked.
        elif hasattr(value, "step") and hasattr(value, "__dict__"):
            visit(vars(value))

    visit(optimizer)
    return sum(storages.values())
