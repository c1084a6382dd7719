"""The convex problems' data and risks, the runs on them, and what figures make of results that are known."""

from __future__ import annotations

import fnmatch
import math

import pytest
import torch

from bench.evidence import convex
from bench.evidence.convex_problems import DTYPE, PROBLEMS, BreastCancer, LeastSquares, Problem, first_below
from bench.evidence.convex_runs import ALPHA, K, Race, Runner, Runs, generalisation, race
from bench.evidence.records import Records


@pytest.fixture(params=list(PROBLEMS))
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()  # type: ignore[no-any-return]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_slope_is_the_losss_derivative(problem: Problem) -> None:
    outputs = torch.randn(50, dtype=DTYPE, generator=seeded(0), requires_grad=True)
    targets = torch.randn(50, dtype=DTYPE, generator=seeded(1)).sign()
    (expected,) = torch.autograd.grad(problem.loss(outputs, targets).sum(), outputs)
    torch.testing.assert_close(problem.slope(outputs.detach(), targets), expected)


def test_an_excess_is_the_mean_losss_over_its_least(problem: Problem) -> None:
    weights = torch.randn(3, problem.features, dtype=DTYPE, generator=seeded(0)) * 0.3
    inputs, targets = problem.fresh((100_000,), seeded(1))
    means = problem.loss(weights @ inputs.T, targets).mean(1) + 0.5 * problem.ridge * (weights**2).sum(1)
    found = problem.excess(weights)
    assert (found > 0).all()
    # Differences between weights say the same of both; the losses scatter by a few thousandths.
    torch.testing.assert_close(found - found[0], means - means[0], atol=0.03, rtol=0.02)


def test_the_logistic_objectives_least_value_is_its_least() -> None:
    problem = BreastCancer()
    at_least = problem._minimum()
    assert float(problem.excess(at_least)) == pytest.approx(0, abs=1e-14)
    nearby = at_least + 1e-3 * torch.randn(20, problem.features, dtype=DTYPE, generator=seeded(0))
    assert (problem.excess(nearby) > 0).all()


def test_a_test_risk_is_of_examples_that_no_replica_was_given() -> None:
    problem = BreastCancer()
    sets = problem.sets(5, 200, seeded(0))
    weights = torch.randn(5, problem.features, dtype=DTYPE, generator=seeded(1))
    found = problem.test_risk(weights)
    for replica in range(5):
        given = torch.cat([sets.inputs[replica], sets.spare_input[replica][None]])
        others = [place for place, x in enumerate(problem.inputs) if not bool((given == x).all(1).any())]
        assert len(others) == 569 - 201
        expected = problem.loss(problem.inputs[others] @ weights[replica], problem.targets[others]).mean()
        assert float(found[replica]) == pytest.approx(float(expected))
    squares = LeastSquares()
    best = squares.best.expand(2, -1)
    assert squares.test_risk(best).tolist() == [0.5, 0.5]  # the noise's


def test_twins_differ_in_one_example(problem: Problem) -> None:
    sets = problem.sets(4, 30, seeded(0))
    inputs, targets = sets.twins()
    assert torch.equal(inputs[0], sets.inputs)
    differing = (inputs[0] != inputs[1]).any(-1)
    assert differing[:, 0].all()
    assert not differing[:, 1:].any()
    assert torch.equal(inputs[1, :, 0], sets.spare_input)
    assert torch.equal(targets[1, :, 0], sets.spare_target)
    assert torch.equal(targets[0, :, 1:], targets[1, :, 1:])


