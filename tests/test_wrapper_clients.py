"""Hooks, copies, checkpoints and loss scaling around Lookahead(base)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import ALPHA, SHAPES, K, inner_step, make_base
from helpers import (
    BackendCase,
    UnfusedRMSprop,
    assert_unchanged,
    make_params,
    make_tensor,
    same_tensor_bits,
    seeded,
    snapshot,
)
from runs import advance, assert_same_run, copies

import lookahead_fused
from lookahead_fused import Lookahead

# ------------------------------------------------------------------------------------------------------------
# hooks, copies, checkpoints


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adamax"])
def test_hooks(backend: BackendCase, name: str) -> None:
    """On the base and on the wrapper, each once, with the optimizer that it hangs on."""
    params = make_params(SHAPES, device=backend.device)
    base = getattr(torch.optim, name)(params, lr=0.1)
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)
    calls: list[tuple[str, str]] = []

    def note(what: str) -> Callable[..., None]:
        def hook(which: torch.optim.Optimizer, *arguments: Any) -> None:
            assert which is base or which is optimizer
            calls.append((what, "base" if which is base else "wrapper"))

        return hook

    for one in (base, optimizer):
        one.register_step_pre_hook(note("before the step"))
        one.register_step_post_hook(note("after the step"))
        one.register_state_dict_pre_hook(note("before the dict"))
        one.register_state_dict_post_hook(note("after the dict"))
        one.register_load_state_dict_pre_hook(note("before the load"))
        one.register_load_state_dict_post_hook(note("after the load"))

    def outside_in(what: str) -> list[tuple[str, str]]:
        before, after = f"before the {what}", f"after the {what}"
        return [(before, "wrapper"), (before, "base"), (after, "base"), (after, "wrapper")]

    advance(optimizer, params, [0])
    assert calls == outside_in("step")
    calls.clear()
    assert optimizer.step(lambda: 3) == 3
    assert calls == outside_in("step")
    calls.clear()
    saved = optimizer.state_dict()
    assert calls == outside_in("dict")
    calls.clear()
    optimizer.load_state_dict(saved)
    assert calls == outside_in("load")
    calls.clear()
    base.load_state_dict(base.state_dict())
    assert [who for _, who in calls] == ["base"] * 4


@pytest.mark.parametrize("name", ["AdamW", "Adamax"])
def test_a_hook_before_the_step_may_change_the_gradients(backend: BackendCase, name: str) -> None:
    """It sees them before the step does, on either optimizer."""
    (p,) = make_params([(4,)], device=backend.device)
    base = getattr(torch.optim, name)([p], lr=0.1, weight_decay=0.0)
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)

    def clear(*_: Any) -> None:
        assert p.grad is not None
        p.grad.zero_()

    for one in (base, optimizer):
        handle = one.register_step_pre_hook(clear)
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.state.clear()
        optimizer.step()
        assert torch.equal(p, before)
        handle.remove()


MODES = {"NAdam": "pullback", "UnfusedRMSprop": "reset", "Adagrad": "none", "LBFGS": "none"}
WAYS = ("state_dict", "base's state_dict", "pickle", "deepcopy")
# torch's LBFGS loads, and loses a part of itself where it is pickled.
COPIED = [(name, how) for name in MODES for how in WAYS if name != "LBFGS" or "state_dict" in how]


@pytest.mark.parametrize(("name", "how"), COPIED)
def test_generic_continues(backend: BackendCase, name: str, how: str) -> None:
    """Copied or loaded between two syncs: to the bits of the run that went on."""
    mode = MODES[name]
    params = make_params(SHAPES, device=backend.device)
    optimizer = Lookahead(make_base(name, params), K, ALPHA, mode, backend=backend.name)
    for step in range(K + 1):
        inner_step(optimizer, name, params, step)
    optimizer.zero_grad()
    if how == "pickle":
        twin, twin_params = pickle.loads(pickle.dumps((optimizer, params)))
    elif how == "deepcopy":
        twin, twin_params = copy.deepcopy((optimizer, params))
    else:
        twin_params = copies(params)
        twin = Lookahead(make_base(name, twin_params), K, ALPHA, mode, backend=backend.name)
        load = twin.load_state_dict if how == "state_dict" else twin.base_optimizer.load_state_dict
        load(copy.deepcopy(optimizer.state_dict()))
    assert twin.state is twin.base_optimizer.state
    for o, ps in ((optimizer, params), (twin, twin_params)):
        for step in range(K + 1, 2 * K + 1):
            inner_step(o, name, ps, step)
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("mode", ["pullback", "reset"])
@pytest.mark.parametrize("how", ["load_state_dict", "pickle"])
def test_a_sync_is_the_first_thing_after_a_load(backend: BackendCase, mode: str, how: str) -> None:
    """Which of the base's tensors is the moment has to be known then, without a step that shows it."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = Lookahead(make_base("UnfusedRMSprop", params), 100, ALPHA, mode, backend=backend.name)
    advance(optimizer, params, range(2))
    if how == "pickle":
        twin, twin_params = pickle.loads(pickle.dumps((optimizer, params)))
    else:
        twin_params = copies(params)
        twin = Lookahead(make_base("UnfusedRMSprop", twin_params), 100, ALPHA, mode, backend=backend.name)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moments = [own["momentum_buffer"].clone() for own in twin.state.values()]
    for o in (optimizer, twin):
        o.sync()
        o.zero_grad()
    assert_same_run(optimizer, twin)
    for own, before in zip(twin.state.values(), moments, strict=True):
        assert not torch.equal(own["momentum_buffer"], before)


