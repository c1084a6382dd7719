"""What differs between measuring on a CPU and on a GPU: the clock, what is cold, the ceiling, and the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import memory
from .measure import Schedule, Side, interleave
from .samples import Samples


@dataclass
class Cpu:
    """Steps on the CPU, by the wall clock."""

    name: str = "cpu"

    def interleave(self, sides: Sequence[Side], schedule: Schedule) -> Samples:
        return interleave(sides, schedule)

    def available_bytes(self) -> int:
        return memory.available_bytes()

    def ceiling_seconds_per_step(self, seconds: float, step_bytes: float) -> float:
        """How long a step of so many bytes would take at the ceiling, of which one pass took `seconds`."""
        return seconds

    def peak_growth(self, run: Callable[[], object]) -> int:
        """By how many bytes memory rises at its highest during `run`."""
        return memory.resident_growth(run)

    def synchronize(self) -> None:
        pass


@dataclass
class Cuda:
    """Steps on a GPU, by the device's events.

    Before each step the L2 cache is overwritten: a step in training finds gradients and state in memory, except where
    a model is smaller than the cache. The overwriting also keeps the device busy while the host prepares the step,
    so that the events time the device's work and not the host's, as far as the host takes no longer than that.

    Args:
        cuda: `torch.cuda`, or what a test puts in its place.
        copy_bytes: of the buffer whose copy is the ceiling.
    """

    name: str = "cuda"
    cuda: Any = torch.cuda
    device: str = "cuda"
    copy_bytes: int = 1 << 30
    _flushed: Tensor | None = field(default=None, init=False)

    def flush(self) -> None:
        if self._flushed is None:
            cache = self.cuda.get_device_properties(0).L2_cache_size
            self._flushed = torch.empty(4 * max(cache, 1 << 20), dtype=torch.uint8, device=self.device)
        self._flushed.zero_()

    def mark(self) -> Any:
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def interleave(self, sides: Sequence[Side], schedule: Schedule) -> Samples:
        def cold(side: Side) -> Side:
            def prepare() -> None:
                if side.prepare:
                    side.prepare()
                self.flush()

            return Side(side.name, side.step, prepare)

        return interleave(
            [cold(side) for side in sides], schedule, clock=self.mark, between=self.between, sleep=lambda _: None
        )

    def available_bytes(self) -> int:
        free, _ = self.cuda.mem_get_info()
        return int(free)

    def ceilings(self, rows: Sequence[Sequence[Tensor]], k: int) -> list[Side]:
        """A copy within the device: the bandwidth that a program reaches, where the data sheet's is none's."""
        source = torch.empty(self.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return [Side("ceiling, copy within the device", lambda: target.copy_(source))]

    def ceiling_seconds_per_step(self, seconds: float, step_bytes: float) -> float:
        return seconds * step_bytes / (2 * self.copy_bytes)

    def peak_growth(self, run: Callable[[], object]) -> int:
        self.synchronize()
        before = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return int(self.cuda.max_memory_allocated() - before)

    def synchronize(self) -> None:
        self.cuda.synchronize()


Device = Cpu | Cuda


def host_seconds(device: Device, step: Callable[[], object]) -> float:
    """The host's time for a step, without waiting for what it has the device do."""
    device.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
