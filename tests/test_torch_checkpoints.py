"""Checkpoints of torch's Adam, AdamW, SGD, RMSprop and RAdam load into our classes, and ours into torch's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPE_NAMES,
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    assert_unchanged,
    make_optimizer,
    oracle_settings,
    same_tensor_bits,
    snapshot,
    to_numpy,
)
from oracle import Exact, Settings, same_bits
from releases import needs_torch
from runs import advance, copies, fresh, gradients_of, through_a_file

import lookahead_fused

K, ALPHA, CUT = 5, 0.3, 7
HYPER: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "adam": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "plain sgd": {"lr": 0.1},
    "rmsprop": {"lr": 0.1, "alpha": 0.8, "momentum": 0.9, "centered": True},
    "radam": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True},
}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")
FUSED = [pytest.param({"fused": True}, id="fused"), pytest.param({"foreach": True}, id="foreach"), {}]


def alpha_of(rule: str) -> str:
    return "lookahead_alpha" if rule == "rmsprop" else "alpha"


def implemented(rule: str, switch: dict[str, Any]) -> dict[str, Any]:
    """RMSprop and RAdam have no fused form in torch."""
    return {} if rule in ("rmsprop", "radam") and "fused" in switch else switch


def torch_class(rule: str) -> Any:
    return TORCH_CLASSES[rule.removeprefix("plain ")]


def ours_class(rule: str) -> Any:
    return LOOKAHEAD_CLASSES[rule.removeprefix("plain ")]


def torch_run(
    rule: str, backend: BackendCase, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[list[torch.nn.Parameter], dict[str, Any]]:
    """Weights and checkpoint of a run of torch's class, after CUT steps."""
    params = fresh(backend, dtype)
    optimizer = torch_class(rule)(params, **{**HYPER[rule], **changes})
    advance(optimizer, params, range(CUT))
    weights, saved = through_a_file((params, optimizer.state_dict()))
    return copies(weights), saved


def continued(rule: str, params: list[torch.nn.Parameter], saved: dict[str, Any]) -> list[Exact]:
    """Oracles that go on from torch's state: moments as they are, phi at the weights of now."""
    settings = oracle_settings(rule.removeprefix("plain "), k=K, **{alpha_of(rule): ALPHA}, **HYPER[rule])
    oracles = []
    for i, p in enumerate(params):
        o = Exact(to_numpy(p), DTYPE_NAMES[p.dtype], settings)
        own = saved["state"].get(i, {})
        for name in MOMENTS:
            if isinstance(own.get(name), torch.Tensor):
                o.state[name] = to_numpy(own[name]).astype(o.T)
        # A count that a checkpoint lacks starts at 0, and the sync comes k steps later. The oracle would take
        # its first step for the first ever, and the momentum for nothing: it is told of k steps before it.
        o.step_count = int(own["step"].item()) if "step" in own else K
        o.state["slow_param"] = o.param.copy()
        oracles.append(o)
    return oracles


def follow(optimizer: torch.optim.Optimizer, params: Any, oracles: list[Exact], steps: range) -> None:
    for step in steps:
        advance(optimizer, params, [step])
        for p, o, g in zip(params, oracles, gradients_of(step, params), strict=True):
            o.step(to_numpy(g))
            assert same_bits(to_numpy(p), o.param), f"step {step}"
            for name, expected in o.state.items():
                assert same_bits(to_numpy(optimizer.state[p][name]), expected), f"{name}, step {step}"


