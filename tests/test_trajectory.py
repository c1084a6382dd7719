"""What Lookahead is: the paper's trajectory, its limits in k and alpha, and its noisy quadratic model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    Lockstep,
    make_grads,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    to_numpy,
)

import lookahead_fused

PAPER_FAST = [1, 2, 1.5, 2.5, 3.5, 3, 4, 5, 4.5]
PAPER_SLOW = [0, 0, 1.5, 1.5, 1.5, 3, 3, 3, 4.5]
NEVER = 10**12
LIVELY = {
    "adamw": {"lr": 0.05, "weight_decay": 0.1},
    "adam": {"lr": 0.05, "weight_decay": 0.1},
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
}


class PlainSGD(torch.optim.Optimizer):
    """An optimizer that torch does not know, to be wrapped."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
        return loss


def paper_optimizer(kind: str, params, backend: BackendCase) -> torch.optim.Optimizer:
    lookahead = {"k": 3, "alpha": 0.5, "backend": backend.name}
    if kind == "LookaheadSGD":
        return lookahead_fused.LookaheadSGD(params, lr=1.0, **lookahead)
    base = torch.optim.SGD(params, lr=1.0) if kind == "Lookahead(SGD)" else PlainSGD(params, lr=1.0)
    return lookahead_fused.Lookahead(base, **lookahead)


