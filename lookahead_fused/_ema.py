"""EMA(base_optimizer): an average of the weights around any optimizer."""

from __future__ import annotations

from typing import Literal

import torch

from . import _policies as policies
from ._norm import GlobalNorm, documents_norm
from ._offload import documents_offload
from ._policies import StateDtype
from ._state_dtype import documents_state_dtype
from ._wrapper import Wrapper


@documents_norm
@documents_state_dtype
@documents_offload
class EMA(Wrapper):
    """An average of the weights around another optimizer: a <- a + (1 - d) (theta - a).

    Theta does not follow the average: its bits are those of the same steps without one. Over torch's Adam, AdamW, SGD,
    RAdam and RMSprop and over `Lion` a step is fused, on the base's own groups and state; its `step` is not called, its
    hooks are. Over any other optimizer a step is `base.step()` and then one fused pass over the average. `with
    optimizer.slow_weights():` evaluates and saves on the average.

    `param_groups`, `state` and `defaults` are the base's, so that it does not matter whether a scheduler, a hook or a
    checkpoint is attached to the base or to this, or when; its other public methods and attributes can be reached here
    too. The settings are kept in the groups as `ema_decay`, `ema_every`, `ema_start`, `ema_warmup`,
    `ema_master_weights`, `ema_state_dtype`, `ema_backend` and `ema_offload_slow`, and may be set there per group; the
    state beside the base's, as `slow_param` and `average_start`, and over an optimizer that is not fused `ema_step`.
    The base may be stepped alone again at any time.

    Args:
        base_optimizer: The optimizer that makes the inner steps.
        decay: d, a float in [0, 1], with which a sample that is n events old counts d^n; or "uniform", the mean of all
            samples, the first included (SWA: Izmailov et al. 2018; LAWA: Kaddour 2022). A tensor of one element is read
            where it lies in every step.
        every: Steps from one event to the next, an int >= 1. The others do not touch the average.
        start: The average begins as the weights after so many steps of their parameter, an int >= 0; at 0, as they were
            before the first. In a run that goes on without an average (of a checkpoint of the base) it begins where it
            was made, if that is later. Before, `slow_weights()` changes nothing.
        warmup: At the n-th event d = min(decay, (1 + n) / (10 + n)); not with "uniform".
        master_weights: Keep fp32 masters of bf16 and fp16 parameters, in which the updates accumulate. Of a bf16 one
            the state has `master_low`, the 16 bits that the parameter lacks: it is the master rounded to the nearest,
            ties away from zero. Of an fp16 one it has the whole, `master_param`. Not around an optimizer
            whose step is its own.
        {state_dtype}
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.
        {offload}
        {norm}

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer, has slow weights of its own, or keeps its state
            elsewhere (ZeroRedundancyOptimizer).
        ValueError: A value is out of bounds, or the base is differentiable.

    Example:
        >>> optimizer = EMA(torch.optim.AdamW(model.parameters(), lr=3e-4), decay=0.999)
        >>> optimizer.step()
        >>> with optimizer.slow_weights():
        ...     evaluate(model)
    """

    policy = policies.Ema(prefix="ema_")

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        decay: float | Literal["uniform"] = 0.999,
        *,
        every: int = 1,
        start: int = 0,
        warmup: bool = False,
        master_weights: bool = False,
        state_dtype: StateDtype = "float32",
        backend: str = "auto",
        offload_slow: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            base_optimizer,
            GlobalNorm(max_grad_norm, skip_nonfinite),
            decay=decay,
            every=every,
            start=start,
            warmup=warmup,
            master_weights=master_weights,
            state_dtype=state_dtype,
            backend=backend,
            offload_slow=offload_slow,
        )