def test_runners_are_torchs_sgd_and_algorithm_1(problem: Problem) -> None:
    """Over the same batches, each at its own learning rate."""
    lrs = (0.05, 0.1)
    runners = [Runner(lookahead, lr) for lookahead in (False, True) for lr in lrs]
    runs = Runs(problem, runners, 3, ridge=0.1)
    by_torch = [torch.zeros(3, problem.features, dtype=DTYPE, requires_grad=True) for _ in lrs]
    sgd = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(by_torch, lrs, strict=True)])
    fast = [torch.zeros(3, problem.features, dtype=DTYPE) for _ in lrs]
    slow = [each.clone() for each in fast]

    def gradient(weights: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        slopes = problem.slope((inputs @ weights[..., None])[..., 0], targets)
        return (slopes[..., None] * inputs).mean(1) + 0.1 * weights

    for step in range(1, 2 * K + 3):
        inputs, targets = problem.fresh((3, 4), seeded(step))
        for p in by_torch:
            p.grad = gradient(p.detach(), inputs, targets)
        sgd.step()
        for place, lr in enumerate(lrs):
            fast[place] = fast[place] - lr * gradient(fast[place], inputs, targets)
            if step % K == 0:
                slow[place] = slow[place] + ALPHA * (fast[place] - slow[place])
                fast[place] = slow[place]
        runs.step(inputs, targets)
    found = runs.slow()
    for place, expected in enumerate([*by_torch, *slow]):
        torch.testing.assert_close(found[place], expected.detach(), rtol=1e-12, atol=1e-14)
    # The gradients come by matrix products of another order; with the same ones it is θ − γ g to the bit.
    runs, alone = Runs(problem, [Runner(False, 0.07)], 3), torch.zeros(3, problem.features, dtype=DTYPE)
    for each in torch.randn(6, 3, problem.features, dtype=DTYPE, generator=seeded(0)):
        runs.params[0].grad = each
        runs.optimizer.step()
        alone = alone - 0.07 * each
    assert torch.equal(runs.params[0], alone)


def test_a_run_without_a_difference_between_twins_has_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = LeastSquares()
    how = {"replicas": 6, "examples": 20, "steps": 20, "batch": 4, "seed": 0}
    found = generalisation(problem, 0.5, **how)  # type: ignore[arg-type]
    assert all(max(found[f"{arm}.distance"]) > 0 for arm in ("lookahead", "sgd", "small-lr", "short"))
    real = problem.sets

    def same(replicas: int, examples: int, generator: torch.Generator) -> object:
        sets = real(replicas, examples, generator)
        return type(sets)(sets.inputs, sets.targets, sets.inputs[:, 0], sets.targets[:, 0])

    monkeypatch.setattr(problem, "sets", same)
    found = generalisation(problem, 0.5, **how)  # type: ignore[arg-type]
    assert set(found["lookahead.distance"]) == {0.0} == set(found["sgd.loss-distance"])
    # What trains more fits its training set better; the shorter run is the first half of SGD's.
    assert sum(found["sgd.train"]) < sum(found["short.train"])
    half = generalisation(problem, 0.5, **{**how, "steps": 10})  # type: ignore[arg-type]
    assert half["sgd.train"] == found["short.train"]
    with pytest.raises(ValueError, match="do not end with a sync"):
        generalisation(problem, 0.5, **{**how, "steps": 21})  # type: ignore[arg-type]


def test_when_a_path_is_first_below() -> None:
    assert first_below([5, 10], [1.0, 0.25], 0.5) == pytest.approx(7.5)
    assert first_below([5, 10, 15], [1.0, 0.5, 2.0], 0.5) == 10
    assert first_below([5, 10], [0.4, 0.2], 0.5) == 5
    assert first_below([5, 10], [1.0, 0.6], 0.5) == math.inf


def test_a_race_finds_the_best_learning_rate_and_says_who_is_late() -> None:
    problem = LeastSquares(noise=0.01)
    how = Race(target=0.05, lrs=(0.01, 0.2, 0.4, 50.0), tuning=4, blocks=3, block=4, most=400)
    found = race(problem, how, batch=16, seed=0)
    assert found["sgd.lr"] == [0.4]
    assert found["lookahead.lr"] == [0.4]
    assert found["sgd.edge"] == found["sgd.late"] == [0.0]
    assert len(found["sgd"]) == 3
    # Without noise to speak of Lookahead at the same learning rate takes 1 / α times as many.
    assert sum(found["lookahead"]) / sum(found["sgd"]) == pytest.approx(2, rel=0.25)
    late = race(problem, Race(1e-9, (0.01, 0.4), 4, 3, 4, 30), batch=16, seed=0)
    assert late["sgd"] == [30.0] * 3
    assert late["sgd.late"] == [3.0]


def test_figures_of_known_results() -> None:
    records = Records(None)
    values = {"train": 0.1, "test": 0.3, "distance": 0.2, "loss-distance": 0.05}
    result = {f"{arm}.{word}": [value] * 8 for arm in ("sgd", "small-lr", "short") for word, value in values.items()}
    result.update({f"lookahead.{word}": [2 * value] * 8 for word, value in values.items()})
    # One pair of twins in each half never saw the example that differs, and the others are further apart for it.
    for arm in ("lookahead", "sgd", "small-lr", "short"):
        distances = result[f"{arm}.distance"]
        distances[0] = distances[4] = 0.0
        distances[1] = distances[5] = 2 * distances[1]
    setting = {"part": "generalisation", "problem": "logistic", "lr": 0.5, "replicas": 8}
    records.add("convex", convex.EXPERIMENT.revision, setting, result, 0)  # type: ignore[arg-type]
    for batch, gradients in ((1, 800.0), (2, 500.0), (8, 100.0)):
        raced = {"lookahead": [gradients] * 8, "sgd": [gradients / 2] * 8}
        raced.update({f"{arm}.{w}": [0.0] for arm in ("lookahead", "sgd") for w in ("late", "lr", "edge")})
        setting = {"part": "race", "problem": "logistic", "batch": batch, "replicas": 8}
        records.add("convex", convex.EXPERIMENT.revision, setting, raced, 0)  # type: ignore[arg-type]
    figures = {figure.name: figure.value for figure in convex.EXPERIMENT.figures(records)}
    for word, value in {"gap": 0.2, "risk": 0.3, "train-risk": 0.1, "stability": 0.2, "loss-stability": 0.05}.items():
        assert figures[f"convex.logistic.{word}.lookahead-sgd"] == pytest.approx(value)
    assert figures["convex.logistic.stability-ratio.lookahead-small-lr"] == pytest.approx(2)
    assert figures["convex.logistic.batch-speedup.lookahead"] == pytest.approx(1)
    assert figures["convex.logistic.batch-speedup.sgd.batch-2"] == pytest.approx(0.8)
    assert figures["convex.logistic.iterations.lookahead-sgd.batch-8"] == pytest.approx(2)
    assert all(any(fnmatch.fnmatch(name, known) for known in convex.EXPERIMENT.names()) for name in figures)
    (picture,) = convex.EXPERIMENT.pictures(records)
    assert picture == convex.EXPERIMENT.pictures(records)[0]
