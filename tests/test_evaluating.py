"""eval() and train(): a slow_weights() that stays open, and checkpoints of in between, from which a run goes on."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LOOKAHEAD_CLASSES,
    BackendCase,
    UnfusedRMSprop,
    assert_unchanged,
    make_optimizer,
    make_params,
    same_tensor_bits,
    set_grad,
    snapshot,
)
from processes import needs_gloo, two_ranks
from runs import advance, assert_same_run, copies, fresh, gradients_of, tensors_of, through_a_file
from test_interrupts import at_all_moments, usual_handler  # noqa: F401

from lookahead_fused import EMA, GPA, Lookahead, ScheduleFree

Make = Callable[[Any, BackendCase], Any]
SHAPES = ((7,), (3, 5), (0,), (), (4,))
CUT, END = 7, 14  # between two syncs, and after one more
MOMENTUM = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.9}, "adamw": {"pullback_momentum": "pullback"}}


def of_class(rule: str, **changes: Any) -> Make:
    hyper = {"lr": 0.1, "k": 5, **MOMENTUM.get(rule.removeprefix("wrapped-"), {}), **changes}
    alpha = "lookahead_alpha" if rule.endswith("rmsprop") else "alpha"
    return lambda params, backend: make_optimizer(rule, params, backend, **{alpha: 0.3}, **hyper)


MAKERS: dict[str, Make] = {
    **{rule: of_class(rule) for rule in LOOKAHEAD_CLASSES},
    "outer momentum": of_class("sgd", outer_momentum=0.5),
    "wrapped-adamw": of_class("wrapped-adamw"),
    "wrapped-sgd": of_class("wrapped-sgd"),
    "external": lambda params, b: Lookahead(UnfusedRMSprop(params, lr=0.1), 5, 0.3, "none", backend=b.name),
    "ema": lambda params, b: EMA(torch.optim.AdamW(params, lr=0.1), 0.7, backend=b.name),
    "ema every 3": lambda params, b: EMA(torch.optim.SGD(params, lr=0.1), 0.7, every=3, backend=b.name),
    "gpa": lambda params, b: GPA(torch.optim.AdamW(params, lr=0.1), backend=b.name),
    "gpa external": lambda params, b: GPA(torch.optim.NAdam(params, lr=0.1), 0.5, 0.8, backend=b.name),
    "schedule-free": lambda params, b: ScheduleFree(torch.optim.SGD(params, lr=0.1), backend=b.name),
    "schedule-free external": lambda params, b: ScheduleFree(UnfusedRMSprop(params, lr=0.1), 0.6, r=1, backend=b.name),
    "ema external": lambda params, b: EMA(torch.optim.NAdam(params, lr=0.1), "uniform", start=2, backend=b.name),
}
MASTER = {f"{rule} with master": of_class(rule, master_weights=True) for rule in ("adamw", "sgd", "lion")}
MASTER["gpa with master"] = lambda params, b: GPA(
    torch.optim.AdamW(params, lr=0.1), 0.5, 0.8, master_weights=True, backend=b.name
)
CASES = [(name, MAKERS[name], torch.float32) for name in MAKERS]
CASES += [(name, MAKERS[name], torch.bfloat16) for name in ("adamw", "sgd", "wrapped-adamw", "external", "ema")]
CASES += [(name, MASTER[name], torch.bfloat16) for name in MASTER]
CASES += [("external", MAKERS["external"], torch.float64), ("adamw", MAKERS["adamw"], torch.float16)]
of_each = pytest.mark.parametrize(("make", "dtype"), [pytest.param(m, d, id=f"{n}-{d}") for n, m, d in CASES])
FEW = ("adamw", "wrapped-adamw", "external", "ema")
of_few = pytest.mark.parametrize("name", FEW)


def begun(
    make: Make, backend: BackendCase, dtype: torch.dtype = torch.float32, steps: int = CUT
) -> tuple[Any, list[torch.nn.Parameter]]:
    """An optimizer between two syncs, whose last parameter never had a gradient."""
    params = fresh(backend, dtype, SHAPES)
    optimizer = make(params, backend)
    advance(optimizer, params[:-1], range(steps))
    return optimizer, params


def slow_weights_of(optimizer: Any, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """In the parameters' dtype; of one without a step, what it is."""
    slow = {id(p): s for p, s in optimizer._table.slow_weights(optimizer.param_groups, optimizer.state)}
    found = [slow.get(id(p), p).to(p.dtype, copy=True) for p in params]
    assert any(not torch.equal(p, s) for p, s in zip(params, found, strict=True))
    return found


