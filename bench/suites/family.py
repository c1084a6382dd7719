"""Lookahead's kin over AdamW: an average of every step's weights, and outer momentum, against what torch's users write.

The average's opponents are torch's fused step with one foreach interpolation of all weights, the same with torch's own
`AveragedModel`, and the fused step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.harness.figures import Figure, Report
from bench.suites.steps import GRADIENTS
from lookahead_fused import EMA, Lookahead
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Side, schedule
from lookahead_fused.bench.opponents import HYPERPARAMETERS, OURS, PLAIN, Setting, Steps
from lookahead_fused.bench.samples import ratio

DECAY = 0.999
FOREACH_EMA, AVERAGED_MODEL = "torch fused + _foreach_lerp_", "torch fused + AveragedModel"
OUTER: dict[str, Any] = {"k": 30, "alpha": 0.7, "outer_momentum": 0.5}


class ForeachAverage:
    """Torch's fused AdamW, and after each of its steps one call that moves all averages."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.weights = [p.detach() for group in base.param_groups for p in group["params"]]
        self.averages = [p.clone() for p in self.weights]

    def step(self) -> None:
        self.base.step()
        torch._foreach_lerp_(self.averages, self.weights, 1 - DECAY)


class TorchAverage:
    """Torch's fused AdamW, and after each of its steps torch's own averaged copy of the model."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.model = nn.ParameterList([p for group in base.param_groups for p in group["params"]])
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def step(self) -> None:
        self.base.step()
        self.averaged.update_parameters(self.model)


def ema(case: str, device: Device, effort: Effort) -> Report:
    """An average moved in every step, against the three ways of torch.

    Args:
        case: a key of ``parameters.CASES``.
        device: where.
        effort: how much time it may take.
    """
    listed = parameters.CASES[case]
    params = parameters.make(listed, device=device.name)
    sides = [
        Side(OURS, EMA(adamw(params), DECAY).step),
        Side(FOREACH_EMA, ForeachAverage(adamw(parameters.twin(params), fused=True)).step),
        Side(AVERAGED_MODEL, TorchAverage(adamw(parameters.twin(params), fused=True)).step),
        Side(PLAIN, adamw(parameters.twin(params), fused=True).step),
    ]
    targets = {FOREACH_EMA: 1.3, PLAIN: 0.85}
    return report(f"EMA of every step, {listed}, fp32, AdamW", sides, 1, targets, listed.elements, device, effort)


def outer_momentum(case: str, device: Device, effort: Effort) -> Report:
    """Outer momentum (SNOO) with k = 30, against torch's fused step with no slow weights at all."""
    listed = parameters.CASES[case]
    params = parameters.make(listed, device=device.name)
    ours: Steps = Lookahead(adamw(params), **OUTER)
    plain = opponents.OPPONENTS[PLAIN].make(
        replace(Setting(), device=device.name), parameters.groups(parameters.twin(params), "one")
    )
    sides = [Side(OURS, ours.step), Side(PLAIN, plain.step)]
    title = f"outer momentum, {listed}, fp32, AdamW, k={OUTER['k']}"
    return report(title, sides, OUTER["k"], {PLAIN: 1.0}, listed.elements, device, effort)


def adamw(params: Sequence[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
    """Torch's AdamW with the benchmarks' hyperparameters, or with others in `options`."""
    return torch.optim.AdamW(list(params), **{**HYPERPARAMETERS["adamw"], **options})


def report(
    title: str,
    sides: list[Side],
    period: int,
    targets: dict[str, float],
    elements: int,
    device: Device,
    effort: Effort,
) -> Report:
    """The first side against each of the others.

    Args:
        title: what is compared.
        sides: ours comes first.
        period: steps after which the work repeats.
        targets: what the ratio to a side must reach, on a CPU.
        elements: of all parameters.
        device: where.
        effort: how much time it may take.
    """
    turns = schedule(elements, period, effort.of(8), effort.budget)
    samples = device.interleave(sides, turns)
    figures = [
        Figure(
            f"{OURS} against {side.name}",
            ratio(samples, OURS, side.name),
            "x",
            targets.get(side.name) if device.name == "cpu" else None,
            kind="ratio",
            of=side.name,
        )
        for side in sides[1:]
    ]
    return Report(title, f"{turns}; {GRADIENTS}", figures, samples)


FAMILY = {
    "ema-gpt2-small": partial(ema, "gpt2-small"),
    "outer-gpt2-small": partial(outer_momentum, "gpt2-small"),
}
