"""A step that clips by the global norm, against torch's clip before the step.

Torch's clip reads the gradients for the norm, reads and writes them again to scale them, and then the step reads them
once more. Ours reads them for the norm, and the step scales what it reads anyway: of GPT-2's list and AdamW, on four
steps of five, 28 + 4 bytes a parameter and not 28 + 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.figures import Report
from bench.suites.family import report
from lookahead_fused import LookaheadAdamW
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Side
from lookahead_fused.bench.opponents import ALPHA, HYPERPARAMETERS, OURS, SYNC, K, Setting, Steps

CLIP = "clip_grad_norm_"
# Smaller than the norm of the benchmarks' gradients at first. Torch's clip leaves them at it: it scales them by about 1
# in every step after, which is the same work.
LARGEST = 1.0


class Clipped:
    """An optimizer, and before each of its steps torch's clip of all gradients."""

    def __init__(self, base: Steps, params: Sequence[Tensor]) -> None:
        self.base, self.params = base, list(params)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, LARGEST, foreach=True)
        self.base.step()


def clip(case: str, device: Device, effort: Effort) -> Report:
    """Lookahead over AdamW that clips, against torch's clip before ours and before torch's own.

    Args:
        case: a key of ``parameters.CASES``.
        device: where.
        effort: how much time it may take.
    """
    listed = parameters.CASES[case]
    params = parameters.make(listed, device=device.name)
    settings: dict[str, Any] = {**HYPERPARAMETERS["adamw"], "k": K, "alpha": ALPHA}
    before_ours, before_torch = (_with_gradients_of_its_own(params) for _ in range(2))
    setting = replace(Setting(), device=device.name)
    torchs = opponents.OPPONENTS[SYNC].make(setting, parameters.groups(before_torch, "one"))
    sides = [
        Side(OURS, LookaheadAdamW(params, **settings, max_grad_norm=LARGEST).step),
        Side(f"{CLIP} + {OURS}", Clipped(LookaheadAdamW(before_ours, **settings), before_ours).step),
        Side(f"{CLIP} + {SYNC}", Clipped(torchs, before_torch).step),
    ]
    targets = {sides[1].name: 1.2, sides[2].name: 1.3}
    title = f"clipped by the global norm, {listed}, fp32, AdamW, k={K}"
    return report(title, sides, K, targets, listed.elements, device, effort)


def _with_gradients_of_its_own(params: Sequence[Tensor]) -> list[Any]:
    others = parameters.twin(params)
    for other in others:
        other.grad = other.grad.clone()
    return others


CLIPS = {"clip-gpt2-small": partial(clip, "gpt2-small")}
