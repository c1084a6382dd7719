"""GPA(base_optimizer) and ScheduleFree(base_optimizer): averaging at every step, around any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _policies as policies
from ._norm import GlobalNorm, documents_norm
from ._offload import documents_offload
from ._policies import StateDtype
from ._state_dtype import documents_state_dtype
from ._swap import Swap
from ._wrapper import Wrapper


class Averaged(Wrapper):
    """What the two share: the parameter is y, the base steps z, and `slow_weights()` gives x."""

    # y and z in each other's place, while a base steps z.
    _traded: Swap | None = None

    def _step_around(self, closure: Callable[[], Any] | None) -> Any:
        try:
            return super()._step_around(closure)
        except BaseException:
            if self._traded is not None:
                self._traded.leave()
            raise
        finally:
            self._traded = None

    def _step_base(self, closure: Callable[[], Any] | None, started: list[tuple[Tensor, dict[str, Any]]]) -> Any:
        """The gradient is taken at y, and the base steps z: what it would take again, in a closure, would be at z.

        Afterwards the parameter holds the new z, and the state y, which the policy's pass no longer needs.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _, found_inf = self._amp()
        if found_inf is None or found_inf.item() == 0:
            begins = {id(param): entries for param, entries in started}
            pairs = [
                (param, begins.get(id(param), self.state.get(param, {}))[self.policy.slow])
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            ]
            traded = Swap(pairs)
            traded.enter()
            self._traded = traded
        returned = self.base_optimizer.step()
        return returned if closure is None else loss


_SHARED = """
    Over torch's Adam, AdamW, SGD, RAdam and RMSprop and over `Lion` a step is fused, on the base's own groups and
    state; its `step` is not called, its hooks are, and x follows from y and z. Over any other optimizer the base steps
    z, and x is kept beside it; a closure is then evaluated once, before that. `with optimizer.slow_weights():`
    evaluates on x. Weight decay acts on z. A checkpoint that is saved on x carries y too, and has a run that loads it
    call `train()` first.

    `param_groups`, `state` and `defaults` are the base's, so that it does not matter whether a scheduler, a hook or a
    checkpoint is attached to the base or to this, or when; its other public methods and attributes can be reached here
    too. The settings are kept in the groups under the names of the arguments after `{prefix}`, and may be set there per
    group; the state beside the base's, as {state}, over an optimizer that is not fused also `x` and `{prefix}step`.
"""


def _shared(state: str) -> Callable[[type[Averaged]], type[Any]]:
    def documented(cls: type[Averaged]) -> type[Any]:
        shared = _SHARED.strip("\n").format(prefix=cls.policy.prefix, state=state)
        cls.__doc__ = (cls.__doc__ or "").replace("    {shared}", shared)
        return documents_offload(documents_norm(documents_state_dtype(cls)))

    return documented


@_shared("`z` and `y_interp`")
class GPA(Averaged):
    """Generalized Primal Averaging (arXiv 2512.17131) around another optimizer: x <- z + mu_x (x - z) after the base's
    step of z, and y <- z + mu_y (x - z), where the next gradient is taken.

    {shared}

    Args:
        base_optimizer: The optimizer that makes the inner steps.
        train_interp: mu_y, a float in (0, 1]: where y lies from z to x. This and the next may be tensors of one
            element, read where they lie in every step.
        eval_interp: mu_x, a float in [0, 1]: how much of the average stays in a step. The authors take 0.974, 0.9869,
            0.9934, 0.9967 and 0.9984 for what 4, 8, 16, 32 and 64 inner steps are to DiLoCo.
        master_weights: Keep fp32 masters of bf16 and fp16 parameters, in which the updates accumulate; they are refused
            without, since x follows from y and 16 bits are too few for that. Of a bf16 one the state has `master_low`,
            the 16 bits that the parameter lacks: it is the master rounded to the nearest, ties away from zero. Of an
            fp16 one it has the whole, `master_param`. Not around an optimizer whose step is its own.
        {state_dtype}
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.
        {offload}
        {norm}

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer, has slow weights of its own, or keeps its state
            elsewhere (ZeroRedundancyOptimizer); a parameter has 16 bits and no master.
        ValueError: A value is out of bounds, or the base is differentiable.

    Example:
        >>> optimizer = GPA(torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> optimizer.step()
        >>> with optimizer.slow_weights():
        ...     evaluate(model)
    """

    policy = policies.Gpa(prefix="gpa_")

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        train_interp: float = 0.7,
        eval_interp: float = 0.9967,
        *,
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
            train_interp=train_interp,
            eval_interp=eval_interp,
            master_weights=master_weights,
            state_dtype=state_dtype,
            backend=backend,
            offload_slow=offload_slow,
        )


@_shared("`z`, `y_interp`, `weight_sum` and `lr_max`")
class ScheduleFree(Averaged):
    """Schedule-Free (Defazio et al. 2024, arXiv 2405.15682) around another optimizer: x is the weighted mean of all z,
    and y <- z + beta (x - z), where the next gradient is taken.

    Step t weighs t^r times the largest learning rate so far to the power `weight_lr_power`. The published AdamW is this
    around ``torch.optim.AdamW(..., betas=(0.0, 0.999))``: beta plays the part of its first moment. It wants no schedule
    of the learning rate but a warm-up.

    {shared}

    Args:
        base_optimizer: The optimizer that makes the inner steps.
        interp: beta, a float in (0, 1]: where y lies from z to x; or a tensor of one element that holds it.
        r: Power of the step in a sample's weight, an int >= 0.
        weight_lr_power: Power of the largest learning rate in it, an int >= 0.
        master_weights: Keep fp32 masters of bf16 and fp16 parameters, in which the updates accumulate; they are refused
            without, since x follows from y and 16 bits are too few for that. Of a bf16 one the state has `master_low`,
            the 16 bits that the parameter lacks: it is the master rounded to the nearest, ties away from zero. Of an
            fp16 one it has the whole, `master_param`. Not around an optimizer whose step is its own.
        {state_dtype}
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.
        {offload}
        {norm}

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer, has slow weights of its own, or keeps its state
            elsewhere (ZeroRedundancyOptimizer); a parameter has 16 bits and no master.
        ValueError: A value is out of bounds, or the base is differentiable.

    Example:
        >>> optimizer = ScheduleFree(torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.0, 0.999)))
        >>> optimizer.step()
        >>> with optimizer.slow_weights():
        ...     evaluate(model)
    """

    policy = policies.ScheduleFree(prefix="schedule_free_")

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        interp: float = 0.9,
        *,
        r: int = 0,
        weight_lr_power: int = 2,
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
            interp=interp,
            r=r,
            weight_lr_power=weight_lr_power,
            master_weights=master_weights,
            state_dtype=state_dtype,
            backend=backend,
            offload_slow=offload_slow,
        )
