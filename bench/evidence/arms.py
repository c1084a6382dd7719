"""Rules of training and the arms that are compared over each: what an optimizer is built from.

A rule is an optimizer without slow weights; an arm says what is done around it. Both sides of every comparison are
`build(arm, rule, ...)` at a learning rate and a momentum (beta), so that they can be tuned over one grid. What an arm
keeps as slow weights is evaluated within `slow_weights(optimizer)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, RAdam, RMSprop

from lookahead_fused import EMA, GPA, Lion, Lookahead, ScheduleFree

Kind = Literal["base", "lookahead", "ema", "tail", "gpa", "schedule-free"]
Momentum = Literal["none", "pullback", "reset"]


@dataclass(frozen=True)
class Rule:
    """An optimizer without slow weights.

    Attributes:
        name: in the names of tasks and figures.
        make: of (params, lr, beta, beta2).
        beta2: what it is where nobody tunes it; None where there is none.
        beta2s: what it may be tuned to.
        elementwise: whether an element's step depends on that element's gradients alone, so that seeds may be stacked.
        averages: whether Schedule-Free's theory covers it: its first moment can be left out.
        accumulates: whether momentum sums gradients, so that a step is 1 / (1 - beta) times as long in the long run.
    """

    name: str
    make: Callable[[list[Tensor], float, float, float], Optimizer]
    beta2: float | None = None
    beta2s: tuple[float, ...] = ()
    elementwise: bool = True
    averages: bool = False
    accumulates: bool = False

    def lr_at(self, lr: float, beta: float, other: float) -> float:
        """The learning rate that makes steps at momentum `other` as long as `lr` does at `beta`."""
        return lr * (1 - other) / (1 - beta) if self.accumulates else lr


@dataclass(frozen=True)
class Arm:
    """What is done around a rule.

    Attributes:
        name: in the names of figures: "<task>.<schedule>.<name>-base.final".
        kind: what the slow weights are.
        k, alpha, momentum, outer_momentum: of Lookahead; `momentum` is what a sync does to the inner one.
        lr_factor: of the learning rate that `build` is given.
        own: the setting that is this arm's alone (decay of an average, evaluation's interpolation of GPA).
        owns: what it may be tuned to.
    """

    name: str
    kind: Kind = "base"
    k: int = 5
    alpha: float = 0.5
    momentum: Momentum = "none"
    outer_momentum: float = 0.0
    lr_factor: float = 1.0
    own: float | None = None
    owns: tuple[float, ...] = ()

    def inner_beta(self, beta: float) -> float:
        """The momentum of the inner rule: none in Schedule-Free, whose interpolation takes its place."""
        return 0.0 if self.kind == "schedule-free" else beta

    def takes(self, beta: float) -> bool:
        """Whether it can be built at a momentum: an interpolation of 0 would train at the average itself."""
        return beta > 0 or self.kind != "schedule-free"

    def serves(self, rule: Rule) -> bool:
        """Whether this arm can be built over a rule."""
        if self.kind == "schedule-free":
            return rule.averages
        # Muon's own buffers, and AdamW's beside it, are not where a wrapper looks for a first moment.
        return self.momentum == "none" or rule.elementwise


def build(
    arm: Arm,
    rule: Rule,
    params: Iterable[Tensor],
    *,
    lr: float,
    beta: float,
    steps: int,
    beta2: float | None = None,
    own: float | None = None,
) -> Optimizer:
    """The optimizer of an arm.

    Args:
        params: of the network; for Muon its matrices are those of two dimensions.
        lr: learning rate of the inner rule at its peak, before `arm.lr_factor`.
        beta: momentum or beta1 of the inner rule; of Schedule-Free the interpolation that takes its place.
        steps: of the whole run, by which a tail average knows where the tail begins.
        beta2: second decay of the rule (RMSprop: its alpha); None: the rule's own.
        own: the arm's own setting; None: `arm.own`.

    Raises:
        ValueError: The arm can't be built over the rule.
    """
    if not arm.serves(rule):
        raise ValueError(f"{arm.name} can't be built over {rule.name}")
    beta2 = rule.beta2 if beta2 is None else beta2
    own = arm.own if own is None else own
    inner_beta = arm.inner_beta(beta)
    base = rule.make(list(params), lr * arm.lr_factor, inner_beta, 0.0 if beta2 is None else beta2)
    if arm.kind == "lookahead":
        # Without momentum there is none to treat, and rules that sum gradients then keep no buffer for it.
        momentum = arm.momentum if inner_beta else "none"
        return Lookahead(base, arm.k, arm.alpha, momentum, outer_momentum=arm.outer_momentum)
    if arm.kind == "ema":
        assert own is not None
        # A short run is shorter than the average's memory of where it began: without warm-up it would carry that.
        return EMA(base, own, warmup=True)
    if arm.kind == "tail":
        assert own is not None
        return EMA(base, "uniform", start=round((1 - own) * steps))
    if arm.kind == "gpa":
        assert own is not None
        return GPA(base, 0.7, own)
    if arm.kind == "schedule-free":
        return ScheduleFree(base, beta)
    return base


def slow_weights(optimizer: Optimizer) -> AbstractContextManager[Any]:
    """The block in which an arm is evaluated; nothing changes in it where there are no slow weights."""
    block: Callable[[], AbstractContextManager[Any]] = getattr(optimizer, "slow_weights", nullcontext)
    return block()


class MuonAndAdamW(Optimizer):
    """torch.optim.Muon for matrices, AdamW for the rest: one optimizer, as a wrapper wants it.

    Muon's update is scaled to the size that AdamW's has, so that one learning rate serves both. AdamW's betas stay at
    their defaults: `momentum` is Muon's.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float) -> None:
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        groups = [{"params": part} for part in (matrices, others) if part]
        super().__init__(groups, {"lr": lr})
        self._inner: list[Optimizer] = []
        if matrices:
            self._inner.append(torch.optim.Muon(matrices, lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self._inner.append(AdamW(others, lr, fused=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self._inner, strict=True):
            inner.param_groups[0]["lr"] = group["lr"]  # where schedules set it
            inner.step()
        return loss


def has_muon() -> bool:
    """Whether this torch has Muon (2.9 and newer)."""
    return hasattr(torch.optim, "Muon")


ADAMW = Rule(
    "adamw",
    lambda params, lr, beta, beta2: AdamW(params, lr, (beta, beta2), fused=True),
    0.999,
    (0.95, 0.99, 0.999),
    averages=True,
)
SGDM = Rule("sgd", lambda params, lr, beta, beta2: SGD(params, lr, beta, fused=True), averages=True, accumulates=True)
RADAM = Rule(
    "radam", lambda params, lr, beta, beta2: RAdam(params, lr, (beta, beta2)), 0.999, (0.95, 0.99, 0.999), averages=True
)
RMSPROP = Rule(
    "rmsprop",
    lambda params, lr, beta, beta2: RMSprop(params, lr, beta2, momentum=beta),
    0.99,
    (0.95, 0.99, 0.999),
    accumulates=True,
)
LION = Rule("lion", lambda params, lr, beta, beta2: Lion(params, lr, (beta, beta2)), 0.99, (0.95, 0.98, 0.99))
MUON = Rule("muon", lambda params, lr, beta, beta2: MuonAndAdamW(params, lr, beta), elementwise=False)

RULES: dict[str, Rule] = {rule.name: rule for rule in (ADAMW, SGDM, RADAM, RMSPROP, LION, MUON)}

_LOOKAHEAD = Arm("lookahead", "lookahead")
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base"),
        # With plain SGD inside, Lookahead is SGD at alpha times the learning rate: what else does it do?
        Arm("base-small-lr", lr_factor=_LOOKAHEAD.alpha),
        _LOOKAHEAD,
        replace(_LOOKAHEAD, name="lookahead-pullback", momentum="pullback"),
        replace(_LOOKAHEAD, name="lookahead-reset", momentum="reset"),
        # SNOO's settings for long runs (k 30, step .7) have too few syncs in some hundred steps.
        replace(_LOOKAHEAD, name="outer-momentum", outer_momentum=0.5),
        Arm("ema", "ema", own=0.97, owns=(0.9, 0.97, 0.99)),
        Arm("tail-average", "tail", own=0.25),
        # "Like 4 local steps", "like 8" and longer, by the authors' table.
        Arm("gpa", "gpa", own=0.974, owns=(0.9, 0.974, 0.9869)),
        Arm("schedule-free", "schedule-free"),
    )
}
