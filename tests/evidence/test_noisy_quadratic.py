"""The linear maps of cycles.py against closed forms, and lookahead_fused's optimizers against both."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.evidence import noisy_fronts as fronts
from bench.evidence.cycles import (
    Method,
    covariance,
    cycle,
    lookahead_contraction,
    lookahead_variance,
    radius,
    rate,
    sgd_variance,
    steady_variance,
    steady_variances,
)
from bench.evidence.experiment import Scale
from bench.evidence.noisy_quadratic import EXPERIMENT, FAMILIES
from bench.evidence.records import Records
from bench.evidence.stepping import impulse_variance, measured_radius, sample

SETTINGS = [method for family in FAMILIES.values() for method in family.settings]


def test_the_lyapunov_equation_gives_the_papers_closed_form() -> None:
    for k in (1, 5, 20):
        for alpha in (0.2, 0.5, 1.0):
            for a in (0.01, 0.4, 1.7):
                method = Method(k=k, alpha=alpha)
                closed = lookahead_variance(a, 0.9, k, alpha, noise=1.3)
                assert steady_variance(method, a, 0.9, noise=1.3) == pytest.approx(closed, rel=1e-11)
                contraction = abs(lookahead_contraction(a, 0.9, k, alpha))
                assert float(radius(cycle(method, a, 0.9)[0])) == pytest.approx(contraction, rel=1e-11)
    # By hand: γ 1, a 1/2, s 1 forgets half in each step, so that the variance is 1 + 1/4 + 1/16 + ... = 4/3; with k 1
    # and α 1/2 it keeps 3/4 and adds 1/4: (1/4) / (1 - 9/16) = 4/7.
    assert sgd_variance(0.5, 1.0) == pytest.approx(4 / 3)
    assert lookahead_variance(0.5, 1.0, 1, 0.5) == pytest.approx(4 / 7)


@pytest.mark.parametrize("method", SETTINGS, ids=str)
def test_the_package_answers_single_kicks_as_the_maps_say(method: Method) -> None:
    a = np.array([0.3, 0.7])
    expected = [steady_variance(method, one, 1.0) for one in a]
    np.testing.assert_allclose(impulse_variance(method, a, 1.0), expected, rtol=1e-9)
    if method.workers == 1:
        np.testing.assert_allclose(measured_radius(method, a, 1.0), radius(cycle(method, a, 1.0)[0]), rtol=1e-9)


def test_many_variances_at_once_are_those_of_single_ones() -> None:
    a = np.array([0.02, 0.5, 1.4, 6.0])
    for method in SETTINGS[:16]:
        found = steady_variances(method, a, 1.0)
        for one, variance in zip(a, found, strict=True):
            if math.isfinite(variance):
                assert variance == pytest.approx(steady_variance(method, one, 1.0), rel=1e-9)
            else:
                assert float(radius(cycle(method, one, 1.0)[0])) >= 1
    assert np.isinf(steady_variances(Method(), a, 1.0)).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="no steady state"):
        steady_variance(Method(), 2.5, 1.0)


def test_a_covariance_by_squaring_is_that_of_a_loop() -> None:
    total, added = cycle(Method(momentum=0.8, k=3, alpha=0.5, outer_momentum=0.6), [0.1, 0.9], 0.7)
    power, spread = np.broadcast_to(np.eye(5), total.shape), np.zeros(total.shape)
    for _ in range(11):
        power, spread = total @ power, total @ spread @ np.swapaxes(total, -1, -2) + added
    found = covariance(total, added, 11)
    np.testing.assert_allclose(found[0], power, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found[1], spread, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", [one for one in SETTINGS if one.workers == 1], ids=str)
def test_a_rate_is_the_whole_maps_radius(method: Method) -> None:
    """It is taken from a smaller matrix, and for two states from a formula."""
    a = np.geomspace(0.01, 3, 9)
    whole = radius(cycle(method, a, 1.0)[0]) ** (1 / method.k)
    np.testing.assert_allclose(rate(method, a, 1.0), whole, rtol=1e-6)


def test_samples_scatter_as_their_standard_errors_say() -> None:
    method = Method(momentum=0.9, k=5, alpha=0.5)
    exact = steady_variance(method, 0.3, 1.0)
    samples = [sample(method, 0.3, 1.0, variance=exact, error=0.02, replicas=500, seed=seed) for seed in range(12)]
    scores = [(one.variance - exact) / one.standard_error for one in samples]
    assert 0.5 < math.sqrt(sum(z * z for z in scores) / len(scores)) < 1.6
    assert all(one.standard_error < 0.03 * exact for one in samples)
    assert max(one.mean_error for one in samples) < 0.01
    again = sample(method, 0.3, 1.0, variance=exact, error=0.02, replicas=500, seed=3)
    assert again == samples[3]


def test_workers_divide_the_variance() -> None:
    one = Method(momentum=0.5, k=4, alpha=0.6, outer_momentum=0.3)
    variance = impulse_variance(one, np.array([0.4]), 1.0)[0]
    four = impulse_variance(replace(one, workers=4), np.array([0.4]), 1.0)[0]
    assert four == pytest.approx(variance / 4, rel=1e-12)


def test_a_fronts_losses_are_sgds_closed_form() -> None:
    """½ Σ a (mean² + variance), where a gradient's noise has the variance a."""
    result = fronts.front(Method(), factor=4.0)
    lrs = 3.9 / 4.0 ** np.arange(len(result["steady"]) + 1)[1:]  # type: ignore[arg-type]  # 3.9 itself diverges
    a = fronts.SPECTRUM
    for place, lr in enumerate(lrs):
        kept = (1 - lr * a) ** 2
        final = lr**2 * a / (1 - kept)
        assert result["steady"][place] == pytest.approx((a * final).sum() / 2, rel=1e-8)  # type: ignore[index]
        after = (a * (kept**1000 + final * (1 - kept**1000))).sum() / 2
        assert result["after_1000"][place] == pytest.approx(after, rel=1e-8)  # type: ignore[index]


