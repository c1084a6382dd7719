"""DeepSpeed: with ZeRO the optimizer is given flat copies, so that slow_weights() does not reach the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import SETTINGS, by_hand, make_batches, make_model, same_weights, weights
from torch import nn

from lookahead_fused import LookaheadAdamW

pytest.importorskip("deepspeed")


def trained(steps: int, **zero: Any) -> tuple[nn.Module, LookaheadAdamW]:
    import deepspeed

    model = make_model()
    optimizer = LookaheadAdamW(model.parameters(), **SETTINGS)
    config = {"train_batch_size": 8, "gradient_clipping": 0.0, **zero}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for x, y in make_batches(steps):
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()
    return engine.module, optimizer


def run(_: int, directory: str) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")
    import deepspeed

    deepspeed.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{directory}/meeting", rank=0, world_size=1
    )
    expected, slow = by_hand()
    model, optimizer = trained(5)
    assert same_weights(weights(model), expected)
    with optimizer.slow_weights():
        assert same_weights(weights(model), slow)

    with pytest.raises(AssertionError, match="zero_allow_untested_optimizer"):
        trained(1, zero_optimization={"stage": 1})
    for stage in (1, 2):
        zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        model, optimizer = trained(5, **zero)
        assert same_weights(weights(model), expected)
        with optimizer.slow_weights():
            assert same_weights(weights(model), expected)  # the flat copies hold them
        model, _ = trained(4, **zero)
        assert same_weights(weights(model), by_hand(4)[1])


def test_zero_trains_and_has_the_slow_weights_at_a_sync(tmp_path: Path) -> None:
    """In a process of its own, which DeepSpeed changes in many places."""
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=1)