KINDS = ("LookaheadSGD", "Lookahead(SGD)", "Lookahead(PlainSGD)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_paper_trajectory(backend: BackendCase, kind: str, dtype: torch.dtype) -> None:
    """Gradient -1, lr 1, k 3, alpha 0.5 from 0. Weights set after construction are the start: those
    present at construction are not to be seen again."""
    p = torch.nn.Parameter(torch.full((3,), 100.0, dtype=dtype, device=backend.device))
    optimizer = paper_optimizer(kind, [p], backend)
    with torch.no_grad():
        p.zero_()
    for fast, slow in zip(PAPER_FAST, PAPER_SLOW, strict=True):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        assert p.tolist() == [fast] * 3
        assert optimizer.state[p]["slow_param"].tolist() == [slow] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_its_own_phase(backend: BackendCase, kind: str) -> None:
    """One starts late, one rests in between: each walks the paper's trajectory at its own pace, and its
    start is where it is when it starts."""
    params = [torch.nn.Parameter(torch.zeros(2, device=backend.device)) for _ in range(3)]
    optimizer = paper_optimizer(kind, params, backend)
    awake = [[1] * 13, [0, 0] + [1] * 11, [1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1]]
    walked = [0, 0, 0]
    for t in range(13):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, -1.0) if awake[i][t] and walked[i] < 9 else None
            walked[i] += p.grad is not None
        optimizer.step()
        for p, n in zip(params, walked, strict=True):
            assert p.tolist() == [PAPER_FAST[n - 1] if n else 0] * 2
            if n == 0:
                assert not optimizer.state.get(p)
            else:
                assert optimizer.state[p]["slow_param"].tolist() == [PAPER_SLOW[n - 1]] * 2


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("limits", [{"k": 1, "alpha": 1.0}, {"k": 3, "alpha": 1.0}, {"k": 2**31 + 1, "alpha": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_limits_are_the_inner_optimizer(backend: BackendCase, rule: str, limits: dict, dtype: torch.dtype) -> None:
    """alpha 1 at any k, and a k that never comes, are the same bits. The gradients make theta far from
    phi, where phi + 1 * (theta - phi) is not theta."""
    results = []
    for lookahead in (limits, {"k": NEVER, "alpha": 0.5}):
        params = make_params(dtype=dtype, device=backend.device)
        optimizer = make_optimizer(rule, params, backend, **LIVELY[rule], **lookahead)
        generator = seeded(1)
        for _ in range(7):
            for p, g in zip(params, make_grads(params, generator=generator, scale=30.0), strict=True):
                p.grad = g
            optimizer.step()
        results.append(params)
    for ours, inner in zip(*results, strict=True):
        assert same_tensor_bits(ours, inner)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("lookahead", [{"k": 1, "alpha": 1.0}, {"k": NEVER}])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
def test_limits_are_torchs_optimizer(
    backend: BackendCase, rule: str, lookahead: dict, dtype: torch.dtype, rtol: float
) -> None:
    ours, theirs = (make_params([(40,), (3, 7)], dtype, device=backend.device) for _ in range(2))
    optimizer = make_optimizer(rule, ours, backend, **LIVELY[rule], **lookahead)
    reference = TORCH_CLASSES[rule](theirs, **LIVELY[rule], foreach=False)
    generator = seeded(1)
    for _ in range(7):
        for p, q, g in zip(ours, theirs, make_grads(ours, generator=generator), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(to_numpy(p), to_numpy(q), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_alpha_zero_returns_to_the_start(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype, device=backend.device)
    start = [p.detach().clone() for p in params]
    optimizer = make_optimizer(rule, params, backend, **LIVELY[rule], k=3, alpha=0.0)
    generator = seeded(1)
    for t in range(1, 10):
        for p, g in zip(params, make_grads(params, generator=generator), strict=True):
            p.grad = g
        optimizer.step()
        for p, s in zip(params, start, strict=True):
            assert same_tensor_bits(p, s) == (t % 3 == 0 or p.numel() == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_one_leaves_theta_where_arithmetic_would_not(backend: BackendCase, kind: str, dtype: torch.dtype) -> None:
    """Far from phi, theta - phi has lost theta's digits: phi + (theta - phi) is not theta."""
    p = torch.nn.Parameter(torch.full((5,), 1e8, dtype=dtype, device=backend.device))
    optimizer = paper_optimizer(kind, [p], backend)
    for group in optimizer.param_groups:
        name = "k" if "k" in group else "lookahead_k"
        group[name], group[name.removesuffix("k") + "alpha"] = 1, 1.0
    for value in (1e8, math.pi * 2**-20, -3.3e7, 1e-30, -0.1, 1e8):
        expected = torch.full_like(p, value)
        with torch.no_grad():
            p.copy_(expected)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert same_tensor_bits(p, expected)
        assert same_tensor_bits(optimizer.state[p]["slow_param"], expected)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "wrapped-adamw", "wrapped-sgd"])
@pytest.mark.parametrize("mode", ["none", "pullback", "reset"])
def test_sync_on_demand(backend: BackendCase, rule: str, mode: str) -> None:
    """`sync()` interpolates now, moves no step, and the next periodic one comes when it would have come.
    Before the first step there is nothing to interpolate, and nothing is created."""
    hyper = {"momentum": 0.9} if rule.endswith("sgd") else {}
    pair = Lockstep(backend, rule, lr=0.1, k=3, alpha=0.4, pullback_momentum=mode, **hyper)
    pair.optimizer.sync()
    pair.check()
    for t in range(1, 9):
        pair.step()
        if t in (1, 3, 5, 6):
            pair.optimizer.sync()
            for oracle in pair.oracles:
                oracle.sync()
            pair.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
def test_sync_on_demand_in_16_bits(backend: BackendCase, dtype: torch.dtype, master: bool) -> None:
    pair = Lockstep(backend, "adamw", dtype=dtype, lr=0.1, k=4, alpha=0.3, master_weights=master)
    for t in range(1, 7):
        pair.step()
        if t in (2, 5):
            pair.optimizer.sync()
            for oracle in pair.oracles:
                oracle.sync()
            pair.check()


def test_sync_spares_parameters_without_a_step(backend: BackendCase) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, device=backend.device)) for _ in range(2))
    optimizer = lookahead_fused.LookaheadSGD([p, q], lr=1.0, backend=backend.name)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.sync()
    assert p.tolist() == [0.5] * 3
    assert q.tolist() == [1.0] * 3
    assert not optimizer.state.get(q)


def test_pullback_by_hand(backend: BackendCase) -> None:
    """m = alpha m + (1 - alpha) m_at_last_sync, from a buffer of its own. One that is the live momentum
    gives -0.9375 in the second step."""
    p = torch.nn.Parameter(torch.zeros(1, device=backend.device))
    optimizer = lookahead_fused.LookaheadSGD(
        [p], lr=1.0, momentum=0.5, k=1, alpha=0.5, pullback_momentum="pullback", backend=backend.name
    )
    seen = []
    for _ in range(3):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        seen.append((p.item(), optimizer.state[p]["momentum_buffer"].item()))
    # buf 1: -1 -> -0.5; buf 2: -1.25 -> -0.875; buf 3: -1.4375 -> -1.15625. theta: half of -buf each step.
    assert seen == [(0.5, -0.5), (1.125, -0.875), (1.84375, -1.15625)]


def test_reset_by_hand(backend: BackendCase) -> None:
    """The buffer is zero after a sync and is then a buffer at rest, not a new one: with dampening, the
    next gradient counts half."""
    p = torch.nn.Parameter(torch.zeros(1, device=backend.device))
    optimizer = lookahead_fused.LookaheadSGD(
        [p],
        lr=1.0,
        momentum=0.5,
        dampening=0.5,
        k=2,
        alpha=1.0,
        pullback_momentum="reset",
        backend=backend.name,
    )
    seen = []
    for _ in range(4):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        seen.append((p.item(), optimizer.state[p]["momentum_buffer"].item()))
    assert seen == [(1.0, -1.0), (2.0, 0.0), (2.5, -0.5), (3.25, 0.0)]


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("start", [2**24 - 1, 2**31 - 2, 2**40])
def test_step_counts_past_the_integers_of_fp32(backend: BackendCase, rule: str, start: int) -> None:
    """A counter in fp32 stands still at 2**24, one in int32 turns negative at 2**31."""
    hyper = {"momentum": 0.9} if rule == "sgd" else {"betas": (0.9, 1 - 2.0**-30)}
    pair = Lockstep(backend, rule, ([(5,)], {}), k=start + 3, alpha=0.3, lr=0.1, **hyper)
    pair.step()
    pair.optimizer.state[pair.params[0]]["step"].fill_(start)
    pair.oracles[0].step_count = start
    for _ in range(4):
        pair.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_k_and_alpha_may_change_in_the_run(backend: BackendCase, rule: str) -> None:
    hyper = {"momentum": 0.9} if rule == "sgd" else {}
    pair = Lockstep(backend, rule, lr=0.1, k=2, alpha=0.3, **hyper)
    for changes in ({}, {"k": 3}, {"alpha": 0.9}, {"k": 1}, {"k": 4, "alpha": 1.0}, {"alpha": 0.0}):
        pair.set_settings(**changes)
        for _ in range(3):
            pair.step()


def test_noisy_quadratic_model(backend: BackendCase) -> None:
    """Proposition 2: the variance that Lookahead settles at, and how fast its mean contracts. 60 000
    independent runs are the elements of one parameter: 0.6 % of noise in a variance."""
    curvature, sigma, lr, k, alpha, runs = 0.5, 2.0, 0.4, 5, 0.6, 60_000
    inner = 1 - lr * curvature

    def simulate(start: float, outer_steps: int, **lookahead) -> tuple[list[float], torch.Tensor]:
        p = torch.nn.Parameter(torch.full((runs,), start, device=backend.device))
        optimizer = lookahead_fused.LookaheadSGD([p], lr=lr, backend=backend.name, **lookahead)
        generator, means = seeded(7), []
        for _ in range(outer_steps):
            for _ in range(k):
                noise = torch.randn(runs, generator=generator).to(backend.device)
                p.grad = curvature * (p.detach() - sigma * noise)
                optimizer.step()
            means.append(p.mean().item())
        return means, p.detach()

    variance_sgd = (lr * curvature * sigma) ** 2 / (1 - inner**2)
    pulled = alpha**2 * (1 - inner ** (2 * k))
    variance = variance_sgd * pulled / (pulled + 2 * alpha * (1 - alpha) * (1 - inner**k))

    _, settled_sgd = simulate(0.0, 5, k=10**9, alpha=alpha)
    means, settled = simulate(100.0, 16, k=k, alpha=alpha)
    assert settled_sgd.var().item() == pytest.approx(variance_sgd, rel=0.03)
    assert settled.var().item() == pytest.approx(variance, rel=0.03)
    contraction = 1 - alpha + alpha * inner**k
    for previous, mean in zip([100.0, *means[:4]], means[:5], strict=True):
        assert mean / previous == pytest.approx(contraction, rel=0.01)


def test_defaults_are_torchs_and_the_papers(backend: BackendCase) -> None:
    """Without a single keyword: the oracle's defaults are written down independently."""
    for rule in LOOKAHEAD_CLASSES:
        pair = Lockstep(backend, rule)
        for _ in range(6):
            pair.step()
