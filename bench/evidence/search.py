"""Tuning by coordinates: the same lattice, start and budget for every arm.

Points lie on a lattice: learning rates by factors of the square root of 2 without end, momenta, and where there are
such settings second decays and the arm's own. From the start, coordinate after coordinate, the search goes on in a
direction while the score falls, and ends where a whole round brought nothing or the budget is used up. A learning rate
counts as found only where smaller and larger ones were tried beside it, all else equal, and were worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeAlias

from bench.evidence.arms import Arm, Rule
from bench.evidence.training import Point

# Beyond the usual .5 to .95 at both ends, so that a best one there can be seen to be best.
BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
START_BETA = 0.9
# Trainings beyond the budget in which a learning rate that is best so far may still be bracketed.
EXTRA = 8


@dataclass(frozen=True)
class Place:
    """A point of the lattice: the learning rate in halves of a doubling from the start, the others as indices."""

    lr: int = 0
    beta: int = BETAS.index(START_BETA)
    beta2: int = 0
    own: int = 0


@dataclass(frozen=True)
class Space:
    """The lattice of an arm.

    `lr` is the start's at a momentum of .9. Over a rule whose momentum sums gradients a change of momentum keeps the
    length of the steps, so that the two can be tuned one after the other.
    """

    arm: Arm
    rule: Rule
    lr: float

    def start(self) -> Place:
        """Where every search begins: the rule's and the arm's own defaults."""
        beta2 = self.rule.beta2s.index(self.rule.beta2) if self.rule.beta2 is not None else 0
        return Place(beta2=beta2, own=self.arm.owns.index(self.arm.own) if self.arm.own in self.arm.owns else 0)

    def holds(self, place: Place) -> bool:
        """Whether the indices are those of settings."""
        return (
            0 <= place.beta < len(BETAS)
            and self.arm.takes(BETAS[place.beta])
            and 0 <= place.beta2 < max(1, len(self.rule.beta2s))
            and 0 <= place.own < max(1, len(self.arm.owns))
        )

    def point(self, place: Place) -> Point:
        """The settings themselves, learning rates to four digits."""
        beta = BETAS[place.beta]
        lr = self.rule.lr_at(self.lr * 2 ** (place.lr / 2), START_BETA, self.arm.inner_beta(beta))
        return Point(
            float(f"{lr:.4g}"),
            beta,
            self.rule.beta2s[place.beta2] if self.rule.beta2s else None,
            self.arm.owns[place.own] if self.arm.owns else self.arm.own,
        )


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        point: with the lowest score.
        score: its.
        bracketed: whether smaller and larger learning rates beside it were worse.
        trainings: how many the search took.
    """

    point: Point
    score: float
    bracketed: bool
    trainings: int


Score: TypeAlias = Callable[[Point], "float | None"]
Search: TypeAlias = Generator[Point, None, "Found | None"]


def search(space: Space, score: Score, budget: int) -> Search:
    """Yields every point whose score it needs next, and returns what it found.

    Args:
        score: lower is better, infinite where a run diverged; None where a point has not been trained, at which the
            search ends and returns None.
        budget: trainings, after which no new round begins and no coordinate but the learning rate is followed.
    """
    climb = _Climb(space, score, budget)
    try:
        yield from climb.line("lr", 2)
        while True:
            before = climb.best
            for coordinate in ("beta", "lr", "beta2", "own"):
                yield from climb.line(coordinate, 1)
            if climb.best == before or climb.spent:
                break
        climb.budget += min(EXTRA, budget)
        while not climb.bracketed and not climb.spent:
            before = climb.best
            yield from climb.line("lr", 1)
            if climb.best == before:
                break
    except _Untrained:
        return None
    return Found(space.point(climb.best), climb.scores[climb.best], climb.bracketed, len(climb.scores))


def found(searching: Search) -> Found | None:
    """Where a search ends that needs nothing more than what is there."""
    while True:
        try:
            next(searching)
        except StopIteration as end:
            result: Found | None = end.value
            return result


class _Untrained(Exception):
    """A score is not there."""


class _Climb:
    """The best place so far, and all scores."""

    def __init__(self, space: Space, score: Score, budget: int) -> None:
        self._space, self._score = space, score
        self.budget = budget
        self.best = space.start()
        self.scores: dict[Place, float] = {}

    @property
    def spent(self) -> bool:
        return len(self.scores) >= self.budget

    @property
    def bracketed(self) -> bool:
        beside = [place.lr - self.best.lr for place in self.scores if replace(place, lr=self.best.lr) == self.best]
        return math.isfinite(self.scores[self.best]) and any(n < 0 for n in beside) and any(n > 0 for n in beside)

    def line(self, coordinate: str, step: int) -> Generator[Point, None, None]:
        """Follows a coordinate upwards while that is better, and else downwards."""
        yield from self._train(self.best)
        begin = self.best
        for direction in (step, -step):
            while True:
                place = replace(self.best, **{coordinate: getattr(self.best, coordinate) + direction})
                if not self._space.holds(place) or (place not in self.scores and self.spent):
                    break
                yield from self._train(place)
                if not self._better(place):
                    break
                self.best = place
            if self.best != begin:
                return

    def _train(self, place: Place) -> Generator[Point, None, None]:
        if place not in self.scores:
            point = self._space.point(place)
            yield point
            score = self._score(point)
            if score is None:
                raise _Untrained
            self.scores[place] = math.inf if math.isnan(score) else score

    def _better(self, place: Place) -> bool:
        """Of two that diverged the smaller learning rate."""
        score, best = self.scores[place], self.scores[self.best]
        return score < best or (score == best == math.inf and place.lr < self.best.lr)
