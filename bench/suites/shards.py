"""What a parameter costs a step for being a DTensor: FSDP2 and tensor parallelism shard every parameter of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bench.harness.figures import Figure, Report, scaled
from bench.suites.steps import GRADIENTS
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Schedule, Side, Unavailable
from lookahead_fused.bench.opponents import OPPONENTS, OURS, PLAIN, K, Setting
from lookahead_fused.bench.samples import ratio, slope

# How many parameters, and how many times as fast as torch's fused step the step over them is to be.
TARGETS = {300: 10.0, 1000: None}
# In microseconds, of a DTensor beyond what a plain tensor costs.
BEYOND = 0.3


@contextmanager
def mesh_of_one(device: str) -> Iterator[Any]:
    """A mesh of this process alone.

    Raises:
        Unavailable: this torch cannot make one, or the process has a group of its own.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise Unavailable("this torch was built without gloo")
    if distributed.is_initialized():
        raise Unavailable("this process has a process group already")
    from torch.distributed.device_mesh import init_device_mesh

    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device, (1,))
    finally:
        distributed.destroy_process_group()


def sharded(params: Sequence[nn.Parameter], mesh: Any) -> list[nn.Parameter]:
    """DTensors of the same numbers, and gradients placed as they are."""
    from torch.distributed.tensor import Shard, distribute_tensor

    made = []
    for param in params:
        own = nn.Parameter(distribute_tensor(param.detach().clone(), mesh, [Shard(0)]))
        assert param.grad is not None
        own.grad = distribute_tensor(param.grad.clone(), mesh, [Shard(0)])
        made.append(own)
    return made


def host_dtensors(device: Device, effort: Effort) -> Report:
    """Our step over plain tensors and over DTensors, and torch's fused one over DTensors, with next to nothing to
    compute."""
    setting = Setting(device=device.name)
    first = opponents.ours(device.name)[0]
    plan = Schedule(effort.of(12), steps=2 * K, settle=K, period=K, budget=effort.budget / 2)
    figures, samples = [], {}
    with mesh_of_one(device.name) as mesh:
        for count, target in TARGETS.items():
            params = parameters.make(parameters.Case("", parameters.equal(count, 1)), device=device.name)
            makers = ((OURS, first.make, False), (OURS, first.make, True), (PLAIN, OPPONENTS[PLAIN].make, True))
            sides = []
            for who, make, is_sharded in makers:
                own = sharded(params, mesh) if is_sharded else parameters.twin(params)
                step = make(setting, parameters.groups(own, "one")).step
                sides.append(Side(f"{who}, {'DTensors' if is_sharded else 'tensors'}: {count}", step))
            samples |= device.interleave(sides, plan)
            plain, ours, torchs = (side.name for side in sides)
            beyond = scaled(slope(samples, plain, ours, count), 1e6)
            goals = (BEYOND, target) if device.name == "cpu" else (None, None)
            label = f"{OURS}, per DTensor of {count} beyond a plain tensor"
            figures += [
                Figure(label, beyond, "µs", goals[0], at_least=False, kind="host", of=OURS),
                Figure(
                    f"{ours} against {torchs}", ratio(samples, ours, torchs), "x", goals[1], kind="ratio", of=torchs
                ),
            ]
    return Report(f"host work per DTensor of 1 element, AdamW, k={K}", f"{plan}; {GRADIENTS}", figures, samples)
