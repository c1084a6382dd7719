"""An average of the weights: to the bit, with every option, around fused and other optimizers; theta never feels it."""

from __future__ import annotations

import copy
import ctypes
import itertools
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cuda_host import HOST
from helpers import (
    DTYPE_NAMES,
    EXTERNAL_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    assert_unchanged,
    make_optimizer,
    make_params,
    oracle_settings,
    same_tensor_bits,
    snapshot,
    to_numpy,
)
from oracle import Exact, same_bits
from runs import advance, assert_same_run, copies, fresh, gradients_of, through_a_file
from test_cuda_graphs import Capture
from test_cuda_traffic import watch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lookahead_fused import EMA, Lookahead

NEVER = 2**60
SHAPES = ((4, 3), (5,), (), (0,), (300,))
BASES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.9},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "decay": {"decay": 0.7},
    "small decay": {"decay": 0.3},  # lerp's other branch
    "decay 0": {"decay": 0.0},
    "decay 1": {"decay": 1},
    "uniform": {"decay": "uniform"},
    "every": {"decay": 0.7, "every": 3},
    "start": {"decay": 0.7, "start": 4},
    "warmup": {"decay": 0.3, "warmup": True},
    "all": {"decay": 0.4, "every": 2, "start": 3, "warmup": True},
    "uniform, every, start": {"decay": "uniform", "every": 2, "start": 1},
}


def make_base(rule: str, params: Any, **changes: Any) -> torch.optim.Optimizer:
    return (TORCH_CLASSES | EXTERNAL_CLASSES)[rule](params, **{**BASES.get(rule, {"lr": 0.1}), **changes})


def make(rule: str, params: Any, backend: BackendCase, **settings: Any) -> EMA:
    return EMA(make_base(rule, params), **settings, backend=backend.name)


# Every option, with one rule and one dtype each in turn; and all of them together with every dtype.
CASES = [
    (name, rule, dtype)
    for name, rule, dtype in zip(OPTIONS, itertools.cycle(BASES), itertools.cycle(DTYPE_NAMES), strict=False)
    if name != "all"
]
CASES += [("all", rule, dtype) for rule, dtype in zip(itertools.cycle(reversed(BASES)), DTYPE_NAMES, strict=False)]


class ExactAverage(Exact):
    """One parameter under a rule, to the bit, and beside it an average. Every sample is the weights as they were
    computed, before they are rounded to the parameter's dtype."""

    def __init__(self, param: np.ndarray, dtype: str, settings: Any, **options: Any) -> None:
        super().__init__(param, dtype, settings)
        self.options = {"every": 1, "start": 0, "warmup": False, **options}
        self.average = self.param.copy()

    def _write(self, p: np.ndarray) -> None:
        super()._write(p)
        since = self.step_count - self.options["start"]
        if since < 0 or since % self.options["every"] != 0:
            return
        n, decay = since // self.options["every"], self.options["decay"]
        if n == 0:
            self.average = p.copy()
        elif decay == "uniform":
            self.average = oracle.lerp(self.average, p, 1.0 / (n + 1))
        else:
            d = min(decay, (1 + n) / (10 + n)) if self.options["warmup"] else decay
            self.average = oracle.lerp(self.average, p, 1.0 - d)


