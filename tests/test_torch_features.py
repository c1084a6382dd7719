"""What torch does with an optimizer: compile, closures, hooks, names, the garbage collector, other modes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import (
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    UnfusedRMSprop,
    assert_unchanged,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    snapshot,
)
from runs import advance, assert_same_run, copies, fresh, gradients_of
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import lookahead_fused

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 2},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "k": 2},
    "wrapped-adamw": {"lr": 0.1, "k": 2},
    "external": {"lr": 0.1},
}


def make(rule: str, params: Any, backend: BackendCase) -> torch.optim.Optimizer:
    if rule == "external":
        base = UnfusedRMSprop(params, **RULES[rule])
        return lookahead_fused.Lookahead(base, 2, backend=backend.name)
    return make_optimizer(rule, params, backend, **RULES[rule])


# ------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("rule", ["adamw", "external"])
@pytest.mark.filterwarnings("ignore")
def test_compile(backend: BackendCase, rule: str) -> None:
    """A compiled training step breaks its graph at ours and computes the same; nothing of the step is traced,
    where hyperparameters, the phase or addresses would become constants."""
    torch._dynamo.reset()
    generator = seeded(1)
    inputs = [torch.randn(5, 4, generator=generator).to(backend.device) for _ in range(6)]
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        model.to(backend.device)
        optimizer = make(rule, model.parameters(), backend)

        def train(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss * 2

        step = torch.compile(train, backend="eager") if compiled else train
        for t, x in enumerate(inputs):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + t)
            loss = step(x)
        runs.append((optimizer, loss))
    assert torch.equal(runs[0][1], runs[1][1])
    assert_same_run(runs[0][0], runs[1][0])


@pytest.mark.filterwarnings("ignore")
def test_compile_of_the_step_alone(backend: BackendCase) -> None:
    torch._dynamo.reset()
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make("adamw", params, backend), make("adamw", twin_params, backend)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for t in range(5):
        for ps in (params, twin_params):
            for p, g in zip(ps, gradients_of(t, ps), strict=True):
                p.grad = g
        compiled()
        twin.step()
    assert_same_run(optimizer, twin)


# ------------------------------------------------------------------------------------------------------------
# closures and hooks


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("returned", [None, 3.5, "a tensor"])
def test_closure(backend: BackendCase, rule: str, returned: Any) -> None:
    """Called once, with gradients on, before the step; what it returns is returned, None too."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    result = torch.ones(()) if returned == "a tensor" else returned
    calls = []

    def closure() -> Any:
        calls.append([p.detach().clone() for p in params])
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        sum((p * 2).sum() for p in params).backward()
        return result

    with torch.no_grad():
        assert optimizer.step(closure) is result
    assert optimizer.step(closure=closure) is result
    assert len(calls) == 2
    assert not any(torch.equal(p, b) for p, b in zip(params, calls[1], strict=True) if p.numel())
    assert optimizer.step() is None


@pytest.mark.parametrize("rule", RULES)
def test_a_closure_that_raises(backend: BackendCase, rule: str) -> None:
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_unchanged(before, snapshot(optimizer))
    advance(optimizer, params, [3])


@pytest.mark.parametrize("rule", RULES)
def test_step_hooks(backend: BackendCase, rule: str) -> None:
    """Before and after, once each, in order; the first may hand other arguments on."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    calls: list[Any] = []

    def before(one: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        assert one is optimizer
        calls.append(("before", {p: own["slow_param"].clone() for p, own in optimizer.state.items()}))
        return (one, lambda: "the hook's"), {}

    def after(one: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert one is optimizer
        calls.append(("after", len(optimizer.state)))

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    for p, g in zip(params, gradients_of(0, params), strict=True):
        p.grad = g
    assert optimizer.step(lambda: "the caller's") == "the hook's"
    assert calls == [("before", {}), ("after", len(params))]
    for handle in handles:
        handle.remove()
    assert optimizer.step(lambda: "the caller's") == "the caller's"
    assert len(calls) == 2


@pytest.mark.parametrize("rule", RULES)
def test_hooks_on_every_optimizer(backend: BackendCase, rule: str) -> None:
    """torch's global ones see ours once; and under a wrapper its base, which has steps of its own."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda one, *_: seen.append(f"before {type(one).__name__}")),
        register_optimizer_step_post_hook(lambda one, *_: seen.append(f"after {type(one).__name__}")),
    ]
    try:
        advance(optimizer, params, [0])
    finally:
        for handle in handles:
            handle.remove()
    names = [type(optimizer).__name__]
    if hasattr(optimizer, "base_optimizer"):
        names.append(type(optimizer.base_optimizer).__name__)
    assert seen == [f"before {name}" for name in names] + [f"after {name}" for name in reversed(names)]


@pytest.mark.parametrize("rule", ["adamw", "wrapped-adamw"])
def test_a_profiler_sees_the_step_by_name(backend: BackendCase, rule: str) -> None:
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        advance(optimizer, params, [2])
    ranges = [event.key for event in profiler.key_averages() if event.key.startswith("Optimizer.step#")]
    expected = {f"Optimizer.step#{type(optimizer).__name__}.step"}
    if rule == "wrapped-adamw":
        expected.add("Optimizer.step#AdamW.step")
    assert set(ranges) == expected


# ------------------------------------------------------------------------------------------------------------
# parameters and gradients


