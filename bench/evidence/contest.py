"""Arms that are tuned alike on some seeds, and compared once on others that no choice has seen.

Every arm gets the same grid of learning rates and momenta. Where the best learning rate lies at an edge, the grid grows
there by a factor of 2, for that arm, until it does not or `widen` is used up; the comparison then says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from bench.evidence.experiment import JSON, Job

# Metric to one number a seed, in the order of the seeds.
Outcome: TypeAlias = Mapping[str, list[float]]
# The recorded result of a setting, or None.
Get: TypeAlias = Callable[[Mapping[str, JSON]], "Mapping[str, JSON] | None"]


@dataclass(frozen=True)
class Point:
    """One choice of an arm: its learning rate, and its momentum or beta1."""

    lr: float
    beta: float


@dataclass(frozen=True)
class Grid:
    """Where a best point is looked for.

    Attributes:
        lrs: ascending by factors of 2.
        betas: momenta or beta1.
        widen: how many learning rates an arm may be given beyond them.
    """

    lrs: tuple[float, ...]
    betas: tuple[float, ...]
    widen: int


@dataclass(frozen=True)
class Contest:
    """One comparison.

    Attributes:
        key: what every setting of its jobs has.
        arms: by name.
        grid: of every arm.
        tuning, fresh: seeds; none is in both.
        run: trains an arm at a point for some seeds.
        score: what tuning maximises, of an outcome.
        cost: seconds of a run of one seed.
        fixed: points, by a label, at which all arms are compared untuned.
        untuned: further arms, which are compared there alone.
    """

    key: Mapping[str, JSON]
    arms: tuple[str, ...]
    grid: Grid
    tuning: tuple[int, ...]
    fresh: tuple[int, ...]
    run: Callable[[str, Point, Sequence[int]], Outcome]
    score: Callable[[Outcome], float]
    cost: float
    fixed: tuple[tuple[str, Point], ...] = ()
    untuned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if set(self.tuning) & set(self.fresh):
            raise ValueError(f"seeds {sorted(set(self.tuning) & set(self.fresh))} both tune and confirm")

    def jobs(self, get: Get) -> Iterator[Job]:
        """In order: the fixed points, then of each arm its tuning and its confirmation. What depends on results that
        are not there yet is left out."""
        for _, point in self.fixed:
            for arm in (*self.arms, *self.untuned):
                yield self._job(arm, point, self.fresh)
        for arm in self.arms:
            yield from self._tuned(arm, get)

    def best(self, arm: str, get: Get) -> Point | None:
        """The point with the best score on the tuning seeds; None where a point that must be tried is not recorded."""
        lrs, scores = self._ladder(arm, get)
        return None if len(scores) < len(self._points(lrs)) else _best(scores)

    def at_edge(self, arm: str, get: Get) -> bool:
        """Whether the best learning rate is the smallest or the largest that was tried."""
        best, (lrs, _) = self.best(arm, get), self._ladder(arm, get)
        return best is not None and best.lr in (lrs[0], lrs[-1])

    def scores(self, arm: str, get: Get) -> dict[Point, float]:
        """What is recorded of an arm's tuning."""
        return self._ladder(arm, get)[1]

    def outcome(self, arm: str, point: Point, seeds: tuple[int, ...], get: Get) -> Outcome | None:
        return cast("Outcome | None", get(self._setting(arm, point, seeds)))

    def _tuned(self, arm: str, get: Get) -> Iterator[Job]:
        seen: set[Point] = set()
        # Where results come in between two jobs, there may be more points now than there were.
        while new := [point for point in self._points(self._ladder(arm, get)[0]) if point not in seen]:
            for point in new:
                yield self._job(arm, point, self.tuning)
            seen.update(new)
        best = self.best(arm, get)
        if best is not None:
            yield self._job(arm, best, self.fresh)

    def _ladder(self, arm: str, get: Get) -> tuple[list[float], dict[Point, float]]:
        """The learning rates that an arm is to be tried at, by what is recorded, and the scores that are there."""
        lrs = list(self.grid.lrs)
        for _ in range(self.grid.widen):
            scores = self._scores(arm, lrs, get)
            if len(scores) < len(self._points(lrs)):
                break
            best = _best(scores).lr
            if best == lrs[0]:
                lrs.insert(0, best / 2)
            elif best == lrs[-1]:
                lrs.append(best * 2)
            else:
                break
        return lrs, self._scores(arm, lrs, get)

    def _scores(self, arm: str, lrs: list[float], get: Get) -> dict[Point, float]:
        outcomes = {point: self.outcome(arm, point, self.tuning, get) for point in self._points(lrs)}
        return {point: self.score(outcome) for point, outcome in outcomes.items() if outcome is not None}

    def _points(self, lrs: Sequence[float]) -> list[Point]:
        return [Point(lr, beta) for lr in lrs for beta in self.grid.betas]

    def _job(self, arm: str, point: Point, seeds: tuple[int, ...]) -> Job:
        return Job(
            self._setting(arm, point, seeds),
            lambda: cast("Mapping[str, JSON]", self.run(arm, point, seeds)),
            self.cost * len(seeds),
        )

    def _setting(self, arm: str, point: Point, seeds: tuple[int, ...]) -> dict[str, JSON]:
        return {**self.key, "arm": arm, "lr": point.lr, "beta": point.beta, "seeds": list(seeds)}


def _best(scores: Mapping[Point, float]) -> Point:
    """Of equals the one with the smallest learning rate."""
    return max(scores, key=lambda point: scores[point])
