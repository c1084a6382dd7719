"""Comparisons over paired seeds: an estimate with its interval, a p-value, and what holds of many at once.

Every comparison is paired: place i of both samples had the same start and the same batches. Intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from bench.evidence.figures import Figure

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 20190719
# With fewer pairs than this a bootstrap covers less than it says: of 1000 normal samples 86 % at 6 pairs, 91 % at 12,
# 93 % at 16, where Student's interval has its 95 %.
FEW = 16
# With fewer pairs than this Wilcoxon's smallest two-sided p-value, 2 / 2^n, is above 5 %: differences without spread
# say nothing then.
FEWEST = 6


def paired(name: str, arm: Sequence[float], base: Sequence[float], *, unit: str, better: int, note: str = "") -> Figure:
    """Mean of arm minus base, its interval (BCa bootstrap), and the p-value of Wilcoxon's signed-rank test.

    Below `FEW` pairs the interval is Student's. Differences without any spread have a point for an interval, and below
    `FEWEST` pairs an unbounded one. The note says each of these.
    """
    differences = _pairs(name, arm, base, lambda a, b: a - b)
    value = float(np.mean(differences))
    low, high, how = _interval(differences)
    return Figure(
        name, value, min(low, value), max(high, value), _wilcoxon(differences), len(differences), unit, better,
        _notes(note, how),
    )  # fmt: skip


def ratio(name: str, arm: Sequence[float], base: Sequence[float], *, better: int, note: str = "") -> Figure:
    """Geometric mean of arm / base, as `paired` over the logarithms; unit "ratio". All values must be positive."""
    if min(*arm, *base, 1.0) <= 0:
        raise ValueError(f"{name}: a ratio needs positive values")
    logs = paired(name, [math.log(a) for a in arm], [math.log(b) for b in base], unit="", better=better, note=note)
    # exp() overflows where an unbounded interval or the ratio of a diverged run leaves the doubles.
    low, value, high = (math.inf if x > 709 else math.exp(x) for x in (logs.low, logs.value, logs.high))
    return Figure(name, value, low, high, logs.p, logs.n, "ratio", better, logs.note)


def variance_ratio(
    name: str, arm: Sequence[float], base: Sequence[float], *, better: int = -1, note: str = ""
) -> Figure:
    """Variance of the arm over that of the base, between seeds; unit "ratio".

    Interval: BCa bootstrap over pairs of the logarithm. p-value: Pitman and Morgan's test, by which two paired samples
    have one variance where their sums and their differences are uncorrelated; by ranks, which needs no normality.
    """
    _pairs(name, arm, base, lambda a, b: a - b)
    x, y = np.asarray(arm, dtype=float), np.asarray(base, dtype=float)
    n = len(x)
    if n < FEWEST:
        raise ValueError(f"{name}: a ratio of variances needs {FEWEST} pairs at least, and there are {n}")
    if _equal(x) or _equal(y):
        raise ValueError(f"{name}: one of the samples has no variance")
    value = float(np.var(x, ddof=1) / np.var(y, ddof=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = _bootstrap((x, y), lambda a, b, axis: np.log(_var(a, axis) / _var(b, axis)))
    how = ""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high, how = -math.inf, math.inf, "Interval unbounded: too few values differ."
    sums, differences = x + y, x - y
    p = 1.0 if _equal(sums) or _equal(differences) else float(stats.spearmanr(sums, differences).pvalue)
    low, high = math.exp(low), math.inf if high > 709 else math.exp(high)
    return Figure(name, value, min(low, value), max(high, value), p, n, "ratio", better, _notes(note, how))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: those up to 0.05 are all true with a probability of 95 %."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def equivalent(figure: Figure, margin: float) -> bool:
    """Whether the whole interval is nearer than `margin` to no difference, which is 1 for ratios and 0 else."""
    return -margin < figure.low - no_difference(figure) and figure.high - no_difference(figure) < margin


def no_difference(figure: Figure) -> float:
    """The value of a comparison of equals."""
    return 1.0 if figure.unit == "ratio" else 0.0


def _pairs(
    name: str, arm: Sequence[float], base: Sequence[float], of: Callable[[Any, Any], Any]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    if len(arm) != len(base) or len(arm) == 0:
        raise ValueError(f"{name}: {len(arm)} and {len(base)} values are no pairs")
    x, y = np.asarray(arm, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"{name}: a value is not finite; a run that diverged needs a score that is")
    result: np.ndarray[Any, np.dtype[np.float64]] = of(x, y)
    return result


def _interval(differences: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float, str]:
    """(low, high, what to say of it) of the mean."""
    n = len(differences)
    if _equal(differences):
        if n < FEWEST:
            return -math.inf, math.inf, f"Interval unbounded: {n} seeds without spread."
        return float(differences.mean()), float(differences.mean()), f"All {n} differences are equal."
    if n >= FEW:
        low, high = _bootstrap((differences,), lambda d, axis: np.mean(d, axis=axis))
        if math.isfinite(low) and math.isfinite(high):
            return low, high, ""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half), f"Student's interval over {n} seeds."


def _bootstrap(samples: tuple[Any, ...], statistic: Callable[..., Any]) -> tuple[float, float]:
    found = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(SEED),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _wilcoxon(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    if not differences.any():
        return 1.0
    return float(min(1.0, stats.wilcoxon(differences).pvalue))


def _equal(values: np.ndarray[Any, np.dtype[np.float64]]) -> bool:
    """Equal but for the rounding of a subtraction: no bootstrap and no variance can be made of that."""
    return bool(np.ptp(values) <= 1e-12 * max(float(np.abs(values).max()), 1e-300))


def _var(values: Any, axis: int) -> Any:
    return np.var(values, axis=axis, ddof=1)


def _notes(note: str, further: str) -> str:
    if not note or not further:
        return note or further
    return f"{note.removesuffix('.')}. {further}"