@pytest.mark.parametrize("rule", RULES)
def test_zero_grad(backend: BackendCase, rule: str) -> None:
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for t in range(4):
        for o, ps, to_none in ((optimizer, params, True), (twin, twin_params, False)):
            grads = [p.grad for p in ps]
            o.zero_grad(set_to_none=to_none)
            if to_none:
                assert all(p.grad is None for p in ps)
            else:
                assert all(p.grad is g for p, g in zip(ps, grads, strict=True))
                assert all(g is None or not g.any() for g in grads)
            sum((p * g).sum() for p, g in zip(ps, gradients_of(t, ps), strict=True)).backward()
            o.step()
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "wrapped-adamw", "wrapped-sgd"])
def test_maximize(backend: BackendCase, rule: str) -> None:
    """The run of the negated gradients, to the bit."""
    params, twin_params = fresh(backend), fresh(backend)
    optimizer = make_optimizer(rule, params, backend, lr=0.1, weight_decay=0.1, maximize=True, k=2)
    twin = make_optimizer(rule, twin_params, backend, lr=0.1, weight_decay=0.1, k=2)
    advance(optimizer, params, range(5))
    for t in range(5):
        for p, g in zip(twin_params, gradients_of(t, twin_params), strict=True):
            p.grad = -g
        twin.step()
    for p, q in zip(params, twin_params, strict=True):
        assert same_tensor_bits(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_named_parameters(backend: BackendCase, rule: str) -> None:
    """Names are kept in the groups, saved, and change nothing else; a checkpoint without them keeps them."""
    params, twin_params = fresh(backend), fresh(backend)
    names = [f"layer.{i}" for i in range(len(params))]
    groups = [
        {"params": list(zip(names[:2], params[:2], strict=True))},
        {"params": list(zip(names[2:], params[2:], strict=True)), "lr": 0.3},
    ]
    optimizer = make(rule, groups, backend)
    twin = make(rule, [{"params": twin_params[:2]}, {"params": twin_params[2:], "lr": 0.3}], backend)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3))
    assert all(same_tensor_bits(p, q) for p, q in zip(params, twin_params, strict=True))
    assert [g["param_names"] for g in optimizer.state_dict()["param_groups"]] == [names[:2], names[2:]]
    optimizer.load_state_dict(twin.state_dict())
    assert [g["param_names"] for g in optimizer.param_groups] == [names[:2], names[2:]]
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": copies(params[:1])})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_a_parameter_in_two_groups_is_refused(rule: str) -> None:
    """By our classes as by torch's, which a wrapper is given."""
    a, b = make_params([(3,), (4,)])
    for cls in (LOOKAHEAD_CLASSES[rule], TORCH_CLASSES[rule]):
        with pytest.raises(ValueError, match="more than one parameter group"):
            cls([{"params": [a, b]}, {"params": [b]}])
    wrapper = lookahead_fused.Lookahead(TORCH_CLASSES[rule]([a, b]))
    with pytest.raises(ValueError, match="more than one parameter group"):
        wrapper.add_param_group({"params": [b]})
    assert len(wrapper.param_groups) == 1


@pytest.mark.parametrize("rule", RULES)
def test_inference_tensors_as_gradients(backend: BackendCase, rule: str) -> None:
    """They have no version counter to look at, and are only read."""
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for t in range(3):
        advance(twin, twin_params, [t])
        with torch.inference_mode():
            grads = gradients_of(t, params)
        for p, g in zip(params, grads, strict=True):
            assert g.is_inference()
            p.grad = g
        optimizer.step()
    for p, q in zip(params, twin_params, strict=True):
        assert same_tensor_bits(p, q)


# ------------------------------------------------------------------------------------------------------------
# memory


def step_in_a_circle(backend: BackendCase, rule: str, by: str) -> list[weakref.ref[Any]]:
    """Three steps of an optimizer that its parameters refer to; returns references to all that they leave."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)

    def step_now(p: torch.Tensor) -> None:
        optimizer.step()
        p.grad = None

    handles = []
    for p in params:
        if by == "hook":
            p.register_hook(lambda grad: grad if optimizer else None)
        elif by == "attribute":
            p.optimizer = optimizer
        else:
            handles.append(p.register_post_accumulate_grad_hook(step_now))
    for _ in range(3):
        sum((p * p).sum() for p in params).backward()
        if by != "step in the backward pass":
            optimizer.step()
    # torch hides these hooks from the garbage collector: with its own optimizers, too, such a circle stays.
    for handle in handles:
        handle.remove()
    state = [value for own in optimizer.state.values() for value in own.values()]
    assert len(state) >= 3 * len(params)
    return [weakref.ref(thing) for thing in (optimizer, *params, *state)]


@pytest.mark.usefixtures("little_to_look_through")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("by", ["hook", "attribute", "step in the backward pass"])
def test_circles_are_collected(backend: BackendCase, rule: str, by: str) -> None:
    """A parameter that holds its optimizer makes a circle through the compiled tables: the garbage collector
    has to see all of it."""
    watched = step_in_a_circle(backend, rule, by)
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_let_go(backend: BackendCase, rule: str) -> None:
    """After zero_grad() their memory is free at once, without the garbage collector."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    gc.disable()
    try:
        for t in range(3):
            advance(optimizer, params, [t])
            watched = [weakref.ref(p.grad) for p in params]
            optimizer.zero_grad()
            assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()


@pytest.mark.usefixtures("little_to_look_through")
@pytest.mark.parametrize("rule", RULES)
def test_replaced_parameters_are_let_go(backend: BackendCase, rule: str) -> None:
    """Parameters and state that were replaced are not held by what a step remembers."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    held = [*params, *(value for own in optimizer.state.values() for value in own.values())]
    watched = [weakref.ref(t) for t in held]
    new = fresh(backend, seed=4)
    optimizer.param_groups[0]["params"] = new
    optimizer.state.clear()
    advance(optimizer, new, [0])
    del params, held
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
