"""GPA and Schedule-Free: to the bit, with every rule and option; in the papers' own form; around other optimizers."""

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
    make_params,
    oracle_settings,
    snapshot,
    to_numpy,
    with_whole_master,
)
from oracle import Exact, same_bits
from runs import advance, assert_same_run, copies, fresh, gradients_of, through_a_file
from test_cuda_graphs import Capture
from test_cuda_traffic import watch

from lookahead_fused import GPA, Lookahead, ScheduleFree

SHAPES = ((4, 3), (5,), (), (0,), (300,))
BASES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1},
    "adam": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "rmsprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "radam": {"lr": 0.1},
}
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpa": (GPA, {}),
    "gpa, other places": (GPA, {"train_interp": 0.3, "eval_interp": 0.5}),
    "gpa at z": (GPA, {"train_interp": 1.0, "eval_interp": 0.0}),
    "gpa, x still": (GPA, {"train_interp": 0.5, "eval_interp": 1.0}),
    "schedule-free": (ScheduleFree, {}),
    "schedule-free, r": (ScheduleFree, {"interp": 0.6, "r": 2, "weight_lr_power": 1}),
    "schedule-free, plain mean": (ScheduleFree, {"interp": 1.0, "weight_lr_power": 0}),
}


def make_base(rule: str, params: Any, **changes: Any) -> torch.optim.Optimizer:
    return (TORCH_CLASSES | EXTERNAL_CLASSES)[rule](params, **{**BASES.get(rule, {"lr": 0.1}), **changes})


def make(option: str, rule: str, params: Any, backend: BackendCase, **settings: Any) -> Any:
    cls, options = OPTIONS[option]
    base_settings = {name: settings.pop(name) for name in ("lr",) if name in settings}
    return cls(make_base(rule, params, **base_settings), **{**options, **settings}, backend=backend.name)


class Shares:
    """Where y lies, and how much of x stays, step for step, in fp64: from the papers, in the written order."""

    def __init__(self, option: str) -> None:
        cls, options = OPTIONS[option]
        self.is_gpa = cls is GPA
        self.train = options.get("train_interp", 0.7) if self.is_gpa else options.get("interp", 0.9)
        self.eval = options.get("eval_interp", 0.9967)
        self.r, self.power = options.get("r", 0), options.get("weight_lr_power", 2)
        self.weight_sum = self.lr_max = 0.0

    def after(self, step: int, lr: float) -> float:
        if self.is_gpa:
            return float(self.eval)
        self.lr_max = max(self.lr_max, lr)
        weight = oracle.power(float(step), self.r) * oracle.power(self.lr_max, self.power)
        self.weight_sum += weight
        return 1.0 - (weight / self.weight_sum if self.weight_sum > 0 else 0.0)


class ExactMiddle(Exact):
    """One parameter that lies between z and x, to the bit. The rule steps z, with the gradient that was taken at y."""

    def __init__(self, param: np.ndarray, dtype: str, settings: Any, option: str, keeps_x: bool = False) -> None:
        super().__init__(param, dtype, settings)
        self.shares, self.place, self.keeps_x = Shares(option), 0.0, keeps_x
        self.z = self.param.copy()
        self.x = self.param.copy()

    def _read(self) -> np.ndarray:
        y, T = super()._read(), self.T
        if not self.keeps_x:
            self.x = y + T((1.0 - self.place) / self.place if self.place > 0 else 0.0) * (y - self.z)
        return self.z.copy()

    def _write(self, p: np.ndarray) -> None:
        T, share = self.T, self.shares.after(self.step_count, self.settings.lr)
        self.z, self.place = p, self.shares.train
        self.x = p + T(share) * (self.x - p)
        super()._write(p + T(self.place) * (self.x - p))


# Every option with every rule, in fp32; and all dtypes in turn.
CASES = [(option, rule, torch.float32) for option, rule in itertools.product(OPTIONS, BASES)]
CASES += list(zip(OPTIONS, itertools.cycle(BASES), itertools.cycle(list(DTYPE_NAMES)[1:]), strict=False))