@pytest.mark.parametrize(("name", "rule", "dtype"), CASES, ids=str)
def test_bits(backend: BackendCase, name: str, rule: str, dtype: torch.dtype) -> None:
    """The average after every step; and theta, which has those of a fused step whose slow weights do nothing."""
    params = make_params(SHAPES, dtype, device=backend.device)
    settings = oracle_settings(rule, **BASES[rule], k=NEVER)
    exact = [ExactAverage(to_numpy(p), DTYPE_NAMES[dtype], settings, **OPTIONS[name]) for p in params]
    optimizer = make(rule, params, backend, **OPTIONS[name])
    for step in range(8):
        advance(optimizer, params, [step])
        for p, one, g in zip(params, exact, gradients_of(step, params), strict=True):
            one.step(to_numpy(g))
            assert oracle.ulps(to_numpy(p), one.param) <= backend.ulps * (step + 1)
            average = to_numpy(optimizer.state[p]["slow_param"])
            if backend.ulps == 0:
                assert same_bits(average, one.average), f"step {step}"
            else:
                np.testing.assert_allclose(average, one.average, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rule", [*BASES, "nadam"])
def test_theta_does_not_feel_it(backend: BackendCase, rule: str) -> None:
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    optimizer = make(rule, params, backend, decay=0.5, every=2)
    advance(optimizer, params, range(7))
    if rule == "nadam":
        theirs: torch.optim.Optimizer = make_base(rule, twins)
    else:
        theirs = make_optimizer(rule, twins, backend, **BASES[rule], k=NEVER)
    advance(theirs, twins, range(7))
    for p, twin in zip(params, twins, strict=True):
        assert same_tensor_bits(p, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_around_another_optimizer(backend: BackendCase, dtype: torch.dtype) -> None:
    """The pass reads what the base made, writes the average alone, and counts steps of its own."""
    params = make_params(SHAPES, dtype, device=backend.device)
    optimizer = make("nadam", params, backend, decay=0.75, every=2, start=1)
    expected = [p.detach().double() for p in params]
    for step in range(6):
        advance(optimizer, params, [step])
        if step % 2 == 0:
            expected = [
                p.detach().double() if step == 0 else a + 0.25 * (p.detach().double() - a)
                for a, p in zip(expected, params, strict=True)
            ]
        for p, a in zip(params, expected, strict=True):
            torch.testing.assert_close(optimizer.state[p]["slow_param"].double(), a, rtol=1e-5, atol=1e-6)
            assert optimizer.state[p]["ema_step"] == step + 1
            assert "step" in optimizer.state[p]  # NAdam's own


def test_it_is_torchs_averaged_model(backend: BackendCase) -> None:
    """torch's copies the weights at its first update, after the first step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(backend.device)
    optimizer = make("adamw", model.parameters(), backend, decay=0.9, start=1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(6):
        advance(optimizer, list(model.parameters()), [step])
        averaged.update_parameters(model)
    with optimizer.slow_weights():
        for p, theirs in zip(model.parameters(), averaged.module.parameters(), strict=True):
            torch.testing.assert_close(p, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", [*BASES, "nadam"])
def test_before_it_begins_nothing_is_swapped(backend: BackendCase, rule: str) -> None:
    params = make_params(SHAPES, device=backend.device)
    optimizer = make(rule, params, backend, decay=0.5, start=3)
    for steps, begun in ((2, False), (3, True), (5, True)):
        advance(optimizer, params, range(int(optimizer_steps(optimizer)), steps))
        before = [p.detach().clone() for p in params]
        averages = [optimizer.state[p]["slow_param"].clone() for p in params] if begun else before
        with optimizer.slow_weights():
            for p, average in zip(params, averages, strict=True):
                assert torch.equal(p, average)
        for p, theta in zip(params, before, strict=True):
            assert torch.equal(p, theta)


def optimizer_steps(optimizer: EMA) -> float:
    name = optimizer._table.rule.step_name
    return max((float(own[name]) for own in optimizer.state.values()), default=0.0)


@pytest.mark.parametrize("start", [0, 3, 12])
def test_a_run_without_an_average_begins_one(backend: BackendCase, start: int) -> None:
    """A base's checkpoint after ten steps: the average begins there, or at `start` where that is later."""
    params = make_params(SHAPES, device=backend.device)
    base = make_base("adamw", params)
    advance(base, params, range(10))
    saved = through_a_file(base.state_dict())
    twins = copies(params)
    optimizer = make("adamw", twins, backend, decay="uniform", every=2, start=start)
    optimizer.load_state_dict(saved)
    begin = max(10, start)
    samples = [[p.detach().double() for p in twins]] if begin == 10 else []
    for step in range(10, 17):
        advance(optimizer, twins, [step])
        if step + 1 >= begin and (step + 1 - begin) % 2 == 0:
            samples.append([p.detach().double() for p in twins])
    for i, p in enumerate(twins):
        assert optimizer.state[p]["average_start"] == 10
        mean = sum(sample[i] for sample in samples) / len(samples)
        torch.testing.assert_close(optimizer.state[p]["slow_param"].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [*BASES, "nadam"])
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_resumed_run_is_the_same_run(backend: BackendCase, rule: str, cut: int) -> None:
    settings = {"decay": 0.9, "every": 2, "start": 2, "warmup": True}
    params = fresh(backend)
    optimizer = make(rule, params, backend, **settings)
    advance(optimizer, params, range(cut))
    saved = through_a_file(optimizer.state_dict())
    resumed = copies(params)
    again = make(rule, resumed, backend)
    again.load_state_dict(saved)
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for one, members in ((optimizer, params), (again, resumed), (twin, twins)):
        advance(one, members, range(cut, 8))
    assert_same_run(again, optimizer)
    assert_same_run(twin, optimizer)


def test_settings_change_between_steps(backend: BackendCase) -> None:
    """As a scheduler would change them, per group."""
    params = make_params(SHAPES, device=backend.device)
    (group,) = (optimizer := make("sgd", params, backend, decay=0.5)).param_groups
    average = [p.detach().double() for p in params]
    changes: list[tuple[dict[str, Any], float]] = [
        ({}, 0.5),
        ({"ema_decay": 0.25}, 0.75),
        ({"ema_every": 2}, 0.0),
        ({}, 0.75),
        ({"ema_every": 1, "ema_decay": "uniform"}, 1 / 6),
        ({"ema_decay": 0.9, "ema_warmup": True}, 1 - 7 / 16),
    ]
    for step, (change, weight) in enumerate(changes):
        group.update(change)
        advance(optimizer, params, [step])
        average = [a + weight * (p.detach().double() - a) for a, p in zip(average, params, strict=True)]
        for p, a in zip(params, average, strict=True):
            torch.testing.assert_close(optimizer.state[p]["slow_param"].double(), a, rtol=1e-5, atol=1e-6)


def test_an_overflow_changes_nothing(backend: BackendCase) -> None:
    params = make_params(SHAPES, device=backend.device)
    optimizer = make("adamw", params, backend, decay=0.5)
    advance(optimizer, params, range(2))
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.full((1,), 4.0)
    optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"decay": -0.1}, ValueError, r"^decay must be a float in \[0, 1\] or 'uniform', got -0.1$"),
    ({"decay": 1.5}, ValueError, "^decay must be .* got 1.5$"),
    ({"decay": float("nan")}, ValueError, "^decay must be .* got nan$"),
    ({"decay": "exponential"}, TypeError, "^decay must be .* got 'exponential' of type str$"),
    ({"every": 0}, ValueError, "^every must be an int >= 1, got 0$"),
    ({"every": 1.5}, TypeError, "^every must be an int >= 1, got 1.5 of type float$"),
    ({"start": -1}, ValueError, "^start must be an int >= 0, got -1$"),
    ({"warmup": "yes"}, TypeError, "^warmup must be True or False, got 'yes' of type str$"),
    ({"decay": "uniform", "warmup": True}, ValueError, "^warmup must be False with decay='uniform'"),
]


