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

    def _tuned(self, arm: str, get: Get) -> Iterator[Job]:
        wanted = self._start()
        for _ in range(1 + self.grid.widen):
            for point in wanted:
                yield self._job(arm, point, self.tuning)
            if any(self.outcome(arm, point, self.tuning, get) is None for point in wanted):
                return
            wanted = self._beyond(arm, get)
            if not wanted:
                break
        best = self.best(arm, get)
        if best is not None:
            yield self._job(arm, best, self.fresh)

    def best(self, arm: str, get: Get) -> Point | None:
        """The point with the best score on the tuning seeds; None where one of the first grid's is not recorded."""
        scores = self.scores(arm, get)
        if not scores.keys() >= set(self._start()):
            return None
        # Of equals the first: the grid's own order, smaller learning rates before larger ones.
        return max(sorted(scores, key=lambda point: (point.lr, point.beta)), key=lambda point: scores[point])

    def at_edge(self, arm: str, get: Get) -> bool:
        """Whether the best learning rate is the smallest or the largest that was tried."""
        best = self.best(arm, get)
        return best is not None and best.lr in self._edges(arm, get)

    def scores(self, arm: str, get: Get) -> dict[Point, float]:
        """What is recorded of an arm's tuning."""
        found: dict[Point, float] = {}
        smallest, largest = self.grid.lrs[0], self.grid.lrs[-1]
        more = [smallest / 2**i for i in range(1, self.grid.widen + 1)]
        more += [largest * 2**i for i in range(1, self.grid.widen + 1)]
        for lr in (*self.grid.lrs, *more):
            for beta in self.grid.betas:
                outcome = self.outcome(arm, Point(lr, beta), self.tuning, get)
                if outcome is not None:
                    found[Point(lr, beta)] = self.score(outcome)
        return found

    def outcome(self, arm: str, point: Point, seeds: tuple[int, ...], get: Get) -> Outcome | None:
        return cast("Outcome | None", get(self._setting(arm, point, seeds)))

    def _start(self) -> list[Point]:
        return [Point(lr, beta) for lr in self.grid.lrs for beta in self.grid.betas]

    def _edges(self, arm: str, get: Get) -> tuple[float, float]:
        tried = [point.lr for point in self.scores(arm, get)]
        return min(tried), max(tried)

    def _beyond(self, arm: str, get: Get) -> list[Point]:
        best = self.best(arm, get)
        if best is None:
            return []
        smallest, largest = self._edges(arm, get)
        lr = {smallest: smallest / 2, largest: largest * 2}.get(best.lr)
        return [] if lr is None else [Point(lr, beta) for beta in self.grid.betas]

    def _job(self, arm: str, point: Point, seeds: tuple[int, ...]) -> Job:
        return Job(
            self._setting(arm, point, seeds),
            lambda: cast("Mapping[str, JSON]", self.run(arm, point, seeds)),
            self.cost * len(seeds),
        )

    def _setting(self, arm: str, point: Point, seeds: tuple[int, ...]) -> dict[str, JSON]:
        return {**self.key, "arm": arm, "lr": point.lr, "beta": point.beta, "seeds": list(seeds)}
