"""What the tests of the CUDA backend on the host share; see `cuda_on_host` for the stand-in itself."""

from __future__ import annotations

from typing import Any

import torch
from helpers import BackendCase, make_grads, set_grad

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


def set_grads(params: list[torch.nn.Parameter], generator: torch.Generator, dtype: torch.dtype | None = None) -> None:
    for p, g in zip(params, make_grads(params, generator=generator, dtype=dtype), strict=True):
        set_grad(p, g)
