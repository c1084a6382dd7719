"""Timing sides against each other in one process, fairly, and what else a measurement needs to be believed.

A machine that others use too is a third slower for seconds at a time. A time alone says nothing there, and
neither does a ratio of two times taken one after the other. So the sides take turns of a few steps, each
round gives one ratio, and what is reported is the median of those ratios with its quartiles.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# OpenMP's threads, torch's among them, spin for some milliseconds after a parallel region before they sleep.
# With as many threads as cores they would take a core from whoever comes next.
PAUSE = 0.02


@dataclass(frozen=True)
class Side:
    """One of the things compared.

    Attributes:
        name: unique among the sides of a comparison.
        step: what is timed.
        prepare: called before every step and not timed; None for nothing.
    """

    name: str
    step: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Schedule:
    """How the sides take turns.

    In a round every side has ``turns`` turns, and in a turn it takes ``settle`` untimed and then ``steps``
    timed steps. Long steps alternate one by one (turns=k, steps=1); short ones need turns of many steps, or
    the switching would be what is measured.

    Attributes:
        rounds: one sample a side each.
        turns: turns of a side in a round.
        steps: timed steps in a turn.
        settle: untimed steps at the start of a turn, which wake the threads and warm the caches.
        period: steps after which a side's work repeats (Lookahead's k): a round times whole periods.
        pause: seconds of sleep before a turn.
        budget: seconds after which no further round is begun, once there are two.

    Raises:
        ValueError: if a round does not time whole periods, or a count is not positive.
    """

    rounds: int
    turns: int = 1
    steps: int = 1
    settle: int = 0
    period: int = 1
    pause: float = PAUSE
    budget: float = math.inf

    def __post_init__(self) -> None:
        for name in ("rounds", "turns", "steps", "period"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        # A turn that settles skips steps: only within one turn is it then known which ones are timed.
        timed = self.steps if self.settle else self.steps * self.turns
        if timed % self.period:
            raise ValueError(f"a round must time whole periods of {self.period} steps, got {timed}")

    def __str__(self) -> str:
        alternated = f"{self.steps} steps" if self.steps > 1 else "each step"
        settled = f", {self.settle} untimed steps first" if self.settle else ""
        at_most = "" if self.budget == math.inf else "up to "
        return (
            f"{at_most}{self.rounds} rounds of {self.turns * self.steps} steps a side, alternated every "
            f"{alternated.removeprefix('each ')} after a pause of {self.pause * 1e3:.0f} ms{settled}"
        )


@dataclass(frozen=True)
class Effort:
    """How much time measuring may take.

    Attributes:
        scale: multiplies each benchmark's own number of rounds.
        rounds: what it is instead.
        budget: see `Schedule`: of a benchmark's main interleaving; its lesser ones get a part.
    """

    scale: float = 1.0
    rounds: int | None = None
    budget: float = math.inf

    def of(self, rounds: int) -> int:
        """How many rounds a benchmark makes whose own number is `rounds`: at least two."""
        return max(self.rounds or round(rounds * self.scale), 2)


@dataclass(frozen=True)
class Spread:
    """A figure with its uncertainty.

    Attributes:
        median: the figure.
        q1, q3: the quartiles of its samples.
        of_medians: the same computed from the sides' median times. Far from ``median``, the run was too
            unquiet to be believed. None where there is no such thing.
        samples: how many.
    """

    median: float
    q1: float
    q3: float
    of_medians: float | None = None
    samples: int = 1


Samples = dict[str, list[float]]


def interleave(
    sides: Sequence[Side],
    schedule: Schedule,
    *,
    clock: Callable[[], Any] = time.perf_counter,
    between: Callable[[Any, Any], float] = lambda start, end: end - start,
    sleep: Callable[[float], object] = time.sleep,
) -> Samples:
    """Time the sides in turns.

    The first round is a warm-up: it creates state, touches memory, builds tables, and is thrown away.

    Args:
        sides: what to compare; names must differ.
        schedule: how they take turns.
        clock: marks a moment.
        between: the seconds from one mark to another, asked for when a turn is over.
        sleep: replaced by tests.

    Returns:
        For each side's name its seconds a step, one number per round; the same index is the same round.
    """
    names = [side.name for side in sides]
    if len(set(names)) != len(names):
        raise ValueError(f"names of sides must differ, got {names}")
    samples: Samples = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(schedule.rounds + 1):
        if round_ > 2 and time.perf_counter() - start > schedule.budget:
            break
        seconds = dict.fromkeys(names, 0.0)
        for turn in range(schedule.turns):
            for side in _order(sides, round_ * schedule.turns + turn):
                seconds[side.name] += _turn(side, schedule, clock, between, sleep)
        if round_:
            for name in names:
                samples[name].append(seconds[name] / (schedule.turns * schedule.steps))
    return samples


def _order(sides: Sequence[Side], turn: int) -> list[Side]:
    """Another order each turn: every side comes at every place and after different others."""
    shift = turn // 2 % len(sides)
    order = [*sides[shift:], *sides[:shift]]
    return order if turn % 2 == 0 else order[::-1]


def _turn(
    side: Side,
    schedule: Schedule,
    clock: Callable[[], Any],
    between: Callable[[Any, Any], float],
    sleep: Callable[[float], object],
) -> float:
    """The seconds of one turn's timed steps."""
    gc.collect(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        sleep(schedule.pause)
        for _ in range(schedule.settle):
            if side.prepare:
                side.prepare()
            side.step()
        if side.prepare is None:
            start = clock()
            for _ in range(schedule.steps):
                side.step()
            return between(start, clock())
        marks = []
        for _ in range(schedule.steps):
            side.prepare()
            start = clock()
            side.step()
            marks.append((start, clock()))
        # Only now: to ask a GPU for a time is to wait for it.
        return sum(between(start, end) for start, end in marks)
    finally:
        if collecting:
            gc.enable()


def spread(values: Sequence[float], of_medians: float | None = None) -> Spread:
    """Median and quartiles of samples."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], of_medians, 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, of_medians, len(values))


def ratio(samples: Samples, of: str, to: str) -> Spread:
    """How many times faster ``of`` is than ``to``: 2 where it takes half the time; round by round."""
    pairs = zip(samples[to], samples[of], strict=True)
    return spread(
        [theirs / ours for theirs, ours in pairs],
        statistics.median(samples[to]) / statistics.median(samples[of]),
    )


def slope(samples: Samples, small: str, large: str, further: int) -> Spread:
    """Seconds for each of the ``further`` things that ``large`` has and ``small`` has not; round by round."""
    pairs = zip(samples[small], samples[large], strict=True)
    return spread(
        [(b - a) / further for a, b in pairs],
        (statistics.median(samples[large]) - statistics.median(samples[small])) / further,
    )


def growth_rate(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent b of seconds = a size^b, by least squares over the logarithms: 1 is linear growth."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in seconds]).slope


def fastest(samples: Samples, names: Sequence[str]) -> str:
    """The name with the smallest median."""
    return min(names, key=lambda name: statistics.median(samples[name]))


class Others:
    """How busy everybody else keeps the machine: the condition that spoils a measurement most. Linux only.

    ``share()`` is the part of all cores that other processes had since this object was made; nan elsewhere.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter(), self._seconds()

    def share(self) -> float:
        elapsed = time.perf_counter() - self.start[0]
        # Counted in clock ticks, so that nobody else at all may come out as a little less than nothing.
        return max((self._seconds() - self.start[1]) / (elapsed * (os.cpu_count() or 1)), 0.0)

    @staticmethod
    def _seconds() -> float:
        statistics_ = Path("/proc/stat")
        if not statistics_.exists():
            return float("nan")
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, statistics_.read_text().split("\n", 1)[0].split()[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


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


@dataclass(frozen=True)
class Conditions:
    """Where and with what a run was made."""

    machine: str
    cores: int
    memory_gib: float
    huge_pages: str
    system: str
    python: str
    torch: str
    threads: int
    load_before: float
    utc: str


def conditions() -> Conditions:
    """The conditions of this process now."""
    return Conditions(
        machine=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        huge_pages=_huge_pages(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        load_before=round(os.getloadavg()[0], 2),
        utc=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    )


def describe(where: Conditions) -> str:
    """The conditions in lines for people."""
    fields = asdict(where)
    return (
        "{machine}, {cores} cores, {memory_gib} GiB, {system}, transparent huge pages: {huge_pages}\n"
        "torch {torch}, {threads} threads, Python {python}; load before: {load_before}; {utc} UTC"
    ).format(**fields)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or sys.platform
    # Virtual machines hide the model's name; family and model still tell the generation.
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return "none"
    return setting.read_text().partition("[")[2].partition("]")[0]
