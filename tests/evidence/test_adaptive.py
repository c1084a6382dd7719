"""Lookahead with an α of its own at each sync: Proposition 1's choice, and the run against the package's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.evidence import adaptive
from bench.evidence.adaptive import CONDITION, DIMENSIONS, STEPS, K, chosen, contest, train
from lookahead_fused import LookaheadSGD

A = np.geomspace(1 / CONDITION, 1, DIMENSIONS)


def test_the_choice_has_the_least_loss_of_all():
    rng = np.random.default_rng(0)
    slow, fast = rng.standard_normal((2, 50, DIMENSIONS))
    found = chosen(slow - fast, A * fast, A)
    grid = np.linspace(adaptive.LEAST, 1, 1601)
    after = slow + grid[:, None, None] * (fast - slow)
    losses = (A * after**2).sum(axis=-1)
    assert found == pytest.approx(grid[losses.argmin(axis=0)], abs=1e-3)
    assert ((found > adaptive.LEAST) & (found < 1)).sum() > 10  # not all of them clipped


def test_no_way_is_no_choice():
    assert chosen(np.zeros((1, DIMENSIONS)), A[None], A) == pytest.approx(1.0)


@pytest.mark.parametrize(("arm", "alpha"), [("fixed", 0.35), ("momentum", 1.0)])
def test_a_run_is_the_packages(arm: str, alpha: float):
    (loss,), alphas = train(arm, [0.3], 0.9, alpha, 0.0, [7])
    start = np.random.default_rng(7).standard_normal(DIMENSIONS) / np.sqrt(A)
    weights, curvatures = torch.tensor(start, requires_grad=True), torch.tensor(A)
    optimizer = LookaheadSGD([weights], lr=0.3, momentum=0.9, k=K, alpha=alpha)
    for _ in range(STEPS):
        weights.grad = curvatures * weights.detach()
        optimizer.step()
    expected = 0.5 * float((curvatures * weights.detach() ** 2).sum())
    assert loss == pytest.approx([expected], rel=1e-9)
    assert alphas == pytest.approx(alpha)


def test_learning_rates_and_arms_share_the_noise():
    several, _ = train("oracle", [0.1, 0.2], 0.5, 0.0, 0.3, [3, 4])
    alone, _ = train("oracle", [0.2], 0.5, 0.0, 0.3, [4])
    assert several[1, 1] == pytest.approx(alone[0, 0], rel=1e-12)
    # At a learning rate of nothing all that is left is the start; other noise would not change it.
    assert train("fisher", [0.0], 0.5, 0.0, 0.3, [4])[0] == pytest.approx(train("fixed", [0.0], 0.9, 0.5, 0.3, [4])[0])


def test_a_run_that_overflows_has_a_finite_loss_that_loses():
    losses, _ = train("momentum", [0.1, 40.0], 0.9, 1.0, 0.0, [0])
    assert np.isfinite(np.log(losses)).all()
    assert losses[1, 0] > losses[0, 0]


def test_a_contest_is_won_by_tuning_and_told_on_fresh_seeds():
    result = contest("noisy", "fixed", 4, 6, 2.0, (0.5, 0.9))
    assert len(result["final"]) == 6  # type: ignore[arg-type]
    point = float(str(result["lr"])), float(str(result["beta"])), float(str(result["alpha"]))
    tuned, _ = train("fixed", [point[0]], point[1], point[2], 0.3, range(1000, 1004))
    for beta in (0.5, 0.9):
        for alpha in adaptive.ALPHAS["fixed"]:
            losses, _ = train("fixed", adaptive._lrs(2.0), beta, alpha, 0.3, range(1000, 1004))
            assert np.log(losses).mean(axis=1).min() >= np.log(tuned).mean() - 1e-9
    fresh, _ = train("fixed", [point[0]], point[1], point[2], 0.3, range(6))
    assert result["final"] == pytest.approx(fresh[0].tolist())
