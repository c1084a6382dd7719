"""FSDP2 with `async_save`, whose collectives run beside training's and so want a group of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain import SETTINGS, make_batches, make_model, same_weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lookahead_fused import LookaheadAdamW

RANKS = 2


def sharded() -> tuple[nn.Module, LookaheadAdamW]:
    model = make_model()
    dist.fsdp.fully_shard(model, mesh=dist.init_device_mesh("cpu", (RANKS,)))
    return model, LookaheadAdamW(model.parameters(), **SETTINGS)


def train(model: nn.Module, optimizer: LookaheadAdamW, first: int, end: int) -> None:
    for x, y in make_batches()[first:end]:
        optimizer.zero_grad()
        # Each rank takes its half of a batch.
        mine = slice(dist.get_rank(), None, RANKS)
        nn.functional.mse_loss(model(x[mine]), y[mine]).backward()
        optimizer.step()


def local_weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().to_local().clone() for p in model.parameters()]


def run(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS)
    model, optimizer = sharded()
    group = dist.new_group(backend="gloo")
    train(model, optimizer, 0, 3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    saved = dcp.async_save(state, checkpoint_id=f"{directory}/checkpoint", process_group=group)
    train(model, optimizer, 3, 5)
    saved.result()

    resumed, its_optimizer = sharded()
    model_state, optimizer_state = get_state_dict(resumed, its_optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=f"{directory}/checkpoint", process_group=group)
    set_state_dict(resumed, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(resumed, its_optimizer, 3, 5)
    trained = local_weights(model)
    assert same_weights(local_weights(resumed), trained)

    x, _ = make_batches()[0]
    before = model(x)
    # A forward leaves the root gathered, and a backward did not follow.
    model.reshard()
    with optimizer.slow_weights():
        on_slow = model(x)
        model.reshard()
    assert not torch.equal(on_slow, before)
    assert same_weights(local_weights(model), trained)
    assert torch.equal(model(x), before)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_a_checkpoint_is_saved_while_training_goes_on(tmp_path: Path) -> None:
    """Resumed, it ends with the same bits; the slow weights are those of the whole model."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=RANKS)