@pytest.mark.parametrize(("option", "rule", "dtype"), CASES, ids=str)
def test_bits(backend: BackendCase, option: str, rule: str, dtype: torch.dtype) -> None:
    """Parameters, z, the numbers and all of the rule's state after every step, with gradients missing now and then."""
    params = make_params(SHAPES, dtype, device=backend.device)
    settings = oracle_settings(rule, **BASES[rule], k=2**60, master_weights=True)
    exact = [ExactMiddle(to_numpy(p), DTYPE_NAMES[dtype], settings, option) for p in params]
    optimizer = make(option, rule, params, backend, master_weights=True)
    for step in range(6):
        left_out = step % len(params) if step >= 2 else -1
        for i, (p, g) in enumerate(zip(params, gradients_of(step, params), strict=True)):
            p.grad = None if i == left_out else g
        optimizer.step()
        for i, (p, one, g) in enumerate(zip(params, exact, gradients_of(step, params), strict=True)):
            if i != left_out:
                one.step(to_numpy(g))
            own = with_whole_master(p, optimizer.state[p])
            found = {"param": p, **{name: own[name] for name in one.state if name != "slow_param"}, "z": own["z"]}
            wanted = {"param": one.param, **one.state, "z": one.z}
            for name, tensor in found.items():
                if backend.ulps == 0:
                    assert same_bits(to_numpy(tensor), wanted[name]), (step, name)
                else:
                    assert oracle.ulps(to_numpy(tensor), wanted[name]) <= backend.ulps * (step + 1)
            numbers = {"y_interp": one.place, "step": one.step_count}
            if not one.shares.is_gpa:
                numbers |= {"weight_sum": one.shares.weight_sum, "lr_max": one.shares.lr_max}
            assert {name: own[name].item() for name in numbers} == numbers
            assert set(own) == {*(one.state.keys() - {"slow_param"}), "z", *numbers}
    with optimizer.slow_weights():
        for p, one in zip(params, exact, strict=True):
            one._read()
            if backend.ulps == 0:
                assert same_bits(to_numpy(p), oracle.round_to(one.x, DTYPE_NAMES[dtype]))
    for p, one in zip(params, exact, strict=True):
        if backend.ulps == 0:
            assert same_bits(to_numpy(p), one.param)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rule", ["sgd", "nadam", "external"])
