"""Under a dispatch mode, whose user wants to see every operator, nothing is written past it through an address: steps,
syncs and slow_weights() go by torch's operators, and to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_optimizer, make_params, snapshot
from runs import advance, gradients_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True, "pullback_momentum": "pullback"},
    "sgd": {"momentum": 0.9},
    "wrapped-adamw": {"weight_decay": 0.1},
    "wrapped-external": {"momentum": 0.9, "pullback_momentum": "pullback"},
}
of_each_rule = pytest.mark.parametrize("rule", RULES)


class Writes(TorchDispatchMode):
    """Notes what operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            targets = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.written |= {target.data_ptr() for target in targets}
        return func(*args, **(kwargs or {}))


def make(backend: BackendCase, rule: str, dtype: torch.dtype = torch.float32) -> tuple[list[Any], Any]:
    params = make_params([(7,), (3, 5)], dtype, device=backend.device)
    return params, make_optimizer(rule, params, backend, lr=0.1, k=2, **RULES[rule])


def enter(optimizer: Any) -> Any:
    block = optimizer.slow_weights()
    block.__enter__()
    return block


CALLS: dict[str, Callable[[Any], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "sync": lambda optimizer: optimizer.sync(),
    "slow_weights": enter,
}


def addresses(params: list[Any], optimizer: Any) -> dict[str, int]:
    found = {f"param {i}": p.data_ptr() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"{name} {i}": value.data_ptr() for name, value in optimizer.state[p].items()}
    return found


@of_each_rule
@pytest.mark.parametrize("first", [0, 3])
def test_a_mode_sees_what_a_step_writes(backend: BackendCase, rule: str, first: int) -> None:
    """Steps before it and after it go through tables: the run is the run without a mode, to the bit."""
    results = []
    for seen in (False, True):
        params, optimizer = make(backend, rule)
        advance(optimizer, params, range(first))
        for step in range(first, first + 3):
            with (mode := Writes()) if seen else torch.no_grad():
                advance(optimizer, params, [step])
            if seen and step > 0:
                unseen = {name for name, at in addresses(params, optimizer).items() if at not in mode.written}
                # Slow weights, and what goes with them, change at a sync.
                assert not any(name.startswith(("param", "exp", "mom", "square")) for name in unseen), unseen
                assert step % 2 == 0 or not unseen, unseen
        advance(optimizer, params, range(first + 3, first + 6))
        results.append({**snapshot(optimizer), "members": 0})
    assert_unchanged(*results)


@of_each_rule
@pytest.mark.parametrize("call", ["sync", "slow_weights"])
def test_a_mode_sees_the_slow_weights(backend: BackendCase, rule: str, call: str) -> None:
    params, optimizer = make(backend, rule)
    advance(optimizer, params, range(3))
    twin_params, twin = make(backend, rule)
    advance(twin, twin_params, range(3))
    names = {name: at for name, at in addresses(params, optimizer).items() if name.startswith(("param", "slow"))}
    with Writes() as entered:
        if call == "sync":
            optimizer.sync()
        else:
            block = enter(optimizer)
    inside = [p.detach().clone() for p in params]
    with Writes() as left:
        if call == "slow_weights":
            block.__exit__(None, None, None)
    for mode in (entered, left) if call == "slow_weights" else (entered,):
        assert set(names.values()) <= mode.written, {n for n, at in names.items() if at not in mode.written}
    if call == "sync":
        twin.sync()
    else:
        with twin.slow_weights():
            assert_unchanged(inside, [p.detach() for p in twin_params])
    assert_unchanged({**snapshot(twin), "members": 0}, {**snapshot(optimizer), "members": 0})


@of_each_rule
@pytest.mark.parametrize(("call", "steps_before"), [("step", 0), *((call, 3) for call in CALLS)])
def test_a_backward_through_weights_that_were_saved(
    backend: BackendCase, rule: str, call: str, steps_before: int
) -> None:
    """allow_mutation_on_saved_tensors learns of a write by its operator: a write that it does not see gives a wrong
    gradient, with no error."""
    (w,) = make_params([(3, 3)], device=backend.device)
    optimizer = make_optimizer(rule, [w], backend, lr=0.1, k=2, **RULES[rule])
    advance(optimizer, [w], range(steps_before))
    x = torch.ones(2, 3, device=backend.device, requires_grad=True)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = x @ w
        before = w.detach().clone()
        (w.grad,) = gradients_of(9, [w])
        block = CALLS[call](optimizer)
        assert not torch.equal(w, before)
        (found,) = torch.autograd.grad(y.sum(), x)
        if call == "slow_weights":
            block.__exit__(None, None, None)
    torch.testing.assert_close(found, torch.ones(2, 3, device=backend.device) @ before.t())


@of_each_rule
@pytest.mark.parametrize("allows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_real_parameters_under_a_mode_that_computes_nothing(
    backend: BackendCase, rule: str, allows: bool, dtype: torch.dtype, steps_before: int
) -> None:
    """FakeTensorMode computes shapes alone: a step is refused, no fake state is left, and the run goes on."""
    params, optimizer = make(backend, rule, dtype)
    advance(optimizer, params, range(steps_before))
    for p, g in zip(params, gradients_of(steps_before, params), strict=True):
        p.grad = g
    before = snapshot(optimizer)
    mode = FakeTensorMode(allow_non_fake_inputs=allows)
    for call in CALLS if steps_before else ("step",):
        with pytest.raises((TypeError, RuntimeError, AssertionError)) as caught, mode:
            CALLS[call](optimizer)
        if call != "slow_weights" and rule != "wrapped-external":  # there a count is asked for first
            assert "outside of a mode that makes a FakeTensor" in str(caught.value)
        assert_unchanged(before, snapshot(optimizer))
    optimizer.step()
    twin_params, twin = make(backend, rule, dtype)
    advance(twin, twin_params, range(steps_before + 1))
    assert_unchanged({**snapshot(twin), "members": 0}, {**snapshot(optimizer), "members": 0})