def assert_hold(params: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        assert same_tensor_bits(p, value)


def values_of(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def without_train_params(saved: dict[str, Any]) -> dict[str, Any]:
    state = {i: {name: v for name, v in own.items() if name != "train_param"} for i, own in saved["state"].items()}
    return {**saved, "state": state}


def hooks_of(optimizer: Any) -> int:
    return len(getattr(optimizer, "base_optimizer", optimizer)._optimizer_state_dict_post_hooks)


# ------------------------------------------------------------------------------------------------------------
# the two modes


@of_each
def test_in_and_out(backend: BackendCase, make: Make, dtype: torch.dtype) -> None:
    """phi after eval(), theta after train(), at the same addresses; twice is once, and the run does not notice."""
    optimizer, params = begun(make, backend, dtype)
    theta, phi = values_of(params), slow_weights_of(optimizer, params)
    before, hooks = snapshot(optimizer, params), hooks_of(optimizer)
    places = [t.data_ptr() for t in (*params, *tensors_of(optimizer.state_dict()))]
    for times in (1, 2):
        for _ in range(times):
            assert optimizer.eval() is None
            assert_hold(params, phi)
        for _ in range(times):
            assert optimizer.train() is None
            assert_hold(params, theta)
        assert_unchanged(before, snapshot(optimizer, params))
    assert places == [t.data_ptr() for t in (*params, *tensors_of(optimizer.state_dict()))]
    assert hooks_of(optimizer) == hooks
    twin, twin_params = begun(make, backend, dtype)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


@of_few
def test_nested(backend: BackendCase, name: str) -> None:
    """Whatever is still open keeps phi in place: what ends last brings theta back."""
    optimizer, params = begun(MAKERS[name], backend)
    theta, phi = values_of(params), slow_weights_of(optimizer, params)
    before = snapshot(optimizer, params)
    optimizer.eval()
    with optimizer.slow_weights():
        assert_hold(params, phi)
        optimizer.eval()
    assert_hold(params, phi)
    with pytest.raises(ValueError, match="inner"), optimizer.slow_weights():
        raise ValueError("inner")
    assert_hold(params, phi)
    with optimizer.slow_weights():
        optimizer.train()
        assert_hold(params, phi)
        optimizer.train()
        assert_hold(params, phi)
        with pytest.raises(RuntimeError, match=r"slow_weights\(\): leave the block"):
            optimizer.step()
    assert_hold(params, theta)
    with optimizer.slow_weights():
        optimizer.eval()
        assert_hold(params, phi)
    assert_hold(params, phi)
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))
    advance(optimizer, params[:-1], [CUT])


@of_few
def test_what_is_refused(backend: BackendCase, name: str) -> None:
    """A step, a sync, a copy: with what to do about it, and nothing has changed."""
    optimizer, params = begun(MAKERS[name], backend)
    before = snapshot(optimizer, params)
    calls: list[int] = []
    optimizer.eval()
    inside = snapshot(optimizer, params)
    refused = [
        (optimizer.step, "step"),
        (lambda: optimizer.step(lambda: calls.append(1)), "step"),
        (lambda: copy.copy(optimizer), "copying"),
        (lambda: copy.deepcopy(optimizer), "copying"),
        (lambda: pickle.dumps(optimizer), "pickling"),
    ]
    if hasattr(optimizer, "sync"):
        refused.append((optimizer.sync, "sync"))
    for call, what in refused:
        with pytest.raises(RuntimeError, match=rf"{what}.*call train\(\) first"):
            call()
    assert_unchanged(inside, snapshot(optimizer, params))
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=r"load_state_dict.*leave the block first"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(inside, snapshot(optimizer, params))
    assert not calls
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))
    copy.deepcopy(optimizer)
    optimizer.step()