def test_the_papers_form(backend: BackendCase, option: str, rule: str) -> None:
    """Convex combinations, in fp64, with the gradient of a function at y: fused, and around other optimizers."""
    (p,) = make_params([(6, 5)], torch.float64, device=backend.device)
    z = torch.nn.Parameter(p.detach().clone())
    x, target = p.detach().clone(), torch.linspace(-1, 1, 30, dtype=torch.float64, device=p.device).view(6, 5)
    optimizer, inner, shares = make(option, rule, [p], backend), make_base(rule, [z]), Shares(option)
    for step in range(1, 9):
        # Up and down: the largest so far is not the last.
        lr = 0.02 * (1 + 3 * step % 4)
        for one in (optimizer, inner):
            one.param_groups[0]["lr"] = lr
        y = shares.train * x + (1 - shares.train) * z.detach() if step > 1 else x
        torch.testing.assert_close(p.detach(), y, rtol=1e-9, atol=1e-11)
        p.grad, z.grad = (p.detach() - target) ** 3, (y - target) ** 3
        optimizer.step()
        inner.step()
        share = shares.after(step, lr)
        x = share * x + (1 - share) * z.detach()
        torch.testing.assert_close(optimizer.state[p]["z"], z.detach(), rtol=1e-9, atol=1e-11)
        with optimizer.slow_weights():
            torch.testing.assert_close(p.detach(), x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_bits_around_other_optimizers(backend: BackendCase, option: str, dtype: torch.dtype) -> None:
    """x is kept: its bits and those of y are the fused pass's of the z that the other optimizer made."""
    params = make_params(SHAPES, dtype, device=backend.device)
    twins = copies(params)
    optimizer, inner = make(option, "nadam", params, backend), make_base("nadam", twins)
    T = np.float64 if dtype == torch.float64 else np.float32
    shares = [Shares(option) for _ in params]
    xs = [to_numpy(p) for p in params]
    for step in range(5):
        advance(optimizer, params, [step])
        advance(inner, twins, [step])
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            z, share = to_numpy(twin), shares[i].after(step + 1, 0.1)
            xs[i] = z + T(share) * (xs[i] - z)
            own = optimizer.state[p]
            assert same_bits(to_numpy(own["z"]), z)
            assert same_bits(to_numpy(own["x"]), xs[i])
            assert same_bits(to_numpy(p), z + T(shares[i].train) * (xs[i] - z))
    with optimizer.slow_weights():
        for p, x in zip(params, xs, strict=True):
            assert same_bits(to_numpy(p), x)


@pytest.mark.parametrize("option", ["gpa", "schedule-free"])
def test_a_step_that_changes_nothing_changes_no_bit(backend: BackendCase, option: str) -> None:
    """With lr 0, z stays where it is; and no sample of Schedule-Free's weighs anything."""
    params = make_params(SHAPES, device=backend.device)
    before = [p.detach().clone() for p in params]
    optimizer = make(option, "sgd", params, backend, lr=0.0)
    advance(optimizer, params, range(3))
    for p, theta in zip(params, before, strict=True):
        assert torch.equal(p, theta)
        assert torch.equal(optimizer.state[p]["z"], theta)
    with optimizer.slow_weights():
        for p, theta in zip(params, before, strict=True):
            assert torch.equal(p, theta)


@pytest.mark.parametrize("rule", ["adamw", "nadam"])
def test_where_y_lies_may_change_between_steps(backend: BackendCase, rule: str) -> None:
    """x is recovered from where the step before left y, and not from where the next one puts it."""
    (p,) = make_params([(50,)], torch.float64, device=backend.device)
    z = torch.nn.Parameter(p.detach().clone())
    x = p.detach().clone()
    optimizer, inner = make("gpa", rule, [p], backend), make_base(rule, [z])
    for step, (train, share) in enumerate([(0.7, 0.9), (0.2, 0.5), (1.0, 0.5), (0.5, 0.0), (0.9, 1.0)]):
        optimizer.param_groups[0].update(gpa_train_interp=train, gpa_eval_interp=share)
        advance(optimizer, [p], [step])
        advance(inner, [z], [step])
        x = share * x + (1 - share) * z.detach()
        torch.testing.assert_close(p.detach(), train * x + (1 - train) * z.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("option", ["gpa", "schedule-free, r"])
@pytest.mark.parametrize(
    ("rule", "dtype"), [("adamw", torch.float32), ("adamw", torch.bfloat16), ("nadam", torch.float32)]
)
def test_a_resumed_run_is_the_same_run(backend: BackendCase, option: str, rule: str, dtype: torch.dtype) -> None:
    fused = rule == "adamw"
    params = fresh(backend, dtype)
    optimizer = make(option, rule, params, backend, master_weights=fused)
    advance(optimizer, params, range(3))
    saved = through_a_file(optimizer.state_dict())
    resumed = copies(params)
    again = make(option, rule, resumed, backend, master_weights=fused)
    again.load_state_dict(saved)
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for one, members in ((optimizer, params), (again, resumed), (twin, twins)):
        advance(one, members, range(3, 7))
    assert_same_run(again, optimizer)
    assert_same_run(twin, optimizer)


@pytest.mark.parametrize("option", ["gpa", "schedule-free"])
def test_a_bases_checkpoint_begins_an_average(backend: BackendCase, option: str) -> None:
    """z and x start at the weights, and the base's moments and count go on."""
    params = make_params(SHAPES, device=backend.device)
    base = make_base("adamw", params)
    advance(base, params, range(4))
    saved, twins = through_a_file(base.state_dict()), copies(params)
    optimizer = make(option, "adamw", twins, backend)
    optimizer.load_state_dict(saved)
    with optimizer.slow_weights():
        assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))
    advance(optimizer, twins, [4])
    advance(base, params, [4])
    for p, twin in zip(params, twins, strict=True):
        assert optimizer.state[twin]["step"] == 5
        torch.testing.assert_close(optimizer.state[twin]["z"], p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["gpa", "schedule-free"])
