"""Intervals and p-values against known answers, and how often intervals hold the truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bench.evidence import statistics
from bench.evidence.figures import Figure
from bench.evidence.statistics import FEW, equivalent, holm, paired, ratio, variance_ratio


def _figure(low: float, high: float, unit: str = "nats") -> Figure:
    return Figure("x", (low + high) / 2, low, high, 0.01, 20, unit, -1)


def test_a_comparison_is_of_pairs():
    # Starts differ by far more than the arms do: only pairing sees the difference of exactly -0.1 on average.
    starts = np.linspace(0, 100, 20)
    noise = np.resize([0.05, -0.05], 20)
    found = paired("x", starts - 0.1 + noise, starts, unit="nats", better=-1, note="Loss.")
    assert found.value == pytest.approx(-0.1)
    assert -0.13 < found.low < -0.1 < found.high < -0.07
    assert (found.n, found.unit, found.better, found.note) == (20, "nats", -1, "Loss.")
    # All twenty differences are negative: 2 / 2^20, or what the normal approximation makes of the ties.
    assert found.p < 1e-4


def test_wilcoxon_counts_signs_exactly():
    # Eight differences of one sign and different sizes: two of 2^8 outcomes are as extreme.
    arm = [1.0, 2.1, 3.3, 4.6, 6.0, 7.5, 9.1, 10.8]
    assert paired("x", arm, [0.0] * 8, unit="", better=1).p == pytest.approx(2 / 2**8)


def test_few_pairs_have_students_interval():
    found = paired("x", [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], unit="", better=1)
    half = 4.302653 / math.sqrt(3)  # the 97.5 % point of t with two degrees of freedom, standard deviation 1
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert "Student" in found.note


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_differences_without_spread(difference: float):
    base = np.linspace(0.3, 0.9, 20)
    many = paired("x", base + difference, base, unit="", better=1)
    assert many.value == pytest.approx(difference)
    assert many.high - many.low < 1e-12
    assert "equal" in many.note
    assert many.p == 1.0 if difference == 0 else many.p < 0.001
    few = paired("x", base[:3] + difference, base[:3], unit="", better=1)
    assert (few.low, few.high) == (-math.inf, math.inf)
    one = paired("x", [1.0 + difference], [1.0], unit="", better=1)
    assert (one.low, one.high, one.p) == (-math.inf, math.inf, 1.0)


def test_a_lone_outlier_leaves_a_finite_interval():
    found = paired("x", [0.0] * 19 + [1.0], [0.0] * 20, unit="", better=1)
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)
    assert found.low <= 0.05 <= found.high


def test_the_interval_leans_as_the_differences_do():
    # Right-skewed: BCa reaches further up. A percentile interval leans less, a basic one the other way.
    skewed = -np.log(np.linspace(0.02, 0.98, 24))
    found = paired("x", skewed, [0.0] * 24, unit="", better=1)
    assert 1.25 < (found.high - found.value) / (found.value - found.low) < 2


def test_the_interval_comes_out_the_same_again():
    arm = np.random.default_rng(3).standard_normal(20)
    assert paired("x", arm, arm[::-1], unit="", better=1) == paired("x", arm, arm[::-1], unit="", better=1)


def test_a_ratio_is_of_logarithms():
    found = ratio("x", [2.0, 8.0], [1.0, 1.0], better=-1)
    assert found.value == pytest.approx(4.0)  # the geometric mean; the arithmetic one is 5
    assert found.unit == "ratio"
    assert found.low * found.high == pytest.approx(16.0)  # symmetric in logarithms
    with pytest.raises(ValueError, match="positive"):
        ratio("x", [1.0, -1.0], [1.0, 1.0], better=-1)


def test_what_is_no_pair_or_no_number_raises():
    with pytest.raises(ValueError, match="no pairs"):
        paired("x", [1.0, 2.0], [1.0], unit="", better=1)
    with pytest.raises(ValueError, match="not finite"):
        paired("x", [1.0, math.inf], [1.0, 1.0], unit="", better=1)


def test_a_ratio_of_variances():
    rng = np.random.default_rng(0)
    base, own = rng.standard_normal(40), rng.standard_normal(40)
    quiet = variance_ratio("x", 0.2 * base + 0.03 * own + 5.0, base)
    expected = np.var(0.2 * base + 0.03 * own, ddof=1) / np.var(base, ddof=1)
    assert quiet.value == pytest.approx(expected)
    # Without the pairs the ratio of two such variances is known to a factor of 2.5.
    assert quiet.low < expected < quiet.high < 1.5 * quiet.low
    assert quiet.p < 0.001
    alike = variance_ratio("x", own, base[::-1] * np.std(own) / np.std(base))
    assert alike.value == pytest.approx(1.0)
    assert alike.low < 1 < alike.high
    assert alike.p > 0.05
    # Runs that go together differ as much from seed to seed.
    together = base + 0.1 * own
    together *= np.std(base) / np.std(together)
    assert variance_ratio("x", together, base).p > 0.05


def test_holms_procedure_on_a_known_case():
    # 0.01 · 4, 0.02 · 3 (at least the former), 0.03 · 2, 0.04 · 1 raised to what came before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "unit", "expected"),
    [(-0.01, 0.01, "nats", True), (-0.03, 0.01, "nats", False), (-0.01, 0.03, "nats", False),
     (0.99, 1.01, "ratio", True), (0.97, 1.01, "ratio", False)],
)  # fmt: skip
def test_equivalence_needs_the_whole_interval_within_the_margin(low: float, high: float, unit: str, expected: bool):
    assert equivalent(_figure(low, high, unit), 0.02) is expected


@pytest.mark.parametrize(("n", "lowest"), [(5, 0.92), (FEW - 1, 0.92), (FEW, 0.88), (24, 0.9)])
def test_intervals_hold_the_truth_as_often_as_they_say(n: int, lowest: float, monkeypatch: pytest.MonkeyPatch):
    """Of 200 normal samples 95 %, which has a standard error of 1.5 %, less what a bootstrap of few lacks."""
    monkeypatch.setattr(statistics, "RESAMPLES", 399)
    rng = np.random.default_rng(n)
    zeros = [0.0] * n
    held = [
        found.low <= 0 <= found.high
        for found in (paired("x", rng.standard_normal(n), zeros, unit="", better=1) for _ in range(200))
    ]
    assert lowest < np.mean(held) < 0.99


def test_holm_keeps_the_rate_of_any_false_alarm():
    rng = np.random.default_rng(1)
    alarms = [min(holm(list(rng.uniform(size=10)))) <= 0.05 for _ in range(2000)]
    assert 0.035 < np.mean(alarms) < 0.065
    assert all(a <= b for a, b in itertools.pairwise(holm([0.001, 0.01, 0.02, 0.9])))
