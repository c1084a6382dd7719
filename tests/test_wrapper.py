"""Lookahead(base): fused over torch's Adam, AdamW and SGD, and around every other optimizer of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bases import ALPHA, GENERIC, HERE, SHAPES, WITH_MOMENT, K, inner_step, make_base
from helpers import (
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    UnfusedRMSprop,
    assert_unchanged,
    make_params,
    same_tensor_bits,
    to_numpy,
)
from oracle import lerp
from runs import advance, gradients_of
from torch import Tensor

from lookahead_fused import Lookahead

FUSED: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "adam": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}


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
    ours = {"lookahead_step", "slow_param"} | ({"cached_momentum"} if mode == "pullback" else set())
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
def test_fused_is_the_class_of_that_name(backend: BackendCase, rule: str, mode: str, dtype: torch.dtype) -> None:
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
    assert classes <= {*GENERIC, *(cls.__name__ for cls in TORCH_CLASSES.values()), "Optimizer"}


@pytest.mark.parametrize("name", HERE)
def test_generic(backend: BackendCase, name: str) -> None:
    """The base's own steps on its own state, and phi_0 is theta before the first of them."""
    check_by_hand(backend, name)


@pytest.mark.parametrize("name", WITH_MOMENT)
@pytest.mark.parametrize("mode", ["pullback", "reset"])
def test_generic_moment(backend: BackendCase, name: str, mode: str) -> None:
    check_by_hand(backend, name, mode)


@pytest.mark.parametrize("name", ["UnfusedRMSprop", "NAdam"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["none", "pullback"])
def test_generic_dtypes(backend: BackendCase, name: str, dtype: torch.dtype, mode: str) -> None:
    """The base keeps its moments in the parameter's dtype; phi and the moment's copy stay unrounded."""
    optimizer = check_by_hand(backend, name, mode, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for own in optimizer.state.values():
        assert own[GENERIC[name][1]].dtype == dtype
        assert own["slow_param"].dtype == wide
        assert mode == "none" or own["cached_momentum"].dtype == wide


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
    p = torch.nn.Parameter(torch.arange(4.0, device=backend.device))
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
    base = UnfusedRMSprop([p], lr=0.1)
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


@pytest.mark.parametrize("name", ["UnfusedRMSprop", "NAdam"])
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
    optimizer = Lookahead(UnfusedRMSprop([a, b], lr=0.1), 2, 0.5, backend=backend.name)

    def closure() -> None:
        (a * 2).sum().backward()

    assert optimizer.step(closure) is None
    assert torch.equal(optimizer.state[a]["slow_param"], start)
    assert not torch.equal(a, start)
    assert not optimizer.state.get(b)


# ------------------------------------------------------------------------------------------------------------
# settings and groups


@pytest.mark.parametrize("name", ["UnfusedRMSprop", "ASGD"])
def test_settings_do_not_clash(backend: BackendCase, name: str) -> None:
    """These have an alpha of their own, which stays theirs, whatever ours is and per group."""
    base = make_base(name, make_params(SHAPES, device=backend.device))
    theirs = base.param_groups[0]["alpha"]
    optimizer = Lookahead(base, K, ALPHA, backend=backend.name)
    (group,) = base.param_groups
    assert group["alpha"] == theirs == optimizer.defaults["alpha"] == base.defaults["alpha"]
    assert group["lookahead_alpha"] == ALPHA == optimizer.defaults["lookahead_alpha"]
    assert not any(key.startswith("lookahead") for key in base.defaults)


@pytest.mark.parametrize("name", ["Adamax", "AdamW"])
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


@pytest.mark.parametrize("name", ["Adamax", "AdamW"])
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
            assert name == "Adamax" or all(torch.allclose(p, b) for p, b in zip(params, before, strict=True))
        base.param_groups[0]["lr"] = 0.1
        advance(optimizer, params, [2])
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_face() -> None:
    """What clients look at: type, names, repr, zero_grad, and errors for what cannot be wrapped."""
    (p,) = make_params([(4,)])
    base = UnfusedRMSprop([p], lr=0.25)
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
        with pytest.raises(TypeError, match=f"must not have slow weights of its own.*{type(wrong).__name__}"):
            Lookahead(wrong)
    with pytest.raises(ValueError, match="differentiable"):
        Lookahead(torch.optim.AdamW([p], differentiable=True))
    with pytest.raises(TypeError, match="positional"):
        Lookahead(base, K, ALPHA, "none", "auto")
