"""What is trained, and the three optimizers at work on copies of it: ours, the same unfused, and none of Lookahead."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bench.demo.data import Batch, Data
from lookahead_fused import LookaheadAdamW
from lookahead_fused.bench.opponents import ForeachSync

FUSED = "Lookahead, fused (ours)"
UNFUSED = "Lookahead, unfused"
PLAIN = "AdamW, no Lookahead"

K = 5
ALPHA = 0.5
SEED = 0


@dataclass(frozen=True)
class Task:
    """A network, its data and how it is trained.

    Attributes:
        key: names the task in files.
        title: names it for people.
        model: makes the network; called once, all runs start from copies of what it returns.
        data: makes the data; its training batches are drawn from the start.
        steps: optimizer steps. Not a multiple of ``K``, or slow and fast weights would be equal at the end.
        lr: the learning rate after ``warmup`` steps of linear increase.
        weight_decay: of matrices and kernels; vectors (norms, biases) have none.
        classifies: whether accuracy is worth reporting.
    """

    key: str
    title: str
    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    steps: int
    lr: float
    weight_decay: float
    warmup: int = 20
    classifies: bool = False

    def __post_init__(self) -> None:
        if self.steps % K == 0 or self.steps < 2 * K:
            raise ValueError(f"steps must be at least {2 * K} and no multiple of {K}, got {self.steps}")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """A network's parameters, in groups of an optimizer."""
        parameters = list(model.parameters())
        return [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        """Of its learning rate."""
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup))


@dataclass
class Run:
    """One optimizer at work on its own copy of the network."""

    model: nn.Module
    optimizer: Optimizer | ForeachSync
    scheduler: LambdaLR
    slow_weights: Callable[[], AbstractContextManager[None]] | None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)

    def advance(self, batch: Batch) -> None:
        """One training step."""
        inputs, targets = batch
        start = time.perf_counter()
        self.model.zero_grad()
        loss = _loss(self.model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        before = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.seconds.append(end - before)
        self.whole_seconds.append(end - start)


def make_runs(task: Task, backend: str) -> dict[str, Run]:
    """The three runs by name, at the same weights."""
    torch.manual_seed(SEED)
    start = task.model()

    model = copy.deepcopy(start)
    ours = LookaheadAdamW(task.groups(model), lr=task.lr, k=K, alpha=ALPHA, backend=backend)
    runs = {FUSED: Run(model, ours, task.schedule(ours), ours.slow_weights)}

    model = copy.deepcopy(start)
    # The schedule is the inner optimizer's: its param_groups hold the learning rate.
    inner = AdamW(task.groups(model), lr=task.lr, fused=True)
    schedule = task.schedule(inner)
    sync = ForeachSync(inner, K, ALPHA)
    runs[UNFUSED] = Run(model, sync, schedule, lambda: _swapped(sync.fast, sync.slow))

    model = copy.deepcopy(start)
    plain = AdamW(task.groups(model), lr=task.lr, fused=True)
    runs[PLAIN] = Run(model, plain, task.schedule(plain), None)
    return runs


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@contextmanager
def _swapped(fast: Sequence[Tensor], slow: Sequence[Tensor]) -> Iterator[None]:
    """The weights read as the slow ones inside; what ``slow_weights()`` does, for the unfused run."""
    kept = [p.clone() for p in fast]
    torch._foreach_copy_(list(fast), list(slow))
    try:
        yield
    finally:
        torch._foreach_copy_(list(fast), kept)
