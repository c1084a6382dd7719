"""Moments and gradients of real training runs: the demo's networks under torch's AdamW in fp32, beta2 = 0.999."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from bench.demo.runs import SEED, Run, Task

BETAS = (0.9, 0.999)
EPS = 1e-8
# Of each tensor so many elements' gradients are kept, from its middle: of all of them they would take gigabytes.
SLICE = 2048
NAMES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Moments:
    """Of all parameters of a network after so many steps, each flat."""

    step: int
    first: list[Tensor]
    second: list[Tensor]


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        losses: of every step.
        moments: at the steps asked for, in their order.
        gradients: of every step, [step, slice, SLICE]; a tensor that is shorter is followed by zeros.
    """

    losses: list[float]
    moments: list[Moments]
    gradients: Tensor


def train(task: Task, steps: int, at: Sequence[int]) -> Trained:
    """Trains a task.

    Args:
        steps: how many, the task's own number set aside.
        at: the steps, from 1, after which the moments are taken.
    """
    torch.manual_seed(SEED)
    model = task.model()
    optimizer = AdamW(task.groups(model), task.lr, BETAS, EPS, fused=True)
    run = Run(model, optimizer, task.schedule(optimizer), None)
    params = list(model.parameters())
    moments = []
    gradients = torch.zeros(steps, len(params), SLICE)
    for step, batch in enumerate(islice(task.data().train, steps), start=1):
        run.advance(batch)
        for place, p in enumerate(params):
            assert p.grad is not None
            begin = p.numel() // 2 // SLICE * SLICE
            kept = p.grad.flatten()[begin : begin + SLICE]
            gradients[step - 1, place, : len(kept)] = kept
        if step in at:
            first, second = ([optimizer.state[p][name].flatten().clone() for p in params] for name in NAMES)
            moments.append(Moments(step, first, second))
    return Trained(run.losses, moments, gradients)


def in_blocks(tensors: Sequence[Tensor], size: int) -> Tensor:
    """[blocks, size] of flat tensors; no block holds elements of two, and the last of each is filled with zeros."""
    return torch.cat([F.pad(flat, (0, -len(flat) % size)).view(-1, size) for flat in tensors])
