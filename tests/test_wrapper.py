"""Lookahead(base): fused over torch's Adam, AdamW and SGD, and around every other optimizer that torch has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    assert_unchanged,
    make_params,
    make_tensor,
    same_tensor_bits,
    seeded,
    snapshot,
    to_numpy,
)
from oracle import lerp
from runs import advance, assert_same_run, copies, gradients_of
from torch import Tensor

from lookahead_fused import Lookahead

K, ALPHA = 3, 0.3
SHAPES = ((4, 6), (3, 2))
FUSED: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "adam": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
# Every other optimizer of torch: how it is made, and the first moment that it keeps.
GENERIC: dict[str, tuple[dict[str, Any], str]] = {
    "ASGD": ({"lr": 0.1, "alpha": 0.6, "t0": 2.0}, ""),
    "Adadelta": ({"lr": 0.5}, ""),
    "Adafactor": ({"lr": 0.1}, ""),
    "Adagrad": ({"lr": 0.1}, ""),
    "Adamax": ({"lr": 0.1}, "exp_avg"),
    "LBFGS": ({"lr": 0.1, "max_iter": 3}, ""),
    "Muon": ({"lr": 0.1}, "momentum_buffer"),
    "NAdam": ({"lr": 0.1}, "exp_avg"),
    "RAdam": ({"lr": 0.1}, "exp_avg"),
    "RMSprop": ({"lr": 0.1, "alpha": 0.7, "momentum": 0.9}, "momentum_buffer"),
    "Rprop": ({"lr": 0.1}, ""),
    "SparseAdam": ({"lr": 0.1}, "exp_avg"),
}
HERE = [name for name in GENERIC if hasattr(torch.optim, name)]
WITH_MOMENT = [name for name in HERE if GENERIC[name][1]]


def make_base(name: str, params: Any, **changes: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(params, **{**GENERIC[name][0], **changes})


def inner_step(optimizer: torch.optim.Optimizer, name: str, params: Sequence[Tensor], step: int) -> Any:
    """One step, by gradients or by a closure, as the base wants it."""
    grads = gradients_of(step, params)
    if name == "LBFGS":

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(((p - g) ** 2).sum() for p, g in zip(params, grads, strict=True))
            loss.backward()
            return loss

        return optimizer.step(closure)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to_sparse() if name == "SparseAdam" else g
    return optimizer.step()


class ByHand:
    """Lookahead around an optimizer, written down with the oracle's interpolation."""

    def __init__(self, base: torch.optim.Optimizer, name: str, mode: str = "none") -> None:
        self.base, self.name, self.mode = base, name, mode
        self.moment = GENERIC[name][1]
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.slow = [self.read(p) for p in self.params]
        self.cached = [np.zeros_like(s) for s in self.slow]
        self.steps = 0

    def read(self, tensor: Tensor) -> np.ndarray:
        return to_numpy(tensor)

    def step(self, step: int) -> None:
        inner_step(self.base, self.name, self.params, step)
        self.steps += 1
        if self.steps % K == 0:
            self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        for i, p in enumerate(self.params):
            self.slow[i] = lerp(self.slow[i], self.read(p), ALPHA)
            p.copy_(torch.from_numpy(self.slow[i]))
            m = self.base.state[p].get(self.moment)
            if self.mode == "pullback":
                self.cached[i] = lerp(self.cached[i], self.read(m), ALPHA)
                m.copy_(torch.from_numpy(self.cached[i]))
            elif self.mode == "reset":
                m.zero_()


def check_by_hand(
    backend: BackendCase, name: str, mode: str = "none", dtype: torch.dtype = torch.float32, **changes: Any
) -> Lookahead:
    params, theirs = (make_params(SHAPES, dtype, device=backend.device) for _ in range(2))
    base = make_base(name, params, **changes)
    optimizer = Lookahead(base, K, ALPHA, mode, backend=backend.name)
    hand = ByHand(make_base(name, theirs, **changes), name, mode)
    ours = {"lookahead_step", "slow_param"} | ({"slow_momentum"} if mode == "pullback" else set())
    for step in range(2 * K + 2):
        inner_step(optimizer, name, params, step)
        hand.step(step)
        for p, q, phi in zip(params, theirs, hand.slow, strict=True):
            assert same_tensor_bits(p, q), f"step {step}"
            own, theirs_own = dict(base.state[p]), hand.base.state[q]
            assert set(own) == set(theirs_own) | ours
            assert own["lookahead_step"].item() == step + 1
            assert np.array_equal(to_numpy(own["slow_param"]), phi)
            assert_unchanged({**theirs_own}, {key: own[key] for key in theirs_own})
    return optimizer


