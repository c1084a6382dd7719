"""Lion as a plain optimizer: to the bit, with nothing of slow weights about it; and under every wrapper."""

from __future__ import annotations

import copy
import ctypes
import itertools
from typing import Any

import oracle
import pytest
import torch
from cuda_host import HOST
from helpers import (
    DTYPE_NAMES,
    BackendCase,
    assert_unchanged,
    make_params,
    oracle_settings,
    same_tensor_bits,
    snapshot,
    to_numpy,
    with_whole_master,
)
from oracle import Exact, same_bits
from runs import advance, assert_same_run, copies, gradients_of, through_a_file
from test_cuda_graphs import Capture
from test_cuda_traffic import watch

from lookahead_fused import EMA, GPA, Lion, Lookahead, LookaheadLion, ScheduleFree

SHAPES = ((4, 3), (5,), (), (0,), (300,))
HYPER: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.7), "weight_decay": 0.1}


def make(params: Any, backend: BackendCase, **changes: Any) -> Lion:
    return Lion(params, **{**HYPER, **changes}, backend=backend.name)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.0}, {"master_weights": True}], ids=str)
def test_bits(backend: BackendCase, dtype: torch.dtype, options: dict[str, Any]) -> None:
    params = make_params(SHAPES, dtype, device=backend.device)
    settings = oracle_settings("lion", **{**HYPER, **options}, k=2**60)
    exact = [Exact(to_numpy(p), DTYPE_NAMES[dtype], settings) for p in params]
    optimizer = make(params, backend, **options)
    for step in range(5):
        left_out = step % len(params) if step >= 2 else -1
        for i, (p, g) in enumerate(zip(params, gradients_of(step, params), strict=True)):
            p.grad = None if i == left_out else g
        optimizer.step()
        for i, (p, one, g) in enumerate(zip(params, exact, gradients_of(step, params), strict=True)):
            if i != left_out:
                one.step(to_numpy(g))
            wanted = {"param": one.param, **one.state}
            del wanted["slow_param"]
            own = with_whole_master(p, optimizer.state[p])
            assert set(own) == {"step", *wanted} - {"param"}
            assert own["step"] == one.step_count
            for name, value in wanted.items():
                found = to_numpy(p if name == "param" else own[name])
                if backend.ulps == 0:
                    assert same_bits(found, value), (step, name)
                else:
                    assert oracle.ulps(found, value) <= backend.ulps * (step + 1)


def test_it_has_no_slow_weights() -> None:
    optimizer = Lion(make_params(SHAPES))
    for name in ("slow_weights", "sync", "eval", "train"):
        assert not hasattr(optimizer, name)
    assert set(optimizer.param_groups[0]) == {
        *("params", "lr", "betas", "weight_decay", "maximize", "master_weights", "state_dtype", "backend")
    }
    with pytest.raises(TypeError, match="unexpected keyword argument 'k'"):
        Lion(make_params(SHAPES), k=5)


