"""What the tests of the CUDA backend on the host share; see `cuda_on_host` for the stand-in itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BackendCase, can_set_grad_dtype, make_grads, set_grad

from bench import cuda_on_host

HOST = BackendCase(cuda_on_host.NAME, "cpu", 0.0)
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "k": 3},
    "adam": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 3},
    "sgd": {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "pullback_momentum": "reset",
        "outer_momentum": 0.5,
        "k": 3,
    },
}
# For fewer of the tests: a walk is the same for every rule.
FURTHER: dict[str, dict[str, Any]] = {
    "rmsprop": {"lr": 0.1, "momentum": 0.9, "centered": True, "pullback_momentum": "pullback", "k": 3},
    "radam": {"lr": 0.1, "betas": (0.9, 0.8), "weight_decay": 0.1, "k": 3},
    "lion": {"lr": 0.1, "weight_decay": 0.1, "pullback_momentum": "reset", "k": 3},
}
# What goes with narrow moments: one that is taken off another does not.
NARROW = {rule: {n: v for n, v in hyper.items() if n != "centered"} for rule, hyper in (RULES | FURTHER).items()}
narrow_dtypes = pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, True),
        (torch.float16, torch.float32, False),
    ],
)


def skip_unless_kept(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")


def set_grads(params: list[torch.nn.Parameter], generator: torch.Generator, dtype: torch.dtype | None = None) -> None:
    for p, g in zip(params, make_grads(params, generator=generator, dtype=dtype), strict=True):
        set_grad(p, g)
