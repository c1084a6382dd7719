"""State dicts of other packages go on here where they stopped there; what does not go over is told."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EXTERNAL_CLASSES, TORCH_CLASSES, BackendCase, assert_unchanged, to_numpy
from runs import advance, copies, fresh, gradients_of, tensors_of, through_a_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lookahead_fused
from lookahead_fused import EMA, LookaheadAdamW, convert

schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed; it is in the extra 'test'")

BASES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "plain sgd": {"lr": 0.1},
    "rmsprop": {"lr": 0.1},
    "radam": {"lr": 0.1},
    "nadam": {"lr": 0.1},
}


def make_base(rule: str, params: Any, **changes: Any) -> torch.optim.Optimizer:
    return (TORCH_CLASSES | EXTERNAL_CLASSES)[rule.removeprefix("plain ")](params, **{**BASES[rule], **changes})


def quietly(*arguments: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert(*arguments)


def test_bad_arguments() -> None:
    optimizer = torch.optim.SGD(fresh(BackendCase("auto", "cpu", 0)))
    given = optimizer.state_dict()
    for source in ("Torch", None, ["torch"]):
        with pytest.raises(ValueError, match=r"^source must be one of 'torch', 'schedulefree', 'AveragedModel', got "):
            convert(given, source)
    with pytest.raises(TypeError, match=r"^state_dict must be a mapping, got SGD$"):
        convert(optimizer, "torch")
    with pytest.raises(ValueError, match=r"^parameters must be None for source='torch'"):
        convert(given, "torch", ["weight"])
    for source in ("torch", "schedulefree"):
        with pytest.raises(ValueError, match=r"^state_dict must be .* without 'param_groups'$"):
            convert({"state": {}}, source)


def test_a_warning_points_at_the_caller() -> None:
    model = torch.nn.Linear(2, 1)
    both = {**AveragedModel(model).state_dict(), **torch.optim.SGD(model.parameters()).state_dict()}
    with pytest.warns(UserWarning, match=r"^convert from 'AveragedModel': n_averaged is 0") as told:
        convert(both, "AveragedModel", ["weight", "bias"])
    assert {one.filename for one in told} == {__file__}


# ------------------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("switches", [{"fused": True}, {"foreach": True}, {"capturable": True}, {}])
def test_torch(backend: BackendCase, switches: dict[str, bool]) -> None:
    """What it loads as is what torch's own dict loads as, without the switches, and in dicts of its own."""
    params = fresh(backend)
    theirs = torch.optim.AdamW(params, **BASES["adamw"])
    advance(theirs, params, range(3))
    given = theirs.state_dict()
    given["param_groups"][0].update(switches)
    before = copy.deepcopy(given)
    converted = quietly(given, "torch")
    group = converted["param_groups"][0]
    assert not {"fused", "foreach", "capturable", "differentiable"} & group.keys()
    group["lr"] = 1.0
    group["params"].clear()
    converted["state"][0]["exp_avg"] = None
    converted["state"].pop(1)
    assert_unchanged(before, given)

    results = []
    for state_dict in (given, through_a_file(quietly(given, "torch"))):
        own = copies(params)
        ours = LookaheadAdamW(own, k=2, backend=backend.name)
        ours.load_state_dict(state_dict)
        advance(ours, own, range(3, 6))
        results.append([*own, *tensors_of(ours.state_dict())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert_unchanged(before, given)


# ------------------------------------------------------------------------------------------------------------
# AveragedModel


def make_model(backend: BackendCase, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    return model.to(backend.device, dtype)


class Averaging:
    """A base of torch's and its averaged model, as torch's users train."""

    def __init__(self, rule: str, model: torch.nn.Module, decay: Any, every: int) -> None:
        self.model, self.every = model, every
        self.params = list(model.parameters())
        self.base = make_base(rule, self.params)
        function = None if decay == "uniform" else get_ema_multi_avg_fn(decay)
        self.averaged = AveragedModel(model, multi_avg_fn=function)

    def run(self, steps: range, start: int = 0) -> None:
        for step in steps:
            advance(self.base, self.params, [step])
            if step >= start and (step + 1) % self.every == 0:
                self.averaged.update_parameters(self.model)


def assert_close(params: Any, others: Any) -> None:
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=2e-5, atol=2e-6)


CASES = [
    (rule, decay, every)
    for (rule, decay), every in zip(itertools.product(BASES, (0.9, "uniform")), itertools.cycle((1, 3, 1)))
]


@pytest.mark.parametrize(("rule", "decay", "every"), CASES)
@pytest.mark.parametrize("start", [0, 7])
def test_an_averaged_model_goes_on(backend: BackendCase, rule: str, decay: Any, every: int, start: int) -> None:
    """Averages and weights are those of torch's run that was not cut; after one sample, and after several."""
    model = make_model(backend)
    theirs = Averaging(rule, model, decay, every)
    theirs.run(range(9), start)
    saved = through_a_file((theirs.averaged.state_dict(), theirs.base.state_dict()))
    own = copy.deepcopy(model)
    params = list(own.parameters())
    optimizer = EMA(make_base(rule, params, lr=0.9), decay, every=every, backend=backend.name)
    optimizer.load_state_dict(saved[1])
    both = {**saved[0], **optimizer.state_dict()}
    before = copy.deepcopy(both)
    converted = through_a_file(quietly(both, "AveragedModel", own.named_parameters()))
    assert_unchanged(before, both)
    optimizer.load_state_dict(converted)
    with optimizer.slow_weights():
        for p, average in zip(params, theirs.averaged.module.parameters(), strict=True):
            assert torch.equal(p, average)
    for step in range(9, 16):
        theirs.run(range(step, step + 1))
        advance(optimizer, params, [step])
        assert_close(params, theirs.params)
        with optimizer.slow_weights():
            assert_close(params, theirs.averaged.module.parameters())


def test_a_plain_checkpoint_says_every_step(backend: BackendCase) -> None:
    """A base's groups do not tell how often the average was moved. What is taken for it is in the result, and wins over
    the constructor's, as all that is loaded does."""
    model = make_model(backend)
    theirs = Averaging("adamw", model, "uniform", 1)
    theirs.run(range(5))
    converted = quietly(
        {**theirs.averaged.state_dict(), **theirs.base.state_dict()}, "AveragedModel", model.named_parameters()
    )
    own = copy.deepcopy(model)
    optimizer = EMA(torch.optim.AdamW(own.parameters()), "uniform", every=10, backend=backend.name)
    optimizer.load_state_dict(converted)
    assert optimizer.param_groups[0]["ema_every"] == 1
    assert optimizer.state[own[0].weight]["average_start"] == 1
    theirs.run(range(5, 8))
    advance(optimizer, list(own.parameters()), range(5, 8))
    with optimizer.slow_weights():
        assert_close(own.parameters(), theirs.averaged.module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_average_of_another_dtype(backend: BackendCase, dtype: torch.dtype) -> None:
    model = make_model(backend, dtype)
    theirs = Averaging("sgd", model, 0.9, 1)
    theirs.run(range(3))
    given = {**theirs.averaged.state_dict(), **theirs.base.state_dict()}
    converted = quietly(given, "AveragedModel", model.named_parameters())
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for own, average in zip(converted["state"].values(), theirs.averaged.module.parameters(), strict=True):
        assert own["slow_param"].dtype == expected
        assert torch.equal(own["slow_param"], average.to(expected))
        assert own["slow_param"].data_ptr() != average.data_ptr()


def test_names_alone_and_names_of_the_optimizer(backend: BackendCase) -> None:
    model = make_model(backend)
    averaged = AveragedModel(model)
    groups = [
        {"params": list(model[1].named_parameters("1"))},
        {"params": list(model[0].named_parameters("0")), "lr": 0.5},
    ]
    base = torch.optim.AdamW(groups)
    advance(base, list(model.parameters()), range(2))
    averaged.update_parameters(model)
    names = ["1.weight", "1.bias", "0.weight", "0.bias"]
    state_dict = base.state_dict()
    assert [name for group in state_dict["param_groups"] for name in group["param_names"]] == names
    both = {**averaged.state_dict(), **state_dict}
    for given in (None, names):
        converted = quietly(both, "AveragedModel", given)
        for index, name in enumerate(names):
            assert torch.equal(converted["state"][index]["slow_param"], model.get_parameter(name))
    with pytest.raises(ValueError, match=r"optimizer's order, got '0.weight' at position 0, where .* '1.weight'"):
        convert(both, "AveragedModel", model.named_parameters())


def test_parameters_that_do_not_fit(backend: BackendCase) -> None:
    model = make_model(backend)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    base = torch.optim.SGD(model.parameters())
    both = {**averaged.state_dict(), **base.state_dict()}
    with pytest.raises(ValueError, match=r"^state_dict must be an AveragedModel's, got one without 'n_averaged'$"):
        convert(base.state_dict(), "AveragedModel", model.named_parameters())
    with pytest.raises(ValueError, match=r"^parameters must be model.named_parameters\(\) .* got None$"):
        convert(both, "AveragedModel")
    with pytest.raises(ValueError, match=r"which has no head, 1.scale$"):
        convert(both, "AveragedModel", ["0.weight", "head", "1.scale"])
    with pytest.raises(ValueError, match=r"^parameters must be the optimizer's 4 parameters, got 1$"):
        convert(both, "AveragedModel", ["0.weight"])
    with pytest.raises(ValueError, match=r"0.weight is \(3,\), and its average \(3, 4\)$"):
        convert(both, "AveragedModel", [("0.weight", torch.ones(3))])
    with pytest.raises(TypeError, match=r"^parameters must be pairs of a name and a parameter, or names, got a Param"):
        convert(both, "AveragedModel", model.parameters())


def test_what_an_averaged_model_cannot_hand_on(backend: BackendCase) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3, bias=False))
    model.add_module("tied", torch.nn.Linear(3, 3, bias=False))
    model.tied.weight = model[2].weight
    averaged = AveragedModel(model)
    params = list(model.parameters())
    base = torch.optim.AdamW(params)
    for step in range(2):
        averaged.update_parameters(model)
        advance(base, params[:-1], [step])
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    both = {**averaged.state_dict(), **base.state_dict()}
    with pytest.warns(UserWarning, match="^convert from") as told:
        converted = convert(both, "AveragedModel", model.named_parameters())
    texts = [str(one.message) for one in told]
    # The parameter that two modules share is none of what stays behind.
    assert "1.running_mean, 1.running_var, 1.num_batches_tracked of the averaged model are not among" in texts[0]
    assert "2.weight had no gradient yet" in texts[1]
    assert "0.weight, 0.bias, 1.weight, 1.bias had fewer updates than n_averaged=4 needs" in texts[2]
    assert len(texts) == 3
    assert [own["average_start"].item() for own in converted["state"].values()] == [0.0] * 4
    # One that is frozen had no gradient, and never will: nothing is to be told.
    params[-1].requires_grad_(False)
    with pytest.warns(UserWarning, match="^convert from") as told:
        convert(both, "AveragedModel", model.named_parameters())
    assert len(told) == 2


def test_an_average_that_began_before_start(backend: BackendCase) -> None:
    model = make_model(backend)
    theirs = Averaging("adamw", model, 0.9, 1)
    theirs.run(range(4))
    optimizer = EMA(theirs.base, 0.9, start=3, backend=backend.name)
    with pytest.warns(UserWarning, match=r"began before ema_start says"):
        convert({**theirs.averaged.state_dict(), **optimizer.state_dict()}, "AveragedModel", model.named_parameters())


def test_an_averaged_model_without_the_optimizers_state(backend: BackendCase) -> None:
    """A first step begins averages, also where there is one already: refused, and not lost in silence."""
    model = make_model(backend)
    theirs = Averaging("adamw", model, 0.9, 1)
    theirs.run(range(2))
    averaged = theirs.averaged.state_dict()
    with pytest.raises(ValueError, match=r"^state_dict must have the optimizer's entries beside the averaged model's"):
        convert(averaged, "AveragedModel", model.named_parameters())
    for rule in ("adamw", "sgd", "nadam"):
        base = make_base(rule, model.parameters())
        with pytest.raises(ValueError, match=r"^state_dict must hold the state of an optimizer that has stepped"):
            convert({**averaged, **base.state_dict()}, "AveragedModel", model.named_parameters())


def test_nothing_was_averaged_yet(backend: BackendCase) -> None:
    model = make_model(backend)
    theirs = Averaging("adamw", model, 0.9, 100)
    theirs.run(range(2))
    with pytest.warns(UserWarning, match=r"n_averaged is 0"):
        converted = convert(
            {**theirs.averaged.state_dict(), **theirs.base.state_dict()}, "AveragedModel", model.named_parameters()
        )
    assert_unchanged(theirs.base.state_dict()["state"], converted["state"])


# ------------------------------------------------------------------------------------------------------------
# schedulefree

SCHEDULE_FREE: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (schedulefree.AdamWScheduleFree, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4}),
    "sgd": (schedulefree.SGDScheduleFree, {"lr": 0.05, "momentum": 0.7}),
}
CUT = 6


