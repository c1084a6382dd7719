"""Checkpoints of ours: exact in every dtype and anywhere in the window, never aliased, hooks and all."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    LOOKAHEAD_ARGUMENTS,
    LOOKAHEAD_CLASSES,
    BackendCase,
    assert_unchanged,
    make_optimizer,
    make_params,
    same_tensor_bits,
    snapshot,
)
from runs import advance, assert_same_run, copies, fresh, gradients_of, tensors_of, through_a_file

import lookahead_fused

K = 5
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback"},
    "adam": {"lr": 0.1, "betas": (0.7, 0.9), "weight_decay": 0.1, "pullback_momentum": "reset", "outer_momentum": 0.5},
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "pullback_momentum": "pullback"},
    "plain sgd": {"lr": 0.1, "maximize": True},
    "wrapped-adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback"},
    "wrapped-sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "pullback_momentum": "reset"},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def make(rule: str, params: Any, backend: BackendCase, **changes: Any) -> torch.optim.Optimizer:
    hyper = {"k": K, "alpha": 0.3, **RUNS[rule], **changes}
    return make_optimizer(rule.removeprefix("plain "), params, backend, **hyper)


def run_with_a_late_parameter(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    """The last parameter has its first gradient at step 9: before it no state, then a phase of its own."""
    for step in steps:
        for p, g in zip(params, gradients_of(step, params), strict=True):
            p.grad = g
        if step < 9:
            params[-1].grad = None
        optimizer.step()


CASES = [(rule, dtype, False) for rule in RUNS for dtype in DTYPES]
CASES += [(r, dtype, True) for r in RUNS if "wrapped" not in r for dtype in DTYPES if dtype.itemsize == 2]


@pytest.mark.parametrize(("rule", "dtype", "master"), CASES)
@pytest.mark.parametrize("cut", [2, 5, 8])
def test_round_trip(backend: BackendCase, rule: str, dtype: torch.dtype, master: bool, cut: int) -> None:
    """Before the first sync, on it and between two: state and settings come back as they were, and the run
    goes on to the bits of the uninterrupted one, over two more syncs. The optimizer that loads was made for
    other settings, or has been stepped elsewhere."""
    changes = {"master_weights": True} if master else {}
    params = fresh(backend, dtype, ((7,), (3, 5), (), (0,), (4,)))
    optimizer = make(rule, params, backend, **changes)
    run_with_a_late_parameter(optimizer, params, range(cut))
    weights, saved = through_a_file((params, optimizer.state_dict()))
    resumed_params = copies(weights)
    resumed = make(rule, resumed_params, backend, lr=0.7, k=3, alpha=0.9)
    if cut == 5:
        advance(resumed, resumed_params, [77, 78])
        with torch.no_grad():
            for p, w in zip(resumed_params, weights, strict=True):
                p.copy_(w)
    resumed.load_state_dict(saved)
    for p, g in zip(resumed_params, gradients_of(cut - 1, params), strict=True):
        p.grad = g if p is not resumed_params[-1] else None
    assert_same_run(optimizer, resumed)
    assert not resumed.state.get(resumed_params[-1])
    for o, ps in ((optimizer, params), (resumed, resumed_params)):
        run_with_a_late_parameter(o, ps, range(cut, 14))
    assert_same_run(optimizer, resumed)


@pytest.mark.parametrize("rule", RUNS)
def test_a_loaded_dict_is_not_aliased(backend: BackendCase, rule: str) -> None:
    """torch's own loading takes the tensors it is given: two optimizers from one dict would share moments."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    twins = []
    for _ in range(2):
        twin_params = copies(params)
        twin = make(rule, twin_params, backend)
        twin.load_state_dict(saved)
        twins.append((twin, twin_params))
    held = {t.data_ptr() for t in tensors_of(saved) if t.numel()}
    for twin, _ in twins:
        assert held.isdisjoint(t.data_ptr() for t in tensors_of(twin.state_dict()) if t.numel())
    for twin, twin_params in twins:
        advance(twin, twin_params, range(3, 7))
        twin.sync()
    assert_unchanged(before, saved)
    assert_same_run(*(twin for twin, _ in twins))


