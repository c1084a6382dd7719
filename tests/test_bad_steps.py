"""What is found bad at a step raises before anything changed, in the parameters before the bad one too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    BackendCase,
    assert_unchanged,
    can_set_grad_dtype,
    check_message,
    make_grads,
    make_optimizer,
    make_params,
    seeded,
    snapshot,
)

NAN = float("nan")


def sparse(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).detach().to_sparse()


def spoil_sparse(params: list, optimizer: torch.optim.Optimizer) -> None:
    params[-1].grad = sparse(params[-1])


def spoil_gradient_complex(params: list, optimizer: torch.optim.Optimizer) -> None:
    params[-1].grad = None
    params[-1].grad_dtype = None
    params[-1].grad = torch.ones_like(params[-1], dtype=torch.complex64)


def spoil_gradient_integer(params: list, optimizer: torch.optim.Optimizer) -> None:
    params[-1].grad = None
    params[-1].grad_dtype = None
    params[-1].grad = torch.ones_like(params[-1], dtype=torch.int32)


def spoil_param_expanded(params: list, optimizer: torch.optim.Optimizer) -> None:
    """All of its elements are one: no update of it is right."""
    params[-1].data = torch.ones((), device=params[-1].device).expand(6)


def spoil_shape(params: list, optimizer: torch.optim.Optimizer) -> None:
    """The parameter outgrows its gradient and its state: memory outside would be read and written."""
    params[-1].data = torch.ones(4000, device=params[-1].device)


def spoil_shape_and_gradient(params: list, optimizer: torch.optim.Optimizer) -> None:
    """The parameter and its gradient outgrow the state."""
    params[-1].grad = None
    params[-1].data = torch.ones(4000, device=params[-1].device)
    params[-1].grad = torch.ones_like(params[-1])


def spoil_state_shape(params: list, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[-1]]["slow_param"] = torch.ones(2, device=params[-1].device)


def spoil_moment_shape(params: list, optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[params[-1]]
    name = "exp_avg" if "exp_avg" in state else "momentum_buffer"
    state[name] = torch.ones(2, device=params[-1].device)


def spoil_state_device(params: list, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[-1]]["slow_param"] = torch.ones_like(params[-1], device="meta")


def spoil_state_type(params: list, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params[-1]]["slow_param"] = [1.0] * params[-1].numel()


SPOILERS: list[tuple[Callable, Any, str]] = [
    (spoil_sparse, TypeError, "sparse"),
    (spoil_gradient_complex, TypeError, "complex"),
    (spoil_gradient_integer, TypeError, "int32"),
    (spoil_param_expanded, (ValueError, RuntimeError, TypeError), "expand|stride|overlap|single memory"),
    (spoil_shape, (ValueError, RuntimeError), "shape|size|element"),
    (spoil_shape_and_gradient, (ValueError, RuntimeError), "shape|size|element"),
    (spoil_state_shape, (ValueError, RuntimeError), "slow_param"),
    (spoil_moment_shape, (ValueError, RuntimeError), "exp_avg|momentum_buffer"),
    (spoil_state_device, (ValueError, RuntimeError, TypeError), "slow_param|meta"),
    (spoil_state_type, (ValueError, RuntimeError, TypeError), "slow_param|list"),
]
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "k": 2},
    "sgd": {"lr": 0.1, "momentum": 0.9, "k": 2},
    "wrapped-adamw": {"lr": 0.1, "k": 2},
}


# These have no state to spoil, or to differ from, before the first step.
NEED_STATE = (
    spoil_shape_and_gradient,
    spoil_state_shape,
    spoil_moment_shape,
    spoil_state_device,
    spoil_state_type,
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("spoil", "error", "message", "steps_before"),
    [
        pytest.param(*spoiler, steps, id=f"{spoiler[0].__name__}-{steps}")
        for spoiler in SPOILERS
        for steps in ((1, 3) if spoiler[0] in NEED_STATE else (0, 1, 3))
    ],
)
def test_a_bad_step_changes_nothing(
    backend: BackendCase, rule: str, steps_before: int, spoil: Callable, error: Any, message: str
) -> None:
    """The last parameter of the last group is bad: the ones before it are not stepped, none gets a state."""
    if "gradient_" in spoil.__name__ and not can_set_grad_dtype():
        pytest.skip("this torch keeps gradients in their parameter's dtype")
    params = make_params([(5,), (3, 4), (6,)], device=backend.device)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = make_optimizer(rule, groups, backend, **RULES[rule])
    generator = seeded(1)
    for _ in range(steps_before + 1):
        for p, g in zip(params, make_grads(params, generator=generator), strict=True):
            p.grad = g
        if _ < steps_before:
            optimizer.step()
    spoil(params, optimizer)
    last = params.pop()
    before, last_before = snapshot(optimizer, params), last.detach().clone()
    last_state = {name: value for name, value in optimizer.state.get(last, {}).items()}
    step_before = last_state["step"].item() if last_state else None
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer, params))
    assert torch.equal(last, last_before)
    assert optimizer.state.get(last, {}).keys() == last_state.keys()
    if last_state:
        assert optimizer.state[last]["step"].item() == step_before


@pytest.mark.parametrize("rule", RULES)
def test_it_goes_on_after_a_bad_step(backend: BackendCase, rule: str) -> None:
    """Mended, the run is the run that never was bad: nothing of the bad step is kept anywhere."""
    results = []
    for bad in (False, True):
        params = make_params([(5,), (6,)], device=backend.device)
        optimizer = make_optimizer(rule, params, backend, **RULES[rule])
        generator = seeded(1)
        for t in range(5):
            grads = make_grads(params, generator=generator)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            if bad and t % 2 == 0:
                params[1].grad = sparse(params[1])
                with pytest.raises(TypeError, match="sparse"):
                    optimizer.step()
                params[1].grad = grads[1]
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integer_parameters(backend: BackendCase, dtype: torch.dtype) -> None:
    """Listed and frozen they are accepted; with a gradient they are refused, by either class."""
    for rule in RULES:
        (p,) = make_params([(5,)], device=backend.device)
        integer = torch.nn.Parameter(torch.ones(4, dtype=dtype, device=backend.device), requires_grad=False)
        optimizer = make_optimizer(rule, [p, integer], backend, **RULES[rule])
        p.grad = torch.ones_like(p)
        optimizer.step()
        integer.grad = torch.ones_like(integer)
        before = snapshot(optimizer)
        with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
            optimizer.step()
        assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(backend: BackendCase, dtype: torch.dtype) -> None:
    (p,) = make_params([(5,)], device=backend.device)
    z = torch.nn.Parameter(torch.ones(4, dtype=dtype, device=backend.device))
    optimizer = make_optimizer("adamw", [p], backend)
    p.grad, z.grad = torch.ones_like(p), torch.ones_like(z)
    optimizer.param_groups[0]["params"].append(z)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="complex"):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k", 0),
        ("k", -1),
        ("k", 2.5),
        ("alpha", 1.5),
        ("alpha", NAN),
        ("pullback_momentum", "x"),
        ("backend", "x"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_bad_values_written_into_a_group(backend: BackendCase, rule: str, argument: str, value: Any) -> None:
    """k = 0 would divide by zero inside a native module, where that ends the process."""
    params = make_params([(5,), (6,)], device=backend.device)
    optimizer = make_optimizer(rule, [{"params": params[:1]}, {"params": params[1:]}], backend, **RULES[rule])
    prefix = "lookahead_" if rule.startswith("wrapped") else ""
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[1][prefix + argument] = value
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer.step()
    check_message(caught.value, argument, str(value))
    assert_unchanged(before, snapshot(optimizer))


# ------------------------------------------------------------------------------------------------------------
# closures


@pytest.mark.parametrize("rule", [*RULES, "wrapped-sgd"])
def test_closure(backend: BackendCase, rule: str) -> None:
    """Called once, with gradients enabled, before the step; what it returns is returned, None too."""
    (p,) = make_params([(5,)], device=backend.device)
    optimizer = make_optimizer(rule, [p], backend, **RULES.get(rule, {"lr": 0.1}))
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(p.detach().clone())
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1
    assert torch.equal(calls[0], before)
    assert not torch.equal(p, before)
    assert loss.item() == pytest.approx((before * before).sum().item())
    assert optimizer.step(lambda: None) is None
    assert optimizer.step() is None


def test_a_closure_that_raises_changes_nothing(backend: BackendCase) -> None:
    (p,) = make_params([(5,)], device=backend.device)
    optimizer = make_optimizer("adamw", [p], backend)
    p.grad = torch.ones_like(p)
    before = snapshot(optimizer)

    def closure() -> None:
        raise KeyError("out of data")

    with pytest.raises(KeyError, match="out of data"):
        optimizer.step(closure)
    assert_unchanged(before, snapshot(optimizer))
