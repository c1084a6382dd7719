"""Who unscales: the step, in registers, or the scaler before it, so that gradients may be clipped in between. Trainers
refuse to clip for an optimizer that unscales itself; fused=False is the door, as of torch's own classes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LOOKAHEAD_CLASSES, TORCH_CLASSES, BackendCase, UnfusedRMSprop, seeded
from runs import through_a_file

from lookahead_fused import Lookahead

SCALE = 2.0**10


def make(form: str, params: Any, fused: bool | None, backend: str = "auto") -> torch.optim.Optimizer:
    """A class, or "wrapped-" and the wrapper around torch's: there it is the base's own argument."""
    hyper: dict[str, Any] = {"lr": 0.1} if "adam" in form else {"lr": 0.1, "momentum": 0.9}
    if form.startswith("wrapped-"):
        base = TORCH_CLASSES[form.removeprefix("wrapped-")](params, **hyper, fused=fused)
        return Lookahead(base, k=2, backend=backend)
    return LOOKAHEAD_CLASSES[form](params, **hyper, fused=fused, k=2, backend=backend)


# Those whose class in torch has an argument `fused`.
RULES = ("adamw", "adam", "sgd")
FORMS = [*RULES, *(f"wrapped-{rule}" for rule in RULES)]


def unscales_itself(optimizer: torch.optim.Optimizer) -> bool:
    """As GradScaler asks, and as Lightning's plugin for mixed precision does."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def clipped_steps(form: str, fused: bool | None, backend: BackendCase, scaled: bool) -> list[torch.Tensor]:
    """Weights after some steps under fp16 autocast whose gradients are clipped, with or without a scaler."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).to(backend.device)
    optimizer = make(form, model.parameters(), fused, backend.name)
    scaler = torch.amp.GradScaler(backend.device, init_scale=SCALE, growth_interval=10**6, enabled=scaled)
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=seeded(step)).to(backend.device)
        with torch.autocast(backend.device, dtype=torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        if not (scaled and unscales_itself(optimizer)):
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert norm > 0.02, "nothing to clip: proves nothing"
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_clipped_in_between(backend: BackendCase, form: str) -> None:
    """The run without a scaler, to fp16's roundings. A scaler that left unscaling to the step would have had the scaled
    gradients clipped, a thousand times too far."""
    for scaled, plain in zip(
        clipped_steps(form, False, backend, True), clipped_steps(form, False, backend, False), strict=True
    ):
        torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_scaler_unscales_before_the_step(backend: BackendCase, form: str) -> None:
    """`scaler.step` alone: the gradients that it leaves tell who unscaled; the step is the same."""
    ends = []
    for fused in (False, None, True):
        p = torch.nn.Parameter(torch.ones(4, device=backend.device))
        optimizer = make(form, [p], fused, backend.name)
        scaler = torch.amp.GradScaler(backend.device, init_scale=SCALE)
        scaler.scale((p * torch.arange(4.0, device=backend.device)).sum()).backward()
        scaler.step(optimizer)
        assert p.grad is not None
        assert p.grad[1].item() == (1.0 if fused is False else SCALE)
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_every_class_takes_it() -> None:
    for cls in LOOKAHEAD_CLASSES.values():
        assert inspect.signature(cls).parameters["fused"].default is None
        with pytest.raises(TypeError, match="fused must be True, False or None, got 'no'"):
            cls([torch.nn.Parameter(torch.ones(1))], fused="no")


def by_pickle(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


def by_a_file(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_its_own_checkpoint(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    return optimizer


WAYS: list[Callable[[torch.optim.Optimizer], torch.optim.Optimizer]] = [
    copy.deepcopy,
    by_pickle,
    by_a_file,
    by_its_own_checkpoint,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 2])
def test_it_survives(form: str, way: Callable, steps: int) -> None:
    for fused in (False, None, True):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = make(form, [p], fused)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert unscales_itself(optimizer) == (fused is not False)
        moved = way(optimizer)
        assert unscales_itself(moved) == (fused is not False)
        assert unscales_itself(way(moved)) == (fused is not False)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("theirs", [None, False])
def test_a_classes_choice_is_not_a_checkpoints(rule: str, theirs: bool | None) -> None:
    """It stands in no state dict: one of a class with another choice, or of torch's, leaves it as its user made it."""
    p = torch.nn.Parameter(torch.ones(4))
    for other in (make(rule, [p], theirs), make(f"wrapped-{rule}", [p], theirs).base_optimizer):
        p.grad = torch.ones_like(p)
        other.step()
        for ours in (False, None):
            optimizer = make(rule, [p], ours)
            optimizer.load_state_dict(through_a_file(other.state_dict()))
            assert unscales_itself(optimizer) == (ours is None)
            assert all("fused" not in group for group in optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("rule", RULES)
def test_the_wrapper_asks_its_base(rule: str) -> None:
    """In every step anew: the base's groups say it, one of them is enough, and a loaded checkpoint may change it, as it
    does for the base. A checkpoint of ours says nothing of it, and changes nothing."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = make(f"wrapped-{rule}", [{"params": params[:1]}, {"params": params[1:]}], None)
    assert unscales_itself(optimizer)
    optimizer.base_optimizer.param_groups[1]["fused"] = False
    assert not unscales_itself(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    ours = make(rule, [{"params": params[:1]}, {"params": params[1:]}], None)
    ours.step()
    optimizer.load_state_dict(through_a_file(ours.state_dict()))
    assert not unscales_itself(optimizer)
    optimizer.base_optimizer.param_groups[1]["fused"] = None
    assert unscales_itself(optimizer)


def test_a_base_of_its_own_says_it_itself() -> None:
    """Around a base that is not fused it is the base that steps, and that says whether it unscales."""

    class Unscales(torch.optim.RMSprop):
        _step_supports_amp_scaling = True

    p = torch.nn.Parameter(torch.ones(4))
    assert not unscales_itself(Lookahead(UnfusedRMSprop([p])))
    assert unscales_itself(Lookahead(Unscales([p])))
