"""eval() and train(): a slow_weights() that stays open."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from evaluating import (
    CUT,
    END,
    MAKERS,
    Make,
    assert_hold,
    begun,
    hooks_of,
    of_each,
    of_few,
    slow_weights_of,
    values_of,
)
from helpers import (
    BackendCase,
    UnfusedRMSprop,
    assert_unchanged,
    snapshot,
)
from runs import advance, assert_same_run, copies, fresh, gradients_of, tensors_of, through_a_file
from test_interrupts import at_all_moments, usual_handler  # noqa: F401

from lookahead_fused import EMA, Lookahead

# ------------------------------------------------------------------------------------------------------------
# the two modes


@of_each
def test_in_and_out(backend: BackendCase, make: Make, dtype: torch.dtype) -> None:
    """phi after eval(), theta after train(), at the same addresses; twice is once, and the run does not notice."""
    optimizer, params = begun(make, backend, dtype)
    theta, phi = values_of(params), slow_weights_of(optimizer, params)
    before, hooks = snapshot(optimizer, params), hooks_of(optimizer)
    places = [t.data_ptr() for t in (*params, *tensors_of(optimizer.state_dict()))]
    for times in (1, 2):
        for _ in range(times):
            assert optimizer.eval() is None
            assert_hold(params, phi)
        for _ in range(times):
            assert optimizer.train() is None
            assert_hold(params, theta)
        assert_unchanged(before, snapshot(optimizer, params))
    assert places == [t.data_ptr() for t in (*params, *tensors_of(optimizer.state_dict()))]
    assert hooks_of(optimizer) == hooks
    twin, twin_params = begun(make, backend, dtype)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


@of_few
def test_nested(backend: BackendCase, name: str) -> None:
    """Whatever is still open keeps phi in place: what ends last brings theta back."""
    optimizer, params = begun(MAKERS[name], backend)
    theta, phi = values_of(params), slow_weights_of(optimizer, params)
    before = snapshot(optimizer, params)
    optimizer.eval()
    with optimizer.slow_weights():
        assert_hold(params, phi)
        optimizer.eval()
    assert_hold(params, phi)
    with pytest.raises(ValueError, match="inner"), optimizer.slow_weights():
        raise ValueError("inner")
    assert_hold(params, phi)
    with optimizer.slow_weights():
        optimizer.train()
        assert_hold(params, phi)
        optimizer.train()
        assert_hold(params, phi)
        with pytest.raises(RuntimeError, match=r"slow_weights\(\): leave the block"):
            optimizer.step()
    assert_hold(params, theta)
    with optimizer.slow_weights():
        optimizer.eval()
        assert_hold(params, phi)
    assert_hold(params, phi)
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))
    advance(optimizer, params[:-1], [CUT])


@of_few
def test_what_is_refused(backend: BackendCase, name: str) -> None:
    """A step, a sync, a copy: with what to do about it, and nothing has changed."""
    optimizer, params = begun(MAKERS[name], backend)
    before = snapshot(optimizer, params)
    calls: list[int] = []
    optimizer.eval()
    inside = snapshot(optimizer, params)
    refused = [
        (optimizer.step, "step"),
        (lambda: optimizer.step(lambda: calls.append(1)), "step"),
        (lambda: copy.copy(optimizer), "copying"),
        (lambda: copy.deepcopy(optimizer), "copying"),
        (lambda: pickle.dumps(optimizer), "pickling"),
    ]
    if hasattr(optimizer, "sync"):
        refused.append((optimizer.sync, "sync"))
    for call, what in refused:
        with pytest.raises(RuntimeError, match=rf"{what}.*call train\(\) first"):
            call()
    assert_unchanged(inside, snapshot(optimizer, params))
    with optimizer.slow_weights(), pytest.raises(RuntimeError, match=r"load_state_dict.*leave the block first"):
        optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(inside, snapshot(optimizer, params))
    assert not calls
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))
    copy.deepcopy(optimizer)
    optimizer.step()


@of_few
def test_a_scaled_step_is_refused(backend: BackendCase, name: str) -> None:
    """By whichever way the scaler calls for it; after train() it is made."""
    optimizer, params = begun(MAKERS[name], backend)
    twin, twin_params = begun(MAKERS[name], backend)
    scaler = torch.amp.GradScaler(backend.device, init_scale=4.0)
    scaler.scale(torch.ones((), device=backend.device))
    for p, q, g in zip(params, twin_params, gradients_of(CUT, params), strict=True):
        p.grad, q.grad = 4 * g, g
    optimizer.eval()
    inside = snapshot(optimizer, params)["params"]
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        scaler.step(optimizer)
    assert_unchanged(inside, snapshot(optimizer, params)["params"])
    optimizer.train()
    scaler.step(optimizer)
    twin.step()
    assert_hold(params, values_of(twin_params))


def test_nothing_to_swap(backend: BackendCase) -> None:
    """Before the first step, and before an average begins: the modes are on and off, and nothing else changes."""
    start = EMA(torch.optim.AdamW(fresh(backend), lr=0.1), 0.5, start=9, backend=backend.name)
    for optimizer, steps in ((MAKERS["adamw"](fresh(backend), backend), 0), (start, 3)):
        params = optimizer.param_groups[0]["params"]
        advance(optimizer, params, range(steps))
        before, saved = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
        optimizer.eval()
        assert_unchanged(before, snapshot(optimizer))
        assert_unchanged(saved, optimizer.state_dict())
        with pytest.raises(RuntimeError, match=r"call train\(\) first"):
            optimizer.step()
        optimizer.train()
        assert_unchanged(before, snapshot(optimizer))
        advance(optimizer, params, [steps])


def test_a_group_added_while_evaluating(backend: BackendCase) -> None:
    optimizer, params = begun(MAKERS["adamw"], backend)
    theta = values_of(params)
    optimizer.eval()
    late = copies(params[:1])
    start = late[0].detach().clone()
    optimizer.add_param_group({"params": late})
    saved = optimizer.state_dict()
    assert [i for i, own in saved["state"].items() if "train_param" in own] == [0, 1, 2, 3]
    optimizer.train()
    assert_hold([*params, *late], [*theta, start])
    advance(optimizer, [*params, *late], [CUT])
    assert optimizer.state[late[0]]["step"].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@of_few
def test_memory_that_moves_meanwhile(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    """As in a block, theta comes back to where the parameter lies by now."""
    optimizer, params = begun(MAKERS[name], backend, dtype)
    before = snapshot(optimizer, params)
    optimizer.eval()
    for p in params:
        p.data = p.data.clone()
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_an_inference_mode_that_ends_earlier(
    backend: BackendCase, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaving needs outlives it: torch refuses to write into a tensor that was made in one."""
    optimizer, params = begun(MAKERS["adamw"], backend, dtype)
    before = snapshot(optimizer, params)
    if not native:
        monkeypatch.setattr("lookahead_fused._swap._lie_in_memory", lambda theta, phi: False)
    with torch.inference_mode():
        optimizer.eval()
        saved = optimizer.state_dict()
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer, params))
    twin_params = copies(params)
    twin = MAKERS["adamw"](twin_params, backend)
    with torch.inference_mode():
        twin.load_state_dict(saved)
    twin.train()
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(CUT, END))
    assert_same_run(optimizer, twin)