@of_few
def test_a_scaled_step_is_refused(backend: BackendCase, name: str) -> None:
    """By whichever way the scaler calls for it; after train() it is made."""
    optimizer, params = begun(MAKERS[name], backend)
    twin, twin_params = begun(MAKERS[name], backend)
    scaler = torch.amp.GradScaler(backend.device, init_scale=4.0)
    scaler.scale(torch.ones((), device=backend.device))
    for p, q, g in zip(params, twin_params, gradients_of(CUT, params), strict=True):
        p.grad, q.grad = 4 * g, g
    optimizer.eval()
    inside = snapshot(optimizer, params)["params"]
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        scaler.step(optimizer)
    assert_unchanged(inside, snapshot(optimizer, params)["params"])
    optimizer.train()
    scaler.step(optimizer)
    twin.step()
    assert_hold(params, values_of(twin_params))


def test_nothing_to_swap(backend: BackendCase) -> None:
    """Before the first step, and before an average begins: the modes are on and off, and nothing else changes."""
    start = EMA(torch.optim.AdamW(fresh(backend), lr=0.1), 0.5, start=9, backend=backend.name)
    for optimizer, steps in ((MAKERS["adamw"](fresh(backend), backend), 0), (start, 3)):
        params = optimizer.param_groups[0]["params"]
        advance(optimizer, params, range(steps))
        before, saved = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
        optimizer.eval()
        assert_unchanged(before, snapshot(optimizer))
        assert_unchanged(saved, optimizer.state_dict())
        with pytest.raises(RuntimeError, match=r"call train\(\) first"):
            optimizer.step()
        optimizer.train()
        assert_unchanged(before, snapshot(optimizer))
        advance(optimizer, params, [steps])


def test_a_group_added_while_evaluating(backend: BackendCase) -> None:
    optimizer, params = begun(MAKERS["adamw"], backend)
    theta = values_of(params)
    optimizer.eval()
    late = copies(params[:1])
    start = late[0].detach().clone()
    optimizer.add_param_group({"params": late})
    saved = optimizer.state_dict()
    assert [i for i, own in saved["state"].items() if "train_param" in own] == [0, 1, 2, 3]
    optimizer.train()
    assert_hold([*params, *late], [*theta, start])
    advance(optimizer, [*params, *late], [CUT])
    assert optimizer.state[late[0]]["step"].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@of_few
