"""The reference backend states the mathematics a third time, in plain PyTorch: here it meets the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BackendCase, make_grads, make_optimizer, make_params, oracle_settings, seeded, to_numpy
from oracle import Textbook

import lookahead_fused

REFERENCE = BackendCase("reference", "cpu", 0.0)


def test_reference_serves_everywhere() -> None:
    assert lookahead_fused.backends()["reference"].available


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("mode", ["none", "pullback", "reset"])
@pytest.mark.parametrize("lookahead", [{"k": 1, "alpha": 0.6}, {"k": 7, "alpha": 0.4}, {"k": 10**9}])
@pytest.mark.parametrize("option", range(3))
def test_a_long_run_is_the_textbook(rule: str, mode: str, lookahead: dict, option: int) -> None:
    """Sixty steps, fp64, first and second moments included: what grows with the steps shows here."""
    adam = [{}, {"amsgrad": True, "betas": (0.8, 0.9)}, {"maximize": True, "eps": 1e-3, "weight_decay": 0.2}]
    sgd = [{"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3, "maximize": True, "weight_decay": 0.1}, {}]
    hyper = {"lr": 0.02, "pullback_momentum": mode, **(sgd if rule == "sgd" else adam)[option], **lookahead}
    params = make_params([(11,), (3, 4), ()], torch.float64)
    textbooks = [Textbook(to_numpy(p), oracle_settings(rule, **hyper)) for p in params]
    optimizer = make_optimizer(rule, params, REFERENCE, **hyper)
    generator = seeded(1)
    for _ in range(60):
        for p, g, textbook in zip(params, make_grads(params, generator=generator), textbooks, strict=True):
            p.grad = g
            textbook.step(to_numpy(g))
        optimizer.step()
    for p, textbook in zip(params, textbooks, strict=True):
        state = optimizer.state[p]
        expected = {"slow_param": textbook.phi}
        if rule != "sgd":
            expected |= {"exp_avg": textbook.m, "exp_avg_sq": textbook.v}
        elif hyper.get("momentum"):
            expected |= {"momentum_buffer": textbook.m}
        if hyper.get("amsgrad"):
            expected |= {"max_exp_avg_sq": textbook.v_max}
        np.testing.assert_allclose(to_numpy(p), textbook.theta, rtol=1e-14, atol=2e-14)
        for name, value in expected.items():
            np.testing.assert_allclose(to_numpy(state[name]), value, rtol=1e-14, atol=2e-14, err_msg=name)
        assert state["step"].item() == 60