# ------------------------------------------------------------------------------------------------------------
# what a step is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["none", "pullback", "reset"])
@pytest.mark.parametrize("rule", FUSED)
def test_fused_is_the_class_of_that_name(
    backend: BackendCase, rule: str, mode: str, dtype: torch.dtype
) -> None:
    """The same bits, and the same state, in the base's own dict under torch's names."""
    params, twin_params = (make_params(((7,), (3, 5), ()), dtype, device=backend.device) for _ in range(2))
    base = TORCH_CLASSES[rule](params, **FUSED[rule])
    optimizer = Lookahead(base, K, ALPHA, mode, backend=backend.name)
    ours = {"k": K, "alpha": ALPHA, "pullback_momentum": mode, "backend": backend.name}
    twin = LOOKAHEAD_CLASSES[rule](twin_params, **FUSED[rule], **ours)
    for step in range(8):
        advance(optimizer, params, [step])
        advance(twin, twin_params, [step])
        for p, q in zip(params, twin_params, strict=True):
            assert same_tensor_bits(p, q), f"step {step}"
            assert_unchanged(dict(twin.state[q]), dict(base.state[p]))
    assert optimizer.state is base.state
    optimizer.sync()
    twin.sync()
    assert all(same_tensor_bits(p, q) for p, q in zip(params, twin_params, strict=True))


def test_every_optimizer_of_torch_is_here() -> None:
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    assert classes <= {*GENERIC, "Adam", "AdamW", "SGD", "Optimizer"}


@pytest.mark.parametrize("name", HERE)
def test_generic(backend: BackendCase, name: str) -> None:
    """The base's own steps on its own state, and phi_0 is theta before the first of them."""
    check_by_hand(backend, name)


@pytest.mark.parametrize("name", WITH_MOMENT)
@pytest.mark.parametrize("mode", ["pullback", "reset"])
def test_generic_moment(backend: BackendCase, name: str, mode: str) -> None:
    check_by_hand(backend, name, mode)


