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
from tables import count_tables

from lookahead_fused import Lookahead

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


@pytest.mark.parametrize("rule", LIVELY)
def test_another_gradient_stays_away_in_each_step(
    backend: BackendCase, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of eight in turn, from the first step on, as layers that are dropped: each row is made when its parameter
    first gets a gradient, and never again; a sync in between makes none."""
    tables = count_tables(monkeypatch)
    params = make_params([(5,), (6,), (7,), (0,), (), (3, 4), (9,), (33,)], device=backend.device)
    pair = Lockstep(backend, rule, (params[:4], {}), (params[4:], {"lr": 0.3}), **LIVELY[rule])
    compiled = backend.name != "reference"
    for step in range(12):
        grads = make_grads(params, generator=pair.generator)
        pair.step([None if i == step % 8 else g for i, g in enumerate(grads)])
        assert tables.made == compiled
        assert tables.rows == compiled * (7 if step == 0 else 8)
    before = [p.detach().clone() for p in params]
    pair.optimizer.sync()
    assert not all(same_tensor_bits(p, q) for p, q in zip(params, before, strict=True))
    assert (tables.made, tables.rows) == (compiled, 8 * compiled)


@pytest.mark.parametrize("rule", LIVELY)
def test_experts_wake_one_by_one(backend: BackendCase, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a group of its own, from the last to the first, some steps apart; those awake rest in between. A row is
    added for each, to the table that there is; an expert without a gradient so far has no state."""
    tables = count_tables(monkeypatch)
    params = make_params([(5,), (6,), (3, 4), (7,), (33,), (8,)], device=backend.device)
    pair = Lockstep(backend, rule, *(([p], {"lr": 0.1 * (i + 1)}) for i, p in enumerate(params)), **LIVELY[rule])
    compiled = backend.name != "reference"
    for step in range(14):
        grads = make_grads(params, generator=pair.generator)
        awake = min(step // 2 + 1, len(params))
        chosen = {len(params) - 1 - (step * 3) % awake, len(params) - awake}
        pair.step([g if i in chosen else None for i, g in enumerate(grads)])
        assert (tables.made, tables.rows) == (compiled, awake * compiled)
    assert all(o.step_count > 1 for o in pair.oracles)


@pytest.mark.parametrize("base", ["Adamax", "NAdam"])
def test_gradients_come_and_go_around_another_optimizer(
    backend: BackendCase, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five in each step: what a parameter becomes is what its own steps alone make of it."""
    tables = count_tables(monkeypatch)

    def make(params: list[torch.nn.Parameter]) -> Lookahead:
        inner = getattr(torch.optim, base)(params, lr=0.1, foreach=False)
        return Lookahead(inner, k=2, backend=backend.name)

    params, others = (make_params([(5,), (6,), (7,), (8,), (3, 4)], device=backend.device) for _ in range(2))
    optimizer = make(params)
    received: list[list[torch.Tensor]] = [[] for _ in params]
    generator = seeded(1)
    for step in range(12):
        for i, (p, g) in enumerate(zip(params, make_grads(params, generator=generator), strict=True)):
            p.grad = g if (i - step) % 5 < 2 else None
            received[i] += [g] if p.grad is not None else []
        optimizer.step()
    compiled = backend.name != "reference"
    assert (tables.made, tables.rows) == (compiled, 5 * compiled)
    for p, q, grads in zip(params, others, received, strict=True):
        alone = make([q])
        for g in grads:
            q.grad = g
            alone.step()
        assert same_tensor_bits(p, q)


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
