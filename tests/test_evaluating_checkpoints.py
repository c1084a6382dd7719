"""Checkpoints of between eval() and train(), from which a run goes on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from evaluating import (
    CUT,
    END,
    MAKERS,
    SHAPES,
    Make,
    assert_hold,
    begun,
    hooks_of,
    of_class,
    of_each,
    of_few,
    slow_weights_of,
    values_of,
    without_train_params,
)
from helpers import (
    BackendCase,
    assert_unchanged,
    make_params,
    same_tensor_bits,
    set_grad,
    snapshot,
)
from runs import advance, assert_same_run, copies, gradients_of, through_a_file
from test_interrupts import at_all_moments, usual_handler  # noqa: F401

from lookahead_fused import Lookahead

# ------------------------------------------------------------------------------------------------------------
# a checkpoint of in between


@of_each
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_resume(backend: BackendCase, make: Make, dtype: torch.dtype, order: str) -> None:
    """Saved while evaluating, in the middle of a window, and loaded elsewhere: it evaluates on, on the slow weights,
    and after train() it is the run that never evaluated. So is the one that was saved."""
    optimizer, params = begun(make, backend, dtype)
    phi = slow_weights_of(optimizer, params)
    optimizer.eval()
    weights, saved = through_a_file((params, optimizer.state_dict()))
    assert_hold(weights, phi)

    resumed_params = make_params(SHAPES, dtype, seed=5, device=backend.device)
    resumed = make(resumed_params, backend)
    if order == "optimizer first":
        resumed.load_state_dict(saved)
        assert_hold(resumed_params, make_params(SHAPES, dtype, seed=5, device=backend.device))
    with torch.no_grad():
        for p, w in zip(resumed_params, weights, strict=True):
            p.copy_(w)
    if order == "model first":
        resumed.load_state_dict(saved)
    assert_hold(resumed_params, phi)
    assert not any("train_param" in own for own in resumed.state.values())
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        resumed.step()
    # Saved once more, and from there.
    assert_unchanged(saved, resumed.state_dict())
    with resumed.slow_weights():
        assert_unchanged(saved, resumed.state_dict())
    assert_hold(resumed_params, phi)

    twin, twin_params = begun(make, backend, dtype)
    for p, g in zip(resumed_params[:-1], gradients_of(CUT - 1, resumed_params[:-1]), strict=True):
        set_grad(p, g)
    for o in (optimizer, resumed):
        o.train()
        assert_same_run(twin, o)
        assert hooks_of(o) == hooks_of(twin)
    for o, ps in ((optimizer, params), (resumed, resumed_params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(twin, optimizer)
    assert_same_run(twin, resumed)


@of_each
def test_what_a_state_dict_holds(backend: BackendCase, make: Make, dtype: torch.dtype) -> None:
    """What it holds outside, and the training weights of what is swapped; and that stays when the mode is left."""
    optimizer, params = begun(make, backend, dtype)
    outside = copy.deepcopy(optimizer.state_dict())
    theta = values_of(params)
    optimizer.eval()
    held = optimizer.state_dict()
    for _ in range(2):
        assert [i for i, own in held["state"].items() if "train_param" in own] == [0, 1, 2, 3]
        for i, own in held["state"].items():
            assert same_tensor_bits(own["train_param"], theta[i])
        assert_unchanged(outside, without_train_params(held))
        optimizer.train()
    assert_unchanged(outside, optimizer.state_dict())
    # In a block they are needed where nothing else tells them.
    inside = held if optimizer._table.policy.averages else outside
    with optimizer.slow_weights():
        assert_unchanged(inside, optimizer.state_dict())
        optimizer.eval()
        assert_unchanged(held, optimizer.state_dict())
        optimizer.train()
        assert_unchanged(inside, optimizer.state_dict())


@pytest.mark.parametrize("name", ["gpa", "schedule-free external"])
def test_a_policy_that_cannot_go_on_without(backend: BackendCase, name: str) -> None:
    """Where no other entry tells the training weights, a dict of inside a block has them too."""
    optimizer, _ = begun(MAKERS[name], backend)
    optimizer.eval()
    evaluating = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    with optimizer.slow_weights():
        assert_unchanged(evaluating, optimizer.state_dict())


@of_few
def test_hooks(backend: BackendCase, name: str) -> None:
    """Those that see a state dict see all of it, on the base too; those after a loading see the mode restored."""
    optimizer, params = begun(MAKERS[name], backend)
    optimizer.eval()
    expected = copy.deepcopy(optimizer.state_dict())
    twin_params = copies(params)
    twin = MAKERS[name](twin_params, backend)
    doors = {id(o): o for o in (optimizer, getattr(optimizer, "base_optimizer", optimizer))}.values()
    for one in doors:
        seen: list[Any] = []
        handle = one.register_state_dict_post_hook(lambda _, saved, seen=seen: seen.append(copy.deepcopy(saved)))
        assert_unchanged(expected, one.state_dict())
        assert_unchanged([expected], seen)
        handle.remove()
    for one in {id(o): o for o in (twin, getattr(twin, "base_optimizer", twin))}.values():
        seen = []
        one.register_load_state_dict_post_hook(
            lambda o, seen=seen: seen.append((twin._evaluating, copy.deepcopy(o.state_dict())))
        )
        twin.load_state_dict(expected)
        assert seen[0][0] is True
        assert_unchanged(expected, seen[0][1])


@pytest.mark.parametrize("name", ["wrapped-adamw", "external", "ema", "ema external"])
@pytest.mark.parametrize("then", ["train", "load"])
def test_the_bases_own_door(backend: BackendCase, name: str, then: str) -> None:
    """The base's state dict, loaded by the base: the same."""
    optimizer, params = begun(MAKERS[name], backend)
    trained = copy.deepcopy(optimizer.state_dict())
    theta = values_of(params)
    optimizer.eval()
    saved = copy.deepcopy(optimizer.base_optimizer.state_dict())
    twin_params = copies(params)
    twin = MAKERS[name](twin_params, backend)
    twin.base_optimizer.load_state_dict(saved)
    assert_hold(twin_params, values_of(params))
    assert_unchanged(saved, twin.state_dict())
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        twin.step()
    with twin.slow_weights(), pytest.raises(RuntimeError, match="leave the block"):
        twin.base_optimizer.load_state_dict(saved)
    if then == "train":
        twin.train()
    else:
        twin.base_optimizer.load_state_dict(trained)
    assert_hold(twin_params, theta)
    optimizer.train()
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


