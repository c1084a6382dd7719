"""What the optimizers with Lookahead fused into their step share; each of them stands in `_optimizers.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import _checkpoint as checkpoint
from . import _rules as rules
from ._hooked import Hooked
from ._norm import GlobalNorm, documents_norm
from ._offload import documents_offload
from ._policies import Lookahead
from ._slow_weights import Interpolating
from ._state_dtype import documents_state_dtype
from ._table import Table
from ._workers import Workers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pullback = Literal["none", "pullback", "reset"]
Betas = tuple[float, float]

_LOOKAHEAD_ARGUMENTS = """
        foreach, capturable: Accepted and without effect: every number that may differ between two replays of a captured
            graph lives on the device.
        fused: False has a GradScaler unscale the gradients before the step, as it does for torch's own class, so that
            they can be clipped in between. Else the step unscales them itself. Either way it is fused.
        differentiable: Must be False.
        k: Inner steps from one sync to the next, an int >= 1. A parameter syncs when its own count of updates is a
            multiple of k.
        alpha: Step size of the slow weights, a float in [0, 1], with outer momentum in [0, 2]; or a tensor of one
            element that holds it, read where it lies in every step.
        pullback_momentum: What becomes of the first moment at a sync: "none" keeps it, "pullback" interpolates it
            like the weights, "reset" zeroes it.
        outer_momentum: Momentum mu of the slow weights, a float in [0, 1): at a sync s = phi - theta, b <- mu b + s,
            phi <- phi - alpha (s + mu b) (SNOO, arXiv 2510.15830; DiLoCo's outer step, arXiv 2311.08105). 0 keeps no
            buffer.
        outer_nesterov: False leaves Nesterov's form: phi <- phi - alpha b.
        master_weights: Keep fp32 masters of bf16 and fp16 parameters, in which the updates accumulate. Of a bf16 one
            the state has `master_low`, the 16 bits that the parameter lacks: it is the master rounded to the nearest,
            ties away from zero. Of an fp16 one it has the whole, `master_param`.
        {state_dtype}
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.
        {offload}
        {norm}
        process_group: A torch.distributed group of workers that train apart and meet at the syncs (local SGD; SlowMo,
            arXiv 1910.00643; DiLoCo with outer momentum): the mean of theta over them takes theta's place before a
            sync, which sends 1/k of the bytes of data-parallel training. It is a mean of the weights as they are kept
            (the master where there is one), made in the compute dtype and rounded to theirs. All workers start from the
            same weights and step the same parameters, which are no DTensors; each has its own moments and `step`, in a
            checkpoint of its own. `found_inf` and what `skip_nonfinite` skips is agreed on; with fused=False each
            worker's scaler skips alone. A sync takes one more copy of the weights in the compute dtype, a step waits
            for the device to tell `step`, and none can be captured in a CUDA graph. It is the whole optimizer's, not a
            group's, and neither a state dict nor a copy nor a pickle has it. A worker that does not come to a sync is
            an error of torch.distributed's, after which nothing has changed; where one is lost amid the mean, the inner
            step stays, and `sync()` makes up for its sync.

    Every argument but these three may also be given per parameter group. State, in the dtype of computation (fp32;
    fp64 for fp64 parameters) or in `state_dtype`: `slow_param` beside what torch's class keeps, `cached_momentum` for
    "pullback", `outer_momentum_buffer` for `outer_momentum`, for `master_weights` `master_low` in int16 or
    `master_param`, and `step` in fp64. All of it is created in a parameter's first step.

    Raises:
        ValueError: A value is out of bounds, or `differentiable` is True.
        TypeError: A value is of a wrong type.
    """


_Class = TypeVar("_Class", bound="type[FusedLookahead]")


def documented(cls: _Class) -> _Class:
    """Lookahead's arguments are the same in every class but for the name of alpha, and stated once."""
    arguments = _LOOKAHEAD_ARGUMENTS.replace(" alpha: ", f" {cls.policy.alpha}: ")
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}{arguments}"
    return documents_offload(documents_norm(documents_state_dtype(cls)))


