"""What one run reached, took and kept: its scores, the time of its steps, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from bench.demo.data import Batch
from bench.demo.runs import K, Run
from lookahead_fused.bench import memory
from lookahead_fused.bench.opponents import ForeachSync
from lookahead_fused.bench.samples import spread

# What a final training loss is averaged over: one batch's says as much about the batch as about the weights.
LAST_STEPS = 20


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


def result_of(run: Run, held_out: Sequence[Batch]) -> RunResult:
    """Judge and measure a run at its end."""
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
        state_bytes=memory.state_bytes(run.optimizer, list(run.model.parameters())),
        growth=growth,
        allocated=allocated,
    )


def evaluate(model: nn.Module, held_out: Sequence[Batch]) -> Score:
    """The score of the weights as they are now; batches must be of one size."""
    losses, right = [], []
    with torch.no_grad():
        for inputs, targets in held_out:
            logits = model(inputs)
            losses.append(F.cross_entropy(logits.flatten(0, -2), targets.flatten()).item())
            right.append((logits.argmax(-1) == targets).float().mean().item())
    return Score(sum(losses) / len(losses), sum(right) / len(right))


def step_time(seconds: Sequence[float]) -> StepTime:
    """The time of a step, from those of all steps; the first ``K`` are left out, since they create state."""
    ordinary = spread([s for step, s in enumerate(seconds, start=1) if step > K and step % K])
    sync = spread([s for step, s in enumerate(seconds, start=1) if step > K and step % K == 0])

    def average(an_ordinary: float, a_sync: float) -> float:
        return ((K - 1) * an_ordinary + a_sync) / K

    return StepTime(
        median=average(ordinary.median, sync.median),
        q1=average(ordinary.q1, sync.q1),
        q3=average(ordinary.q3, sync.q3),
        ordinary=ordinary.median,
        sync=sync.median,
    )


def _memory_of_steps(optimizer: Optimizer | ForeachSync) -> tuple[int | None, int]:
    """Bytes of resident growth and bytes allocated, of ``K`` steps each."""

    def steps() -> None:
        for _ in range(K):
            optimizer.step()

    growth: int | None
    try:
        growth = memory.resident_growth(steps)
    except OSError:
        # Other systems than Linux have no /proc, and some containers refuse to reset the high-water mark.
        growth = None
    return growth, memory.allocated_bytes(steps)
