"""Loss scaling: gradients are read scaled and unscaled on the way; a step that found inf never happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    DTYPE_NAMES,
    BackendCase,
    Lockstep,
    UnfusedRMSprop,
    assert_unchanged,
    make_grads,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    snapshot,
)

import lookahead_fused

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 2},
    "adam": {"lr": 0.1, "weight_decay": 0.1, "maximize": True, "pullback_momentum": "reset", "k": 3},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "pullback_momentum": "pullback", "k": 2},
    "wrapped-adamw": {"lr": 0.1, "weight_decay": 0.1, "pullback_momentum": "pullback", "k": 2},
    "wrapped-sgd": {"lr": 0.1, "momentum": 0.9, "k": 2},
}
SKIPS = (1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0)  # the very first step among them


def tell(optimizer: torch.optim.Optimizer, device: str, *, found_inf: float | None, scale: float | None) -> None:
    """What GradScaler tells an optimizer that unscales by itself: two attributes, for one step."""
    for name, value in (("found_inf", found_inf), ("grad_scale", scale)):
        setattr(optimizer, name, None if value is None else torch.full((), value, device=device))


def spoil(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    for i, g in enumerate(grads):
        if g.numel() > 0:
            g.view(-1)[0] = (float("inf"), float("nan"), 1e4)[i % 3]
    return grads


@pytest.mark.parametrize(
    ("rule", "dtype"),
    # The dtypes of a wrapped base's 16-bit state are torch's business.
    [(r, d) for r in RULES for d in DTYPE_NAMES if d.itemsize > 2 or not r.startswith("wrapped")],
)
def test_found_inf_holds_everything_back(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """Nothing changes, nothing is created: not in the first step, not before a sync, not after one."""
    params = make_params(dtype=dtype, device=backend.device)
    optimizer = make_optimizer(rule, params, backend, **RULES[rule])
    generator = seeded(1)
    for skip in SKIPS:
        grads = make_grads(params, generator=generator)
        for p, g in zip(params, spoil(grads) if skip else grads, strict=True):
            p.grad = g
        tell(optimizer, backend.device, found_inf=float(skip), scale=8.0)
        before = snapshot(optimizer)
        optimizer.step()
        if skip:
            assert_unchanged(before, snapshot(optimizer))
        else:
            assert all(optimizer.state[p] for p in params)


@pytest.mark.parametrize("found_inf", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_found_inf_may_count_devices(
    backend: BackendCase, found_inf: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """GradScaler adds it up over devices: anything but 0 holds. Others make the two tensors of shape (1,),
    or of another dtype, whose bits must not be read as fp32."""
    (p,) = make_params([(5,)], device=backend.device)
    optimizer = make_optimizer("sgd", [p], backend, lr=1.0, k=100)
    start = p.detach().clone()
    p.grad = torch.full_like(p, 4.0)
    optimizer.grad_scale = torch.full(shape, 8, device=backend.device, dtype=dtype)
    optimizer.found_inf = torch.full(shape, int(found_inf), device=backend.device, dtype=dtype)
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(before, snapshot(optimizer))
    optimizer.found_inf.zero_()
    optimizer.step()
    assert torch.equal(p, start - 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_phi_is_taken_in_the_first_step_that_counts(backend: BackendCase, rule: str) -> None:
    """Weights loaded after a skipped step are the start: a phi from the skipped one would pull to the old."""
    pair = Lockstep(backend, rule, **RULES[rule])
    tell(pair.optimizer, backend.device, found_inf=1.0, scale=None)
    for p, oracle in zip(pair.params, pair.oracles, strict=True):
        p.grad = torch.full_like(p, float("inf"))
        oracle.param = oracle.param * 4
    pair.optimizer.step()
    with torch.no_grad():
        for p in pair.params:
            p.mul_(4)
    tell(pair.optimizer, backend.device, found_inf=0.0, scale=None)
    for _ in range(4):
        pair.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [65536.0, 3.0, 2.0**-3])
def test_gradients_are_unscaled_once_and_not_written(backend: BackendCase, rule: str, scale: float) -> None:
    """By one multiplication with the rounded reciprocal, in registers."""
    pair = Lockstep(backend, rule, **RULES[rule])
    for _ in range(5):
        tell(pair.optimizer, backend.device, found_inf=0.0, scale=scale)
        grads = make_grads(pair.params, generator=pair.generator, scale=scale)
        copies = [g.clone() for g in grads]
        pair.step(grads, grad_scale=scale)
        for g, c in zip(grads, copies, strict=True):
            assert same_tensor_bits(g, c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_unscaled_in_fp32(backend: BackendCase, dtype: torch.dtype) -> None:
    """Unscaled in 16 bits, the small ones would vanish."""
    pair = Lockstep(backend, "adamw", dtype=dtype, lr=0.1, k=2, master_weights=True)
    for _ in range(4):
        tell(pair.optimizer, backend.device, found_inf=0.0, scale=2.0**24)
        pair.step(grad_scale=2.0**24)


def test_the_scale_is_for_one_step(backend: BackendCase) -> None:
    """GradScaler deletes both attributes: a step without them is one without a scale."""
    pair = Lockstep(backend, "adamw", k=2)
    for scale in (4.0, None, 16.0, None):
        if scale is None:
            del pair.optimizer.grad_scale, pair.optimizer.found_inf
            pair.step()
        else:
            tell(pair.optimizer, backend.device, found_inf=0.0, scale=scale)
            pair.step(grad_scale=scale)
    tell(pair.optimizer, backend.device, found_inf=None, scale=None)
    pair.step()
    tell(pair.optimizer, backend.device, found_inf=None, scale=2.0)
    pair.step(grad_scale=2.0)


# ------------------------------------------------------------------------------------------------------------
# with torch's GradScaler


class Training:
    """A linear model under GradScaler; `poison` makes the loss infinite, `unscale` clips in between."""

    def __init__(self, rule: str, backend: BackendCase, *, scaled: bool = True) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 3).to(backend.device)
        self.optimizer = self.make_optimizer(rule, backend)
        # Around a base without a scaled step it is the scaler that unscales the gradients, and that skips.
        self.reads_scaled = rule != "wrapped-external"
        # It backs off by halves and never grows: two scales unscale to the same bits.
        self.scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**16, growth_interval=10**6, enabled=scaled)
        self.device = backend.device

    def make_optimizer(self, rule: str, backend: BackendCase) -> torch.optim.Optimizer:
        params = list(self.model.parameters())
        if rule == "wrapped-external":
            base = UnfusedRMSprop(params, lr=0.01, momentum=0.5)
            return lookahead_fused.Lookahead(base, k=2, backend=backend.name)
        return make_optimizer(rule, params, backend, **RULES[rule])

    def step(self, t: int, *, poison: bool = False, unscale: bool = False) -> None:
        x = torch.randn(4, 6, generator=seeded(t)).to(self.device)
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        if poison:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        grads = [p.grad.clone() for p in self.model.parameters()]
        self.scaler.step(self.optimizer)
        if self.reads_scaled:
            for p, g in zip(self.model.parameters(), grads, strict=True):
                assert same_tensor_bits(p.grad, g), "the step wrote a gradient"
        self.scaler.update()


def without_identity(taken: dict[str, Any]) -> dict[str, Any]:
    """A snapshot without what differs between two runs that are the same, or what the scaler may write."""
    return {name: value for name, value in taken.items() if name not in ("members", "grads")}


@pytest.mark.parametrize("rule", [*RULES, "wrapped-external"])
@pytest.mark.parametrize("unscale", [False, True])
def test_skipped_steps_leave_no_trace(backend: BackendCase, rule: str, unscale: bool) -> None:
    """A run with infinities is, to the bit, the run without those steps; and each of them changes nothing."""
    runs = []
    for skips in (SKIPS, [0] * len(SKIPS)):
        training = Training(rule, backend)
        for t, (skip, left_out) in enumerate(zip(skips, SKIPS, strict=True)):
            if left_out and not skip:
                continue
            before = without_identity(snapshot(training.optimizer))
            training.step(t, poison=bool(skip), unscale=unscale)
            if skip:
                assert_unchanged(before, without_identity(snapshot(training.optimizer)))
        runs.append(without_identity(snapshot(training.optimizer)))
    with_skips, without = runs
    assert_unchanged(without, with_skips)
    assert all(with_skips["state"]), "nothing was stepped: proves nothing"


@pytest.mark.parametrize("rule", [*RULES, "wrapped-external"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaled_run_is_the_unscaled_run(backend: BackendCase, rule: str, unscale: bool) -> None:
    """The scale is a power of two: scaled and unscaled, nothing is rounded otherwise."""
    scaled, plain = Training(rule, backend), Training(rule, backend, scaled=False)
    for t in range(6):
        scaled.step(t, unscale=unscale)
        plain.step(t, unscale=unscale)
        for p, q in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
            assert same_tensor_bits(p, q)


def test_a_poisoned_step_is_poison_without_a_scaler(backend: BackendCase) -> None:
    """The tests above prove something: without a scaler the same step reaches the weights."""
    training = Training("adamw", backend, scaled=False)
    training.step(0, poison=True)
    assert not all(p.isfinite().all() for p in training.model.parameters())