@pytest.mark.parametrize("rule", ["adamw", "nadam"])
def test_an_overflow_changes_nothing(backend: BackendCase, option: str, rule: str) -> None:
    params = make_params(SHAPES, device=backend.device)
    optimizer = make(option, rule, params, backend)
    advance(optimizer, params, range(2))
    if rule == "nadam":
        # What looks at found_inf itself: torch's fused optimizers do.
        stepped = optimizer.base_optimizer.step
        optimizer.base_optimizer.step = lambda: None if optimizer.base_optimizer.found_inf else stepped()
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.full((1,), 4.0)
    optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


def test_a_base_that_fails_leaves_everything(backend: BackendCase) -> None:
    """y and z have traded places by then."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = make("gpa", "nadam", params, backend)
    advance(optimizer, params, range(2))
    before = snapshot(optimizer)

    def fails() -> None:
        raise RuntimeError("the base's own")

    optimizer.base_optimizer.step = fails
    with pytest.raises(RuntimeError, match="the base's own"):
        optimizer.step()
    # Trading there and back has bumped versions, and no bits.
    for p, theta in zip(params, before["params"], strict=True):
        assert torch.equal(p, theta)
    for own, was in zip(optimizer.state.values(), before["state"], strict=True):
        assert all(torch.equal(own[name], was[name]) for name in was if isinstance(own[name], torch.Tensor))


@pytest.mark.parametrize("rule", ["sgd", "nadam"])
def test_a_closure_is_evaluated_once_at_y(backend: BackendCase, rule: str) -> None:
    (p,) = make_params([(5,)], device=backend.device)
    optimizer = make("gpa", rule, [p], backend)
    seen = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        seen.append(p.detach().clone())
        return loss

    for step in range(3):
        y = p.detach().clone()
        assert optimizer.step(closure).item() == pytest.approx((y**2).sum().item())
        assert len(seen) == step + 1
        assert torch.equal(seen[-1], y)


@pytest.mark.parametrize("cls", [GPA, ScheduleFree])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_want_a_master(cls: Any, dtype: torch.dtype) -> None:
    """At construction, for a group that is added, and where a step finds a parameter converted."""
    told = r"must have \w+master_weights=True with \w+, or be float32 or float64: .* 16 bits are too few"
    with pytest.raises(TypeError, match=told):
        cls(make_base("sgd", make_params(SHAPES, dtype)))
    cls(make_base("sgd", make_params(SHAPES, dtype)), master_weights=True)
    params = make_params(SHAPES)
    optimizer = cls(make_base("sgd", params))
    with pytest.raises(TypeError, match=told):
        optimizer.add_param_group({"params": make_params([(3,)], dtype)})
    assert len(optimizer.param_groups) == 1
    advance(optimizer, params, range(2))
    params[0].data = params[0].data.to(dtype)
    params[0].grad = torch.zeros_like(params[0])
    with pytest.raises(TypeError, match=told):
        optimizer.step()
    with pytest.raises(ValueError, match=r"^master_weights must be False around .*, got True"):
        cls(make_base("nadam", make_params(SHAPES)), master_weights=True)


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (GPA, {"train_interp": 0.0}, ValueError, r"train_interp must be a float in \(0, 1\], got 0.0$"),
    (GPA, {"train_interp": 1.1}, ValueError, r"train_interp must be a float in \(0, 1\], got 1.1$"),
    (GPA, {"eval_interp": -0.1}, ValueError, r"eval_interp must be a float in \[0, 1\], got -0.1$"),
    (GPA, {"eval_interp": "most"}, TypeError, "eval_interp must be .* got 'most' of type str$"),
    (ScheduleFree, {"interp": 0}, ValueError, r"interp must be a float in \(0, 1\], got 0$"),
    (ScheduleFree, {"r": -1}, ValueError, "r must be an int >= 0, got -1$"),
    (ScheduleFree, {"r": 0.5}, TypeError, "r must be an int >= 0, got 0.5 of type float$"),
    (ScheduleFree, {"weight_lr_power": -2}, ValueError, "weight_lr_power must be an int >= 0, got -2$"),
]


@pytest.mark.parametrize(("cls", "settings", "error", "told"), BAD)
def test_bad_settings(cls: Any, settings: dict[str, Any], error: type[Exception], told: str) -> None:
    """An argument is named as its user wrote it, in a group by its name there; nothing has changed then."""
    with pytest.raises(error, match=f"^{told}"):
        cls(make_base("sgd", make_params(SHAPES)), **settings)
    params = make_params(SHAPES)
    optimizer = cls(make_base("sgd", params))
    advance(optimizer, params, range(2))
    prefix = optimizer.policy.prefix
    optimizer.param_groups[0].update({prefix + name: value for name, value in settings.items()})
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=f"^{prefix}{told}"):
        optimizer.step()
    assert all(torch.equal(p, theta) for p, theta in zip(params, before, strict=True))


def test_one_policy_is_around_an_optimizer() -> None:
    for inner, outer in itertools.permutations((GPA, ScheduleFree, Lookahead), 2):
        with pytest.raises(TypeError, match="base_optimizer must not have slow weights of its own"):
            outer(inner(make_base("sgd", make_params(SHAPES))))
    assert not hasattr(GPA(make_base("sgd", make_params(SHAPES))), "sync")


def test_the_base_may_step_alone_and_its_master_follows() -> None:
    """A master that the base did not step would undo the base's step."""
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = Lookahead(make_base("sgd", params), k=100, master_weights=True)
    advance(optimizer, params, range(2))
    advance(optimizer.base_optimizer, params, [2])
    stepped = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, theta) for p, theta in zip(params, stepped, strict=True))