def test_a_sync_before_the_first_step_is_none() -> None:
    """Over a base without a moment too, whose lack shows only with its state."""
    params = make_params(SHAPES)
    optimizer = Lookahead(torch.optim.Adagrad(params), K, ALPHA, "reset")
    before = snapshot(optimizer)
    optimizer.sync()
    assert_unchanged(before, snapshot(optimizer))


def test_the_base_loads_its_own_state_its_own_way(backend: BackendCase) -> None:
    """A run in fp32 goes on in bf16: the base's state becomes bf16, as without a wrapper, since its
    arithmetic takes nothing else; phi stays fp32. And nothing is shared with the dict."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = Lookahead(make_base("NAdam", params), K, ALPHA, "pullback", backend=backend.name)
    advance(optimizer, params, range(K + 1))
    saved = optimizer.state_dict()
    for dtype in (torch.bfloat16, torch.float32):
        twin_params = [torch.nn.Parameter(p.detach().to(dtype)) for p in params]
        twin = Lookahead(make_base("NAdam", twin_params), K, ALPHA, "pullback", backend=backend.name)
        twin.load_state_dict(saved)
        before = copy.deepcopy(saved)
        for p, own in zip(twin_params, saved["state"].values(), strict=True):
            assert twin.state[p]["exp_avg"].dtype == dtype
            for name in ("slow_param", "cached_momentum", "lookahead_step"):
                assert same_tensor_bits(twin.state[p][name], own[name])
        advance(twin, twin_params, range(K))
        assert_unchanged(before, saved)


class LoadsAlone(torch.optim.RMSprop):
    """Loads in its own way, calls no hooks, and keeps less precision than it is given."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for i, own in state_dict["state"].items():
            self.state[params[i]] = {name: value.bfloat16() for name, value in own.items()}


def test_a_base_that_calls_no_hooks(backend: BackendCase) -> None:
    """phi and the count are exact then as well, the rest is the base's business."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = Lookahead(LoadsAlone(params, lr=0.1), K, ALPHA, backend=backend.name)
    advance(optimizer, params, range(K + 1))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lookahead_backend"] = "another machine's"
    optimizer.load_state_dict(saved)
    for p, own in zip(params, saved["state"].values(), strict=True):
        for name in ("slow_param", "lookahead_step"):
            assert same_tensor_bits(optimizer.state[p][name], own[name])
        assert optimizer.state[p]["square_avg"].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["lookahead_backend"] == backend.name


# ------------------------------------------------------------------------------------------------------------
# loss scaling

SCALED = [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("Adamax", {}), ("Adagrad", {"fused": True})]


@pytest.mark.parametrize(("name", "hyper"), SCALED)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(backend: BackendCase, name: str, hyper: dict[str, Any], unscale: bool) -> None:
    """Whether the base unscales by itself, we do, or the scaler: the run of unscaled gradients, without the
    steps that found inf. The scale is a power of two, and takes nothing from them."""
    if backend.device != "cpu" and name == "Adagrad":
        pytest.skip("torch's fused Adagrad is for the CPU")
    params, twin_params = (make_params(SHAPES, device=backend.device) for _ in range(2))
    optimizer, twin = (
        Lookahead(getattr(torch.optim, name)(ps, lr=0.1, **hyper), 2, ALPHA, backend=backend.name)
        for ps in (params, twin_params)
    )
    scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**10, growth_interval=3)
    generator = seeded(3)
    for skip in (1, 0, 0, 1, 0, 0, 0, 1, 0):
        factors = [make_tensor(p.shape, generator=generator, device=backend.device) for p in params]
        optimizer.zero_grad()
        loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
        scaler.scale(loss * (float("inf") if skip else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if skip:
            assert_unchanged(before, snapshot(optimizer))
            continue
        for q, f in zip(twin_params, factors, strict=True):
            q.grad = f
        twin.step()
        for p, q in zip(params, twin_params, strict=True):
            assert same_tensor_bits(p, q)
            assert_unchanged(dict(twin.state[q]), dict(optimizer.state[p]))
    assert not hasattr(optimizer.base_optimizer, "found_inf")


def test_state_that_is_no_parameters_is_left_alone(backend: BackendCase) -> None:
    """An optimizer may keep something for itself in its state, under a name; torch saves and loads it."""
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    optimizer = lookahead_fused.Lookahead(UnfusedRMSprop([p], lr=0.1), k=2, backend=backend.name)
    optimizer.state["global"] = 7
    for _ in range(4):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state["global"] == 7
    with optimizer.slow_weights():
        assert optimizer.state_dict()["state"]["global"] == 7
    assert optimizer.state[p]["lookahead_step"].item() == 4


def test_a_parameter_given_twice_is_refused(backend: BackendCase) -> None:
    """Two rows over one memory would be stepped by two threads at once."""
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = lookahead_fused.LookaheadAdamW([p, p], backend=backend.name)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="parameter 1 of group 0"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones_like(p))
    assert not optimizer.state


def test_memory_is_free_when_the_optimizer_is_deleted(backend: BackendCase) -> None:
    """At once, as with torch's optimizers, and not when the garbage collector comes by."""
    p = torch.nn.Parameter(torch.ones(3, device=backend.device))
    optimizer = lookahead_fused.LookaheadAdamW([p], backend=backend.name)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    slow = weakref.ref(optimizer.state[p]["slow_param"])
    gc.disable()
    try:
        del optimizer
        assert slow() is None
    finally:
        gc.enable()
