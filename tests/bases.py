"""The optimizers of torch that Lookahead has no rule for and only wraps, and how each of them is stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers import UnfusedRMSprop
from runs import gradients_of
from torch import Tensor

K, ALPHA = 3, 0.3
# Muon takes matrices only.
SHAPES = ((4, 6), (3, 2))
# Every other optimizer of torch, and one of a class of its own: how it is made, and the first moment that it keeps.
GENERIC: dict[str, tuple[dict[str, Any], str]] = {
    "ASGD": ({"lr": 0.1, "alpha": 0.6, "t0": 2.0}, ""),
    "Adadelta": ({"lr": 0.5}, ""),
    "Adafactor": ({"lr": 0.1}, ""),
    "Adagrad": ({"lr": 0.1}, ""),
    "Adamax": ({"lr": 0.1}, "exp_avg"),
    "LBFGS": ({"lr": 0.1, "max_iter": 3}, ""),
    "Muon": ({"lr": 0.1}, "momentum_buffer"),
    "NAdam": ({"lr": 0.1}, "exp_avg"),
    "UnfusedRMSprop": ({"lr": 0.1, "alpha": 0.7, "momentum": 0.9}, "momentum_buffer"),
    "Rprop": ({"lr": 0.1}, ""),
    "SparseAdam": ({"lr": 0.1}, "exp_avg"),
}
CLASSES = {name: getattr(torch.optim, name) for name in GENERIC if hasattr(torch.optim, name)}
CLASSES["UnfusedRMSprop"] = UnfusedRMSprop
HERE = [name for name in GENERIC if name in CLASSES]
WITH_MOMENT = [name for name in HERE if GENERIC[name][1]]


def make_base(name: str, params: Any, **changes: Any) -> torch.optim.Optimizer:
    return CLASSES[name](params, **{**GENERIC[name][0], **changes})


def inner_step(optimizer: torch.optim.Optimizer, name: str, params: Sequence[Tensor], step: int) -> Any:
    """One step, by gradients or by a closure, as the base wants it."""
    grads = gradients_of(step, params)
    if name == "LBFGS":

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(((p - g) ** 2).sum() for p, g in zip(params, grads, strict=True))
            loss.backward()
            return loss

        return optimizer.step(closure)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to_sparse() if name == "SparseAdam" else g
    return optimizer.step()
