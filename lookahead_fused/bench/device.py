"""What differs between measuring on a CPU and on a GPU: the clock, what is cold, the ceiling, and the memory."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import memory
from .measure import Schedule, Side, interleave
from .samples import Samples

# How long a GPU spins before a step, by the host's time for enqueuing it: what disturbs the host, and a device's clock
# that rises after the spin was calibrated, must not end it early.
SPIN_MARGIN = 2.0
SPIN_LEAST = 50e-6
# Some milliseconds of a device's clock each.
WARM_UP_CYCLES, CALIBRATION_CYCLES = 20_000_000, 5_000_000


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
    a model is smaller than the cache. Then the device spins for longer than the host takes to enqueue the step, so that
    the events time the device alone: of a host that is slower than its device they would time the host, and of two
    sides the one whose host is quicker would look like the one with the quicker kernels. How long a side's host takes
    is measured before the sides take turns. The stream holds about a thousand launches: what enqueues more waits for
    the spin to end, and no spin is long enough for it. `late` counts such steps, and a warning names their side.

    Args:
        cuda: `torch.cuda`, or what a test puts in its place.
        copy_bytes: of the buffer whose copy is the ceiling.
        now: the host's clock, in seconds.
    """

    name: str = "cuda"
    cuda: Any = torch.cuda
    device: str = "cuda"
    copy_bytes: int = 1 << 30
    now: Callable[[], float] = time.perf_counter
    late: Counter[str] = field(default_factory=Counter, init=False)
    _flushed: Tensor | None = field(default=None, init=False)
    _cycles_per_second: float | None = field(default=None, init=False)
    # Of the step that is being timed, where it begins.
    _start: Any = field(default=None, init=False)

    def flush(self) -> None:
        if self._flushed is None:
            cache = self.cuda.get_device_properties(0).L2_cache_size
            self._flushed = torch.empty(4 * max(cache, 1 << 20), dtype=torch.uint8, device=self.device)
        self._flushed.zero_()

    def spin(self, seconds: float) -> None:
        """Keeps the device busy for at least so long, without a wait for it."""
        if self._cycles_per_second is None:
            self.cuda._sleep(WARM_UP_CYCLES)  # an idle device's clock is slow
            start = self._event()
            self.cuda._sleep(CALIBRATION_CYCLES)
            self._cycles_per_second = CALIBRATION_CYCLES / self.between(start, self._event())
        self.cuda._sleep(int(seconds * self._cycles_per_second))

    def mark(self) -> Any:
        self._start = self._event()
        return self._start

    def between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def interleave(self, sides: Sequence[Side], schedule: Schedule) -> Samples:
        late: Counter[str] = Counter()
        timed = [self._timed(side, self._seconds_to_enqueue(side, schedule.period), late) for side in sides]
        samples = interleave(timed, schedule, clock=self.mark, between=self.between, sleep=lambda _: None)
        for name, steps in late.items():
            warnings.warn(
                f"{name}: the device was done with waiting before {steps} steps were enqueued; their times hold the "
                "host's too",
                RuntimeWarning,
                stacklevel=2,
            )
        self.late.update(late)
        return samples

    def _seconds_to_enqueue(self, side: Side, period: int) -> float:
        """The host's most for a step, of as many as make its work repeat; the first as many create its state."""
        longest = 0.0
        for step in range(2 * period):
            if side.prepare:
                side.prepare()
            seconds = host_seconds(self, side.step, self.now)
            longest = max(longest, seconds if step >= period else 0.0)
        return longest

    def _timed(self, side: Side, host: float, late: Counter[str]) -> Side:
        spin = SPIN_MARGIN * host + SPIN_LEAST

        def prepare() -> None:
            if side.prepare:
                side.prepare()
            self.flush()
            self.spin(spin)
            self._start = None

        def step() -> None:
            side.step()
            # An untimed step has no start. Asked before the end is enqueued: nothing of the step comes after this.
            if self._start is not None and self._start.query():
                late[side.name] += 1

        return Side(side.name, step, prepare)

    def _event(self) -> Any:
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

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


def host_seconds(device: Device, step: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> float:
    """The host's time for a step, without waiting for what it has the device do."""
    device.synchronize()
    start = now()
    step()
    return now() - start
