"""Learning rate schedulers: each of torch's drives our groups as it drives torch's own, without a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BackendCase,
    Lockstep,
    UnfusedRMSprop,
    composed,
    make_grads,
    make_optimizer,
    make_params,
    oracle_settings,
    seeded,
    to_numpy,
)
from torch.optim import lr_scheduler as lrs

import lookahead_fused

# torch 2.6's SequentialLR calls what it warns of.
OWN_WARNING = "ignore:The epoch parameter in `scheduler.step:UserWarning"
STEPS = 12
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: lrs.StepLR(o, 3, gamma=0.3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5, 7], gamma=0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.2, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=3),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, start_factor=0.1, total_iters=3), lrs.ExponentialLR(o, gamma=0.7)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, factor=0.2, total_iters=4), lrs.ExponentialLR(o, gamma=0.7)]
    ),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
}
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "k": 3, "pullback_momentum": "pullback"},
    "sgd": {"lr": 0.1, "momentum": 0.9, "k": 3},
}
# What a scheduler may move in a group.
DRIVEN = ("lr", "betas", "momentum")


def test_every_scheduler_of_torch_is_here() -> None:
    ours = {*SCHEDULERS, "LRScheduler"}
    assert {name for name in lrs.__all__ if name != "LRScheduler"} <= ours


def advance(scheduler: Any, t: int) -> None:
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step((1.0, 2.0, 3.0, 0.5, 4.0, 4.0, 4.0)[t % 7])
    else:
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.filterwarnings("error", OWN_WARNING)
def test_scheduler(backend: BackendCase, name: str, rule: str, tensor_lr: bool) -> None:
    """The same sequence of hyperparameters as under torch's class, each in force at the next step: to the bit
    by the oracle, and near torch's own run."""
    hyper = {**RULES[rule]}
    theirs = make_params([(7,), (2, 3)], device=backend.device)
    if tensor_lr:
        hyper["lr"] = torch.tensor(0.1)
    groups = (([(7,)], {}), ([(2, 3)], {"weight_decay": 0.3}))
    pair = Lockstep(backend, rule, *groups, **hyper)
    with torch.no_grad():
        for p, q in zip(pair.params, theirs, strict=True):
            q.copy_(p)
    if tensor_lr:
        hyper["lr"] = torch.tensor(0.1)
    reference = composed(rule, [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.3}], **hyper)
    scheduler, reference_scheduler = (SCHEDULERS[name](o) for o in (pair.optimizer, reference.optimizer))
    lr_seen = set()
    for t in range(STEPS):
        for group, other, oracle in zip(
            pair.optimizer.param_groups, reference.optimizer.param_groups, pair.oracles, strict=True
        ):
            driven = {key: group[key] for key in DRIVEN if key in group}
            assert {key: other[key] for key in driven} == driven
            lr_seen.add(float(group["lr"]))
            own = {"weight_decay": group["weight_decay"]}
            oracle.settings = oracle_settings(rule, **{**RULES[rule], **driven, **own})
        grads = make_grads(pair.params, generator=pair.generator)
        for q, g in zip(theirs, grads, strict=True):
            q.grad = g.clone()
        pair.step(grads)
        reference.step()
        advance(scheduler, t)
        advance(reference_scheduler, t)
    for p, q in zip(pair.params, theirs, strict=True):
        np.testing.assert_allclose(to_numpy(p), to_numpy(q), rtol=3e-5, atol=3e-5)
    assert len(lr_seen) > 1, "the scheduler changed nothing: proves nothing"


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_one_cycle_moves_the_momentum_too(backend: BackendCase, rule: str) -> None:
    """OneCycleLR writes betas or momentum, by what it finds in `defaults` and in the groups."""
    optimizer = make_optimizer(rule, make_params([(3,)], device=backend.device), backend, **RULES[rule])
    scheduler = lrs.OneCycleLR(optimizer, max_lr=0.2, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    (group,) = optimizer.param_groups
    seen = []
    for _ in range(9):
        seen.append(group["momentum"] if rule == "sgd" else group["betas"][0])
        optimizer.step()
        scheduler.step()
    assert min(seen) == pytest.approx(0.5)
    assert max(seen) == pytest.approx(0.9)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "wrapped-adamw", "wrapped-sgd"])