def test_memory_that_moves_meanwhile(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    """As in a block, theta comes back to where the parameter lies by now."""
    optimizer, params = begun(MAKERS[name], backend, dtype)
    before = snapshot(optimizer, params)
    optimizer.eval()
    for p in params:
        p.data = p.data.clone()
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_an_inference_mode_that_ends_earlier(
    backend: BackendCase, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaving needs outlives it: torch refuses to write into a tensor that was made in one."""
    optimizer, params = begun(MAKERS["adamw"], backend, dtype)
    before = snapshot(optimizer, params)
    if not native:
        monkeypatch.setattr("lookahead_fused._swap._lie_in_memory", lambda theta, phi: False)
    with torch.inference_mode():
        optimizer.eval()
        saved = optimizer.state_dict()
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))
    twin_params = copies(params)
    twin = MAKERS["adamw"](twin_params, backend)
    with torch.inference_mode():
        twin.load_state_dict(saved)
    twin.train()
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


@of_few
def test_a_ctrl_c_at_any_moment(backend: BackendCase, name: str) -> None:
    """The mode is on or off, and the parameters are what it says."""
    optimizer, params = begun(MAKERS[name], backend)
    theta, phi = values_of(params), slow_weights_of(optimizer, params)
    before = snapshot(optimizer, params)

    def check(ended: bool) -> None:
        assert_hold(params, phi if optimizer._evaluating else theta)
        optimizer.train()
        assert_unchanged(before, snapshot(optimizer, params))

    def to_and_fro() -> None:
        optimizer.eval()
        optimizer.train()

    at_all_moments(optimizer.eval, check, 60)
    at_all_moments(to_and_fro, check, 60)


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


# ------------------------------------------------------------------------------------------------------------
# bases with modes of their own


class WithModes(UnfusedRMSprop):
    """What a schedule-free optimizer does: it evaluates on other weights, which it makes of those that it trains. Here
    a power of two lies between them, so that no bit is lost."""

    def __init__(self, params: Any, **hyper: Any) -> None:
        super().__init__(params, **hyper)
        self.calls: list[str] = []
        self.fails = False

    def _change(self, call: str, training: bool, factor: float) -> None:
        self.calls.append(call)
        if self.fails:
            raise MemoryError("none left")
        for group in self.param_groups:
            if group.get("training", True) != training:
                group["training"] = training
                with torch.no_grad():
                    for p in group["params"]:
                        p.mul_(factor)

    def eval(self) -> str:
        self._change("eval", False, 0.25)
        return "the base's"

    def train(self) -> str:
        self._change("train", True, 4.0)
        return "the base's"

    def step(self, closure: Any = None) -> Any:
        assert all(group.get("training", True) for group in self.param_groups)
        return super().step(closure)


WITH_MODES: dict[str, Make] = {
    "lookahead": lambda params, b: Lookahead(WithModes(params, lr=0.1), 5, 0.3, backend=b.name),
    "ema": lambda params, b: EMA(WithModes(params, lr=0.1), 0.7, backend=b.name),
}
of_modes = pytest.mark.parametrize("name", WITH_MODES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@both_dtypes
@of_modes
def test_a_base_with_modes(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    """It is told first and told last, each time, and changes the weights that it trains, whatever is open."""
    optimizer, params = begun(WITH_MODES[name], backend, dtype)
    base = optimizer.base_optimizer
    theta, phi = values_of(params[:-1]), slow_weights_of(optimizer, params)[:-1]
    for _ in range(2):
        assert optimizer.eval() is None
        assert_hold(params[:-1], phi)
    for _ in range(2):
        assert optimizer.train() is None
        assert_hold(params[:-1], theta)
    assert base.calls == ["eval", "eval", "train", "train"]
    for eval_inside, train_inside in ((True, False), (False, True), (True, True)):
        with optimizer.slow_weights() if eval_inside else contextlib.nullcontext():
            optimizer.eval()
            assert_hold(params[:-1], phi)
        assert_hold(params[:-1], phi)
        with optimizer.slow_weights() if train_inside else contextlib.nullcontext():
            optimizer.train()
            assert_hold(params[:-1], phi if train_inside else theta)
        assert_hold(params[:-1], theta)
    with optimizer.slow_weights():
        optimizer.eval()
        optimizer.train()
    assert_hold(params[:-1], theta)
    twin, twin_params = begun(WITH_MODES[name], backend, dtype)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        o.train()
        advance(o, ps[:-1], range(CUT, END))
    assert_hold(params[:-1], values_of(twin_params[:-1]))


@both_dtypes
@of_modes
def test_a_base_with_modes_resumes(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    """Its mode stands in its groups, and the training weights that are saved are those of that mode."""
    optimizer, params = begun(WITH_MODES[name], backend, dtype)
    optimizer.eval()
    weights, saved = through_a_file((params, optimizer.state_dict()))
    assert_unchanged(saved["state"][0]["train_param"] * 4, begun(WITH_MODES[name], backend, dtype)[1][0].detach())
    twin_params = copies(weights)
    twin = WITH_MODES[name](twin_params, backend)
    # What is loaded in an inference mode outlives it, and nobody else's tensors are written into.
    copied = copy.deepcopy(saved)
    with torch.inference_mode():
        twin.load_state_dict(copied)
    twin.eval()
    assert_unchanged(saved, copied)
    for value in tensors_of(copied):
        value.zero_()
    assert_hold(twin_params[:-1], weights[:-1])
    for o, ps in ((optimizer, params), (twin, twin_params)):
        o.train()
        advance(o, ps[:-1], range(CUT, END))
    assert_hold(params[:-1], values_of(twin_params[:-1]))
    assert_unchanged(optimizer.state_dict(), twin.state_dict())


@of_modes
def test_a_change_of_mode_that_fails(backend: BackendCase, name: str) -> None:
    """The base's fails: ours has not changed. Ours fails: the base is back in its own."""
    optimizer, params = begun(WITH_MODES[name], backend)
    base, before = optimizer.base_optimizer, snapshot(optimizer, params)
    base.fails = True
    with pytest.raises(MemoryError):
        optimizer.eval()
    base.fails = False
    assert_unchanged(before, snapshot(optimizer, params))
    slow = optimizer.state[params[1]]["slow_param"]
    optimizer.state[params[1]]["slow_param"] = torch.ones(2)
    with pytest.raises(ValueError, match="slow_param"):
        optimizer.eval()
    assert base.calls == ["eval", "eval", "train"]
    optimizer.state[params[1]]["slow_param"] = slow
    assert_hold(params, before["params"])
    advance(optimizer, params[:-1], [CUT])


# ------------------------------------------------------------------------------------------------------------
# torch.distributed


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("way", ["a whole dict", "a template of evaluating", "a template of training"])
def test_distributed_checkpoint(backend: BackendCase, name: str, flat: bool, way: str, tmp_path: Path) -> None:
    """What has no place in a template stays in the file, and of flat names torch reads those that stand in the state:
    what is loaded then is a checkpoint of inside a block. Else all of it is."""
    if backend.device != "cpu":
        pytest.skip("the model is on the CPU")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, again, plain = make_model(), make_model(1), make_model()
    optimizer, resumed, twin = (MAKERS[name](list(m.parameters()), backend) for m in (model, again, plain))
    for m, o in ((model, optimizer), (plain, twin)):
        advance(o, list(m.parameters()), range(CUT))
        o.zero_grad()

    def both(m: torch.nn.Module, o: Any) -> dict[str, Any]:
        return {"model": sd.get_model_state_dict(m), "optim": sd.get_optimizer_state_dict(m, o, options=options)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.eval()
        saved = both(model, optimizer)
        dcp.save(saved, checkpoint_id=tmp_path)
        if way == "a template of evaluating":
            both(again, resumed)  # makes its state
            resumed.eval()
        template = both(again, resumed)
        if way != "a whole dict":
            dcp.load(template, checkpoint_id=tmp_path)
        else:
            template = copy.deepcopy(saved)
        sd.set_model_state_dict(again, template["model"])
        sd.set_optimizer_state_dict(again, resumed, template["optim"], options=options)
    assert_hold(list(again.parameters()), values_of(list(model.parameters())))
    nested = copy.deepcopy(optimizer.state_dict())
    if flat or way == "a template of training":
        assert_unchanged(without_train_params(nested), resumed.state_dict())
        resumed.step()
        return
    assert_unchanged(nested, resumed.state_dict())
    resumed.train()
    for m, o in ((again, resumed), (plain, twin)):
        advance(o, list(m.parameters()), range(CUT, END))
    assert_same_run(twin, resumed)


SHARDS = """
import copy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from lookahead_fused import EMA, Lookahead, LookaheadAdamW

MAKERS = {
    "adamw": lambda ps: LookaheadAdamW(ps, lr=0.1, k=5),
    "external": lambda ps: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=5),
    "ema": lambda ps: EMA(torch.optim.AdamW(ps, lr=0.1), 0.7),
}
mesh = init_device_mesh("cpu", (2,))

def value(step, dtype):
    whole = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
    return distribute_tensor(whole, mesh, [Shard(0)])

def advance(optimizer, p, steps):
    for step in steps:
        p.grad = value(step + 1, p.dtype)
        optimizer.step()

def bits(t):
    return t.detach().to_local().clone()

for dtype in (torch.float32, torch.bfloat16):
    for name, make in MAKERS.items():
        p, q, r = (torch.nn.Parameter(value(0, dtype)) for _ in range(3))
        optimizer, twin, resumed = make([p]), make([q]), make([r])
        for o, x in ((optimizer, p), (twin, q)):
            advance(o, x, range(7))
        phi = bits(optimizer.state[p]["slow_param"]).to(dtype)
        optimizer.eval()
        assert torch.equal(bits(p), phi), name
        saved = copy.deepcopy(optimizer.state_dict())
        train = saved["state"][0]["train_param"]
        assert type(train) is DTensor and train.placements == p.placements and train.shape == p.shape, name
        assert torch.equal(bits(train), bits(q)), name
        resumed.load_state_dict(saved)
        with torch.no_grad():
            r.copy_(p)
        for o, x in ((optimizer, p), (resumed, r)):
            o.train()
            assert torch.equal(bits(x), bits(q)), name
        for o, x in ((optimizer, p), (resumed, r), (twin, q)):
            advance(o, x, range(7, 14))
            assert torch.equal(bits(x), bits(p)), name
        # What was loaded into a parameter first stays.
        other = copy.deepcopy(optimizer.state_dict())
        resumed.eval()
        with torch.no_grad():
            r.copy_(value(99, dtype))
        resumed.load_state_dict(other)
        assert torch.equal(bits(r), bits(value(99, dtype))), name
"""


@needs_gloo
def test_shards(tmp_path: Path) -> None:
    """Of a DTensor the training weights are one too, which torch.distributed.checkpoint can put together."""
    two_ranks(SHARDS, tmp_path)
