"""Slow weights around any optimizer, and fused with the step of the ones that there is a rule for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam, RMSprop

from . import _checkpoint as checkpoint
from . import _rules as rules
from ._door import BaseDoor
from ._entries import start_cached, start_slow
from ._hyperparameters import check_passed
from ._interrupts import uninterrupted
from ._norm import GlobalNorm
from ._norm_around import NormAround, clipped
from ._optimizers import Lion
from ._policies import CACHED, DEFAULT_STATE_DTYPE, Policy
from ._rows import parameter_name
from ._slow_weights import SlowWeights
from ._state_dtype import check_state_dtype
from ._table import Table
from ._tensors import local_tensor
from ._torch import call_with_hooks, keeps_its_state_elsewhere

# By exact type: a subclass may step differently.
_FUSED = {
    Adam: rules.ADAM,
    AdamW: rules.ADAMW,
    SGD: rules.SGD,
    RAdam: rules.RADAM,
    RMSprop: rules.RMSPROP,
    Lion: rules.LION,
}

# Under these names optimizers keep the first moment, which pullback and reset act on.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")


class Wrapper(SlowWeights):
    """What the wrappers share: slow weights around another optimizer, by a policy that a subclass names.

    Over torch's Adam, AdamW, SGD, RAdam and RMSprop and over `Lion` a step is fused, on the base's own groups and
    state; its `step` is not called, its hooks are. Over any other optimizer a step is `base.step()` and then one fused
    pass over the slow weights.

    `param_groups`, `state` and `defaults` are the base's, so that it does not matter whether a scheduler, a hook or a
    checkpoint is attached to the base or to this, or when; its other public methods and attributes can be reached here
    too. The base may be stepped alone again at any time: it then finds its state in the dtypes that torch keeps it in.

    Args:
        base_optimizer: The optimizer that makes the inner steps.
        norm: Of the gradients.
        settings: The policy's, by the names that its user gives them.
    """

    policy: Policy
    base_optimizer: Optimizer
    _own_defaults: dict[str, Any]

    def __init__(self, base_optimizer: Optimizer, norm: GlobalNorm, **settings: Any) -> None:
        _check_base(base_optimizer)
        own = {self.policy.prefix + name: value for name, value in settings.items()}
        table = Table(_FUSED.get(type(base_optimizer)) or self._external(), self.policy)
        check_passed(table.arguments, own)
        self.policy.check(own, **{name: name for name in settings})
        table.check_master(own, "master_weights")
        check_state_dtype(own, table.rule, self.policy, "state_dtype")
        for group in base_optimizer.param_groups:
            table.check_group({**own, **group})
            self._check_group(group, base_optimizer.defaults)
        self.__setstate__({"base_optimizer": base_optimizer, "_own_defaults": own, "_norm": norm})
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
        """The base's state, with the slow weights beside it."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults and this one's, as a new dict."""
        return {**self.base_optimizer.defaults, **self._own_defaults}

    def __getattr__(self, name: str) -> Any:
        # What is looked for before unpickling has set the base must not ask for the base.
        if name.startswith("_") or name == "base_optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the base, as in torch.optim; raises what the constructor raises."""
        checkpoint.check_switches(param_group)
        self._table.check_group({**self.defaults, **param_group})
        self._check_group(param_group, self.base_optimizer.defaults)
        self.base_optimizer.add_param_group(param_group)
        self._complete_groups()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base does it, which may keep gradients elsewhere too."""
        self.base_optimizer.zero_grad(set_to_none)

    def eval(self) -> None:
        with self._lock, uninterrupted():
            was_training, told = not self._evaluating, self._tell_base("eval")
            try:
                super().eval()
            except BaseException:
                if told and was_training:
                    self._tell_base("train")
                raise

    def train(self) -> None:
        with self._lock, uninterrupted():
            super().train()
            self._tell_base("train")

    def _tell_base(self, mode: str) -> bool:
        """Has a base that has modes of its own (a schedule-free one, say) change to one; it acts on what it trains."""
        change = getattr(self.base_optimizer, mode, None)
        if not callable(change):
            return False
        self._on_training_weights(change)
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer on every parameter with a gradient, and the event of those whose turn it is.

        Args:
            closure: Reevaluates the model and returns the loss, as in torch.optim; it may return None.

        Returns:
            What the base's step would return: the closure's loss, or None.

        Raises:
            RuntimeError: Inside `slow_weights()` or after `eval()`, a named backend cannot serve, or host memory for
                offloaded slow weights could not be pinned. Nothing has changed then.
            TypeError: A gradient is sparse, complex or not floating-point, and the base is fused.
            ValueError: A setting or a state is not acceptable, or pullback_momentum names a moment that the base does
                not keep. Nothing has changed then, but where a base has stepped before, and gives a parameter that is
                new to it a moment of another form: the others keep that step.
        """
        with self._lock:
            self._refuse_inside_slow_weights("step()")
            self._complete_groups()
            return self._step_fused(closure) if self._is_fused else self._step_around(closure)

    @property
    def _is_fused(self) -> bool:
        return type(self.base_optimizer) in _FUSED

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch.amp.GradScaler asks for this: who unscales, and who looks at found_inf, is the one that steps."""
        if not self._is_fused:
            return bool(getattr(self.base_optimizer, "_step_supports_amp_scaling", False))
        groups = self.param_groups
        return self._may_unscale(False if any(group.get("fused") is False for group in groups) else None)

    def _step_fused(self, closure: Callable[[], Any] | None) -> Any:
        def step(base: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._advance(*self._amp(), self._asked_norm)
            return loss

        base = self.base_optimizer
        # A scheduler on the base wants to know that it stepped, and hooks on it want to be called.
        base._opt_called = True  # type: ignore[attr-defined]
        with self._door:
            arguments = () if closure is None else (closure,)
            return call_with_hooks(step, base, *arguments, own_hooks=self._door.step_hooks)

    def _step_around(self, closure: Callable[[], Any] | None) -> Any:
        norm, evaluated = self._asked_norm, None
        if norm is not None and closure is not None:
            # The base is to see the gradients clipped, and so cannot make them.
            with torch.enable_grad():
                evaluated = closure()
            closure = None
        base, state = self.base_optimizer, self.state
        self._find_first_moment()
        self._table.check(self.param_groups, state, gradients_come=closure is not None)
        started = self._start_slow_weights(closure is not None)
        grad_scale, found_inf = self._amp()
        clip = None
        if norm is not None:
            clip = self._norm_around.measure(norm, self.param_groups, self.policy.backend, grad_scale, found_inf)
        # Which parameters get gradients in a closure shows when the base has evaluated it.
        turn = self._turn(grad_scale, found_inf, clip) if closure is None else None
        if turn is not None and turn.skips:
            return evaluated
        if norm is not None and norm.skip_nonfinite and not norm.was_finite():
            return evaluated
        forwarded = {"grad_scale": grad_scale, "found_inf": found_inf} if found_inf is not None else {}
        with uninterrupted():
            for name, value in forwarded.items():
                setattr(base, name, value)
            try:
                scaling = clip if self._norm.max_grad_norm is not None else None
                with nullcontext() if scaling is None else clipped(self.param_groups, scaling):
                    loss = self._step_base(closure, started)
            finally:
                for name in forwarded:
                    delattr(base, name)
            if found_inf is None or found_inf.device.type != "cpu" or found_inf.item() == 0:
                self._begin(started)
                self._advance(None, found_inf, None, turn)
        return loss if evaluated is None else evaluated

    def _step_base(self, closure: Callable[[], Any] | None, started: list[tuple[Tensor, dict[str, Any]]]) -> Any:
        """The base's own step, before the policy's pass; `started` are slow weights that begin in it."""
        base = self.base_optimizer
        return base.step() if closure is None else base.step(closure)

    def _amp(self) -> tuple[Tensor | None, Tensor | None]:
        # Not by getattr, which would find the base's.
        return self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")

    def _start_slow_weights(self, gradients_come: bool) -> list[tuple[Tensor, dict[str, Any]]]:
        """phi_0 = theta_0, taken before the base moves theta, and kept out of its state until it has stepped.

        Many optimizers take a state that is not empty for one that they made.

        Args:
            gradients_come: The base will evaluate a closure, and any parameter may get a gradient.
        """
        started = []
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is None and not (gradients_come and param.requires_grad):
                    continue
                own = self.state.get(param, {})
                pullback = self.policy.caches_moment(group)
                moment = own.get(self._table.rule.moments[0]) if pullback else None
                if own.get(self.policy.slow) is None or not self._has_begun(own):
                    count = own.get(self._table.rule.step_name)
                    name = parameter_name(index, position)
                    started.append((param, start_slow(param, moment, self.policy, group, name, count)))
                elif pullback and own.get(CACHED) is None:
                    started.append((param, start_cached(param, moment)))
        return started

    def _has_begun(self, own: dict[str, Any]) -> bool:
        count = own.get(self._table.rule.step_name)
        # Only a state that the base made early can say otherwise, and it keeps the count on the CPU until then.
        return count is None or count.device.type != "cpu" or count.item() != 0

    def _begin(self, started: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """The base has stepped: slow weights that start here are state from now on."""
        fresh = [(param, entries) for param, entries in started if param.grad is not None]
        if not fresh:
            return
        try:
            self._find_first_moment(made=True)
            self._table.check(self.param_groups, self.state)
        except (TypeError, ValueError):
            # Only now it shows that there is no moment to act on, or not a tensor like its parameter: the base's first
            # step is taken back.
            for param, entries in fresh:
                if self.policy.slow in entries:
                    local_tensor(param).copy_(local_tensor(entries[self.policy.slow]))
                    self.state.pop(param, None)
            raise
        for param, entries in fresh:
            self.state[param].update(entries)

    def _states(self) -> Iterator[dict[str, Any]]:
        """The parameters' states; an optimizer may keep something else beside them."""
        return (own for own in self.state.values() if isinstance(own, dict))

    def _find_first_moment(self, made: bool = False) -> None:
        """Which of the base's tensors is the first moment, where the policy acts on it.

        Args:
            made: The base has stepped, and has made all that it will keep.
        """

    def _external(self, moment: str = FIRST_MOMENTS[0]) -> rules.Rule:
        policy = self.policy
        return rules.external(moment, policy.acts_on_moment, policy.prefix + "step", policy.reads_lr)

    def _complete_groups(self) -> None:
        """A group that was added to the base, or loaded from a checkpoint of it, lacks entries of the policy."""
        for group in self.param_groups:
            if not self._own_defaults.keys() <= group.keys():
                for key, value in self._own_defaults.items():
                    group.setdefault(key, value)
                if not self._is_fused:
                    self._stand_beside_early_state(group)

    @torch.no_grad()
    def _stand_beside_early_state(self, group: dict[str, Any]) -> None:
        """Where a base makes state before its first step (Adagrad), ours stands beside it from the start, with a count
        that says "not begun": else a checkpoint's template, which is made before that step too, has no place for it."""
        name = self._table.rule.step_name
        for param in group["params"]:
            own = self.state.get(param)
            if isinstance(own, dict) and own and own.get(self.policy.slow) is None:
                own.update(start_slow(param, None, self.policy, group, "a parameter"))
                own.setdefault(name, torch.tensor(0.0, dtype=torch.float64, device="cpu"))

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with this one's entries among its groups and state."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._complete_groups()
        self._wait_for_hosted()
        state_dict: dict[str, Any] = self.base_optimizer.state_dict()
        if self._saving is None:
            state_dict = self._on_slow_weights(self, state_dict)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this, or of the base alone; its slow weights then start in the next step.

        Raises:
            RuntimeError: Inside `slow_weights()`.
            ValueError: The checkpoint's groups are not the base's, its shards of DTensors are of other ranks, or a
                `master_low` has more than 16 bits.
        """
        with self._lock:
            self._refuse_inside_slow_weights("load_state_dict()", unless_evaluating=True)
            # A shallow copy, as torch gives its hooks, which may write into it.
            state_dict = state_dict.copy()
            for hook in self._optimizer_load_state_dict_pre_hooks.values():
                replaced = hook(self, state_dict)
                state_dict = state_dict if replaced is None else replaced
            base, exact = self.base_optimizer, self._exact_names
            with self._door, checkpoint.exactly(base, state_dict, self._table, self._restore_mode, exact):
                base.load_state_dict(state_dict)
            self._loaded()
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    @property
    def _exact_names(self) -> tuple[str, ...] | None:
        """The state entries that are ours to keep exact; of a fused base all are."""
        return None if self._is_fused else (self._table.rule.step_name, *self.policy.entries)

    def _loaded(self) -> None:
        self._complete_groups()
        self._table.invalidate()

    @property
    def _state_keeper(self) -> Optimizer:
        return self.base_optimizer

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_slow_weights("copying or pickling")
        self._wait_for_hosted()
        own = ("base_optimizer", "_own_defaults", "_norm")
        return {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # This and not Optimizer.__init__, which would give this optimizer groups and state of its own: it sets up the
        # hooks and the profiling of step(), and leaves groups and state alone.
        super().__setstate__(state)
        self.__dict__.setdefault("_norm", GlobalNorm())
        base = self.base_optimizer
        self._table = Table(_FUSED.get(type(base)) or self._external(), self.policy)
        self._norm_around = NormAround()
        self._door = BaseDoor(self)


def _check_base(base: object) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {base!r} of type {type(base).__name__}")
    if isinstance(base, SlowWeights):
        raise TypeError(f"base_optimizer must not have slow weights of its own, got {type(base).__name__}")
    if keeps_its_state_elsewhere(base):
        raise TypeError(
            "base_optimizer must keep its own state, and ZeroRedundancyOptimizer keeps it in another one; "
            "use ZeroRedundancyOptimizer(params, optimizer_class=LookaheadAdamW, ...)"
        )
    if type(base) is Lion:
        if any(group.get("master_weights") for group in base.param_groups):
            raise ValueError(
                "base_optimizer must have master_weights=False, got True: give master_weights=True to its wrapper, "
                "which makes the step"
            )
        for group in base.param_groups:
            if (asked := group.get("state_dtype", DEFAULT_STATE_DTYPE)) != DEFAULT_STATE_DTYPE:
                raise ValueError(
                    f"base_optimizer must have state_dtype={DEFAULT_STATE_DTYPE!r}, got {asked!r}: give "
                    f"state_dtype={asked!r} to its wrapper, which makes the step"
                )
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError("base_optimizer must not be differentiable: a fused step cannot be differentiated through")
