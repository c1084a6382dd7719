"""Momentum of the slow weights: when its buffer exists and moves, and which step sizes go with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    BackendCase,
    Lockstep,
    assert_unchanged,
    composed,
    make_grads,
    make_optimizer,
    make_params,
    oracle_settings,
    seeded,
    snapshot,
)

BUFFER = "outer_momentum_buffer"
SETTINGS: dict[str, Any] = {"lr": 0.1, "k": 3, "alpha": 0.7, "outer_momentum": 0.5}
# The last is not fused.
RULES = ("adamw", "sgd", "wrapped-adamw", "wrapped-nadam")


def train(optimizer: Any, params: list[Any], steps: range) -> None:
    for t in steps:
        for p, g in zip(params, make_grads(params, generator=seeded(t)), strict=True):
            p.grad = g
        optimizer.step()


def key(rule: str, name: str) -> str:
    return f"lookahead_{name}" if rule.startswith("wrapped") else name


@pytest.mark.parametrize("rule", RULES)
def test_the_buffer_moves_at_a_sync_alone(backend: BackendCase, rule: str) -> None:
    """It starts at 0 in the first step, with all other state, and every call of sync() moves it."""
    params = make_params([(4, 3), (5,)], device=backend.device)
    optimizer = make_optimizer(rule, params, backend, **SETTINGS)
    train(optimizer, params, range(2))
    assert all(not optimizer.state[p][BUFFER].any() for p in params)
    train(optimizer, params, range(2, 3))
    before = [optimizer.state[p][BUFFER].clone() for p in params]
    assert all(b.any() for b in before)
    train(optimizer, params, range(3, 5))
    for p, b in zip(params, before, strict=True):
        assert torch.equal(optimizer.state[p][BUFFER], b)
    optimizer.sync()
    optimizer.sync()  # theta is phi: s = 0, b <- mu b
    middle = [optimizer.state[p][BUFFER].clone() for p in params]
    optimizer.sync()
    for p, b in zip(params, middle, strict=True):
        assert torch.equal(optimizer.state[p][BUFFER], 0.5 * b)


def test_an_outer_step_is_one_of_torchs_sgd(backend: BackendCase) -> None:
    """Along phi - theta, with momentum, of Nesterov's form or not; over a fused and another base."""
    for rule, nesterov in (("adamw", True), ("adamw", False), ("wrapped-sgd", True)):
        settings = {**SETTINGS, "outer_nesterov": nesterov}
        params, twins = (make_params([(4, 3), (5,)], device=backend.device, seed=3) for _ in range(2))
        optimizer = make_optimizer(rule, params, backend, **settings)
        theirs = composed(rule.removeprefix("wrapped-"), twins, **settings)
        train(optimizer, params, range(7))
        train(theirs, twins, range(7))
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


def test_a_schedule_turns_it_on_and_off(backend: BackendCase) -> None:
    """Its buffer is made when it is first wanted, and stays as it is while it is not."""
    pair = Lockstep(backend, "adamw", ([(3,), (40,)], {}), lr=0.1, k=2, alpha=0.5)
    (group,) = pair.optimizer.param_groups
    for momentum, alpha in ((0.0, 0.5), (0.6, 1.2), (0.3, 1.2), (0.0, 0.5), (0.4, 0.5)):
        group["outer_momentum"], group["alpha"] = momentum, alpha
        for oracle in pair.oracles:
            oracle.settings = oracle_settings("adamw", lr=0.1, k=2, alpha=alpha, outer_momentum=momentum)
        for _ in range(3):
            pair.step()


@pytest.mark.parametrize("rule", RULES)
def test_a_step_size_above_1_goes_with_it_alone(backend: BackendCase, rule: str) -> None:
    """At construction the argument is named, in a step the entry of the group, before anything changed."""
    with pytest.raises(ValueError, match=r"^alpha must be a float in \[0, 1\] without outer momentum, got 1.5"):
        make_optimizer(rule, make_params([(3,)]), backend, lr=0.1, alpha=1.5)
    with pytest.raises(ValueError, match=r"^alpha must be .* in \[0, 2\], got 2.5"):
        make_optimizer(rule, make_params([(3,)]), backend, lr=0.1, alpha=2.5, outer_momentum=0.5)
    params = make_params([(3,), (4, 2)], device=backend.device)
    optimizer = make_optimizer(rule, params, backend, **{**SETTINGS, "alpha": 1.5})
    train(optimizer, params, range(4))
    (group,) = optimizer.param_groups
    for change in ({"outer_momentum": 0.0}, {"outer_momentum": 0.0, "alpha": 1.2}, {"outer_momentum": 1.0}):
        kept = dict(group)
        group.update({key(rule, name): value for name, value in change.items()})
        for call in (optimizer.step, optimizer.sync):
            before = snapshot(optimizer)
            name = key(rule, "alpha" if change["outer_momentum"] == 0 else "outer_momentum")
            with pytest.raises(ValueError, match=f"^{name} must be"):
                call()
            assert_unchanged(before, snapshot(optimizer))
        group.update(kept)
    train(optimizer, params, range(4, 6))
    # Without the buffer alone, and a step size that fits: it goes on.
    group.update({key(rule, "alpha"): 1.0, key(rule, "outer_momentum"): 0.0})
    train(optimizer, params, range(6, 9))


@pytest.mark.parametrize("rule", RULES)
def test_slow_weights_that_start_anew_have_no_momentum(backend: BackendCase, rule: str) -> None:
    """What is left of it in a state without slow weights is as old as they were."""
    params = make_params([(4, 3)], device=backend.device)
    (p,) = params
    optimizer = make_optimizer(rule, params, backend, **SETTINGS)
    train(optimizer, params, range(4))
    saved = optimizer.state_dict()
    assert saved["state"][0][BUFFER].any()
    del saved["state"][0]["slow_param"]
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(4, 5))
    assert not optimizer.state[p][BUFFER].any()
