"""Bounds are for what a user passes. A schedule may leave them: a step goes on with every number that it can compute
with, as torch's does, and refuses the rest by name before anything changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BackendCase,
    Lockstep,
    assert_unchanged,
    check_message,
    make_optimizer,
    make_params,
    oracle_settings,
    snapshot,
)
from torch.optim import lr_scheduler as lrs

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "k": 3, "pullback_momentum": "pullback"},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "k": 3},
    "wrapped-adamw": {"lr": 0.1, "k": 3},
    "wrapped-sgd": {"lr": 0.1, "momentum": 0.9, "k": 3, "pullback_momentum": "reset"},
}
# By rounding, past their end, or because they are told to.
BELOW_ZERO: dict[str, tuple[float, int, Callable[[Any], Any]]] = {
    "LinearLR": (0.1, 60, lambda o: lrs.LinearLR(o, end_factor=0.0, total_iters=49)),
    "OneCycleLR": (0.1, 12, lambda o: lrs.OneCycleLR(o, 0.3, 11, anneal_strategy="linear", final_div_factor=1e300)),
    "LambdaLR": (0.1, 8, lambda o: lrs.LambdaLR(o, lambda t: 1 - t / 5)),
    "CyclicLR": (0.1, 8, lambda o: lrs.CyclicLR(o, -0.1, 0.1, step_size_up=3)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BELOW_ZERO)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_schedule_goes_below_zero(backend: BackendCase, name: str, rule: str, tensor_lr: bool) -> None:
    lr, steps, make = BELOW_ZERO[name]
    pair = Lockstep(backend, rule, ([(3,)], {}), **RULES[rule])
    (group,) = pair.optimizer.param_groups
    group["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr
    scheduler = make(pair.optimizer)
    lowest = lr
    for step in range(steps):
        if step > 0:
            scheduler.step()
        now = {key: group[key] for key in ("lr", "betas", "momentum") if key in group}
        (oracle,) = pair.oracles
        oracle.settings = oracle_settings(rule, **{**RULES[rule], **now})
        lowest = min(lowest, float(group["lr"]))
        pair.step()
    assert lowest < 0, "never below zero: proves nothing"


# What may be written into a group, and be taken back.
OUTSIDE: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"lr": -1e-20}),
    ("adamw", {"lr": torch.tensor(-0.01)}),
    ("adamw", {"betas": (0.0, 0.0)}),
    ("adamw", {"betas": (-0.1, 1.1)}),
    ("adamw", {"betas": (0.9, 1.0)}),
    ("adamw", {"betas": [1.0, 0.999]}),
    ("adamw", {"eps": -1e-8}),
    ("adamw", {"weight_decay": -0.1}),
    ("sgd", {"lr": -1e-20}),
    ("sgd", {"momentum": 0}),
    ("sgd", {"momentum": 0.0, "dampening": 0.5}),
    ("sgd", {"momentum": -0.5}),
    ("sgd", {"momentum": 1.5, "dampening": 2.0}),
    ("wrapped-adamw", {"lr": -1e-20, "betas": (0.0, 0.999)}),
    ("wrapped-sgd", {"momentum": 0}),
]


@pytest.mark.parametrize(("rule", "values"), OUTSIDE)
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_a_value_from_outside_and_back(backend: BackendCase, rule: str, values: dict[str, Any], first: int) -> None:
    """In the first step or later: to the bit what the rule computes from these numbers, also when they are gone."""
    hyper = {key: value for key, value in RULES[rule].items() if key != "nesterov"}
    pair = Lockstep(backend, rule, ([(3,), (2, 3)], {}), **hyper)
    back = {key: pair.optimizer.param_groups[0][key] for key in values}
    for step in range(5):
        if step == first:
            pair.optimizer.param_groups[0].update(values)
        if step == first + 2:
            pair.optimizer.param_groups[0].update(back)
        inside = not first <= step < first + 2
        for oracle in pair.oracles:
            oracle.settings = oracle_settings(rule, **{**hyper, **(back if inside else values)})
        pair.step()


@pytest.mark.parametrize("rule", ["sgd", "wrapped-sgd"])
def test_momentum_that_rests_is_kept(backend: BackendCase, rule: str) -> None:
    """Momentum 0 and back: torch's buffer waits meanwhile, and so does ours, under nesterov too."""
    (p,), (q,) = make_params([(6,)], device=backend.device), make_params([(6,)], device=backend.device)
    ours = make_optimizer(rule, [p], backend, lr=0.1, momentum=0.9, nesterov=True, k=10**9)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, nesterov=True)
    for step in range(7):
        for optimizer, param in ((ours, p), (theirs, q)):
            optimizer.param_groups[0]["momentum"] = 0 if step in (2, 3) else 0.9
            param.grad = torch.full_like(param, 0.1 * (step + 1))
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


NOT_COMPUTABLE: list[tuple[str, str, Any, str]] = [
    ("adamw", "lr", "0.1", "'0.1'"),
    ("adamw", "lr", None, "None"),
    ("adamw", "lr", 1j, "1j"),
    ("adamw", "lr", torch.ones(2), r"\(2,\)"),
    ("adamw", "lr", torch.ones((), device="meta"), "meta"),
    ("adamw", "betas", (0.9,), r"\(0.9,\)"),
    ("adamw", "betas", (0.9, 0.99, 0.999), "0.999"),
    ("adamw", "betas", 0.9, "0.9"),
    ("adamw", "betas", ("0.9", 0.99), "'0.9'"),
    ("adamw", "eps", None, "None"),
    ("adamw", "amsgrad", "yes", "'yes'"),
    ("sgd", "momentum", None, "None"),
    ("sgd", "momentum", "0.9", "'0.9'"),
    ("sgd", "dampening", [0.1], r"\[0.1\]"),
    ("sgd", "dampening", torch.ones(1), "Tensor"),
    ("sgd", "weight_decay", torch.ones(2), r"\(2,\)"),
    ("sgd", "alpha", 1.5, "1.5"),
    ("sgd", "k", 0, "0"),
]


@pytest.mark.parametrize(("rule", "argument", "value", "came"), NOT_COMPUTABLE)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_cannot_be_computed_is_refused(
    backend: BackendCase, rule: str, argument: str, value: Any, came: str, wrapped: bool, steps_before: int
) -> None:
    params = make_params([(3,), (4,)], device=backend.device)
    rule = f"wrapped-{rule}" if wrapped else rule
    optimizer = make_optimizer(rule, [{"params": [p]} for p in params], backend, lr=0.1, k=2)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(steps_before):
        optimizer.step()
    ours = argument in ("k", "alpha")
    optimizer.param_groups[1][f"lookahead_{argument}" if wrapped and ours else argument] = value
    before = without_settings(optimizer)
    with pytest.raises((TypeError, ValueError)) as caught:
        optimizer.step()
    check_message(caught.value, argument, came)
    assert_unchanged(before, without_settings(optimizer))


def without_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A bad value need not be one that can be compared."""
    return {**snapshot(optimizer), "groups": []}