@pytest.mark.parametrize("kind", ["float", "tensor", "fp64 tensor", "bf16 tensor", "replaced tensor"])
def test_lr_written_by_hand(backend: BackendCase, rule: str, kind: str) -> None:
    """In force at the next step: a float put into the group, a tensor filled in place, a tensor replaced."""
    make: dict[str, Callable[[float], Any]] = {
        "float": float,
        "tensor": torch.tensor,
        "fp64 tensor": lambda lr: torch.tensor(lr, dtype=torch.float64),
        "bf16 tensor": lambda lr: torch.tensor(lr, dtype=torch.bfloat16),
        "replaced tensor": torch.tensor,
    }
    hyper = {"k": 2, "weight_decay": 0.1}
    pair = Lockstep(backend, rule, ([(7,)], {}), ([(2, 3)], {"lr": make[kind](0.03)}), lr=make[kind](0.1), **hyper)
    for factor in (1.0, 0.5, 3.0, 0.0, 1.0):
        for group, oracle in zip(pair.optimizer.param_groups, pair.oracles, strict=True):
            lr = 0.1 * factor
            if "tensor" in kind and not kind.startswith("replaced"):
                group["lr"].fill_(lr)
            else:
                group["lr"] = make[kind](lr)
            oracle.settings = oracle_settings(rule, lr=float(group["lr"]), **hyper)
        pair.step()
        pair.step()


# ------------------------------------------------------------------------------------------------------------
# Lookahead(base), and a scheduler that knows one of the two

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": lambda params: UnfusedRMSprop(params, lr=0.1, momentum=0.5),
}
ATTACHED = ("to the base, before", "to the base, after", "to the wrapper")


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau"])
@pytest.mark.filterwarnings("error", OWN_WARNING)
def test_scheduler_and_wrapper(backend: BackendCase, attached: str, base_name: str, name: str) -> None:
    """Wherever it is attached: no warning that `step` was never called, and the run is that of torch's base
    under its scheduler with k steps and one interpolation."""
    ours, theirs = (make_params([(7,), (2, 3)], device=backend.device) for _ in range(2))
    base, reference = BASES[base_name](ours), BASES[base_name](theirs)
    scheduler = SCHEDULERS[name](base) if attached == "to the base, before" else None
    optimizer = lookahead_fused.Lookahead(base, k=10**6, backend=backend.name)
    if scheduler is None:
        scheduler = SCHEDULERS[name](base if attached == "to the base, after" else optimizer)
    reference_scheduler = SCHEDULERS[name](reference)
    generator = seeded(1)
    for t in range(STEPS):
        for group, other, theirs_group in zip(
            optimizer.param_groups, base.param_groups, reference.param_groups, strict=True
        ):
            assert group["lr"] == other["lr"] == theirs_group["lr"]
        for p, q, g in zip(ours, theirs, make_grads(ours, generator=generator), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        reference.step()
        advance(scheduler, t)
        advance(reference_scheduler, t)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(to_numpy(p), to_numpy(q), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("base_name", BASES)
def test_a_forgotten_step_is_still_told(backend: BackendCase, attached: str, base_name: str) -> None:
    """Silence is not bought by switching the check off: a scheduler that runs first warns as ever."""
    params = make_params([(7,)], device=backend.device)
    base = BASES[base_name](params)
    scheduler = SCHEDULERS["StepLR"](base) if attached == "to the base, before" else None
    optimizer = lookahead_fused.Lookahead(base, backend=backend.name)
    if scheduler is None:
        scheduler = SCHEDULERS["StepLR"](base if attached == "to the base, after" else optimizer)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_a_forgotten_step_of_ours_is_told(backend: BackendCase) -> None:
    optimizer = make_optimizer("adamw", make_params([(7,)], device=backend.device), backend)
    scheduler = SCHEDULERS["StepLR"](optimizer)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


@pytest.mark.parametrize("attached", ATTACHED)
def test_a_scheduler_survives_a_load(backend: BackendCase, attached: str) -> None:
    """`load_state_dict` replaces the groups' dicts: the scheduler has to drive those that are stepped."""
    (p,) = make_params([(7,)], device=backend.device)
    base = torch.optim.AdamW([p], lr=0.1)
    scheduler = lrs.StepLR(base, 1, gamma=0.5) if attached == "to the base, before" else None
    optimizer = lookahead_fused.Lookahead(base, k=100, backend=backend.name)
    if scheduler is None:
        scheduler = lrs.StepLR(base if attached == "to the base, after" else optimizer, 1, gamma=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"] == 0.025
    for groups in (optimizer.param_groups, base.param_groups):
        before = p.detach().clone()
        groups[0]["lr"] = 0.0
        optimizer.step()
        assert torch.equal(p, before)
        groups[0]["lr"] = 0.1
        optimizer.step()
        assert not torch.equal(p, before)