@pytest.mark.parametrize("rule", RUNS)
def test_loading_ones_own_dict(backend: BackendCase, rule: str) -> None:
    """`load_state_dict(state_dict())` changes nothing, and none of the compiled table goes stale."""
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for step in range(8):
        advance(optimizer, params, [step])
        advance(twin, twin_params, [step])
        before = snapshot(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert_unchanged(before, snapshot(optimizer))
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("rule", RUNS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("cut", [0, 3])
def test_copies_continue(backend: BackendCase, rule: str, how: str, cut: int) -> None:
    """A copy of an optimizer and its parameters, taken between two syncs, goes on to the same bits."""
    params = fresh(backend, torch.bfloat16 if rule == "adamw" else torch.float32)
    optimizer = make(rule, params, backend, **({"master_weights": True} if rule == "adamw" else {}))
    advance(optimizer, params, range(cut))
    for p in params:
        p.grad = None
    if how == "pickle":
        twin, twin_params = pickle.loads(pickle.dumps((optimizer, params)))
    elif how == "deepcopy":
        twin, twin_params = copy.deepcopy((optimizer, params))
    else:
        file = io.BytesIO()
        torch.save((optimizer, params), file)
        file.seek(0)
        twin, twin_params = torch.load(file, weights_only=False)
    assert type(twin) is type(optimizer)
    assert [id(p) for g in twin.param_groups for p in g["params"]] == [id(p) for p in twin_params]
    assert_same_run(optimizer, twin)
    advance(twin, twin_params, range(cut, cut + 4))
    advance(optimizer, params, range(cut, cut + 4))
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("rule", RUNS)
def test_params_are_replaced_after_a_load_of_nothing(backend: BackendCase, rule: str) -> None:
    """What Accelerate does: the state dict of an optimizer without state is loaded into it, then other
    tensors take the places in `group["params"]`."""
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make(rule, fresh(backend, seed=9), backend), make(rule, twin_params, backend)
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"] == {}
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    optimizer.param_groups[0]["params"] = params
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(7))
    assert_same_run(optimizer, twin)


# ------------------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize("rule", RUNS)
def test_settings_that_a_checkpoint_lacks_stay(backend: BackendCase, rule: str) -> None:
    """Settings come from the checkpoint; those that an older one does not have are this optimizer's own, per
    group, and not the defaults. The backend belongs to the machine and stays."""
    prefix = "lookahead_" if rule.startswith("wrapped") else ""
    names = [prefix + name for name in LOOKAHEAD_ARGUMENTS]
    donor = make(rule, [{"params": fresh(backend)}, {"params": fresh(backend)}], backend, lr=0.25)
    saved = donor.state_dict()
    for group in saved["param_groups"]:
        for name in names:
            del group[name]
        group[prefix + "backend"] = "a backend of another machine"
        group["initial_lr"] = 0.5
    groups = [
        {"params": fresh(backend)},
        {"params": fresh(backend), **dict(zip(names, (2, 0.9, "reset", 0.7, False), strict=True))},
    ]
    optimizer = make(rule, groups, backend)
    before = [[group[name] for name in names] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    assert [[group[name] for name in names] for group in optimizer.param_groups] == before
    for group in optimizer.param_groups:
        assert group[prefix + "backend"] == backend.name
        assert group["lr"] == 0.25
        assert group["initial_lr"] == 0.5
    optimizer.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_switches_of_torch_do_not_come_along(backend: BackendCase, rule: str) -> None:
    """Given per group or loaded from a checkpoint, they change nothing and are not handed on as True."""
    params = fresh(backend)
    switches = {"fused": True, "foreach": True, "capturable": True}
    optimizer = make(rule, [{"params": params, **switches}], backend)
    saved = optimizer.state_dict()
    assert not any(saved["param_groups"][0].get(name) for name in switches)
    saved["param_groups"][0].update(switches)
    optimizer.load_state_dict(saved)
    assert not any(optimizer.param_groups[0].get(name) for name in switches)
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.add_param_group({"params": make_params([(3,)]), "differentiable": True})
    assert len(optimizer.param_groups) == 1


def test_a_checkpoint_of_other_groups_is_refused(backend: BackendCase) -> None:
    """By what torch says, and nothing is loaded."""
    params = fresh(backend)
    for rule in RUNS:
        optimizer = make(rule, params, backend)
        advance(optimizer, params, range(2))
        before = snapshot(optimizer)
        for groups in ([fresh(backend)[:2]], [params[:2], fresh(backend)[2:]]):
            other = make(rule, [{"params": members} for members in groups], backend)
            with pytest.raises(ValueError, match="group"):
                optimizer.load_state_dict(other.state_dict())
            assert_unchanged(before, snapshot(optimizer))
        advance(optimizer, params, [2])


# ------------------------------------------------------------------------------------------------------------
# what comes back changed, and what stands beside it

STEPS_AS: dict[str, Callable[[torch.Tensor], Any]] = {
    "fp32": lambda step: step.float(),
    "int64": lambda step: step.long(),
    "float": lambda step: step.item(),
    "int": lambda step: int(step.item()),
    "one element": lambda step: step.reshape(1),
    "fp32, one element, 2-dim": lambda step: step.float().reshape(1, 1),
}


@pytest.mark.parametrize("rule", ["adamw", "sgd", "wrapped-adamw"])
@pytest.mark.parametrize("form", STEPS_AS)
def test_the_step_comes_back_in_another_form(backend: BackendCase, rule: str, form: str) -> None:
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    for own in saved["state"].values():
        own["step"] = STEPS_AS[form](own["step"])
    optimizer.load_state_dict(saved)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(4, 7))
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("rule", ["adamw", "wrapped-adamw"])
def test_a_step_past_what_fp32_counts(backend: BackendCase, rule: str) -> None:
    """2^24 + 1 has no fp32; a counter that cannot be advanced would stay out of step with k for good."""
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    for own in saved["state"].values():
        own["step"].fill_(2**24)
    optimizer.load_state_dict(through_a_file(saved))
    advance(optimizer, params, [1])
    advance(optimizer, params, [2])
    assert [own["step"].item() for own in optimizer.state.values()] == [2**24 + 2] * len(params)
    # 2^24 + 1 is not a multiple of 5, 2^24 + 4 is.
    advance(optimizer, params, [3, 4])
    assert all(same_tensor_bits(p, optimizer.state[p]["slow_param"]) for p in params)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "wrapped-adamw"])