WRAPPERS: dict[str, Any] = {
    "lookahead": lambda base, b: Lookahead(base, 2, 0.5, "pullback", outer_momentum=0.5, backend=b.name),
    "ema": lambda base, b: EMA(base, 0.9, backend=b.name),
    "gpa": lambda base, b: GPA(base, backend=b.name),
    "schedule-free": lambda base, b: ScheduleFree(base, backend=b.name),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookahead_around_it_is_the_class(backend: BackendCase, dtype: torch.dtype) -> None:
    """The same fused step, bits and state; and a checkpoint of either is one of the other."""
    params = make_params(SHAPES, dtype, device=backend.device)
    twins = copies(params)
    settings: dict[str, Any] = {"k": 2, "alpha": 0.5, "pullback_momentum": "pullback", "backend": backend.name}
    wrapped, fused = Lookahead(make(params, backend), **settings), LookaheadLion(twins, **HYPER, **settings)
    assert wrapped._is_fused
    for one, members in ((wrapped, params), (fused, twins)):
        advance(one, members, range(5))
    for p, twin in zip(params, twins, strict=True):
        assert same_tensor_bits(p, twin)
        assert wrapped.state[p].keys() == fused.state[twin].keys()
        assert all(same_tensor_bits(wrapped.state[p][name], value) for name, value in fused.state[twin].items())


@pytest.mark.parametrize("name", WRAPPERS)
def test_under_every_wrapper(backend: BackendCase, name: str) -> None:
    """Fused: what the rule steps has the bits of the rule alone, where the gradient does not depend on the weights."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    optimizer, alone = WRAPPERS[name](make(params, backend), backend), make(twins, backend)
    assert optimizer._is_fused
    steps = range(1) if name == "lookahead" else range(4)
    advance(optimizer, params, steps)
    advance(alone, twins, steps)
    for p, twin in zip(params, twins, strict=True):
        stepped = optimizer.state[p].get("z", p)
        assert same_tensor_bits(stepped, twin)


def test_stepped_alone_under_a_wrapper_it_keeps_its_precision() -> None:
    """torch's own classes want their moments in the parameter's dtype, and it does not."""
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = EMA(Lion(params, **HYPER), master_weights=True)
    advance(optimizer, params, range(2))
    advance(optimizer.base_optimizer, params, range(2, 4))
    assert all(own["exp_avg"].dtype == torch.float32 for own in optimizer.state.values())
    assert all(own["step"].dtype == torch.float64 and own["step"] == 4 for own in optimizer.state.values())


def test_its_master_is_the_wrappers() -> None:
    with pytest.raises(ValueError, match=r"^base_optimizer must have master_weights=False, got True"):
        Lookahead(Lion(make_params(SHAPES, torch.bfloat16), master_weights=True))


def test_a_resumed_run_is_the_same_run(backend: BackendCase) -> None:
    params = make_params(SHAPES, torch.bfloat16, device=backend.device)
    optimizer = make(params, backend, master_weights=True)
    advance(optimizer, params, range(3))
    saved, resumed = through_a_file(optimizer.state_dict()), copies(params)
    again = make(resumed, backend, master_weights=True)
    again.load_state_dict(saved)
    twin = copy.deepcopy(optimizer)
    for one, members in ((optimizer, params), (again, resumed), (twin, twin.param_groups[0]["params"])):
        advance(one, members, range(3, 6))
    assert_same_run(again, optimizer)
    assert_same_run(twin, optimizer)


def test_a_checkpoint_with_slow_weights_gives_its_momentum() -> None:
    params = make_params(SHAPES)
    optimizer = LookaheadLion(params, **HYPER, k=100)
    advance(optimizer, params, range(3))
    twins = copies(params)
    alone = Lion(twins, **HYPER)
    alone.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, members in ((optimizer, params), (alone, twins)):
        advance(one, members, range(3, 6))
    assert all(same_tensor_bits(p, twin) for p, twin in zip(params, twins, strict=True))


def test_an_overflow_changes_nothing(backend: BackendCase) -> None:
    params = make_params(SHAPES, device=backend.device)
    optimizer = make(params, backend)
    advance(optimizer, params, range(2))
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.full((1,), 4.0)
    optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


def test_hooks_and_schedulers() -> None:
    params = make_params(SHAPES)
    optimizer = Lion(params, **HYPER)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    advance(optimizer, params, range(1))
    scheduler.step()
    assert seen == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == HYPER["lr"] / 2


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "^lr must be a float >= 0 or a tensor of one element, got -1.0$"),
    ({"betas": (0.9, 1.0)}, ValueError, "^betas must be a pair of floats"),
    ({"weight_decay": "no"}, TypeError, "^weight_decay must be a float >= 0 or a tensor of one element, got 'no'"),
    ({"differentiable": True}, ValueError, "^differentiable must be False, got True"),
    ({"backend": "cudnn"}, ValueError, "^backend must be"),
]


@pytest.mark.parametrize(("settings", "error", "told"), BAD)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        Lion(make_params(SHAPES), **settings)


def test_traffic(runtime: ctypes.CDLL) -> None:
    """Twenty bytes a parameter: theta and m read and written, g read."""
    p = torch.nn.Parameter(torch.randn(4099))
    optimizer = make([p], HOST)
    for _ in range(3):
        p.grad = torch.randn(4099)
        runtime.control_reset()
        state = [value for value in optimizer.state.get(p, {}).values() if value.dim() > 0]
        watch(runtime, p, p.grad, *state)
        optimizer.step()
        if state:
            moved = [(runtime.control_read(i), runtime.control_written(i)) for i in range(2 + len(state))]
            assert sum(itertools.chain(*moved)) == 20 * p.numel()
            assert runtime.control_elsewhere() == 0


def test_replays_of_a_captured_step(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for captured in (False, True):
        params = make_params(SHAPES)
        optimizer = make(params, HOST)
        advance(optimizer, params, [0])
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for _ in range(4):
            capture.replay() if captured else optimizer.step()
        results.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
