"""The oracles against each other, against torch.optim and by hand: the judge is judged first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import TORCH_CLASSES, composed, oracle_settings, to_numpy
from oracle import Exact, Settings, Textbook, lerp, power, round_to, same_bits, ulps

STEPS = 11
ADAM = [
    {},
    {"lr": 0.03, "betas": (0.6, 0.8), "eps": 1e-3},
    {"weight_decay": 0.3, "lr": 0.1},
    {"amsgrad": True, "betas": (0.5, 0.6), "lr": 0.1},
    {"maximize": True, "weight_decay": 0.2, "lr": 0.05},
    {"k": 2, "alpha": 0.8, "pullback_momentum": "pullback", "lr": 0.1},
    {"k": 3, "alpha": 0.3, "pullback_momentum": "reset", "lr": 0.1},
    {"k": 2, "alpha": 1.3, "outer_momentum": 0.6, "pullback_momentum": "pullback", "lr": 0.1},
    {"betas": (0.3, 0.9), "lr": 0.1},
]
SGD = [
    {},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.7, "nesterov": True, "maximize": True, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "k": 3, "alpha": 0.7, "pullback_momentum": "pullback"},
    {"lr": 0.1, "momentum": 0.9, "k": 2, "alpha": 0.2, "pullback_momentum": "reset"},
    {"lr": 0.1, "momentum": 0.9, "k": 2, "alpha": 0.7, "outer_momentum": 0.5, "outer_nesterov": False},
]
RMSPROP = [
    {"lr": 0.1},
    {"lr": 0.1, "alpha": 0.3, "momentum": 0.8, "weight_decay": 0.2, "eps": 1e-3},
    {"lr": 0.1, "alpha": 0.7, "momentum": 0.9, "centered": True, "k": 3, "pullback_momentum": "pullback"},
    {"lr": 0.1, "centered": True, "maximize": True, "k": 2, "lookahead_alpha": 0.2},
]
RADAM = [
    {"lr": 0.1},
    {"lr": 0.1, "betas": (0.6, 0.7), "weight_decay": 0.2, "eps": 1e-3},
    {"lr": 0.1, "betas": (0.3, 0.8), "weight_decay": 0.2, "decoupled_weight_decay": True, "maximize": True},
    {"lr": 0.1, "betas": (0.8, 0.9), "k": 2, "alpha": 0.8, "pullback_momentum": "pullback"},
]
LION = [
    {"lr": 0.1},
    {"lr": 0.1, "betas": (0.3, 0.7), "weight_decay": 0.2, "k": 2},
    {"lr": 0.1, "betas": (0.8, 0.4), "maximize": True, "k": 3, "alpha": 0.7, "pullback_momentum": "pullback"},
]
HYPER = {"adamw": ADAM, "adam": ADAM, "sgd": SGD, "rmsprop": RMSPROP, "radam": RADAM, "lion": LION}
CASES = [(rule, hyper) for rule, cases in HYPER.items() for hyper in cases]


def gradients(shape: tuple[int, ...], seed: int = 1) -> list[np.ndarray]:
    # Decreasing, so that AMSGrad's maximum is not always the newest.
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) / (1 + i) for i in range(STEPS)]


@pytest.mark.parametrize(("rule", "hyper"), CASES)
def test_exact_in_fp64_is_the_textbook(rule: str, hyper: dict) -> None:
    theta = np.random.default_rng(0).standard_normal((4, 5))
    settings = oracle_settings(rule, **hyper)
    textbook, exact = Textbook(theta, settings), Exact(theta, "float64", settings)
    for g in gradients(theta.shape):
        textbook.step(g)
        exact.step(g)
        np.testing.assert_allclose(exact.param, textbook.theta, rtol=0, atol=1e-13)
        np.testing.assert_allclose(exact.state["slow_param"], textbook.phi, rtol=0, atol=1e-13)
        if exact.momentum_name is not None:
            np.testing.assert_allclose(exact.state[exact.momentum_name], textbook.m, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rule", "hyper"), CASES)
def test_exact_in_fp32_is_near_the_textbook(rule: str, hyper: dict) -> None:
    theta = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    settings = oracle_settings(rule, **hyper)
    textbook, exact = Textbook(theta, settings), Exact(theta, "float32", settings)
    for g in gradients(theta.shape):
        textbook.step(g.astype(np.float32))
        exact.step(g.astype(np.float32))
    assert exact.param.dtype == np.float32
    assert all(t.dtype == np.float32 for t in exact.state.values())
    np.testing.assert_allclose(exact.param, textbook.theta, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("rule", "hyper"), [case for case in CASES if case[0] in TORCH_CLASSES])
def test_textbook_is_torch_with_a_manual_sync(rule: str, hyper: dict) -> None:
    theta = np.random.default_rng(0).standard_normal((4, 5))
    textbook = Textbook(theta, oracle_settings(rule, **hyper))
    p = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = composed(rule, [p], **hyper)
    for g in gradients(theta.shape):
        textbook.step(g)
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        np.testing.assert_allclose(to_numpy(p), textbook.theta, rtol=0, atol=1e-13)


def test_textbook_makes_the_papers_trajectory() -> None:
    textbook = Textbook(np.zeros(1), Settings(rule="sgd", lr=1.0, k=3, alpha=0.5))
    trajectory = []
    for _ in range(9):
        textbook.step(-np.ones(1))
        trajectory.append(textbook.theta.item())
    assert trajectory == [1, 2, 1.5, 2.5, 3.5, 3, 4, 5, 4.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype) -> None:
    """All exponents, ties to even both ways, subnormals, the overflow threshold, infinities and NaN."""
    bits = np.arange(0, 2**32, 40503, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(0, 2**16, dtype=np.uint32) << np.uint32(16)
    ties = np.concatenate([halves | np.uint32(x) for x in (0x1000, 0x3000, 0x7FFF, 0x8000, 0x8001)])
    values = np.concatenate([bits, ties]).view(np.float32)
    expected = to_numpy(torch.from_numpy(values).to(dtype))
    assert same_bits(round_to(values, str(dtype).removeprefix("torch.")), expected)


def test_16_bit_parameters_are_rounded_once() -> None:
    """A 16-bit parameter that moves less than half a unit a step stands still; with a master it gets on."""
    steps = [np.float32([-1.0])] * 12
    settings = Settings(rule="sgd", lr=2.0**-10, k=100)
    bare = Exact(np.float32([1.0]), "bfloat16", settings)
    master = Exact(np.float32([1.0]), "bfloat16", dataclasses.replace(settings, master_weights=True))
    for g in steps:
        bare.step(g)
        master.step(g)
    assert bare.param.item() == 1.0
    assert master.state["master_param"].item() == 1 + 12 * 2.0**-10
    assert master.param.item() == 1 + 2 * 2.0**-7  # 1.5 units: away from zero


@pytest.mark.parametrize("T", [np.float32, np.float64])
def test_lerp_is_exact_at_both_ends(T: type) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(10000) * 10.0 ** generator.integers(-9, 9, 10000) for _ in range(2))
    a, b = a.astype(T), b.astype(T)
    assert same_bits(lerp(a, b, 0.0), a)
    assert same_bits(lerp(a, b, 1.0), b)
    assert not same_bits(a + (b - a), b), "the plain formula would be exact too: the values prove nothing"


def test_power() -> None:
    assert power(0.9, 0) == 1.0
    assert power(0.0, 3) == 0.0
    assert power(0.5, 40) == 2.0**-40
    assert power(0.999, 2**31) == 0.0
    for n in (1, 2, 3, 7, 100, 12345):
        assert power(0.999, n) == pytest.approx(0.999**n, rel=1e-13)


def test_ulps() -> None:
    one = np.float32([1.0])
    assert ulps(one, np.nextafter(one, np.float32(2))) == 1
    zero, nan = np.float32([0.0]), np.float32([np.nan])
    assert ulps(zero, -zero) == 0
    assert not same_bits(zero, -zero)
    assert ulps(nan, one) == np.inf
    assert ulps(np.float32([np.inf]), one) == np.inf
    assert same_bits(nan, -nan)