def test_foreign_entries(backend: BackendCase, rule: str) -> None:
    """Beside ours in a parameter's state, in a group and at the top of the dict: kept where torch keeps them,
    and in nobody's way."""
    params, twin_params = fresh(backend), fresh(backend)
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    foreign = {"name": "layer 1", "history": [1.0, 2.0], "nothing": None, "flag": True, "pair": (1, 2)}
    for own in saved["state"].values():
        own.update(foreign, mask=torch.tensor([True, False]))
    saved["param_groups"][0]["comment"] = "of another program"
    saved["version"] = 7
    optimizer.load_state_dict(saved)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3, 8))
    with optimizer.slow_weights():
        pass
    for p in params:
        own = optimizer.state[p]
        assert {name: own.pop(name) for name in foreign} == foreign
        assert own.pop("mask").tolist() == [True, False]
    assert optimizer.param_groups[0].pop("comment") == "of another program"
    assert_same_run(optimizer, twin)


# ------------------------------------------------------------------------------------------------------------
# hooks


@pytest.mark.parametrize("rule", ["adamw", "wrapped-adamw"])
def test_state_dict_hooks(backend: BackendCase, rule: str) -> None:
    params = fresh(backend)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    calls: list[str] = []

    def note(optimizer: torch.optim.Optimizer) -> None:
        calls.append("pre")

    def replace(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("replace")
        return {**saved, "extra": 1}

    def change(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        calls.append("change")
        saved["extra"] += 1

    optimizer.register_state_dict_pre_hook(note)
    optimizer.register_state_dict_post_hook(replace)
    optimizer.register_state_dict_post_hook(change)
    saved = optimizer.state_dict()
    assert calls == ["pre", "replace", "change"]
    assert saved["extra"] == 2
    assert set(saved["state"]) == set(range(len(params)))


@pytest.mark.parametrize("rule", RUNS)
def test_a_load_hook_may_return_a_new_dict(backend: BackendCase, rule: str) -> None:
    """As programs do that renamed their parameters: what is loaded exactly is what the last hook returned,
    and the dict that was given stays as it was."""
    params = fresh(backend, torch.bfloat16)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    shuffled = {**saved, "state": {f"parameter {i}": own for i, own in saved["state"].items()}}
    before = copy.deepcopy(shuffled)
    calls: list[str] = []

    def note(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        calls.append("in place")
        given["note"] = 1

    def rename(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        calls.append("new")
        state = {int(name.removeprefix("parameter ")): own for name, own in given["state"].items()}
        return {"state": state, "param_groups": [{**g, "lr": 0.5} for g in given["param_groups"]]}

    twin_params = copies(params)
    twin = make(rule, twin_params, backend)
    twin.register_load_state_dict_pre_hook(note)
    twin.register_load_state_dict_pre_hook(rename)
    seen: list[tuple[Any, ...]] = []

    def look(loaded: torch.optim.Optimizer) -> None:
        own = loaded.state[twin_params[0]]
        seen.append((loaded, own["slow_param"].dtype, own["step"].item(), loaded.param_groups[0]["lr"]))

    twin.register_load_state_dict_post_hook(look)
    twin.load_state_dict(shuffled)
    assert calls == ["in place", "new"]
    assert seen == [(twin, torch.float32, 3, 0.5)]
    assert_unchanged(before, shuffled)
    optimizer.param_groups[0]["lr"] = 0.5
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3, 7))
    assert_same_run(optimizer, twin)


def test_a_class_of_another_name_is_nobodys_business() -> None:
    """A state dict names no class: every class lists its own settings, and no others."""
    general = ("master_weights", "state_dtype", "backend", "offload_slow")
    own = {"params", "lr", "weight_decay", "maximize", *LOOKAHEAD_ARGUMENTS, *general}
    radam = own | {"betas", "eps", "decoupled_weight_decay"}
    rmsprop = own - {"alpha"} | {"lookahead_alpha", "alpha", "eps", "momentum", "centered"}
    expected = {
        "adamw": radam | {"amsgrad"},
        "adam": radam | {"amsgrad"},
        "sgd": own | {"momentum", "dampening", "nesterov"},
        "rmsprop": rmsprop,
        "radam": radam,
        "lion": own | {"betas"},
    }
    for rule, cls in LOOKAHEAD_CLASSES.items():
        assert set(cls(make_params([(3,)])).state_dict()["param_groups"][0]) == expected[rule]
    base = torch.optim.AdamW(make_params([(3,)]))
    before = set(base.param_groups[0])
    wrapper = lookahead_fused.Lookahead(base)
    ours = {f"lookahead_{name}" for name in (*LOOKAHEAD_ARGUMENTS, *general)}
    assert set(wrapper.state_dict()["param_groups"][0]) == before | ours
