"""The seconds that sides took in each round, and what is computed of them: ratios, slopes, growth, and their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# For each side's name its seconds a step, one number per round; the same index is the same round.
Samples = dict[str, list[float]]


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
