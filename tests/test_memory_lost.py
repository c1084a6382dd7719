"""Tensors whose memory is gone: freed, or cut down to less than they say. No step is made with them; each is refused by
name before anything changed, and when the memory is back the run goes on as if nothing had been."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_optimizer, make_params, snapshot, tune
from processes import in_fork, needs_cpu_backend, needs_fork, serving
from runs import advance, gradients_of
from torch import Tensor

from lookahead_fused import _policies

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True, "pullback_momentum": "pullback"},
    "sgd": {"momentum": 0.9},
    "wrapped-adamw": {},
    "wrapped-external": {"momentum": 0.9, "pullback_momentum": "pullback"},
}
# What is read and written by the base alone, which is torch's, dies of it as torch does.
THEIRS = ("step", "square_avg")
PARAMETER, GRADIENT, LR = "parameter 1 of group 0", "the gradient of parameter 1 of group 0", "lr"


@needs_fork
def test_memory_that_is_lost_is_refused(backend: BackendCase) -> None:
    script = f"import test_memory_lost\nfrom helpers import BackendCase\ntest_memory_lost.report({backend!r})"
    assert in_fork(script) == []


@needs_cpu_backend
@pytest.mark.parametrize("way", ["SHIM", "EXCHANGE_API", "ATTRIBUTES"])
def test_a_gradient_cut_down_is_refused_in_whatever_way_it_is_described(way: str) -> None:
    params = make_params([(7,), (33,)])
    optimizer = make_optimizer("adamw", params, BackendCase("cpu", "cpu", 0.0), lr=0.1)
    tune(optimizer, way=way)
    advance(optimizer, params, range(2))
    for p, g in zip(params, gradients_of(2, params), strict=True):
        p.grad = g
    before = snapshot(optimizer)
    storage = params[1].grad.untyped_storage()
    storage.resize_(66)
    with pytest.raises(ValueError, match=f"^{GRADIENT} must have its memory, got a storage of 66 bytes"):
        optimizer.step()
    storage.resize_(132)
    params[1].grad.copy_(gradients_of(2, params)[1])
    assert_unchanged(before, snapshot(optimizer))


def report(backend: BackendCase) -> None:
    """Prints what is not refused, changes something all the same, or does not go on. In a process of its own, since
    whatever reads such a tensor may die of it."""
    wrong = []
    cases = list(itertools.product(RULES, (0, 3), (0, 0.5), ("step", "sync", "slow_weights", "nothing")))
    for rule, steps, rest, call in cases[:: 5 if backend.name == "triton-host" else 1]:
        with serving(backend.name):
            for name in names(backend, rule, steps, call):
                try:
                    refused(backend, rule, steps, name, rest, call)
                except AssertionError as error:
                    wrong.append(f"{rule}, {call} after {steps} steps, {name}, {rest}: {error}")
    print(json.dumps(wrong))


def begun(backend: BackendCase, rule: str, steps: int) -> tuple[list[Any], Any]:
    params = make_params([(7,), (33,)], device=backend.device)
    lr = torch.tensor(0.1, dtype=torch.float64, device=backend.device) if rule in ("adamw", "sgd") else 0.1
    optimizer = make_optimizer(rule, params, backend, lr=lr, k=2, **RULES[rule])
    advance(optimizer, params, range(steps))
    for p, g in zip(params, gradients_of(steps, params), strict=True):
        p.grad = g
    return params, optimizer


def names(backend: BackendCase, rule: str, steps: int, call: str) -> list[str]:
    """What a call needs the memory of, by the names that messages have."""
    params, optimizer = begun(backend, rule, steps)
    theirs = THEIRS if rule == "wrapped-external" else ()
    state = [f"state {key!r} of {PARAMETER}" for key in optimizer.state.get(params[1], {}) if key not in theirs]
    if call == "step":
        lr = [LR] if isinstance(optimizer.param_groups[0]["lr"], Tensor) else []
        # A gradient is read by a base of its own, too.
        return [PARAMETER, *([] if theirs else [GRADIENT]), *state, *lr]
    if steps == 0:
        return []
    needed = {"slow_param", "step"} if call == "slow_weights" else needed_in_a_sync(rule)
    return [PARAMETER, *(name for name in state if name.split("'")[1] in needed)]


def needed_in_a_sync(rule: str) -> set[str]:
    acts = RULES[rule].get("pullback_momentum") == "pullback"
    moments = {"exp_avg", "momentum_buffer"} if acts else set()
    return {*_policies.Lookahead().entries, "step", "lookahead_step", *moments}


def refused(backend: BackendCase, rule: str, steps: int, name: str, rest: float, call: str) -> None:
    params, optimizer = begun(backend, rule, steps)
    _, twin = begun(backend, rule, steps)
    before = snapshot(optimizer)
    tensor = find(name, params[1], optimizer)
    storage = tensor.untyped_storage()
    size, content = storage.nbytes(), tensor.detach().clone()
    storage.resize_(int(size * rest))
    if call != "nothing":
        with pytest.raises(
            ValueError, match=f"^{name} must have its memory, got a storage of {int(size * rest)} bytes"
        ):
            CALLS[call](optimizer)
    storage.resize_(size)
    tensor.detach().copy_(content)
    assert_unchanged(before, snapshot(optimizer))
    for o in (optimizer, twin):
        o.step()
        o.sync()
    assert_unchanged({**snapshot(twin), "members": 0}, {**snapshot(optimizer), "members": 0})


def enter(optimizer: Any) -> None:
    param = optimizer.param_groups[0]["params"][0]
    before = param.detach().clone()
    with optimizer.slow_weights():
        assert not torch.equal(param, before)


CALLS: dict[str, Callable[[Any], None]] = {
    "step": lambda optimizer: optimizer.step(),
    "sync": lambda optimizer: optimizer.sync(),
    "slow_weights": enter,
    "nothing": lambda optimizer: None,
}


def find(name: str, param: Tensor, optimizer: Any) -> Tensor:
    if name == LR:
        return optimizer.param_groups[0]["lr"]
    if name in (PARAMETER, GRADIENT):
        return param if name == PARAMETER else param.grad  # type: ignore[return-value]
    return optimizer.state[param][name.split("'")[1]]


@pytest.mark.parametrize("call", ["sync", "slow_weights"])
@pytest.mark.parametrize("rule", RULES)
def test_moments_may_be_away_where_none_is_needed(backend: BackendCase, rule: str, call: str) -> None:
    """To make room for an evaluation, say: there only parameters and slow weights are needed, and in a sync what the
    policy acts on."""
    params, optimizer = begun(backend, rule, 3)
    _, twin = begun(backend, rule, 3)
    before = snapshot(optimizer)
    moments = [
        value
        for own in optimizer.state.values()
        for name, value in own.items()
        if value.dim() and name != "slow_param" and not (call == "sync" and name in needed_in_a_sync(rule))
    ]
    contents = [value.clone() for value in moments]
    for value in moments:
        value.untyped_storage().resize_(0)
    CALLS[call](optimizer)
    CALLS[call](twin)
    for value, content in zip(moments, contents, strict=True):
        value.untyped_storage().resize_(content.untyped_storage().nbytes())
        value.copy_(content)
    assert_unchanged({**snapshot(twin), "members": 0}, {**snapshot(optimizer), "members": 0})
    assert torch.equal(params[0], before["params"][0]) == (call == "slow_weights")
