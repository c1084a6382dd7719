"""Timing sides against each other in one process, fairly.

A machine that others use too is a third slower for seconds at a time. A time alone says nothing there, and
neither does a ratio of two times taken one after the other. So the sides take turns of a few steps, each
round gives one ratio, and what is reported is the median of those ratios with its quartiles (samples.py).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .samples import Samples

# OpenMP's threads, torch's among them, spin for some milliseconds after a parallel region before they sleep.
# With as many threads as cores they would take a core from whoever comes next.
PAUSE = 0.02
# Elements from which a step is bound by memory, so that a bandwidth ceiling says something.
LARGE = 10_000_000


class Unavailable(Exception):
    """A benchmark that cannot be made here; the message says why."""


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


def schedule(elements: int, k: int, rounds: int, budget: float = math.inf) -> Schedule:
    """Long steps alternate one by one; short ones take turns of many, or the switching would be what is measured."""
    if elements >= LARGE:
        return Schedule(rounds, turns=max(k, 2), period=k, budget=budget)
    repeats = -(-20 // k)
    return Schedule(rounds, steps=repeats * k, settle=k, period=k, budget=budget)


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