def schedule_free_run(
    rule: str, params: list[torch.nn.Parameter], steps: int = CUT, **changes: Any
) -> torch.optim.Optimizer:
    cls, hyper = SCHEDULE_FREE[rule]
    optimizer: torch.optim.Optimizer = cls(params, **{**hyper, **changes})
    optimizer.train()
    advance(optimizer, params, range(steps))
    return optimizer


class ScheduleFreeInNumPy:
    """Schedule-Free over a converted state, in fp64 and by its definition: what the result means."""

    def __init__(self, param: np.ndarray, group: dict[str, Any], state: dict[str, Any]) -> None:
        self.y, self.group = param.astype(np.float64), group
        self.state = {name: to_numpy(value).astype(np.float64) for name, value in state.items()}

    def step(self, gradient: np.ndarray) -> None:
        group, state, y = self.group, self.state, self.y
        lr, interp = group["lr"], group["schedule_free_interp"]
        state["step"] = state["step"] + 1
        state["lr_max"] = np.maximum(state["lr_max"], lr)
        weight = state["step"] ** group["schedule_free_r"]
        weight = weight * state["lr_max"] ** group["schedule_free_weight_lr_power"]
        state["weight_sum"] = state["weight_sum"] + weight
        update = gradient.astype(np.float64)
        if "betas" in group:
            assert group["betas"][0] == 0
            beta2 = group["betas"][1]
            state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * update**2
            root = np.sqrt(state["exp_avg_sq"]) / np.sqrt(1 - beta2 ** state["step"])
            update = update / (root + group["eps"])
        else:
            assert group["momentum"] == 0
        x = y + (y - state["z"]) * (1 - interp) / interp
        z = state["z"] - lr * update
        x = z + (1 - weight / state["weight_sum"]) * (x - z)
        state["z"], self.y = z, z + interp * (x - z)


