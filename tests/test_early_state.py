"""Bases that make their state before the first step, as torch's Adagrad does. What a wrapper keeps beside it must have
its place there from the start, or a checkpoint's template has none for it; and it begins with the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BackendCase, UnfusedRMSprop, assert_unchanged, make_params, same_tensor_bits, seeded
from releases import is_torch
from runs import advance, assert_same_run, copies, through_a_file

from lookahead_fused import Lookahead


class Momentum(torch.optim.Optimizer):
    """A user's own, without a step count. `early` says of which parameters it makes the state at construction."""

    early = (0, 1, 2, 3, 4)

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: Any) -> None:
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if i in self.early:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.mul_(0.9).add_(p.grad)
                    p.sub_(buffer, alpha=group["lr"])
        return loss


class OfSome(Momentum):
    early = (1,)


BASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Adagrad": (lambda params: torch.optim.Adagrad(params, lr=0.1), "none"),
    "a user's own": (Momentum, "none"),
    "a user's own, pulled back": (Momentum, "pullback"),
    "of some parameters": (OfSome, "reset"),
    "UnfusedRMSprop": (lambda params: UnfusedRMSprop(params, lr=0.1, momentum=0.9), "pullback"),
}
of_each_base = pytest.mark.parametrize("name", BASES)
early_bases = pytest.mark.parametrize("name", [name for name in BASES if name != "UnfusedRMSprop"])
OURS = ("slow_param", "cached_momentum", "lookahead_step")


def wrap(name: str, params: Any, backend: BackendCase) -> Lookahead:
    make, mode = BASES[name]
    return Lookahead(make(params), 3, 0.3, mode, backend=backend.name)  # type: ignore[arg-type]


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=seeded(step))).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


# Of a base that makes a part of its state early torch's template lacks the rest, which is the base's own loss.
@pytest.mark.parametrize("name", [name for name in BASES if name != "of some parameters"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("steps", [0, 3, 4, 5])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_through_files_of_torchs(backend: BackendCase, name: str, flat: bool, steps: int, tmp_path: Path) -> None:
    """By the book: a fresh optimizer's state dict is the template that torch.distributed.checkpoint fills. What has no
    place in it is left in the file, and nobody is told."""
    if backend.device != "cpu":
        pytest.skip("the model is on the CPU")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, again = make_model(), make_model(1)
    optimizer, resumed = wrap(name, model.parameters(), backend), wrap(name, again.parameters(), backend)
    train(model, optimizer, range(steps))

    def both(m: torch.nn.Module, o: Any) -> dict[str, Any]:
        return {"model": sd.get_model_state_dict(m), "optim": sd.get_optimizer_state_dict(m, o, options=options)}

    dcp.save(both(model, optimizer), checkpoint_id=tmp_path)
    template = both(again, resumed)
    dcp.load(template, checkpoint_id=tmp_path)
    sd.set_model_state_dict(again, template["model"])
    sd.set_optimizer_state_dict(again, resumed, template["optim"], options=options)
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(steps, steps + 7))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert same_tensor_bits(p, q)
        assert_unchanged(dict(optimizer.state[p]), dict(resumed.state[q]))


@of_each_base
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("into", ["a fresh one", "one that has stepped", "its base"])
def test_through_a_state_dict(backend: BackendCase, name: str, steps: int, into: str) -> None:
    params = make_params([(4, 3), (5,)], device=backend.device)
    optimizer = wrap(name, params, backend)
    advance(optimizer, params, range(steps))
    saved = through_a_file(optimizer.state_dict())
    twin_params = copies(params)
    resumed = wrap(name, twin_params, backend)
    if into == "one that has stepped":
        advance(resumed, twin_params, range(100, 105))
        with torch.no_grad():
            for p, q in zip(twin_params, params, strict=True):
                p.copy_(q)
    (resumed.base_optimizer if into == "its base" else resumed).load_state_dict(saved)
    for o, ps in ((optimizer, params), (resumed, twin_params)):
        advance(o, ps, range(steps, steps + 7))
    assert_same_run(optimizer, resumed)


@early_bases
def test_a_checkpoint_of_the_base_alone(backend: BackendCase, name: str) -> None:
    """Slow weights start at the next step, where the weights are then; not where they were at construction."""
    donor_params = make_params([(4, 3), (5,)], device=backend.device)
    donor = BASES[name][0](donor_params)
    advance(donor, donor_params, range(4))
    params = make_params([(4, 3), (5,)], seed=1, device=backend.device)
    optimizer = wrap(name, params, backend)
    optimizer.load_state_dict(through_a_file(donor.state_dict()))
    with torch.no_grad():
        for p, q in zip(params, donor_params, strict=True):
            p.copy_(q)
    twin_params = copies(params)
    twin = BASES[name][0](twin_params)
    twin.load_state_dict(through_a_file(donor.state_dict()))
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(4, 6))
    for p, q, start in zip(params, twin_params, donor_params, strict=True):
        assert same_tensor_bits(p, q)
        assert same_tensor_bits(optimizer.state[p]["slow_param"], start)
        assert optimizer.state[p]["lookahead_step"].item() == 2