def _after_save(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    table: Table = optimizer._table  # type: ignore[attr-defined]
    return checkpoint.saved(state_dict, optimizer.param_groups, table.rule)


class Fused(Hooked):
    """What the classes share: the table, the step and the checkpoints. A subclass names its rule and its policy."""

    rule: rules.Rule

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        norm: GlobalNorm,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        checkpoint.check_switches({"differentiable": differentiable, "fused": fused})
        self._table = Table(self.rule, self.policy)
        self._norm = norm
        self._fused = fused
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as in torch.optim; raises what the constructor raises."""
        checkpoint.check_switches(param_group)
        self._table.check_group({**self.defaults, **param_group})
        self._check_group(param_group, {})
        super().add_param_group(param_group)
        for switch in checkpoint.TORCH_SWITCHES:
            self.param_groups[-1].pop(switch, None)

    def _patch_step_function(self) -> None:
        # Called where hooks can be registered: in a constructor, in unpickling, and in loading once more.
        super()._patch_step_function()
        if _after_save not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(_after_save, prepend=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advances every parameter that has a gradient by one step; with Lookahead, and syncs those whose turn it is.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.optim; it may return None.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: Inside `slow_weights()` or after `eval()`, a named backend cannot serve, or the workers of a
                process group do not sync the same parameters, or host memory for offloaded slow weights could not be
                pinned. Nothing has changed then.
            TypeError: A gradient is sparse, complex or not floating-point.
            ValueError: A hyperparameter was set to a value that nothing can be computed with, a parameter or a state
                tensor has lost its memory, or a gradient does not fit its parameter.
        """
        with self._lock:
            self._refuse_inside_slow_weights("step()")
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            # What torch.amp.GradScaler sets on an optimizer that unscales in its own step.
            grad_scale: Tensor | None = getattr(self, "grad_scale", None)
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            norm = self._norm
            self._advance(grad_scale, found_inf, norm if norm.is_asked else None)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler asks for this: who unscales, and who looks at found_inf, is the one that steps."""
        return self._may_unscale(self._fused)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; it waits for the device where slow weights lie on the host."""
        self._wait_for_hosted()
        state_dict: dict[str, Any] = super().state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of the torch.optim class whose name it carries.

        State keeps the precision it was saved in, and is copied. Slow weights that the checkpoint lacks start in the
        next step, at what the parameters are then. The choices of backends, of `state_dtype` and of where slow weights
        lie stay.

        Raises:
            RuntimeError: Inside `slow_weights()`.
            ValueError: The checkpoint's groups are not this optimizer's, its shards of DTensors are of other ranks, or
                a `master_low` has more than 16 bits.
        """
        with self._lock:
            self._refuse_inside_slow_weights("load_state_dict()", unless_evaluating=True)
            with checkpoint.exactly(self, state_dict, self._table, self._restore_mode):
                super().load_state_dict(state_dict)
            self._table.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fused": self._fused, "_norm": self._norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's loading of a state dict comes by here too, with no such entry: the user's choice stays.
        self.__dict__.setdefault("_fused", None)
        self.__dict__.setdefault("_norm", GlobalNorm())
        super().__setstate__(state)
        self._table = Table(self.rule, self.policy)
        for group in self.param_groups:
            for key in self._own_keys():
                group.setdefault(key, self.defaults[key])

    def _own_keys(self) -> tuple[str, ...]:
        return tuple(key for key in self.defaults if key not in checkpoint.TORCH_SWITCHES)


class FusedLookahead(Fused, Interpolating):
    """A rule with Lookahead."""

    policy = Lookahead()

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        norm: GlobalNorm,
        differentiable: bool = False,
        fused: bool | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._workers = None if process_group is None else Workers(process_group)
        super().__init__(params, defaults, norm, differentiable, fused)