@of_few
def test_a_ctrl_c_at_any_moment(backend: BackendCase, name: str) -> None:
    """The mode is on or off, and the parameters are what it says."""
    optimizer, params = begun(MAKERS[name], backend)
    theta, phi = values_of(params), slow_weights_of(optimizer, params)
    before = snapshot(optimizer, params)

    def check(ended: bool) -> None:
        assert_hold(params, phi if optimizer._evaluating else theta)
        optimizer.train()
        assert_unchanged(before, snapshot(optimizer, params))

    def to_and_fro() -> None:
        optimizer.eval()
        optimizer.train()

    at_all_moments(optimizer.eval, check, 60)
    at_all_moments(to_and_fro, check, 60)


# ------------------------------------------------------------------------------------------------------------
# bases with modes of their own


class WithModes(UnfusedRMSprop):
    """What a schedule-free optimizer does: it evaluates on other weights, which it makes of those that it trains. Here
    a power of two lies between them, so that no bit is lost."""

    def __init__(self, params: Any, **hyper: Any) -> None:
        super().__init__(params, **hyper)
        self.calls: list[str] = []
        self.fails = False

    def _change(self, call: str, training: bool, factor: float) -> None:
        self.calls.append(call)
        if self.fails:
            raise MemoryError("none left")
        for group in self.param_groups:
            if group.get("training", True) != training:
                group["training"] = training
                with torch.no_grad():
                    for p in group["params"]:
                        p.mul_(factor)

    def eval(self) -> str:
        self._change("eval", False, 0.25)
        return "the base's"

    def train(self) -> str:
        self._change("train", True, 4.0)
        return "the base's"

    def step(self, closure: Any = None) -> Any:
        assert all(group.get("training", True) for group in self.param_groups)
        return super().step(closure)


