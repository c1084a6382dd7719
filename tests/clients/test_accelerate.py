"""Accelerate: `Accelerator.prepare` wraps the optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain import SETTINGS, by_hand, make_batches, make_model, same_weights, weights
from torch import nn

from lookahead_fused import LookaheadAdamW

accelerate = pytest.importorskip("accelerate")


def test_the_prepared_optimizer_steps_and_the_raw_one_has_the_slow_weights(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    raw = LookaheadAdamW((plain := make_model()).parameters(), **SETTINGS)
    model, optimizer = accelerator.prepare(plain, raw)
    for x, y in make_batches():
        optimizer.zero_grad()
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
    expected, slow = by_hand()
    assert same_weights(weights(model), expected)
    assert optimizer.optimizer is raw
    assert not hasattr(optimizer, "slow_weights")
    with raw.slow_weights():
        assert same_weights(weights(model), slow)
    assert same_weights(weights(model), expected)


def test_a_saved_state_resumes(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    model, optimizer = accelerator.prepare(model, LookaheadAdamW(model.parameters(), **SETTINGS))
    for step, (x, y) in enumerate(make_batches()):
        if step == 3:
            accelerator.save_state(str(tmp_path))
            for p in model.parameters():
                p.data.zero_()
            optimizer.optimizer.state.clear()
            accelerator.load_state(str(tmp_path))
        optimizer.zero_grad()
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
    assert same_weights(weights(model), by_hand()[0])