@pytest.mark.parametrize("rule", SCHEDULE_FREE)
@pytest.mark.parametrize(
    "changes", [{}, {"r": 1.0, "weight_lr_power": 1.0}, {"warmup_steps": 4}, {"foreach": False, "weight_lr_power": 0}]
)
def test_what_a_schedule_free_run_becomes(rule: str, changes: dict[str, Any]) -> None:
    params = fresh(BackendCase("auto", "cpu", 0))
    theirs = schedule_free_run(rule, params, **changes)
    given = through_a_file(theirs.state_dict())
    before = copy.deepcopy(given)
    converted = through_a_file(quietly(given, "schedulefree"))
    assert_unchanged(before, given)

    (group,) = converted["param_groups"]
    _, hyper = SCHEDULE_FREE[rule]
    assert group["lr"] == hyper["lr"]
    assert group["params"] == list(range(len(params)))
    settings = {name: group[f"schedule_free_{name}"] for name in ("interp", "r", "weight_lr_power")}
    assert settings == {
        "interp": hyper.get("momentum") or hyper["betas"][0],
        "r": changes.get("r", 0),
        "weight_lr_power": changes.get("weight_lr_power", 2),
    }
    assert {type(settings["r"]), type(settings["weight_lr_power"])} == {int}
    if rule == "adamw":
        assert (group["betas"], group["eps"]) == ((0.0, 0.95), 1e-4)
        names = {"step", "z", "weight_sum", "lr_max", "y_interp", "exp_avg", "exp_avg_sq"}
    else:
        assert (group["momentum"], group["dampening"], group["nesterov"]) == (0, 0, False)
        names = {"step", "z", "weight_sum", "lr_max", "y_interp"}
    assert not {"k", "train_mode", "warmup_steps", "scheduled_lr", "foreach", "r", "weight_sum"} & group.keys()
    for p, own in zip(params, converted["state"].values(), strict=True):
        assert own.keys() == names
        assert own["step"].item() == CUT
        assert own["y_interp"].item() == settings["interp"]
        for name in ("step", "weight_sum", "lr_max", "y_interp"):
            assert (own[name].dtype, own[name].dim()) == (torch.float64, 0)
        assert torch.equal(own["z"], theirs.state[p]["z"])
    continued = [
        ScheduleFreeInNumPy(to_numpy(p), group, own) for p, own in zip(params, converted["state"].values(), strict=True)
    ]
    for step in range(CUT, CUT + 6):
        for one, gradient in zip(continued, gradients_of(step, params), strict=True):
            one.step(to_numpy(gradient))
        advance(theirs, params, [step])
        for one, p in zip(continued, params, strict=True):
            np.testing.assert_allclose(one.y, to_numpy(p), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rule", SCHEDULE_FREE)
@pytest.mark.parametrize("r", [0, 1])
def test_a_schedule_free_run_goes_on(backend: BackendCase, rule: str, r: int) -> None:
    """Weights and averages are those of the package's run that was not cut."""
    params = fresh(backend)
    theirs = schedule_free_run(rule, params, r=r)
    own = copies(params)
    base = torch.optim.AdamW(own) if rule == "adamw" else torch.optim.SGD(own)
    optimizer = lookahead_fused.ScheduleFree(base, backend=backend.name)
    optimizer.load_state_dict(through_a_file(quietly(theirs.state_dict(), "schedulefree")))
    for step in range(CUT, CUT + 6):
        advance(theirs, params, [step])
        advance(optimizer, own, [step])
        assert_close(own, params)
        theirs.eval()
        with optimizer.slow_weights():
            assert_close(own, params)
        theirs.train()


def test_a_schedule_free_run_that_did_not_begin() -> None:
    """Nothing was averaged: train mode or not, the parameters are all three sequences."""
    params = fresh(BackendCase("auto", "cpu", 0))
    converted = quietly(schedulefree.AdamWScheduleFree(params).state_dict(), "schedulefree")
    assert converted["state"] == {}
    assert converted["param_groups"][0]["schedule_free_interp"] == 0.9


def test_another_dtype_of_a_schedule_free_run() -> None:
    params = fresh(BackendCase("auto", "cpu", 0), torch.bfloat16)
    theirs = schedule_free_run("adamw", params)
    converted = quietly(theirs.state_dict(), "schedulefree")
    for p, own in zip(params, converted["state"].values(), strict=True):
        for name in ("z", "exp_avg_sq"):
            assert own[name].dtype == torch.float32
            assert torch.equal(own[name], theirs.state[p][name].float())


def test_what_a_schedule_free_run_cannot_hand_on() -> None:
    params = fresh(BackendCase("auto", "cpu", 0))
    theirs = schedule_free_run("adamw", params[:1], warmup_steps=10, weight_decay=0.1)
    theirs.add_param_group({"params": params[1:], "train_mode": True})
    theirs.param_groups[1].update(k=2, weight_decay=0.0, initial_lr=0.3)
    with pytest.warns(UserWarning, match="^convert from") as told:
        converted = convert(theirs.state_dict(), "schedulefree")
    texts = [str(one.message) for one in told]
    assert "group 0 is at step 6 of its warmup_steps=10" in texts[0]
    assert "group 0 has weight_decay=0.1, which acts on y there and on z here" in texts[1]
    assert "group 1 is at step 2 of its warmup_steps=10" in texts[2]
    assert "parameters 1, 2, 3 of group 1 had no gradient yet" in texts[3]
    assert len(texts) == 4
    # What others keep in a group stays.
    assert converted["param_groups"][1]["initial_lr"] == 0.3
    assert list(converted["state"]) == [0]


def test_schedule_free_state_that_is_refused() -> None:
    params = fresh(BackendCase("auto", "cpu", 0))
    theirs = schedule_free_run("sgd", params)
    theirs.eval()
    with pytest.raises(ValueError, match=r"group 0 has train_mode=False: .* call optimizer.train\(\) before saving"):
        convert(theirs.state_dict(), "schedulefree")
    theirs.train()
    for name, value in (("r", 0.5), ("weight_lr_power", -1.0)):
        given = theirs.state_dict()
        given["param_groups"][0][name] = value
        with pytest.raises(ValueError, match=rf"^{name} of group 0 must be a whole number >= 0, got {value}$"):
            convert(given, "schedulefree")
    given = theirs.state_dict()
    given["state"] = {0: {"exp_avg": torch.ones(7)}}
    with pytest.raises(ValueError, match=r"got a state of parameter 0 without 'z'"):
        convert(given, "schedulefree")
    # Its RAdam's state has the same form, and means something else.
    for other in (schedulefree.RAdamScheduleFree(params), torch.optim.AdamW(params)):
        with pytest.raises(ValueError, match=r"must be that of schedulefree's AdamWScheduleFree or SGDScheduleFree"):
            convert(other.state_dict(), "schedulefree")
