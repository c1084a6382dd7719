"""An arm is what its name says: against trajectories written down by hand, or made by torch's optimizers alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.evidence.arms import ARMS, RULES, build, has_muon, slow_weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def descend(arm: str, rule: str, steps: int, *, lr: float = 1.0, beta: float = 0.0, **more: float) -> list[float]:
    """Weights of one parameter whose gradient is always -1, after each step; starts at 0."""
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = build(ARMS[arm], RULES[rule], [weight], lr=lr, beta=beta, steps=steps, **more)
    seen = []
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()
        seen.append(weight.item())
    with slow_weights(optimizer):
        seen.append(weight.item())
    return seen


def test_lookahead_goes_back_half_the_way_every_fifth_step() -> None:
    # Syncs: 5 -> 2.5 and 7.5 -> 5; the last entry is the slow weight, where the sixth and seventh step don't count.
    assert descend("lookahead", "sgd", 7) == [1, 2, 3, 4, 2.5, 3.5, 4.5, 2.5]


def test_a_sync_treats_the_momentum_as_the_arm_is_named() -> None:
    momentum = [1.0, 1.5, 1.75, 1.875, 1.9375]  # of momentum .5 under a gradient of 1
    synced = sum(momentum) / 2
    sixth = {
        "lookahead": 1 + 0.5 * momentum[-1],
        "lookahead-pullback": 1 + 0.5 * (momentum[-1] / 2),
        "lookahead-reset": 1.0,
    }
    for arm, step in sixth.items():
        assert descend(arm, "sgd", 6, beta=0.5)[5] == pytest.approx(synced + step, rel=1e-12)


def test_outer_momentum_adds_nesterovs_step_along_the_way_of_five() -> None:
    # Of ways 5: b = 5, 2.5 + 5; steps .5 (.5 b + 5) = 3.75, then .5 (.5 * 7.5 + 5) = 4.375.
    assert descend("outer-momentum", "sgd", 10)[4:10:5] == [3.75, 8.125]


def test_the_small_learning_rate_is_the_base_at_alpha_times_it() -> None:
    for rule in ("sgd", "adamw"):
        small = descend("base-small-lr", rule, 4, lr=0.2, beta=0.5)
        assert small == pytest.approx(descend("base", rule, 4, lr=0.1, beta=0.5), rel=1e-12)
        assert small != pytest.approx(descend("base", rule, 4, lr=0.2, beta=0.5), rel=1e-3)


def test_averages_leave_training_alone_and_evaluate_on_the_mean() -> None:
    plain = descend("base", "sgd", 8)
    for arm in ("ema", "tail-average"):
        assert descend(arm, "sgd", 8)[:-1] == plain[:-1]
    # The tail of 8 steps begins at the sixth's weight.
    assert descend("tail-average", "sgd", 8)[-1] == 7.0
    # An average of long memory is further behind; with warm-up both are past the first steps.
    short, long = (descend("ema", "sgd", 40, own=own)[-1] for own in (0.5, 0.9))
    assert 30 < long < short < 40


def test_schedule_free_has_its_interpolation_in_place_of_the_first_moment() -> None:
    # z falls by lr a step, whatever beta is: x is the mean of z, y between x and z.
    for beta in (0.5, 0.9):
        *seen, x = descend("schedule-free", "sgd", 3, beta=beta)
        assert x == pytest.approx(2.0)
        assert seen[-1] == pytest.approx((1 - beta) * 3 + beta * 2)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "radam", "rmsprop", "lion", "muon"])
@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_learns_and_feels_beta(arm: str, rule: str) -> None:
    if rule == "muon" and not has_muon():
        pytest.skip("torch.optim.Muon came with torch 2.9")
    if not ARMS[arm].serves(RULES[rule]):
        with pytest.raises(ValueError, match=f"{arm} can't be built over {rule}"):
            build(ARMS[arm], RULES[rule], [torch.zeros(2, 2)], lr=0.1, beta=0.5, steps=1)
        return
    ends = [_train(arm, rule, beta) for beta in (0.5, 0.9)]
    first = _loss(_start()).item()
    assert all(loss < 0.9 * first for loss in ends)
    assert ends[0] != ends[1]


def test_a_schedule_reaches_both_halves_of_muon() -> None:
    if not has_muon():
        pytest.skip("torch.optim.Muon came with torch 2.9")
    params = _start()
    optimizer = build(ARMS["lookahead"], RULES["muon"], params, lr=0.1, beta=0.9, steps=2)
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _loss(params).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def _start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in ((4, 3), (1, 1, 4))]


def _loss(params: list[Tensor]) -> Tensor:
    return params[0].square().sum() + (params[1] - 1).square().sum()


def _train(arm: str, rule: str, beta: float) -> float:
    params = _start()
    optimizer = build(ARMS[arm], RULES[rule], params, lr=0.06, beta=beta, steps=43)
    for _ in range(43):
        optimizer.zero_grad()
        _loss(params).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with slow_weights(optimizer):
        return _loss(params).item()
