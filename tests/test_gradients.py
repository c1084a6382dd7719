"""Gradients come late, stay away, return and move; they are only read."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    BackendCase,
    Lockstep,
    make_grads,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
)

LIVELY = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 2},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "pullback_momentum": "pullback", "k": 2},
    "wrapped-adamw": {"lr": 0.1, "weight_decay": 0.1, "pullback_momentum": "reset", "k": 2},
}


@pytest.mark.parametrize("rule", LIVELY)
def test_gradients_come_late_stay_away_and_return(backend: BackendCase, rule: str) -> None:
    """Each parameter counts its own steps. A gradient of None leaves all of it alone; the address of the
    gradient before it must not be read again."""
    params = make_params([(5,), (6,), (7,), (8,)], device=backend.device)
    pair = Lockstep(backend, rule, (params[:2], {}), (params[2:], {"lr": 0.3}), **LIVELY[rule])
    present = [
        (1, 0, 0, 0),
        (1, 1, 0, 0),
        (0, 0, 0, 0),
        (0, 1, 1, 0),
        (1, 1, 0, 0),
        (1, 1, 1, 1),
        (0, 0, 1, 1),
    ]
    for row in present:
        grads = make_grads(params, generator=pair.generator)
        pair.step([g if here else None for g, here in zip(grads, row, strict=True)])
    assert [o.step_count for o in pair.oracles] == [sum(column) for column in zip(*present, strict=True)]


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_frozen_parameters(backend: BackendCase, rule: str) -> None:
    """Frozen ones rest; frozen integers may be listed; one that is thawed starts then, one that is frozen
    and loses its gradient rests, and goes on when it returns."""
    a, b, c = make_params([(5,), (6,), (7,)], device=backend.device)
    b.requires_grad_(False)
    table = torch.nn.Parameter(torch.arange(4, device=backend.device), requires_grad=False)
    pair = Lockstep(backend, rule, ([a, b, c], {}), **LIVELY[rule])
    pair.optimizer.add_param_group({"params": [table]})
    for t in range(6):
        if t == 2:
            b.requires_grad_(True)
            c.requires_grad_(False)
        if t == 4:
            c.requires_grad_(True)
        pair.optimizer.zero_grad()
        grads = make_grads([a, b, c], generator=pair.generator)
        for p, g in zip((a, b, c), grads, strict=True):
            if p.requires_grad:
                (p * g).sum().backward()
        pair.follow([p.grad for p in (a, b, c)])
    assert table.tolist() == [0, 1, 2, 3]
    assert not pair.optimizer.state.get(table)


@pytest.mark.parametrize("rule", LIVELY)
def test_gradients_move_every_step(backend: BackendCase, rule: str) -> None:
    """zero_grad(set_to_none) and a backward put gradients elsewhere each time; old ones are freed and their
    memory is filled with something else."""
    pair = Lockstep(backend, rule, **LIVELY[rule])
    rubbish = []
    for _ in range(5):
        pair.step()
        pair.optimizer.zero_grad(set_to_none=True)
        rubbish += [torch.full_like(p, float("nan")) for p in pair.params]


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_gradients_are_only_read(backend: BackendCase, rule: str) -> None:
    params = make_params(device=backend.device)
    optimizer = make_optimizer(rule, params, backend, **LIVELY[rule], maximize=True)
    grads = make_grads(params, generator=seeded(1))
    copies = [g.clone() for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    for _ in range(3):
        optimizer.step()
        for p, g, c in zip(params, grads, copies, strict=True):
            assert p.grad is g
            assert same_tensor_bits(g, c)
            assert g._version == 0


@pytest.mark.parametrize("rule", LIVELY)
def test_data_of_a_gradient_moves(backend: BackendCase, rule: str) -> None:
    """`p.grad.data = ...` leaves the gradient the same object; memory and strides are others."""
    pair = Lockstep(backend, rule, ([(6, 8), (4,)], {}), **LIVELY[rule])
    pair.step()
    held = [p.grad for p in pair.params]
    for t in range(5):
        values = make_grads(pair.params, generator=pair.generator)
        if t % 2:
            values[0] = values[0].t().contiguous().t()
        for p, g, v in zip(pair.params, held, values, strict=True):
            g.data = v
            assert p.grad is g
        pair.follow(held)


@pytest.mark.parametrize("rule", LIVELY)
def test_one_gradient_for_two(backend: BackendCase, rule: str) -> None:
    """Two parameters may hold the same gradient tensor."""
    pair = Lockstep(backend, rule, ([(33,), (33,), (33,)], {}), **LIVELY[rule])
    for _ in range(3):
        (g,) = make_grads(pair.params[:1], generator=pair.generator)
        pair.step([g, g, g])


@pytest.mark.parametrize("rule", LIVELY)
def test_a_gradient_that_torch_has_not_made(backend: BackendCase, rule: str) -> None:
    """Zeros without memory, as torch's formulas give them, are a gradient, and not the lack of one."""
    pair = Lockstep(backend, rule, ([(6, 8), (4,)], {}), **LIVELY[rule])
    pair.step()
    for _ in range(3):
        grads = make_grads(pair.params, generator=pair.generator)
        pair.step([torch._efficientzerotensor((6, 8), device=backend.device), grads[1]])
    pair.step()
    assert pair.optimizer.state[pair.params[0]]["step"] == 5