@pytest.mark.parametrize("rule", HYPER)
@pytest.mark.parametrize("switch", FUSED)
@pytest.mark.parametrize("order", ["weights first", "weights last"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_from_torch(backend: BackendCase, rule: str, switch: dict, order: str, wrapped: bool) -> None:
    """Moments and settings come over, phi starts where theta is at the next step: also when the weights are
    loaded after the optimizer. A torch SGD checkpoint has momentum and no count, and its momentum counts."""
    weights, saved = torch_run(rule, backend, **implemented(rule, switch))
    params = fresh(backend, seed=5)
    if wrapped:
        base = torch_class(rule)(params, lr=0.9)
        optimizer = lookahead_fused.Lookahead(base, K, ALPHA, backend=backend.name)
    else:
        optimizer = ours_class(rule)(params, lr=0.9, k=K, **{alpha_of(rule): ALPHA}, backend=backend.name)
    before = copy.deepcopy(saved)
    if order == "weights last":
        optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, w in zip(params, weights, strict=True):
            p.copy_(w)
    if order == "weights first":
        optimizer.load_state_dict(saved)
    assert all("slow_param" not in optimizer.state.get(p, {}) for p in params)
    oracles = continued(rule, params, saved)
    follow(optimizer, params, oracles, range(CUT, CUT + 7))
    counts = [7 if rule.endswith("sgd") else CUT + 7] * len(params)
    assert [optimizer.state[p]["step"].item() for p in params] == counts
    assert {optimizer.state[p]["step"].dtype for p in params} == {torch.float64}
    assert_unchanged(before, saved)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_torch_in_16_bits(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """torch keeps such moments in the parameter's dtype: they are read exactly, and go on in fp32."""
    params, saved = torch_run(rule, backend, dtype)
    moments = [v for own in saved["state"].values() for v in own.values() if v.dim()]
    assert {v.dtype for v in moments} == {dtype}
    optimizer = ours_class(rule)(params, k=K, alpha=ALPHA, backend=backend.name)
    optimizer.load_state_dict(saved)
    follow(optimizer, params, continued(rule, params, saved), range(CUT, CUT + 7))


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_from_torch_with_a_sync_of_the_moments(backend: BackendCase, rule: str) -> None:
    """Under pullback the moment's copy starts with phi, at the loaded moment and not at zero."""
    params, saved = torch_run(rule, backend)
    optimizer = ours_class(rule)(params, k=K, alpha=ALPHA, pullback_momentum="pullback", backend=backend.name)
    optimizer.load_state_dict(saved)
    oracles = continued(rule, params, saved)
    for o in oracles:
        o.settings = Settings(rule, k=K, alpha=ALPHA, pullback_momentum="pullback", **HYPER[rule])
        o.state["cached_momentum"] = o.state["momentum_buffer" if rule == "sgd" else "exp_avg"].copy()
    follow(optimizer, params, oracles, range(CUT, CUT + 7))


def test_from_a_capturable_checkpoint(backend: BackendCase) -> None:
    """What a CUDA graph's optimizer saves: switches that are True, and a step of fp32 on the device."""
    params, saved = torch_run("adamw", backend)
    for group in saved["param_groups"]:
        group.update(capturable=True, fused=True, foreach=False, differentiable=False)
    optimizer = ours_class("adamw")(params, k=K, alpha=ALPHA, backend=backend.name)
    optimizer.load_state_dict(saved)
    follow(optimizer, params, continued("adamw", params, saved), range(CUT, CUT + 4))
    switches = ("capturable", "fused", "foreach", "differentiable")
    assert not any(optimizer.state_dict()["param_groups"][0].get(name) for name in switches)


def test_an_old_checkpoint(backend: BackendCase) -> None:
    """torch 1.x saved the step as an int and fewer settings; SGD without momentum saved None for a buffer."""
    params, saved = torch_run("adamw", backend)
    oracles = continued("adamw", params, saved)
    for own in saved["state"].values():
        own["step"] = int(own["step"].item())
    group = saved["param_groups"][0]
    saved["param_groups"] = [
        {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")}
    ]
    optimizer = ours_class("adamw")(params, k=K, alpha=ALPHA, backend=backend.name)
    optimizer.load_state_dict(saved)
    follow(optimizer, params, oracles, range(CUT, CUT + 4))

    params, saved = torch_run("plain sgd", backend)
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    optimizer = ours_class("sgd")(params, k=K, alpha=ALPHA, backend=backend.name)
    optimizer.load_state_dict(saved)
    oracles = continued("plain sgd", params, saved)
    follow(optimizer, params, oracles, range(CUT, CUT + 6))


def test_momentum_that_begins_after_the_load(backend: BackendCase) -> None:
    """A checkpoint without momentum, and a group that is given some: the buffer starts at the gradient."""
    params, saved = torch_run("plain sgd", backend)
    optimizer = ours_class("sgd")(params, k=100, backend=backend.name)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
    advance(optimizer, params, [CUT])
    for p, g in zip(params, gradients_of(CUT, params), strict=True):
        assert same_tensor_bits(optimizer.state[p]["momentum_buffer"], g)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("rule", ["adam", "adamw"])
@needs_torch("2.9", "the kind of weight decay in Adam's checkpoints")
def test_the_kind_of_weight_decay(backend: BackendCase, rule: str, decoupled: bool) -> None:
    """As in torch: a checkpoint brings its kind along into Adam, and AdamW stays AdamW."""
    params = fresh(backend)
    donor_rule = "adamw" if decoupled else "adam"
    donor = TORCH_CLASSES[donor_rule](copies(params), **HYPER[donor_rule])
    theirs = TORCH_CLASSES[rule](copies(params))
    theirs.load_state_dict(donor.state_dict())
    expected = theirs.param_groups[0]["decoupled_weight_decay"]
    assert expected == (decoupled or rule == "adamw")
    ours = ours_class(rule)(params, backend=backend.name)
    for source in (donor, make_optimizer(donor_rule, copies(params), backend, **HYPER[donor_rule])):
        ours.load_state_dict(source.state_dict())
        assert ours.param_groups[0]["decoupled_weight_decay"] is expected
    if decoupled:
        twin_params = copies(params)
        twin = make_optimizer("adamw", twin_params, backend, **HYPER["adamw"])
        for o, ps in ((ours, params), (twin, twin_params)):
            advance(o, ps, range(3))
        for p, q in zip(params, twin_params, strict=True):
            assert same_tensor_bits(p, q)


# ------------------------------------------------------------------------------------------------------------
# to torch


@pytest.mark.parametrize("rule", HYPER)
@pytest.mark.parametrize("switch", FUSED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_to_torch(backend: BackendCase, rule: str, switch: dict, wrapped: bool) -> None:
    """torch's class goes on from our checkpoint as from its own that holds the same numbers: on each of its
    implementations, the one it was told to take among them."""
    switch = implemented(rule, switch)
    params = fresh(backend)
    make_rule = ("wrapped-" if wrapped else "") + rule.removeprefix("plain ")
    ours = make_optimizer(make_rule, params, backend, k=K, **{alpha_of(rule): ALPHA}, **HYPER[rule])
    advance(ours, params, range(CUT))
    saved = through_a_file(ours.state_dict())
    before = copy.deepcopy(saved)

    reference_params = copies(params)
    reference = torch_class(rule)(reference_params, **HYPER[rule], **switch)
    state = {}
    for i, own in saved["state"].items():
        state[i] = {name: own[name].clone() for name in MOMENTS if name in own}
        if not rule.endswith("sgd"):
            state[i]["step"] = own["step"].float()
    reference.load_state_dict({**reference.state_dict(), "state": state})

    theirs_params = copies(params)
    theirs = torch_class(rule)(theirs_params, lr=0.9, **switch)
    theirs.load_state_dict(saved)
    for group in theirs.param_groups:
        assert not any(group.get(name) for name in ("fused", "foreach", "capturable", "differentiable"))
        # A checkpoint without switches leaves torch to its own choice: the implementation is asked for again.
        group.update(switch)
    for o, ps in ((reference, reference_params), (theirs, theirs_params)):
        advance(o, ps, range(CUT, CUT + 4))
    for p, q in zip(reference_params, theirs_params, strict=True):
        assert same_tensor_bits(p, q)
    assert_unchanged(before["param_groups"], saved["param_groups"])


@pytest.mark.parametrize("rule", HYPER)
def test_unwrapped(backend: BackendCase, rule: str) -> None:
    """The base of a wrapper still is torch's optimizer, and goes on by itself where the wrapper stopped."""
    params = fresh(backend)
    base = torch_class(rule)(params, **HYPER[rule])
    wrapper = lookahead_fused.Lookahead(base, K, ALPHA, backend=backend.name)
    advance(wrapper, params, range(CUT))
    twin_params = copies(params)
    twin = torch_class(rule)(twin_params, **HYPER[rule])
    twin.load_state_dict(copy.deepcopy(base.state_dict()))
    for o, ps in ((base, params), (twin, twin_params)):
        advance(o, ps, range(CUT, CUT + 3))
    for p, q in zip(params, twin_params, strict=True):
        assert same_tensor_bits(p, q)


@pytest.mark.parametrize("rule", HYPER)
def test_there_and_back(backend: BackendCase, rule: str) -> None:
    """To torch, some steps there, and back: torch hands on what it does not know, and we read it again."""
    params = fresh(backend)
    alpha = {alpha_of(rule): ALPHA}
    ours = make_optimizer(rule.removeprefix("plain "), params, backend, k=K, **alpha, **HYPER[rule])
    advance(ours, params, range(3))
    slow = [ours.state[p]["slow_param"].clone() for p in params]
    theirs = torch_class(rule)(params)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    advance(theirs, params, range(3, 6))
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert ours.param_groups[0]["k"] == K
    assert ours.param_groups[0].items() >= alpha.items()
    for p, phi in zip(params, slow, strict=True):
        assert same_tensor_bits(ours.state[p]["slow_param"], phi)
    before = snapshot(ours)
    ours.sync()
    for b, p, phi in zip(before["params"], params, slow, strict=True):
        np.testing.assert_allclose(to_numpy(p), to_numpy(phi + ALPHA * (b - phi)), rtol=1e-6, atol=1e-7)
