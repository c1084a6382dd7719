"""Three optimizers train one network in lockstep; what they did is measured, and two of them must agree.

Every step draws one batch, and each run in turn does a forward, a backward and a timed ``optimizer.step()``
on it. So the runs differ in nothing but the optimizer, and other work on the machine slows all three alike.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import measure
import torch
import torch.nn.functional as F
from demo_data import Batch, Data
from opponents import ForeachSync
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lookahead_fused import LookaheadAdamW

FUSED = "Lookahead, fused (ours)"
UNFUSED = "Lookahead, unfused"
PLAIN = "AdamW, no Lookahead"

K = 5
ALPHA = 0.5
SEED = 0
# What a final training loss is averaged over: one batch's says as much about the batch as about the weights.
LAST_STEPS = 20

Progress = Callable[[int, dict[str, float]], None]


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


@dataclass(frozen=True)
class Score:
    """Mean loss and share of right predictions on the held-out batches."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: an average over a period of ``K`` steps, each kind of step by its median.

    A median over all steps would be one of the four in five that do not sync; a mean would be made by the few
    steps in which something else had the core.

    Attributes:
        median: the figure.
        q1, q3: the same of the quartiles.
        ordinary: median of the steps that do not sync.
        sync: median of the ``K``-th steps.
    """

    median: float
    q1: float
    q3: float
    ordinary: float
    sync: float


@dataclass(frozen=True)
class RunResult:
    """What one optimizer did and cost.

    Attributes:
        losses: training loss of every step, before its update.
        seconds: duration of every ``optimizer.step()``.
        train_loss: mean of the last ``LAST_STEPS`` losses.
        held_out, held_out_slow: scores with the weights as trained, and with the slow weights (None without).
        step: seconds of a step.
        share: of a whole training step (forward, backward, optimizer) that the optimizer takes.
        state_bytes: all tensors the optimizer keeps from step to step, slow weights included.
        growth: bytes that resident memory rises at its highest in ``K`` steps; None where that is not told.
        allocated: bytes that torch's allocator hands out in ``K`` steps.
    """

    losses: list[float]
    seconds: list[float]
    train_loss: float
    held_out: Score
    held_out_slow: Score | None
    step: StepTime
    share: float
    state_bytes: int
    growth: int | None
    allocated: int


@dataclass(frozen=True)
class Deviations:
    """How far the fused run is from the unfused one.

    Attributes:
        loss: absolute difference of the training losses, of every step.
        weights: distance of the weights at every ``K``-th step, in units of the way that the unfused ones
            have come from the start.
    """

    loss: list[float]
    weights: list[float]


@dataclass(frozen=True)
class TaskResult:
    """All of one task."""

    task: Task
    source: str
    parameters: int
    tensors: int
    runs: dict[str, RunResult]
    deviations: Deviations

    def speedup(self, name: str) -> float:
        """How many times as fast as run ``name`` ours takes a step."""
        return self.runs[name].step.median / self.runs[FUSED].step.median


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


def run_task(task: Task, *, backend: str = "auto", progress: Progress = lambda step, losses: None) -> TaskResult:
    """Train a task with all three optimizers and measure them.

    Args:
        task: what to train.
        backend: of our optimizer.
        progress: called after every step with its number, from 1, and the loss of every run by name.

    Raises:
        FloatingPointError: a training loss is not finite.
    """
    data = task.data()
    runs = make_runs(task, backend)
    deviations = _train(task, data, runs, progress)
    results = {name: _result(run, data.held_out) for name, run in runs.items()}
    weights = list(runs[FUSED].model.parameters())
    return TaskResult(
        task=task,
        source=data.source,
        parameters=sum(p.numel() for p in weights),
        tensors=len(weights),
        runs=results,
        deviations=deviations,
    )


def make_runs(task: Task, backend: str) -> dict[str, Run]:
    """The three runs by name, at the same weights."""
    torch.manual_seed(SEED)
    start = task.model()

    def warmup(step: int) -> float:
        return min(1.0, (step + 1) / task.warmup)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        parameters = list(model.parameters())
        return [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": task.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]

    model = copy.deepcopy(start)
    ours = LookaheadAdamW(groups(model), lr=task.lr, k=K, alpha=ALPHA, backend=backend)
    runs = {FUSED: Run(model, ours, LambdaLR(ours, warmup), ours.slow_weights)}

    model = copy.deepcopy(start)
    # The schedule is the inner optimizer's: its param_groups hold the learning rate.
    inner = AdamW(groups(model), lr=task.lr, fused=True)
    schedule = LambdaLR(inner, warmup)
    sync = ForeachSync(inner, K, ALPHA)
    runs[UNFUSED] = Run(model, sync, schedule, lambda: _swapped(sync.fast, sync.slow))

    model = copy.deepcopy(start)
    plain = AdamW(groups(model), lr=task.lr, fused=True)
    runs[PLAIN] = Run(model, plain, LambdaLR(plain, warmup), None)
    return runs


def step_time(seconds: Sequence[float]) -> StepTime:
    """The time of a step, from those of all steps; the first ``K`` are left out, since they create state."""
    ordinary = measure.spread([s for step, s in enumerate(seconds, start=1) if step > K and step % K])
    sync = measure.spread([s for step, s in enumerate(seconds, start=1) if step > K and step % K == 0])

    def average(an_ordinary: float, a_sync: float) -> float:
        return ((K - 1) * an_ordinary + a_sync) / K

    return StepTime(
        median=average(ordinary.median, sync.median),
        q1=average(ordinary.q1, sync.q1),
        q3=average(ordinary.q3, sync.q3),
        ordinary=ordinary.median,
        sync=sync.median,
    )


def state_bytes(optimizer: Optimizer | ForeachSync) -> int:
    """Bytes of every tensor that an optimizer keeps from step to step; what shares memory counts once."""
    inner = optimizer.base if isinstance(optimizer, ForeachSync) else optimizer
    tensors = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors += optimizer.slow if isinstance(optimizer, ForeachSync) else []
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def evaluate(model: nn.Module, held_out: Sequence[Batch]) -> Score:
    """The score of the weights as they are now; batches must be of one size."""
    losses, right = [], []
    with torch.no_grad():
        for inputs, targets in held_out:
            logits = model(inputs)
            losses.append(F.cross_entropy(logits.flatten(0, -2), targets.flatten()).item())
            right.append((logits.argmax(-1) == targets).float().mean().item())
    return Score(sum(losses) / len(losses), sum(right) / len(right))


def _train(task: Task, data: Data, runs: dict[str, Run], progress: Progress) -> Deviations:
    start = [p.detach().clone() for p in runs[UNFUSED].model.parameters()]
    deviations = Deviations([], [])
    names = list(runs)
    for step, batch in zip(range(1, task.steps + 1), data.train, strict=False):
        # Every run comes at every place and after every other.
        order = [*names[step % 3 :], *names[: step % 3]]
        for name in order if step // 3 % 2 else reversed(order):
            runs[name].advance(batch)
        losses = {name: run.losses[-1] for name, run in runs.items()}
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise FloatingPointError(f"{task.title}: the loss of '{name}' at step {step} is {loss}")
        deviations.loss.append(abs(losses[FUSED] - losses[UNFUSED]))
        if step % K == 0:
            ours, theirs = (list(runs[name].model.parameters()) for name in (FUSED, UNFUSED))
            deviations.weights.append(_distance(ours, theirs) / _distance(theirs, start))
        progress(step, losses)
    return deviations


def _result(run: Run, held_out: Sequence[Batch]) -> RunResult:
    score = evaluate(run.model, held_out)
    slow_score = None
    if run.slow_weights is not None:
        with run.slow_weights():
            slow_score = evaluate(run.model, held_out)
    step = step_time(run.seconds)
    last = run.losses[-LAST_STEPS:]
    # After the scores, since they take steps: K of them, so that a sync is among them, on the last gradients.
    growth, allocated = _memory_of_steps(run.optimizer)
    return RunResult(
        losses=run.losses,
        seconds=run.seconds,
        train_loss=sum(last) / len(last),
        held_out=score,
        held_out_slow=slow_score,
        step=step,
        share=step.median / step_time(run.whole_seconds).median,
        state_bytes=state_bytes(run.optimizer),
        growth=growth,
        allocated=allocated,
    )


def _memory_of_steps(optimizer: Optimizer | ForeachSync) -> tuple[int | None, int]:
    """Bytes of resident growth and bytes allocated, of ``K`` steps each."""

    def steps() -> None:
        for _ in range(K):
            optimizer.step()

    growth: int | None
    try:
        growth = measure.resident_growth(steps)
    except OSError:
        # Other systems than Linux have no /proc, and some containers refuse to reset the high-water mark.
        growth = None
    return growth, measure.allocated_bytes(steps)


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return math.sqrt(sum((p - q).square().sum(dtype=torch.float64).item() for p, q in zip(a, b, strict=True)))


@contextmanager
def _swapped(fast: Sequence[Tensor], slow: Sequence[Tensor]) -> Iterator[None]:
    """The weights read as the slow ones inside; what ``slow_weights()`` does, for the unfused run."""
    kept = [p.clone() for p in fast]
    torch._foreach_copy_(list(fast), list(slow))
    try:
        yield
    finally:
        torch._foreach_copy_(list(fast), kept)