@of_each_base
@pytest.mark.parametrize("how", ["weights are loaded", "skipped by a scaler", "added by a group", "added to the base"])
def test_nothing_begins_before_the_first_step(backend: BackendCase, name: str, how: str) -> None:
    """phi_0 is theta before the first step that is made, whatever was there at construction, and counts from it."""
    if name == "Adagrad" and how.startswith("added") and not is_torch("2.13"):
        pytest.skip("before torch 2.13 Adagrad could not step what was added to it")
    params = make_params([(4, 3), (5,)], device=backend.device)
    optimizer = wrap(name, params[:1] if how.startswith("added") else params, backend)
    if how == "added by a group":
        optimizer.add_param_group({"params": params[1:]})
    elif how == "added to the base":
        optimizer.base_optimizer.add_param_group({"params": params[1:]})
    if how == "weights are loaded":
        with torch.no_grad():
            for p in params:
                p.add_(1)
    before = [p.detach().clone() for p in params]
    optimizer.state_dict()
    optimizer.sync()
    with optimizer.slow_weights():
        assert_unchanged(before, [p.detach() for p in params])
    assert_unchanged(before, [p.detach() for p in params])
    if how == "skipped by a scaler":
        scaler = torch.amp.GradScaler(backend.device, init_scale=4.0)
        for p in params:
            p.grad = torch.full_like(p, float("inf"))
        scaler.scale(torch.ones((), device=backend.device))
        scaler.step(optimizer)
        scaler.update()
        assert_unchanged(before, [p.detach() for p in params])
    start = [p.detach().clone() for p in params]
    fresh_params = copies(params)
    fresh = wrap(name, [{"params": fresh_params[:1]}, {"params": fresh_params[1:]}], backend)
    advance(optimizer, params, range(2))
    advance(fresh, fresh_params, range(2))
    for p, q, theta in zip(params, fresh_params, start, strict=True):
        assert same_tensor_bits(optimizer.state[p]["slow_param"], theta)
        assert same_tensor_bits(p, q)
        for key in OURS:
            if key in fresh.state[q]:
                assert same_tensor_bits(optimizer.state[p][key], fresh.state[q][key]), key
    for o, ps in ((optimizer, params), (fresh, fresh_params)):
        advance(o, ps, range(2, 8))
    for p, q in zip(params, fresh_params, strict=True):
        assert same_tensor_bits(p, q)


@early_bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_dtype(backend: BackendCase, name: str, dtype: torch.dtype) -> None:
    params = make_params([(4, 3), (5,)], dtype, device=backend.device)
    optimizer = wrap(name, params, backend)
    fresh_params = copies(params)
    resumed = wrap(name, fresh_params, backend)
    advance(optimizer, params, range(4))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(fresh_params, params, strict=True):
            p.copy_(q)
    for o, ps in ((optimizer, params), (resumed, fresh_params)):
        advance(o, ps, range(4, 8))
    assert_same_run(optimizer, resumed)