def test_a_front_is_the_least_loss_among_cells_that_are_as_quiet() -> None:
    results = [
        {
            "lrs": [3.0, 1.0],
            "steady": [0.4, 0.1],
            "after_100": [5.0, 9.0],
            "after_1000": [1.0, 4.0],
            "after_10000": [1, 1],
        },
        # Louder without being better: nobody has to take its second learning rate.
        {
            "lrs": [2.0, 4.0],
            "steady": [0.2, 0.8],
            "after_100": [7.0, 8.0],
            "after_1000": [6.0, 9.0],
            "after_10000": [1, 1],
        },
    ]
    front = fronts.read_front(results)  # type: ignore[arg-type]
    # Half way from 0.1 to 0.4, and from 4 to 1, is 0.2 and 2 in logarithms; the other setting is worse there.
    at = front.at(np.array([0.05, 0.1, 0.2, 0.4, 9.0]), 1000)
    np.testing.assert_allclose(at, [math.inf, 4.0, 2.0, 1.0, 1.0])
    assert front.at(np.array([0.4]), 100) == pytest.approx(5)
    assert (front.best(1000), front.best(100), front.quietest()) == ((1.0, 3.0), (5.0, 3.0), 0.1)
    only = fronts.Front(front.curves[1:])
    np.testing.assert_allclose(only.at(np.array([0.1, 0.2, 0.9]), 1000), [math.inf, 6.0, 6.0])
    halved = fronts.Front([fronts.Curve(one.steady, one.lrs, one.horizons / 2) for one in front.curves])
    assert fronts.ratio_along(halved, front, 1000) == pytest.approx(0.5)
    # A curve of which every second learning rate is left out is hardly worse for that.
    fine, coarse = (fronts.read_front([fronts.front(Method(), factor)]) for factor in (2**0.5, 2.0))
    assert fronts.ratio_along(coarse, fine, 1000) == pytest.approx(1, abs=0.02)


@pytest.fixture(scope="module")
def comparisons() -> dict[str, Any]:
    return fronts.comparisons()


def test_at_equal_speed_sgd_contracts_as_much_a_gradient(comparisons: dict[str, Any]) -> None:
    found = comparisons
    for a, ratio in zip(fronts.CURVATURES, found["equal_speed_sgd"], strict=True):
        slower = 1 - (0.5 + 0.5 * (1 - a) ** 5) ** (1 / 5)
        expected = lookahead_variance(1.0, a, 5, 0.5) / sgd_variance(1.0, slower)
        assert ratio == pytest.approx(expected, rel=1e-9)
    # Heavy ball's least variance at a rate r, at critical damping or beside it, cannot be above SGD's.
    assert all(ratio > 0.95 for ratio in found["equal_speed_tuned"])


def test_figures_of_the_smallest_run(comparisons: dict[str, Any]) -> None:
    """Of what is quick of it."""
    records = Records(None)
    families = {"lookahead-momentum", "outer-momentum", "workers"}
    for job in EXPERIMENT.jobs(Scale.SMOKE, records):
        part, family = job.setting["part"], job.setting.get("family")
        if part != "sampled" or family in families:
            result = comparisons if part == "comparisons" else job.run()
            records.add(EXPERIMENT.name, EXPERIMENT.revision, job.setting, result, 0.0)
    figures = {figure.name: figure for figure in EXPERIMENT.figures(records)}
    assert all(any(fnmatch.fnmatch(name, known) for known in EXPERIMENT.names()) for name in figures)
    for word in ("kicks", "closed-form", "contraction"):
        assert figures[f"noisy-quadratic.{word}.worst-relative-error"].value < 1e-9
    worst = figures["noisy-quadratic.worst-relative-error"]
    assert 1e-5 < worst.value < 0.01  # sampled: neither exact nor wrong
    assert worst.value == max(figures[f"noisy-quadratic.{family}.worst-relative-error"].value for family in families)
    # (.7953 / 1.7953) of V(γ), over V(αγ) = .5 · 1.9 / 1.95 of it, at γA = .1.
    kept = 0.9**5
    expected = (0.5 + 0.5 * kept) / (1.5 + 0.5 * kept) / (0.5 * 1.9 / 1.95)
    assert figures["noisy-quadratic.lookahead-over-small-lr-variance"].value == pytest.approx(expected)
    assert figures["noisy-quadratic.workers.variance-times-workers"].value == pytest.approx(1.0, abs=1e-12)
    (picture,) = EXPERIMENT.pictures(records)
    assert EXPERIMENT.pictures(records) == [picture]
    assert picture.svg.count("<path") > 6
    assert "<dc:date>" not in picture.svg
