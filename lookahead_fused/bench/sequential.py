"""Is B slower than A? Answers while the pairs come in, with bounds on how often the answer is wrong.

The data are log ratios of speed, log(time of A / time of B), one a block of turns, in groups: a group is one pair of
processes, with its own placement in memory. Within a group the mean is trimmed, since a neighbour's burst hits one side
of a block and not the other. Between groups there is a second variance (DerSimonian and Laird's random effects,
pooled with what is known of it beforehand): as far as pairs of processes differ by more than their blocks explain, the
pair is what counts, and more blocks help no more.

Both errors are bounded over all looks together. The n-th look spends 6/(π n)² of each bound, which sums to all of it
however many looks there are (Bonferroni), so that the test may stop at any of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Of each end of a group's sorted blocks, left out of its mean.
TRIM = 0.2
FALSE_ALARM = 0.01
MISS = 0.03
# The standard deviation between pairs of processes that is believed before any is seen, and how many pairs that belief
# counts as much as: a few pairs alone cannot tell it, and a test that had to learn it from them would find nothing.
# Other work doubles it: 34 comparisons of an install with itself at a load of 8 to 10 had 0.8 %.
BETWEEN = 0.010
KNOWN = 8
# Pairs of processes before the first look, and where the time is over.
FIRST_LOOK = 5
FEWEST = 3


@dataclass(frozen=True)
class Estimate:
    """A log ratio with its standard error.

    Attributes:
        value: log(speed of B / speed of A).
        error: its standard error.
        freedom: degrees of freedom of the error.
        between: the standard deviation between pairs of processes that the blocks do not explain.
    """

    value: float
    error: float
    freedom: float
    between: float

    def bounds(self, level: float) -> tuple[float, float]:
        """An interval that misses the truth on either side with a probability of `level`."""
        reach = t_quantile(1 - level, self.freedom) * self.error
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Answer:
    """What is known at a look.

    Attributes:
        slower: B is slower than A, at the bound on false alarms.
        holds: B is faster than the limit, at the bound on misses.
    """

    slower: bool
    holds: bool

    @property
    def decided(self) -> bool:
        return self.slower or self.holds

    @property
    def fails(self) -> bool:
        """B is slower, and may be slower than the limit allows."""
        return self.slower and not self.holds


def share(look: int) -> float:
    """The part of an error bound that the n-th look spends, n = 1, 2, ..."""
    return 6 / (math.pi * look) ** 2


def estimate(groups: Sequence[Sequence[float]]) -> Estimate:
    """The log ratio behind groups of blocks, two blocks at least in each."""
    means, variances = zip(*(trimmed(group) for group in groups), strict=True)
    weights = [1 / variance for variance in variances]
    pooled = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    scatter = sum(w * (m - pooled) ** 2 for w, m in zip(weights, means, strict=True))
    scale = sum(weights) - sum(w * w for w in weights) / sum(weights)
    further = len(groups) - 1
    seen = max((scatter - further) / scale, 0.0) if further else 0.0
    between = (KNOWN * BETWEEN**2 + further * seen) / (KNOWN + further)
    weights = [1 / (variance + between) for variance in variances]
    value = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    # Satterthwaite: each variance is known only as well as its group's blocks, or the number of groups, tell.
    freedom: float = sum(_freedom(len(group)) for group in groups)
    part = between / (between + statistics.fmean(variances))
    freedom = 1 / (part**2 / (KNOWN + further) + (1 - part) ** 2 / freedom)
    return Estimate(value, math.sqrt(1 / sum(weights)), freedom, math.sqrt(between))


def trimmed(values: Sequence[float]) -> tuple[float, float]:
    """The trimmed mean and its variance, from the winsorized sample (Tukey and McLaughlin 1963)."""
    ordered = sorted(values)
    cut = int(TRIM * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    winsorized = [kept[0]] * cut + kept + [kept[-1]] * cut
    variance = statistics.variance(winsorized) * (len(ordered) - 1) / (len(kept) * (len(kept) - 1))
    # Blocks that are all equal, as on a clock too coarse for them: no group may weigh infinitely much.
    return statistics.fmean(kept), max(variance, 1e-12)


def _freedom(blocks: int) -> int:
    return blocks - 2 * int(TRIM * blocks) - 1


def answer(now: Estimate, look: int, limit: float, false_alarm: float = FALSE_ALARM, miss: float = MISS) -> Answer:
    """What an estimate says at the n-th look.

    Args:
        now: the estimate.
        look: n, from 1.
        limit: the ratio of speeds below which B is too slow, less than 1.
        false_alarm: the probability that "slower" is ever said where nothing changed.
        miss: the probability that "holds" is ever said where B is as slow as the limit.
    """
    _, upper = now.bounds(false_alarm * share(look))
    lower, _ = now.bounds(miss * share(look))
    return Answer(upper < 0, lower > math.log(limit))


def t_quantile(p: float, freedom: float) -> float:
    """Student's quantile, by bisection over the distribution function."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if _t_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cdf(t: float, freedom: float) -> float:
    """Student's distribution function at t >= 0, by its incomplete beta function's continued fraction (Lentz)."""
    x = freedom / (freedom + t * t)
    a, b = freedom / 2, 0.5
    if x >= (a + 1) / (a + b + 2):
        return 0.5 + 0.5 * _beta(b, a, 1 - x)
    return 1 - 0.5 * _beta(a, b, x)


def _beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function, where x is below the mean's neighbourhood."""
    if x <= 0:
        return 0.0
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 500):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + factor * d or tiny), 1 + factor / c or tiny
            fraction *= d * c
        if abs(d * c - 1) < 1e-13:
            break
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log) * fraction / a
