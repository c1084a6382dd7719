"""LookaheadAdamW, LookaheadAdam and LookaheadSGD: torch.optim's optimizers with Lookahead fused into the step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import checkpoint, rules
from .slow_weights import SlowWeights, opaque_to_compile
from .table import Table

Pullback = Literal["none", "pullback", "reset"]
Betas = tuple[float, float]

_LOOKAHEAD_ARGUMENTS = """
        foreach, fused, capturable: Accepted and without effect. Every step is fused, and every number that may differ
            between two replays of a captured graph lives on the device.
        differentiable: Must be False.
        k: Inner steps from one sync to the next, an int >= 1. A parameter syncs when its own count of updates is a
            multiple of k.
        alpha: Step size of the slow weights, a float in [0, 1].
        pullback_momentum: What becomes of the first moment at a sync: "none" keeps it, "pullback" interpolates it
            like the weights, "reset" zeroes it.
        master_weights: Keep an fp32 copy of bf16 and fp16 parameters, in which the updates accumulate.
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.

    Every argument may also be given per parameter group. State, in the dtype of computation (fp32; fp64 for fp64
    parameters): `slow_param` beside what torch's class keeps, `slow_momentum` for "pullback", `master_param` for
    `master_weights`, and `step` in fp64. All of it is created in a parameter's first step.

    Raises:
        ValueError: A value is out of bounds, or `differentiable` is True.
        TypeError: A value is of a wrong type.
    """


class _Probe:
    held: dict[str, Any]


def _count_of_one_reference() -> int:
    """What this Python counts for an object that only an attribute refers to."""
    probe = _Probe()
    probe.held = {}
    return sys.getrefcount(probe.held)


_ONE_REFERENCE = _count_of_one_reference()

_Class = TypeVar("_Class", bound=type)


def _documented(cls: _Class) -> _Class:
    """Lookahead's arguments are the same in every class, and stated once."""
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}{_LOOKAHEAD_ARGUMENTS}"
    return cls


class FusedLookahead(SlowWeights):
    """What the classes share: the table, the step and the checkpoints. A subclass names its rule."""

    rule: rules.Rule
    settings = rules.Settings()

    def __init__(self, params: ParamsT, defaults: dict[str, Any], differentiable: bool) -> None:
        if differentiable:
            raise ValueError("differentiable must be False, got True: a fused step cannot be differentiated through")
        self._table = Table(self.rule, self.settings)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as in torch.optim; raises what the constructor raises."""
        if param_group.get("differentiable"):
            raise ValueError("differentiable must be False, got True: a fused step cannot be differentiated through")
        self._table.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for switch in checkpoint.TORCH_SWITCHES:
            self.param_groups[-1].pop(switch, None)

    @opaque_to_compile
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Advances every parameter that has a gradient by one step, and syncs those whose turn it is.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.optim; it may return None.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: Inside `slow_weights()`, or a named backend cannot serve.
            TypeError: A gradient is sparse, complex or not floating-point.
            ValueError: A hyperparameter was set to a value out of bounds.
        """
        self._refuse_inside_slow_weights("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What torch.amp.GradScaler sets on an optimizer that unscales in its own step.
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self._table.advance(self.param_groups, self._state, grad_scale, found_inf, deep=self._state_was_read)
        if self._state_was_read and sys.getrefcount(self._state) <= _ONE_REFERENCE:
            self._state_was_read = not self._table.state_is_private(self._state)
        return loss

    # Whoever wants to replace or move a state tensor has to come by here for it. A step looks at the state tensors
    # only after somebody did, and until nobody holds any: there are several times as many as parameters, and looking
    # at each would cost more than a small model's step.
    _state_was_read = True

    @property
    def state(self) -> Any:
        """Each parameter's state, as in torch.optim."""
        self._state_was_read = True
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state_was_read = True
        self._state = state

    _step_supports_amp_scaling = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of the torch.optim class whose name it carries.

        State keeps the precision it was saved in, and is copied. Slow weights that the checkpoint lacks start in the
        next step, at what the parameters are then. The choice of backends stays.

        Raises:
            RuntimeError: Inside `slow_weights()`.
            ValueError: The checkpoint's groups are not this optimizer's.
        """
        self._refuse_inside_slow_weights("load_state_dict()")
        checkpoint.load(self, super().load_state_dict, state_dict, self.settings)
        self._table.invalidate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch writes these past the property.
        super().__setstate__({("_state" if key == "state" else key): value for key, value in state.items()})
        self._state_was_read = True
        self._table = Table(self.rule, self.settings)
        for group in self.param_groups:
            for key in self._own_keys():
                group.setdefault(key, self.defaults[key])

    def _own_keys(self) -> tuple[str, ...]:
        return tuple(key for key in self.defaults if key not in checkpoint.TORCH_SWITCHES)


@_documented
class LookaheadAdam(FusedLookahead):
    """Adam (Kingma and Ba 2015, algorithm 1) with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: Decay rates of the two moments, a pair of floats in [0, 1).
        eps: Added to the denominator, a float >= 0.
        weight_decay: L2 penalty, a float >= 0.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018, algorithm 2).
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Decay as AdamW does."""

    rule = rules.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "k": k,
            "alpha": alpha,
            "pullback_momentum": pullback_momentum,
            "master_weights": master_weights,
            "backend": backend,
        }
        super().__init__(params, defaults, differentiable)


@_documented
class LookaheadAdamW(LookaheadAdam):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: Decay rates of the two moments, a pair of floats in [0, 1).
        eps: Added to the denominator, a float >= 0.
        weight_decay: Decoupled weight decay, a float >= 0.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018, algorithm 2).
        maximize: Ascend instead of descend."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            differentiable=differentiable,
            decoupled_weight_decay=True,
            k=k,
            alpha=alpha,
            pullback_momentum=pullback_momentum,
            master_weights=master_weights,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # As torch's AdamW does: a checkpoint of Adam does not turn this class into Adam.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


@_documented
class LookaheadSGD(FusedLookahead):
    """SGD, as torch.optim.SGD defines it, with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        momentum: Decay rate of the momentum buffer, a float >= 0; with 0 there is no buffer.
        dampening: How much of a gradient is kept out of the buffer, a float.
        weight_decay: L2 penalty, a float >= 0.
        nesterov: Nesterov's form; needs momentum and no dampening.
        maximize: Ascend instead of descend."""

    rule = rules.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
        master_weights: bool = False,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "k": k,
            "alpha": alpha,
            "pullback_momentum": pullback_momentum,
            "master_weights": master_weights,
            "backend": backend,
        }
        super().__init__(params, defaults, differentiable)
