"""Lookahead(base_optimizer): Lookahead around any optimizer, and fused with the step of the ones we have a rule for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from . import checkpoint, rules
from .optimizers import Pullback
from .rows import start_slow
from .slow_weights import SlowWeights, opaque_to_compile
from .step_hooks import call_with_hooks
from .table import Table

# The base keeps its own names in the groups, and RMSprop and ASGD have an alpha.
SETTINGS = rules.Settings(prefix="lookahead_")

# By exact type: a subclass may step differently.
_FUSED = {Adam: rules.ADAM, AdamW: rules.ADAMW, SGD: rules.SGD}

# Under these names optimizers keep the first moment, which pullback and reset act on.
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class Lookahead(SlowWeights):
    """Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1) around another optimizer.

    Over torch's Adam, AdamW and SGD a step is fused, on the base's own groups and state; its `step` is not called,
    its hooks are. Over any other optimizer a step is `base.step()` and then one fused sync.

    `param_groups`, `state` and `defaults` are the base's, so that it does not matter whether a scheduler, a hook or a
    checkpoint is attached to the base or to this, or when. Lookahead's settings are kept in the groups as
    `lookahead_k`, `lookahead_alpha`, `lookahead_pullback_momentum` and `lookahead_backend`, and may be set there per
    group; its state beside the base's, as `slow_param`, for pullback `slow_momentum`, and over an optimizer that is
    not fused `lookahead_step`.

    Args:
        base_optimizer: The optimizer that makes the inner steps.
        k: Inner steps from one sync to the next, an int >= 1.
        alpha: Step size of the slow weights, a float in [0, 1].
        pullback_momentum: What becomes of the first moment at a sync: "none" keeps it, "pullback" interpolates it like
            the weights, "reset" zeroes it.
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer, or is a Lookahead already.
        ValueError: A value is out of bounds, or the base is differentiable.
    """

    base_optimizer: Optimizer
    _own_defaults: dict[str, Any]

    def __init__(
        self,
        base_optimizer: Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
        *,
        backend: str = "auto",
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer must be a torch.optim.Optimizer, got {base_optimizer!r} of type "
                f"{type(base_optimizer).__name__}"
            )
        if isinstance(base_optimizer, SlowWeights):
            raise TypeError(f"base_optimizer must not be a Lookahead itself, got {type(base_optimizer).__name__}")
        if any(group.get("differentiable") for group in base_optimizer.param_groups):
            raise ValueError("base_optimizer must not be differentiable: a fused step cannot be differentiated through")
        self._own_defaults = {
            SETTINGS.k: k,
            SETTINGS.alpha: alpha,
            SETTINGS.pullback_momentum: pullback_momentum,
            SETTINGS.backend: backend,
        }
        self.__setstate__({"base_optimizer": base_optimizer, "_own_defaults": self._own_defaults})
        for group in base_optimizer.param_groups:
            self._table.check_group({**self._own_defaults, **group})
        self._complete_groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups, whichever list that is by now."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state, with Lookahead's beside it."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults and Lookahead's, as a new dict."""
        return {**self.base_optimizer.defaults, **self._own_defaults}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the base, as in torch.optim; raises what the constructor raises."""
        if param_group.get("differentiable"):
            raise ValueError("differentiable must be False, got True: a fused step cannot be differentiated through")
        self._table.check_group({**self.defaults, **param_group})
        self.base_optimizer.add_param_group(param_group)
        self._complete_groups()

    @opaque_to_compile
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer on every parameter with a gradient, and a sync of those whose turn it is.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.optim; it may return None.

        Returns:
            What the base's step would return: the closure's loss, or None.

        Raises:
            RuntimeError: Inside `slow_weights()`, or a named backend cannot serve.
            TypeError: A gradient is sparse, complex or not floating-point, and the base is fused.
            ValueError: A hyperparameter was set to a value out of bounds, or pullback_momentum names a moment that
                the base does not keep.
        """
        self._refuse_inside_slow_weights("step()")
        self._complete_groups()
        return self._step_fused(closure) if self._is_fused else self._step_around(closure)

    @property
    def _is_fused(self) -> bool:
        return type(self.base_optimizer) in _FUSED

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler asks for this: who unscales, and who looks at found_inf, is the one that steps."""
        return self._is_fused or bool(getattr(self.base_optimizer, "_step_supports_amp_scaling", False))

    def _step_fused(self, closure: Callable[[], Any] | None) -> Any:
        def step(base: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._table.advance(self.param_groups, self.state, *self._amp())
            return loss

        base = self.base_optimizer
        # A scheduler on the base wants to know that it stepped, and hooks on it want to be called.
        base._opt_called = True  # type: ignore[attr-defined]
        return call_with_hooks(step, base, *(() if closure is None else (closure,)))

    def _step_around(self, closure: Callable[[], Any] | None) -> Any:
        base, state = self.base_optimizer, self.state
        started = self._start_slow_weights(closure is not None)
        grad_scale, found_inf = self._amp()
        forwarded = {"grad_scale": grad_scale, "found_inf": found_inf} if found_inf is not None else {}
        for name, value in forwarded.items():
            setattr(base, name, value)
        try:
            loss = base.step() if closure is None else base.step(closure)
        finally:
            for name in forwarded:
                delattr(base, name)
        if found_inf is None or found_inf.device.type != "cpu" or found_inf.item() == 0:
            for param, entries in started:
                if param.grad is not None:
                    state[param].update(entries)
            self._find_first_moment()
            self._table.advance(self.param_groups, state, None, found_inf)
        return loss

    def _amp(self) -> tuple[Tensor | None, Tensor | None]:
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _start_slow_weights(self, gradients_come: bool) -> list[tuple[Tensor, dict[str, Any]]]:
        """phi_0 = theta_0, taken before the base moves theta, and kept out of its state until it has stepped.

        Many optimizers take a state that is not empty for one that they made.

        Args:
            gradients_come: The base will evaluate a closure, and any parameter may get a gradient.
        """
        if not gradients_come and self._table.is_current(self.param_groups, self.state):
            return []
        started = []
        for group in self.param_groups:
            for param in group["params"]:
                own = self.state.get(param, {})
                takes_part = param.grad is not None or (gradients_come and param.requires_grad)
                if takes_part and own.get("slow_param") is None:
                    moment = next((own[name] for name in _FIRST_MOMENTS if isinstance(own.get(name), Tensor)), None)
                    started.append((param, start_slow(param, moment, group[SETTINGS.pullback_momentum] == "pullback")))
        return started

    def sync(self) -> None:
        """Interpolates now: every parameter that had a step gets phi <- phi + alpha (theta - phi), theta <- phi.

        Step counts stay, so the next sync of the rhythm comes when it would have come.

        Raises:
            RuntimeError: Inside `slow_weights()`.
            ValueError: pullback_momentum names a moment that the base does not keep.
        """
        if not self._is_fused and any("slow_param" in own for own in self._states()):
            self._find_first_moment()
        super().sync()

    def _states(self) -> Iterator[dict[str, Any]]:
        """The parameters' states; an optimizer may keep something else beside them."""
        return (own for own in self.state.values() if isinstance(own, dict))

    def _find_first_moment(self) -> None:
        """Which of the base's tensors is the first moment shows once it has made one."""
        if all(group[SETTINGS.pullback_momentum] == "none" for group in self.param_groups):
            return
        names = {name for own in self._states() for name in _FIRST_MOMENTS if isinstance(own.get(name), Tensor)}
        if not names:
            raise ValueError(
                f"{SETTINGS.pullback_momentum} must be 'none' over {type(self.base_optimizer).__name__}, which keeps "
                f"no first moment under one of the names {', '.join(_FIRST_MOMENTS)}"
            )
        name = next(name for name in _FIRST_MOMENTS if name in names)
        if self._table.rule.moments != (name,):
            self._table = Table(rules.sync_only(SETTINGS, name), SETTINGS)

    def _complete_groups(self) -> None:
        """A group that was added to the base, or loaded from a checkpoint of it, lacks entries of Lookahead."""
        for group in self.param_groups:
            if not self._own_defaults.keys() <= group.keys():
                for key, value in self._own_defaults.items():
                    group.setdefault(key, value)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with Lookahead's entries among its groups and state."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict: dict[str, Any] = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this, or of the base alone; its slow weights then start in the next step.

        Raises:
            RuntimeError: Inside `slow_weights()`.
            ValueError: The checkpoint's groups are not the base's.
        """
        self._refuse_inside_slow_weights("load_state_dict()")
        # A shallow copy, as torch gives its hooks, which may write into it.
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        base = self.base_optimizer
        exact_names = None if self._is_fused else (self._table.rule.step_name, "slow_param", "slow_momentum")
        checkpoint.load(base, base.load_state_dict, state_dict, SETTINGS, exact_names)
        self._complete_groups()
        self._table.invalidate()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def _state_keeper(self) -> Optimizer:
        return self.base_optimizer

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_slow_weights("copying or pickling")
        return {"base_optimizer": self.base_optimizer, "_own_defaults": self._own_defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # This and not Optimizer.__init__, which would give this optimizer groups and state of its own: it sets up the
        # hooks and the profiling of step(), and leaves groups and state alone.
        super().__setstate__(state)
        base = self.base_optimizer
        rule = _FUSED.get(type(base)) or rules.sync_only(SETTINGS, _FIRST_MOMENTS[0])
        self._table = Table(rule, SETTINGS)