class LoadsAlone(torch.optim.RMSprop):
    """Loads in its own way, and calls no hooks."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        for i, own in state_dict["state"].items():
            self.state[params[i]] = {name: value.clone() for name, value in own.items()}


def test_a_base_that_calls_no_hooks(backend: BackendCase) -> None:
    def make(params: Any, backend: BackendCase) -> Any:
        return Lookahead(LoadsAlone(params, lr=0.1), 5, 0.3, backend=backend.name)

    optimizer, params = begun(make, backend)
    optimizer.eval()
    twin_params = copies(params)
    twin = make(twin_params, backend)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any("train_param" in own for own in twin.state.values())
    assert_unchanged(optimizer.state_dict()["state"], twin.state_dict()["state"])
    for o, ps in ((optimizer, params), (twin, twin_params)):
        o.train()
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


# ------------------------------------------------------------------------------------------------------------
# loading while evaluating


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["model first", "optimizer first", "optimizer alone"])
@of_few
def test_a_checkpoint_of_training(backend: BackendCase, name: str, order: str, dtype: torch.dtype) -> None:
    """It ends the mode. What was loaded into the parameters before stays: the old training weights, which come back
    where nothing was loaded, do not take its place."""
    optimizer, params = begun(MAKERS[name], backend, dtype)
    weights, saved = through_a_file((params, optimizer.state_dict()))
    other, other_params = begun(MAKERS[name], backend, dtype, steps=CUT - 2)
    theta = values_of(other_params)
    other.eval()

    def load_model() -> None:
        with torch.no_grad():
            for p, w in zip(other_params, weights, strict=True):
                p.copy_(w)

    if order == "model first":
        load_model()
    other.load_state_dict(saved)
    if order != "model first":
        assert_hold(other_params, theta)
    if order == "optimizer first":
        load_model()
    if order == "optimizer alone":
        theta = values_of(other_params)
        other.train()
        assert_hold(other_params, theta)
        assert_unchanged(saved, other.state_dict())
        return
    assert hooks_of(other) == hooks_of(optimizer)
    for o, ps in ((optimizer, params), (other, other_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, other)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@of_few
def test_a_checkpoint_of_evaluating(backend: BackendCase, name: str, order: str) -> None:
    """Its mode takes the place of the one that was on, also where another parameter was swapped."""
    optimizer, params = begun(MAKERS[name], backend)
    optimizer.eval()
    weights, saved = through_a_file((params, optimizer.state_dict()))
    other_params = make_params(SHAPES, seed=5, device=backend.device)
    other = MAKERS[name](other_params, backend)
    advance(other, other_params, range(3))  # the last one too
    last = other_params[-1].detach().clone()
    other.eval()
    assert not torch.equal(last, other_params[-1])
    for way in (order, "model first", "optimizer first"):
        if way == "optimizer first":
            other.load_state_dict(saved)
        with torch.no_grad():
            for p, w in zip(other_params[:-1], weights[:-1], strict=True):
                p.copy_(w)
        if way == "model first":
            other.load_state_dict(saved)
        assert_hold(other_params, [*weights[:-1], last])
        assert_unchanged(saved, other.state_dict())
    optimizer.train()
    other.train()
    assert_hold(other_params, [*params[:-1], last])
    with torch.no_grad():
        other_params[-1].copy_(params[-1])
    other_params[-1].grad = None
    for o, ps in ((optimizer, params), (other, other_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, other)


@of_few
def test_ones_own_dict(backend: BackendCase, name: str) -> None:
    optimizer, params = begun(MAKERS[name], backend)
    twin, twin_params = begun(MAKERS[name], backend)
    optimizer.eval()
    inside = values_of(params)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
        assert_hold(params, inside)
    optimizer.train()
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


@of_few
def test_what_cannot_be_loaded(backend: BackendCase, name: str) -> None:
    """Other groups, and training weights that are not the parameter's: neither weights nor mode have changed."""
    optimizer, params = begun(MAKERS[name], backend)
    before = snapshot(optimizer, params)
    optimizer.eval()
    inside, saved = snapshot(optimizer, params), copy.deepcopy(optimizer.state_dict())
    bad: list[tuple[type[Exception], str, Any]] = []
    for error, match, value in (
        (TypeError, "'train_param'.*must be a Tensor, got int", 7),
        (ValueError, r"'train_param'.*shape \(3, 5\), got \(5, 3\)", torch.ones(5, 3)),
    ):
        spoiled = copy.deepcopy(saved)
        spoiled["state"][1]["train_param"] = value
        bad.append((error, match, spoiled))
    alone = copy.deepcopy(saved)
    del alone["state"][1]["slow_param"]
    bad.append((ValueError, "'train_param'.*beside slow weights", alone))
    fewer, _ = begun(lambda ps, b: MAKERS[name](ps[:3], b), backend, steps=0)
    advance(fewer, fewer.param_groups[0]["params"], range(2))
    fewer.eval()
    bad.append((ValueError, "group", fewer.state_dict()))
    doors = {id(o): o for o in (optimizer, getattr(optimizer, "base_optimizer", optimizer))}.values()
    for door in doors:
        for error, match, spoiled in bad:
            with pytest.raises(error, match=match):
                door.load_state_dict(spoiled)
            assert_unchanged(inside, snapshot(optimizer, params))
            assert_unchanged(saved, optimizer.state_dict())
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))


def test_into_another_spelling(backend: BackendCase) -> None:
    """`LookaheadAdamW` and `Lookahead(AdamW)` read each other's, and torch's class goes on from the slow weights."""
    optimizer, params = begun(of_class("adamw"), backend)
    theta = values_of(params)
    optimizer.eval()
    saved = copy.deepcopy(optimizer.state_dict())
    for make in (of_class("wrapped-adamw"), of_class("adamw")):
        twin_params = copies(params)
        twin = make(twin_params, backend)
        twin.load_state_dict(saved)
        twin.train()
        assert_hold(twin_params, theta)
        advance(twin, twin_params[:-1], [CUT])
    plain_params = copies(params)
    plain = torch.optim.AdamW(plain_params, lr=0.1)
    plain.load_state_dict(saved)
    advance(plain, plain_params[:-1], [CUT])