@pytest.mark.parametrize("name", ["RMSprop", "NAdam"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["none", "pullback"])
def test_generic_dtypes(backend: BackendCase, name: str, dtype: torch.dtype, mode: str) -> None:
    """The base keeps its moments in the parameter's dtype; phi and the moment's copy are fp32, and unrounded."""
    optimizer = check_by_hand(backend, name, mode, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for own in optimizer.state.values():
        assert own[GENERIC[name][1]].dtype == dtype
        assert own["slow_param"].dtype == wide
        assert mode == "none" or own["slow_momentum"].dtype == wide


@pytest.mark.parametrize("name", ["Adagrad", "Adadelta", "Rprop"])
@pytest.mark.parametrize("mode", ["pullback", "reset"])
def test_a_moment_that_is_not_there(backend: BackendCase, name: str, mode: str) -> None:
    params = make_params(SHAPES, device=backend.device)
    optimizer = Lookahead(make_base(name, params), K, ALPHA, mode, backend=backend.name)
    with pytest.raises(ValueError, match=rf"lookahead_pullback_momentum.*'none'.*{name}.*exp_avg"):
        advance(optimizer, params, [0])


class Strict(torch.optim.AdamW):
    """A subclass that steps otherwise, and takes a state that is not empty for one that it made."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                own = self.state[p]
                if len(own) == 0:
                    own["sum"] = torch.zeros_like(p)
                own["sum"] += p.grad
                p.sub_(own["sum"])
        return loss


def test_a_subclass_is_stepped_by_itself(backend: BackendCase) -> None:
    (p,) = make_params([(4,)], device=backend.device)
    start = p.detach().clone()
    base = Strict([p], lr=0.1)
    optimizer = Lookahead(base, 2, 0.5, backend=backend.name)
    p.grad = torch.ones_like(p)
    assert optimizer.step(lambda: 7) == 7
    assert torch.equal(p, start - 1)
    assert torch.equal(base.state[p]["slow_param"], start)
    assert set(base.state[p]) == {"sum", "slow_param", "lookahead_step"}
    optimizer.step()
    assert base.steps == 2
    assert torch.equal(p, start + 0.5 * ((start - 1 - 2) - start))


def test_a_step_of_the_base_that_raises(backend: BackendCase) -> None:
    """Then there was none: no phi, no count, and the next one is the first."""
    (p,) = make_params([(4,)], device=backend.device)
    base = torch.optim.RMSprop([p], lr=0.1)
    optimizer = Lookahead(base, 2, 0.5, backend=backend.name)
    step, base.step = base.step, lambda: 1 / 0
    p.grad = torch.ones_like(p)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert not base.state
    base.step = step
    with torch.no_grad():
        p.fill_(3.0)
    optimizer.step()
    assert base.state[p]["slow_param"].tolist() == [3.0] * 4
    assert base.state[p]["lookahead_step"].item() == 1


@pytest.mark.parametrize("name", ["RMSprop", "NAdam"])
def test_gradients_come_late(backend: BackendCase, name: str) -> None:
    """Each parameter has its own phi_0 and its own phase; without a gradient nothing of it moves."""
    params, theirs = (make_params(SHAPES, device=backend.device) for _ in range(2))
    optimizer = Lookahead(make_base(name, params), K, ALPHA, backend=backend.name)
    hands = [ByHand(make_base(name, [q]), name) for q in theirs]
    for step, present in enumerate([(1, 0), (1, 1), (0, 1), (1, 1), (1, 1), (0, 1), (1, 1)]):
        grads = gradients_of(step, params)
        for p, q, g, here, hand in zip(params, theirs, grads, present, hands, strict=True):
            p.grad = g if here else None
            if here:
                q.grad = g.clone()
                hand.base.step()
                hand.steps += 1
                if hand.steps % K == 0:
                    hand.sync()
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, q, b, here, hand in zip(params, theirs, before, present, hands, strict=True):
            assert same_tensor_bits(p, q)
            assert here or torch.equal(p, b)
            assert len(optimizer.state.get(p, {})) > 0 or hand.steps == 0


def test_a_closure_brings_the_gradients(backend: BackendCase) -> None:
    """Nobody has one when the step begins, and some get none: phi_0 is theta of before, where one came."""
    a, b = make_params([(4,), (5,)], device=backend.device)
    start = a.detach().clone()
    optimizer = Lookahead(torch.optim.RMSprop([a, b], lr=0.1), 2, 0.5, backend=backend.name)

    def closure() -> None:
        (a * 2).sum().backward()

    assert optimizer.step(closure) is None
    assert torch.equal(optimizer.state[a]["slow_param"], start)
    assert not torch.equal(a, start)
    assert not optimizer.state.get(b)


# ------------------------------------------------------------------------------------------------------------
# settings and groups


@pytest.mark.parametrize("name", ["RMSprop", "ASGD"])
def test_settings_do_not_clash(backend: BackendCase, name: str) -> None:
    """These have an alpha of their own, which stays theirs, whatever ours is and per group."""
    base = make_base(name, make_params(SHAPES, device=backend.device))
    theirs = base.param_groups[0]["alpha"]
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)
    (group,) = base.param_groups
    assert group["alpha"] == theirs == optimizer.defaults["alpha"] == base.defaults["alpha"]
    assert group["lookahead_alpha"] == ALPHA == optimizer.defaults["lookahead_alpha"]
    assert not any(key.startswith("lookahead") for key in base.defaults)


@pytest.mark.parametrize("name", ["RMSprop", "AdamW"])
@pytest.mark.parametrize("by", ["the base's maker", "wrapper.add_param_group", "base.add_param_group"])
def test_settings_per_group(backend: BackendCase, name: str, by: str) -> None:
    """One entry may be given and the others left to the wrapper's; a group may come at any time."""
    a, b = make_params([(4,), (4,)], device=backend.device)
    special = {"params": [b], "lookahead_k": 1, "lr": 0.5}
    make = getattr(torch.optim, name)
    base = make([{"params": [a]}] + ([special] if by == "the base's maker" else []), lr=0.1)
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)
    a.grad = torch.ones_like(a)
    if by != "the base's maker":
        optimizer.step()
        (optimizer if by.startswith("wrapper") else base).add_param_group(special)
    b.grad = torch.ones_like(b)
    start = b.detach().clone()
    optimizer.step()
    assert optimizer.param_groups is base.param_groups
    settings = ("lookahead_k", "lookahead_alpha", "lookahead_pullback_momentum", "lookahead_backend", "lr")
    assert [base.param_groups[1][key] for key in settings] == [1, ALPHA, "none", backend.name, 0.5]
    reference = make([other := torch.nn.Parameter(start.clone())], lr=0.5)
    other.grad = torch.ones_like(other)
    reference.step()
    assert torch.allclose(b, start + ALPHA * (other - start), atol=1e-6)
    with pytest.raises(ValueError, match="lookahead_k"):
        optimizer.add_param_group({"params": make_params([(3,)]), "lookahead_k": 0})
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.add_param_group({"params": make_params([(3,)]), "differentiable": True})
    assert len(base.param_groups) == 2


@pytest.mark.parametrize("name", ["RMSprop", "AdamW"])
def test_groups_are_never_stale(backend: BackendCase, name: str) -> None:
    """Whoever replaces the base's list, or a dict in it, replaces what the wrapper shows and steps."""
    params = make_params(SHAPES, device=backend.device)
    base = getattr(torch.optim, name)(params, lr=0.1)
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)
    advance(optimizer, params, [0])

    def replace_by_wrapper() -> None:
        optimizer.param_groups = [dict(g) for g in optimizer.param_groups]

    def replace_by_base() -> None:
        base.param_groups = [dict(g) for g in base.param_groups]

    for replace in (
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: base.load_state_dict(base.state_dict()),
        replace_by_wrapper,
        replace_by_base,
    ):
        replace()
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        optimizer.param_groups[0]["lr"] = 0.0
        before = [p.detach().clone() for p in params]
        advance(optimizer, params, [1])
        if base.state[params[0]].get("step", 0) % K:
            assert name == "RMSprop" or all(torch.allclose(p, b) for p, b in zip(params, before, strict=True))
        base.param_groups[0]["lr"] = 0.1
        advance(optimizer, params, [2])
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_face() -> None:
    """What clients look at: type, names, repr, zero_grad, and errors for what cannot be wrapped."""
    (p,) = make_params([(4,)])
    base = torch.optim.RMSprop([p], lr=0.25)
    optimizer = Lookahead(base, K, ALPHA)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.base_optimizer is base
    shown = repr(optimizer)
    assert shown.startswith("Lookahead (")
    assert "lr: 0.25" in shown
    assert f"lookahead_k: {K}" in shown
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0.0] * 4
    optimizer.zero_grad()
    assert p.grad is None
    for wrong in (optimizer, LOOKAHEAD_CLASSES["adamw"]([p])):
        with pytest.raises(TypeError, match=f"must not be a Lookahead.*{type(wrong).__name__}"):
            Lookahead(wrong)
    with pytest.raises(ValueError, match="differentiable"):
        Lookahead(torch.optim.AdamW([p], differentiable=True))
    with pytest.raises(TypeError, match="positional"):
        Lookahead(base, K, ALPHA, "none", "auto")


