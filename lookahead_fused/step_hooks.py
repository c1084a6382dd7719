"""Step hooks and the profiler's name for a step, at no price where nobody asked for them.

torch enters a profiler range around every step of an optimizer, whether or not a profiler runs. That is 7 of the 12
microseconds that a step of one tensor takes, and 34 of 50 where the caches have seen a backward pass meanwhile
(measured on a Xeon with AMX, torch 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch._C._autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Step = Callable[..., Any]


def with_hooks(step: Step) -> Step:
    """A class's step, with what torch would put around it."""

    @functools.wraps(step)
    def stepped(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return call_with_hooks(step, optimizer, *args, **kwargs)

    return stepped


def call_with_hooks(step: Step, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    """One step of an optimizer: its hooks and the global ones are called, and a profiler sees it under its name."""
    if _is_watched(optimizer):
        step = Optimizer.profile_hook_step(step)
    return step(optimizer, *args, **kwargs)


def _is_watched(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or _profiler_enabled()
    )