WITH_MODES: dict[str, Make] = {
    "lookahead": lambda params, b: Lookahead(WithModes(params, lr=0.1), 5, 0.3, backend=b.name),
    "ema": lambda params, b: EMA(WithModes(params, lr=0.1), 0.7, backend=b.name),
}
of_modes = pytest.mark.parametrize("name", WITH_MODES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@both_dtypes
@of_modes
def test_a_base_with_modes(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    """It is told first and told last, each time, and changes the weights that it trains, whatever is open."""
    optimizer, params = begun(WITH_MODES[name], backend, dtype)
    base = optimizer.base_optimizer
    theta, phi = values_of(params[:-1]), slow_weights_of(optimizer, params)[:-1]
    for _ in range(2):
        assert optimizer.eval() is None
        assert_hold(params[:-1], phi)
    for _ in range(2):
        assert optimizer.train() is None
        assert_hold(params[:-1], theta)
    assert base.calls == ["eval", "eval", "train", "train"]
    for eval_inside, train_inside in ((True, False), (False, True), (True, True)):
        with optimizer.slow_weights() if eval_inside else contextlib.nullcontext():
            optimizer.eval()
            assert_hold(params[:-1], phi)
        assert_hold(params[:-1], phi)
        with optimizer.slow_weights() if train_inside else contextlib.nullcontext():
            optimizer.train()
            assert_hold(params[:-1], phi if train_inside else theta)
        assert_hold(params[:-1], theta)
    with optimizer.slow_weights():
        optimizer.eval()
        optimizer.train()
    assert_hold(params[:-1], theta)
    twin, twin_params = begun(WITH_MODES[name], backend, dtype)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        o.train()
        advance(o, ps[:-1], range(CUT, END))
    assert_hold(params[:-1], values_of(twin_params[:-1]))


@both_dtypes
@of_modes
def test_a_base_with_modes_resumes(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    """Its mode stands in its groups, and the training weights that are saved are those of that mode."""
    optimizer, params = begun(WITH_MODES[name], backend, dtype)
    optimizer.eval()
    weights, saved = through_a_file((params, optimizer.state_dict()))
    assert_unchanged(saved["state"][0]["train_param"] * 4, begun(WITH_MODES[name], backend, dtype)[1][0].detach())
    twin_params = copies(weights)
    twin = WITH_MODES[name](twin_params, backend)
    # What is loaded in an inference mode outlives it, and nobody else's tensors are written into.
    copied = copy.deepcopy(saved)
    with torch.inference_mode():
        twin.load_state_dict(copied)
    twin.eval()
    assert_unchanged(saved, copied)
    for value in tensors_of(copied):
        value.zero_()
    assert_hold(twin_params[:-1], weights[:-1])
    for o, ps in ((optimizer, params), (twin, twin_params)):
        o.train()
        advance(o, ps[:-1], range(CUT, END))
    assert_hold(params[:-1], values_of(twin_params[:-1]))
    assert_unchanged(optimizer.state_dict(), twin.state_dict())


@of_modes
def test_a_change_of_mode_that_fails(backend: BackendCase, name: str) -> None:
    """The base's fails: ours has not changed. Ours fails: the base is back in its own."""
    optimizer, params = begun(WITH_MODES[name], backend)
    base, before = optimizer.base_optimizer, snapshot(optimizer, params)
    base.fails = True
    with pytest.raises(MemoryError):
        optimizer.eval()
    base.fails = False
    assert_unchanged(before, snapshot(optimizer, params))
    slow = optimizer.state[params[1]]["slow_param"]
    optimizer.state[params[1]]["slow_param"] = torch.ones(2)
    with pytest.raises(ValueError, match="slow_param"):
        optimizer.eval()
    assert base.calls == ["eval", "eval", "train"]
    optimizer.state[params[1]]["slow_param"] = slow
    assert_hold(params, before["params"])
    advance(optimizer, params[:-1], [CUT])