# ------------------------------------------------------------------------------------------------------------
# hooks, copies, checkpoints


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
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


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_a_hook_before_the_step_may_change_the_gradients(backend: BackendCase, name: str) -> None:
    """It sees them before the step does, on either optimizer."""
    (p,) = make_params([(4,)], device=backend.device)
    base = getattr(torch.optim, name)([p], lr=0.1)
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)
    for one in (base, optimizer):
        handle = one.register_step_pre_hook(lambda *_: p.grad.zero_())
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.base_optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.state.clear()
        optimizer.step()
        assert torch.equal(p, before)
        handle.remove()


COPIED = [("NAdam", "pullback"), ("RMSprop", "reset"), ("Adagrad", "none"), ("LBFGS", "none")]


@pytest.mark.parametrize(("name", "mode"), COPIED)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict", "base's state_dict"])
def test_generic_continues(backend: BackendCase, name: str, mode: str, how: str) -> None:
    """Copied or loaded between two syncs: to the bits of the run that went on."""
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
    optimizer = Lookahead(make_base("RMSprop", params), 100, ALPHA, mode, backend=backend.name)
    advance(optimizer, params, range(2))
    if how == "pickle":
        twin, twin_params = pickle.loads(pickle.dumps((optimizer, params)))
    else:
        twin_params = copies(params)
        twin = Lookahead(make_base("RMSprop", twin_params), 100, ALPHA, mode, backend=backend.name)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moments = [own["momentum_buffer"].clone() for own in twin.state.values()]
    for o in (optimizer, twin):
        o.sync()
        o.zero_grad()
    assert_same_run(optimizer, twin)
    assert not any(torch.equal(own["momentum_buffer"], m) for own, m in zip(twin.state.values(), moments))


def test_a_sync_before_the_first_step_is_none() -> None:
    """Over a base without a moment too, whose lack shows only with its state."""
    params = make_params(SHAPES)
    optimizer = Lookahead(torch.optim.Adagrad(params), K, ALPHA, "reset")
    before = snapshot(optimizer)
    optimizer.sync()
    assert_unchanged(before, snapshot(optimizer))


def test_the_base_loads_its_own_state_its_own_way(backend: BackendCase) -> None:
    """A run in fp32 goes on in bf16: the base's state becomes bf16, as without a wrapper, since its arithmetic
    takes nothing else; phi stays fp32. And nothing is shared with the dict."""
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
            for name in ("slow_param", "slow_momentum", "lookahead_step"):
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

SCALED = [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("RMSprop", {}), ("Adagrad", {"fused": True})]


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