@pytest.mark.parametrize(("rule", "bytes_moved"), [("adamw", 36), ("sgd", 28), ("nadam", 20)])
@pytest.mark.parametrize("option", ["gpa", "schedule-free"])
def test_traffic(runtime: ctypes.CDLL, option: str, rule: str, bytes_moved: int) -> None:
    """Eight bytes a parameter beyond the rule's own, for z. Around another optimizer y is written, z and x read and
    written."""
    p = torch.nn.Parameter(torch.randn(4099))
    optimizer = make(option, rule, [p], HOST)
    for step in range(3):
        p.grad = torch.randn(4099)
        state = {name: value for name, value in optimizer.state.get(p, {}).items() if value.dim() > 0}
        runtime.control_reset()
        watch(runtime, p, p.grad, *state.values())
        optimizer.step()
        if step == 0:
            continue
        moved = [(runtime.control_read(i), runtime.control_written(i)) for i in range(2 + len(state))]
        assert sum(itertools.chain(*moved)) == p.numel() * bytes_moved
        assert runtime.control_elsewhere() == 0


@pytest.mark.parametrize("option", ["gpa", "schedule-free, r"])
def test_replays_of_a_captured_step(option: str, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, their sum and the largest learning rate, which a schedule writes into its tensor, live on the device."""
    results = []
    for captured in (False, True):
        params, lr = make_params(SHAPES), torch.tensor(0.1)
        optimizer = make(option, "adamw", params, HOST, lr=lr)
        advance(optimizer, params, [0])
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for step in range(6):
            lr.fill_(0.05 * (3 - abs(step - 3)))
            capture.replay() if captured else optimizer.step()
        results.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
