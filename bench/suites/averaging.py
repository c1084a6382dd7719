"""Primal averaging over AdamW: GPA and Schedule-Free, against their published forms and against plain torch.

The gradient is taken at y, between the average x and the base's own sequence z; y and z are kept, and x follows from
them. GPA's published step is written here per tensor, as its authors write it; Schedule-Free's is its package's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import lookahead_fused
from bench.harness.figures import Report
from bench.suites.family import adamw, report
from lookahead_fused.bench import parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Side, Unavailable
from lookahead_fused.bench.opponents import HYPERPARAMETERS, OURS, PLAIN

PUBLISHED_GPA, FOREACH_GPA = "GPA per tensor", "torch fused + foreach GPA"
PACKAGE = "schedulefree's AdamWScheduleFree"
GPA: dict[str, Any] = {"train_interp": 0.7, "eval_interp": 0.9967}
INTERP = 0.9
TARGET = 2.5


class PublishedGpa:
    """GPA over AdamW with z as its one further buffer, in twelve operations for each tensor (arXiv 2512.17131).

    Args:
        params: the parameters, which hold y.
        lr, betas, eps, weight_decay: AdamW's; the decay acts on z.
        train_interp, eval_interp: how far y and x are from z.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        train_interp: float,
        eval_interp: float,
    ) -> None:
        self.params = list(params)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.train_interp, self.eval_interp = train_interp, eval_interp
        self.z = [p.detach().clone() for p in self.params]
        self.first = [torch.zeros_like(p) for p in self.z]
        self.second = [torch.zeros_like(p) for p in self.z]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        # What y moves by as z moves by 1: z's own share of y, and what x takes of it.
        share = 1 - self.train_interp * self.eval_interp
        for y, z, first, second in zip(self.params, self.z, self.first, self.second, strict=True):
            assert y.grad is not None
            first.lerp_(y.grad, 1 - beta1)
            second.mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
            root = second.sqrt().div_(math.sqrt(correction2)).add_(self.eps)
            update = first.div(correction1).div_(root).add_(z, alpha=self.weight_decay)
            y.lerp_(z, 1 - self.eval_interp).sub_(update, alpha=self.lr * share)
            z.sub_(update, alpha=self.lr)


class ForeachGpa:
    """GPA as a careful user of torch writes it: torch's fused AdamW steps z, between three foreach interpolations.

    Args:
        params: the parameters, which hold y.
        train_interp, eval_interp: how far y and x are from z.
    """

    def __init__(self, params: Sequence[nn.Parameter], train_interp: float, eval_interp: float) -> None:
        self.weights = [p.detach() for p in params]
        z = [nn.Parameter(p.clone()) for p in self.weights]
        for own, p in zip(z, params, strict=True):
            own.grad = p.grad
        self.z = [p.detach() for p in z]
        self.base = adamw(z, fused=True)
        self.train_interp, self.eval_interp = train_interp, eval_interp

    def step(self) -> None:
        # x, in y's place; then x moves towards z, and y is taken between the two.
        torch._foreach_lerp_(self.weights, self.z, 1 - 1 / self.train_interp)
        self.base.step()
        torch._foreach_lerp_(self.weights, self.z, 1 - self.eval_interp)
        torch._foreach_lerp_(self.weights, self.z, 1 - self.train_interp)


def gpa(case: str, device: Device, effort: Effort) -> Report:
    """GPA against its published form, its foreach form, and plain torch.

    Args:
        case: a key of ``parameters.CASES``.
        device: where.
        effort: how much time it may take.
    """
    listed = parameters.CASES[case]
    params = parameters.make(listed, device=device.name)
    sides = [
        Side(OURS, lookahead_fused.GPA(adamw(params), **GPA).step),
        Side(PUBLISHED_GPA, PublishedGpa(parameters.twin(params), **HYPERPARAMETERS["adamw"], **GPA).step),
        Side(FOREACH_GPA, ForeachGpa(parameters.twin(params), **GPA).step),
        Side(PLAIN, adamw(parameters.twin(params), fused=True).step),
    ]
    title = f"GPA, {listed}, fp32, AdamW"
    return report(title, sides, 1, {PUBLISHED_GPA: TARGET}, listed.elements, device, effort)


def schedule_free(case: str, device: Device, effort: Effort) -> Report:
    """Schedule-Free against its package, and against plain torch.

    Raises:
        Unavailable: the package cannot be imported.
    """
    try:
        package = importlib.import_module("schedulefree")
    except ImportError as error:
        raise Unavailable(f"schedulefree cannot be imported: {error}") from error
    listed = parameters.CASES[case]
    params = parameters.make(listed, device=device.name)
    # Its interpolation takes the first moment's place.
    own: dict[str, Any] = {**HYPERPARAMETERS["adamw"], "betas": (0.0, HYPERPARAMETERS["adamw"]["betas"][1])}
    ours = lookahead_fused.ScheduleFree(adamw(params, **own), INTERP)
    # It leaves its updates in the gradients, which would be the others' too.
    theirs_params = parameters.twin(params)
    parameters.renew_gradients(theirs_params)
    theirs = package.AdamWScheduleFree(theirs_params, **{**own, "betas": (INTERP, own["betas"][1])})
    theirs.train()
    sides = [
        Side(OURS, ours.step),
        Side(PACKAGE, theirs.step),
        Side(PLAIN, adamw(parameters.twin(params), fused=True).step),
    ]
    title = f"Schedule-Free, {listed}, fp32, AdamW"
    return report(title, sides, 1, {PACKAGE: TARGET}, listed.elements, device, effort)


AVERAGING = {
    "gpa-gpt2-small": partial(gpa, "gpt2-small"),
    "schedule-free-gpt2-small": partial(schedule_free, "gpt2-small"),
}