@pytest.mark.parametrize(("settings", "error", "told"), BAD)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], told: str) -> None:
    """An argument is named as its user wrote it, in a group by its name there; nothing has changed then."""
    with pytest.raises(error, match=told):
        EMA(make_base("sgd", make_params(SHAPES)), **settings)
    params = make_params(SHAPES)
    optimizer = EMA(make_base("sgd", params))
    advance(optimizer, params, range(2))
    (group,) = optimizer.param_groups
    group.update({f"ema_{name}": value for name, value in settings.items()})
    before = snapshot(optimizer)
    for p, g in zip(params, gradients_of(2, params), strict=True):
        p.grad.copy_(g)
    with pytest.raises(error, match=f"^ema_{told[1:]}".replace("with decay", "with ema_decay")):
        optimizer.step()
    for (p, theta), own in zip(zip(params, before["params"], strict=True), optimizer.state.values(), strict=True):
        assert torch.equal(p, theta)
        assert own["step"] == 2


def test_there_is_one_policy_and_it_does_not_interpolate() -> None:
    params = make_params(SHAPES)
    for inner in (EMA(make_base("sgd", params)), Lookahead(make_base("sgd", params))):
        for outer in (EMA, Lookahead):
            with pytest.raises(TypeError, match="base_optimizer must not have slow weights of its own"):
                outer(inner)
    assert not hasattr(EMA(make_base("sgd", params)), "sync")


@pytest.mark.parametrize(("rule", "theirs"), [("adamw", 28), ("sgd", 20), ("nadam", 4)])
def test_traffic(runtime: ctypes.CDLL, rule: str, theirs: int) -> None:
    """Eight bytes a parameter at an event, for the average; none of it in any other step. Around another optimizer the
    weights are read and not written."""
    p = torch.nn.Parameter(torch.randn(4099))
    optimizer = make(rule, [p], HOST, decay=0.9, every=3)
    for step in range(1, 10):
        p.grad = torch.randn(4099)
        state = {name: value for name, value in optimizer.state.get(p, {}).items() if value.dim() > 0}
        runtime.control_reset()
        watch(runtime, p, p.grad, *state.values())
        optimizer.step()
        if step == 1:
            continue
        due = step % 3 == 0
        moved = [(runtime.control_read(i), runtime.control_written(i)) for i in range(2 + len(state))]
        average = moved[2 + list(state).index("slow_param")]
        assert average == ((p.nbytes, p.nbytes) if due else (0, 0))
        total = sum(itertools.chain(*moved)) - sum(average)
        assert total == p.numel() * (theirs if rule != "nadam" or due else 0)
        assert runtime.control_elsewhere() == 0


def test_replays_of_a_captured_step(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it begins, and which step is an event, is decided on the device."""
    results = []
    for captured in (False, True):
        params = make_params(SHAPES)
        optimizer = make("adamw", params, HOST, decay=0.3, every=2, start=3, warmup=True)
        advance(optimizer, params, [0])
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for _ in range(9):
            capture.replay() if captured else optimizer.step()
        results.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
