"""Speeds against heavy ball's theory, and the cells where Lookahead diverges though heavy ball converges."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.evidence import quadratics
from bench.evidence.cycles import Method, rate
from bench.evidence.quadratics import BESIDE, EXPERIMENT, LIMITS, limit, region, speed
from bench.evidence.records import Records
from bench.evidence.stepping import Run

HEAVY_BALL = math.sqrt(0.9)


def test_heavy_ball_is_as_fast_as_its_theory_says() -> None:
    """Its rate is √β wherever it is underdamped; over all β, (√κ − 1) / (√κ + 1) at the best (Polyak 1964)."""
    assert float(rate(Method(momentum=0.9), 0.5, 1.0)) == pytest.approx(HEAVY_BALL, rel=1e-12)
    best = (math.sqrt(100) - 1) / (math.sqrt(100) + 1)
    at_best = speed(Method(momentum=best**2), 100, 200)
    assert at_best["speed"] == pytest.approx(-math.log(best), rel=0.03)
    # Both ends are critically damped there: γ = (1 + √β)².
    assert at_best["lr"] == pytest.approx((1 + best) ** 2, rel=0.02)
    # Without momentum (κ − 1) / (κ + 1) at γ = 2 / (1 + 1/κ).
    plain = speed(Method(), 100, 100)
    assert plain["speed"] == pytest.approx(-math.log(99 / 101), rel=0.03)
    assert plain["lr"] == pytest.approx(2 / 1.01, rel=1e-3)


def test_a_method_that_converges_nowhere_has_no_speed() -> None:
    assert speed(replace(BESIDE["none"], momentum=0.9999, alpha=1e-9), 20, 10)["speed"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "lr", "expected"),
    [
        (0.99, 1.0, {"heavy-ball": 0.99499, "none": 1.00042, "pullback": 0.99121}),
        (0.9, 3.0, {"heavy-ball": 0.94868, "none": 1.02083, "pullback": 0.97569, "reset": 1.03728}),
    ],
)
def test_lookahead_that_keeps_the_momentum_diverges_where_heavy_ball_converges(
    beta: float, lr: float, expected: dict[str, float]
) -> None:
    """κ = 100, k = 5, α = 0.5; growth of a gradient on the worst curvature."""
    assert (beta, lr) in LIMITS
    found = limit(beta, lr)
    for word, growth in expected.items():
        assert found[word] == pytest.approx(growth, abs=1e-5)
    for word in BESIDE:
        assert found[f"{word}-package"] == pytest.approx(found[word], rel=1e-9)  # type: ignore[arg-type]


def test_the_packages_run_diverges_where_torchs_converges() -> None:
    """The same cell, stepped from 1 for 600 gradients: growth 1.021 against .949 and .976."""
    a = torch.tensor([float(limit(0.9, 3.0)["none-curvature"])], dtype=torch.float64)  # type: ignore[arg-type]
    sizes = {}
    for word, method in {"heavy-ball": Method(), **BESIDE}.items():
        run = Run(replace(method, momentum=0.9), 3.0, torch.ones(1, dtype=torch.float64), a)
        for _ in range(600 // method.k):
            run.cycle(lambda _: None)
        sizes[word] = abs(float(run.slow()))
    assert sizes["none"] > 1e3
    assert sizes["heavy-ball"] < 1e-9
    assert sizes["pullback"] < 1e-4


def test_a_region_counts_where_heavy_ball_alone_converges() -> None:
    """Heavy ball converges for γ < 2 (1 + β)."""
    for word, diverges in (("none", True), ("pullback", False), ("reset", True)):
        found = region(BESIDE[word], 240, 24)
        heavy, own = np.array(found["heavy_ball"]), np.array(found["rates"])
        betas, lrs = np.array(found["betas"])[:, None], np.array(found["grid"])[None, :]
        inside = lrs < 2 * (1 + betas) * (1 - 1e-9)
        assert (heavy[inside] < 1).all()
        assert (heavy[~inside] > 1 - 1e-9).all()
        alone = (heavy < 1) & (own > 1)
        assert bool(alone.any()) is diverges
        assert not alone[0].any()  # without momentum there is none to keep
    lost = {word: _share(word) for word in ("none", "pullback", "reset")}
    assert lost["pullback"] == 0 < lost["none"] < lost["reset"]


def test_figures_are_those_of_the_largest_run_and_named_before() -> None:
    records = Records(None)
    small, large = {"curvatures": 30, "lrs": 12}, {"curvatures": 60, "lrs": 24}
    for size, factor in ((large, 2.0), (small, 1.0)):
        for beta in quadratics.BETAS:
            records.add(
                "quadratics", EXPERIMENT.revision, {"part": "heavy-ball", "beta": beta, **size}, {"speed": 1.0}, 0
            )
            for word, method in BESIDE.items():
                own = vars(replace(method, momentum=beta))
                setting = {"part": "speed", "word": word, "method": own, **size}
                records.add("quadratics", EXPERIMENT.revision, setting, {"speed": factor * beta, "lr": 1.0}, 0)
    figures = {figure.name: figure for figure in EXPERIMENT.figures(records)}
    assert figures["quadratics.speed.beta-0.8.none"].value == pytest.approx(1.6)
    assert figures["quadratics.speed.any-beta.none"].value == pytest.approx(1.98)
    assert all(any(fnmatch.fnmatch(name, known) for known in EXPERIMENT.names()) for name in figures)


def test_a_picture_of_a_region_is_the_same_each_time() -> None:
    records = Records(None)
    setting = {"part": "region", "word": "none", "method": vars(BESIDE["none"]), "curvatures": 60, "lrs": 24}
    found = region(BESIDE["none"], 60, 24)
    records.add("quadratics", EXPERIMENT.revision, setting, found, 0)
    (figure,) = EXPERIMENT.figures(records)
    assert figure.name == "quadratics.none.diverging-cells"
    converging = np.array(found["rates"])[np.array(found["heavy_ball"]) < 1]
    assert figure.value == (converging > 1).sum() / len(converging) > 0
    (picture,) = EXPERIMENT.pictures(records)
    assert picture == EXPERIMENT.pictures(records)[0]
    assert "heavy ball alone" in picture.svg


def _share(word: str) -> float:
    found = region(BESIDE[word], 240, 36)
    heavy, own = np.array(found["heavy_ball"]), np.array(found["rates"])
    return float(((heavy < 1) & (own > 1)).sum() / (heavy < 1).sum())
