"""Optimizers of every kind between two syncs, for the tests of eval() and train()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    LOOKAHEAD_CLASSES,
    BackendCase,
    UnfusedRMSprop,
    make_optimizer,
    same_tensor_bits,
)
from runs import advance, fresh
from test_interrupts import at_all_moments, usual_handler  # noqa: F401

from lookahead_fused import EMA, GPA, Lookahead, ScheduleFree

Make = Callable[[Any, BackendCase], Any]
SHAPES = ((7,), (3, 5), (0,), (), (4,))
CUT, END = 7, 14  # between two syncs, and after one more
MOMENTUM = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.9}, "adamw": {"pullback_momentum": "pullback"}}


def of_class(rule: str, **changes: Any) -> Make:
    hyper = {"lr": 0.1, "k": 5, **MOMENTUM.get(rule.removeprefix("wrapped-"), {}), **changes}
    alpha = "lookahead_alpha" if rule.endswith("rmsprop") else "alpha"
    return lambda params, backend: make_optimizer(rule, params, backend, **{alpha: 0.3}, **hyper)


MAKERS: dict[str, Make] = {
    **{rule: of_class(rule) for rule in LOOKAHEAD_CLASSES},
    "outer momentum": of_class("sgd", outer_momentum=0.5),
    "wrapped-adamw": of_class("wrapped-adamw"),
    "wrapped-sgd": of_class("wrapped-sgd"),
    "external": lambda params, b: Lookahead(UnfusedRMSprop(params, lr=0.1), 5, 0.3, "none", backend=b.name),
    "ema": lambda params, b: EMA(torch.optim.AdamW(params, lr=0.1), 0.7, backend=b.name),
    "ema every 3": lambda params, b: EMA(torch.optim.SGD(params, lr=0.1), 0.7, every=3, backend=b.name),
    "gpa": lambda params, b: GPA(torch.optim.AdamW(params, lr=0.1), backend=b.name),
    "gpa external": lambda params, b: GPA(torch.optim.NAdam(params, lr=0.1), 0.5, 0.8, backend=b.name),
    "schedule-free": lambda params, b: ScheduleFree(torch.optim.SGD(params, lr=0.1), backend=b.name),
    "schedule-free external": lambda params, b: ScheduleFree(UnfusedRMSprop(params, lr=0.1), 0.6, r=1, backend=b.name),
    "ema external": lambda params, b: EMA(torch.optim.NAdam(params, lr=0.1), "uniform", start=2, backend=b.name),
}
MASTER = {f"{rule} with master": of_class(rule, master_weights=True) for rule in ("adamw", "sgd", "lion")}
MASTER["gpa with master"] = lambda params, b: GPA(
    torch.optim.AdamW(params, lr=0.1), 0.5, 0.8, master_weights=True, backend=b.name
)
CASES = [(name, MAKERS[name], torch.float32) for name in MAKERS]
CASES += [(name, MAKERS[name], torch.bfloat16) for name in ("adamw", "sgd", "wrapped-adamw", "external", "ema")]
CASES += [(name, MASTER[name], torch.bfloat16) for name in MASTER]
CASES += [("external", MAKERS["external"], torch.float64), ("adamw", MAKERS["adamw"], torch.float16)]
of_each = pytest.mark.parametrize(("make", "dtype"), [pytest.param(m, d, id=f"{n}-{d}") for n, m, d in CASES])
FEW = ("adamw", "wrapped-adamw", "external", "ema")
of_few = pytest.mark.parametrize("name", FEW)


def begun(
    make: Make, backend: BackendCase, dtype: torch.dtype = torch.float32, steps: int = CUT
) -> tuple[Any, list[torch.nn.Parameter]]:
    """An optimizer between two syncs, whose last parameter never had a gradient."""
    params = fresh(backend, dtype, SHAPES)
    optimizer = make(params, backend)
    advance(optimizer, params[:-1], range(steps))
    return optimizer, params


def slow_weights_of(optimizer: Any, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """In the parameters' dtype; of one without a step, what it is."""
    slow = {id(p): s for p, s in optimizer._table.slow_weights(optimizer.param_groups, optimizer.state)}
    found = [slow.get(id(p), p).to(p.dtype, copy=True) for p in params]
    assert any(not torch.equal(p, s) for p, s in zip(params, found, strict=True))
    return found


def assert_hold(params: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        assert same_tensor_bits(p, value)


def values_of(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def without_train_params(saved: dict[str, Any]) -> dict[str, Any]:
    state = {i: {name: v for name, v in own.items() if name != "train_param"} for i, own in saved["state"].items()}
    return {**saved, "state": state}


def hooks_of(optimizer: Any) -> int:
    return len(getattr(optimizer, "base_optimizer", optimizer)._optimizer_state_dict_post_hooks)
