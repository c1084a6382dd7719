"""torchtitan's way with optimizers, which takes torch alone: a container of one for each part of a model, whose state
is one flat dict of all, saved and loaded by `torch.distributed.checkpoint`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain import SETTINGS, make_batches, make_model, same_weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lookahead_fused import LookaheadAdamW

RANKS = 2
OPTIONS: dict[str, Any] = {**SETTINGS, "pullback_momentum": "pullback"}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Model:
    """The parts under one name in a checkpoint; what each lacks is another's."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts

    def state_dict(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in get_model_state_dict(part).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            set_model_state_dict(part, state, options=StateDictOptions(strict=False))


class Container(torch.optim.Optimizer):
    """Itself an optimizer of all parameters, for hooks alone: the parts' optimizers step."""

    def __init__(self, parts: list[nn.Module], **settings: Any) -> None:
        self.parts = parts
        self.optimizers = [LookaheadAdamW(part.parameters(), **settings) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        states = [
            get_optimizer_state_dict(part, optimizer, options=FLAT)
            for part, optimizer in zip(self.parts, self.optimizers, strict=True)
        ]
        assert len({name for state in states for name in state}) == sum(map(len, states))
        return {name: value for state in states for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, optim_state_dict=state, options=FLAT)


def sharded() -> list[nn.Module]:
    """Two parts, as two stages of a pipeline on one rank; their parameters keep the whole model's names."""
    whole, mesh = make_model(), dist.init_device_mesh("cpu", (RANKS,))
    parts: list[nn.Module] = [whole[:2], whole[2:]]
    for part in parts:
        dist.fsdp.fully_shard(part, mesh=mesh)
    return parts


def train(parts: list[nn.Module], optimizer: torch.optim.Optimizer, schedules: list[Any], steps: range) -> None:
    for x, y in make_batches()[steps.start : steps.stop]:
        optimizer.zero_grad()
        # Each rank takes its half of a batch.
        mine = slice(dist.get_rank(), None, RANKS)
        out = x[mine]
        for part in parts:
            out = part(out)
        nn.functional.mse_loss(out, y[mine]).backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()


def schedules_of(optimizers: list[Any]) -> list[Any]:
    return [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]


def parameters(parts: list[nn.Module]) -> list[nn.Parameter]:
    return [p for part in parts for p in part.parameters()]


def local(tensors: Any) -> list[torch.Tensor]:
    return [t.detach().to_local().clone() for t in tensors]


def run(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=RANKS)
    parts = sharded()
    container = Container(parts, **OPTIONS)
    schedules = schedules_of(container.optimizers)
    train(parts, container, schedules, range(3))  # k is 2
    saved = {"model": Model(parts), "optimizer": container, "schedule": schedules[0]}
    dcp.save(saved, checkpoint_id=f"{directory}/checkpoint")
    train(parts, container, schedules, range(3, 5))
    slow = local(optimizer.state[p]["slow_param"] for optimizer in container.optimizers for p in optimizer.state)

    # One optimizer over all that the parts' have.
    alone = sharded()
    single = LookaheadAdamW(parameters(alone), **OPTIONS)
    train(alone, single, schedules_of([single]), range(5))
    assert same_weights(local(parameters(parts)), local(parameters(alone)))
    assert same_weights(slow, local(single.state[p]["slow_param"] for p in parameters(alone)))

    resumed = sharded()
    for p in parameters(resumed):
        p.data.zero_()
    its_container = Container(resumed, **OPTIONS)
    its_schedules = schedules_of(its_container.optimizers)
    loaded = {"model": Model(resumed), "optimizer": its_container, "schedule": its_schedules[0]}
    dcp.load(loaded, checkpoint_id=f"{directory}/checkpoint")
    its_schedules[1].load_state_dict(its_schedules[0].state_dict())
    train(resumed, its_container, its_schedules, range(3, 5))
    assert same_weights(local(parameters(resumed)), local(parameters(parts)))

    trained = local(parameters(resumed))
    with contextlib.ExitStack() as on_slow:
        for optimizer in its_container.optimizers:
            on_slow.enter_context(optimizer.slow_weights())
        assert same_weights(local(parameters(resumed)), slow)
    assert same_weights(local(parameters(resumed)), trained)
    assert not same_weights(slow, trained)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_parts_resume_between_two_syncs_from_one_flat_state(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=RANKS)
