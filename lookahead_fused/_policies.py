"""What the optimizers know of each policy, which is what becomes of slow weights after the inner step.

The mathematics stands in `csrc/slow`, `backends/triton_policies.py` and `backends/reference.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from . import _masters as masters
from ._hyperparameters import (
    ABOVE_ZERO,
    BELOW_ONE,
    LARGEST_PERIOD,
    Argument,
    Number,
    NumberOrTensor,
    Switch,
    known,
    one_of,
)

# State names of every policy's: the first moment as the last event left it, and how many updates there had been when
# the slow weights were made.
CACHED, START = "cached_momentum", "average_start"
# The numbers that a policy may keep for a parameter, in the compiled modules' order: the second says where the weights
# lie between z and x, as the last step left them.
NUMBERS = (START, "y_interp", "weight_sum", "lr_max")
UNIFORM = "uniform"
DEFAULT_STATE_DTYPE = "float32"
StateDtype = Literal["float32", "bfloat16", "int8"]
PULLBACK_MODES = ("none", "pullback", "reset")


@dataclass(frozen=True)
class _StepSize(NumberOrTensor):
    """The slow weights' step size, which outer momentum allows to be larger than 1: there Python is asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "high", 1.0)


@dataclass(frozen=True)
class Policy:
    """What becomes of the slow weights, and the names of its entries in a parameter group.

    A wrapper keeps them under a prefix: the groups are its base optimizer's, which may have an `alpha` of its own.
    """

    prefix: str = ""
    # Under which every backend has it.
    name: ClassVar[str]
    # State names: of the slow weights, "" where there are none, of what may stand beside them, and of the numbers that
    # it keeps for a parameter.
    slow: ClassVar[str] = "slow_param"
    companion: ClassVar[str] = ""
    numbers: ClassVar[tuple[str, ...]] = ()
    # The weights lie between z and an average x of it, at every step, and `slow` is z.
    averages: ClassVar[bool] = False
    # It weighs by the learning rate, also of an optimizer that is not ours.
    reads_lr: ClassVar[bool] = False

    @property
    def as_large(self) -> tuple[str, ...]:
        """What may stand in a parameter's state beside the inner optimizer's own, as large as the parameter."""
        return tuple(name for name in (self.slow, self.companion, CACHED, *masters.NAMES) if name)

    @property
    def entries(self) -> tuple[str, ...]:
        """All that may stand there."""
        return (*self.as_large, *self.numbers)

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Its own, in which bounds hold in every step: there is no event every zeroth step."""
        raise NotImplementedError

    def check(self, group: Mapping[str, Any], **names: str) -> None:
        """Raises ValueError for settings that do not go together.

        Args:
            group: A parameter group, or arguments of a constructor under the names that they have in groups.
            names: What its user calls an argument, where that is not its name in groups.
        """

    def begins(self, group: Mapping[str, Any]) -> int:
        """After how many updates of a parameter its slow weights are what they are about."""
        return 1

    def an_event(self, group: Mapping[str, Any]) -> int:
        """A number of updates that ends with an event."""
        raise NotImplementedError

    @property
    def master_weights(self) -> str:
        return self.prefix + "master_weights"

    @property
    def backend(self) -> str:
        return self.prefix + "backend"

    @property
    def offload_slow(self) -> str:
        return self.prefix + "offload_slow"

    def offloads(self, group: Mapping[str, Any]) -> bool:
        """Whether the slow weights of parameters on a GPU lie on the host, under a group's settings."""
        return bool(group.get(self.offload_slow, False))

    def offload_argument(self) -> Argument:
        return Argument(self.offload_slow, Switch(), default=False, name="offload_slow")

    def master_argument(self) -> Argument:
        return Argument(self.master_weights, Switch(), default=False, name="master_weights")

    @property
    def state_dtype(self) -> str:
        return self.prefix + "state_dtype"

    def state_argument(self) -> Argument:
        return Argument(
            self.state_dtype, one_of(*get_args(StateDtype)), default=DEFAULT_STATE_DTYPE, name="state_dtype"
        )

    def acts_on_moment(self, group: Mapping[str, Any]) -> bool:
        """Whether an event changes the rule's first moment, under a group's settings."""
        return False

    def no_first_moment(self, group: Mapping[str, Any], found: str) -> ValueError:
        """What to raise where an event would act on a moment that is not there, since `found`."""
        raise NotImplementedError

    def caches_moment(self, group: Mapping[str, Any]) -> bool:
        """Whether the first moment of the last event is kept."""
        return False

    def has_companion(self, group: Mapping[str, Any], reads_gradient: bool) -> bool:
        """Whether something stands beside the slow weights; `reads_gradient` tells whether the inner step is ours."""
        return False

    def check_dtype(self, name: str, dtype: torch.dtype, has_master: bool) -> None:
        """Raises TypeError for a parameter whose dtype has too few bits for the policy."""


@dataclass(frozen=True)
class Lookahead(Policy):
    """The weights go on from the slow weights after every k-th step.

    A class whose rule has an `alpha` of its own calls this one `alpha_name`.
    """

    name = "lookahead"
    companion = "outer_momentum_buffer"
    alpha_name: str = "alpha"

    @property
    def k(self) -> str:
        return self.prefix + "k"

    @property
    def alpha(self) -> str:
        return self.prefix + self.alpha_name

    @property
    def pullback_momentum(self) -> str:
        return self.prefix + "pullback_momentum"

    @property
    def outer_momentum(self) -> str:
        return self.prefix + "outer_momentum"

    @property
    def outer_nesterov(self) -> str:
        return self.prefix + "outer_nesterov"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        k = Number("an int >= 1", at_least=1, whole=True, binds=True)
        alpha = _StepSize(
            "a float in [0, 1], with outer momentum in [0, 2]",
            at_least=0.0,
            at_most=2.0,
            binds=True,
        )
        momentum = Number("a float in [0, 1)", at_least=0.0, at_most=BELOW_ONE, binds=True)
        return (
            Argument(self.k, k, ("k",), name="k"),
            Argument(self.alpha, alpha, ("alpha",), name=self.alpha_name),
            Argument(self.pullback_momentum, one_of(*PULLBACK_MODES), ("pullback_momentum",), name="pullback_momentum"),
            Argument(self.outer_momentum, momentum, ("outer_momentum",), True, 0.0, "outer_momentum"),
            Argument(self.outer_nesterov, Switch(), ("outer_nesterov",), default=True, name="outer_nesterov"),
        )

    def check(self, group: Mapping[str, Any], **names: str) -> None:
        if known(group[self.alpha]) > 1 and not self.has_outer_momentum(group):
            name = names.get(self.alpha_name, self.alpha)
            raise ValueError(f"{name} must be a float in [0, 1] without outer momentum, got {group[self.alpha]!r}")

    def an_event(self, group: Mapping[str, Any]) -> int:
        return int(group[self.k])

    def acts_on_moment(self, group: Mapping[str, Any]) -> bool:
        return bool(group[self.pullback_momentum] != "none")

    def no_first_moment(self, group: Mapping[str, Any], found: str) -> ValueError:
        name, mode = self.pullback_momentum, group[self.pullback_momentum]
        return ValueError(f"{name} must be 'none' where there is no first moment to act on, got {mode!r} with {found}")

    def caches_moment(self, group: Mapping[str, Any]) -> bool:
        return bool(group[self.pullback_momentum] == "pullback")

    def has_outer_momentum(self, group: Mapping[str, Any]) -> bool:
        """Whether the slow weights have a momentum of their own."""
        return bool(group.get(self.outer_momentum, 0.0) != 0)

    def has_companion(self, group: Mapping[str, Any], reads_gradient: bool) -> bool:
        return self.has_outer_momentum(group)


@dataclass(frozen=True)
class _Decay(NumberOrTensor):
    """A number, or the word for a mean in which all samples count alike."""

    def check(self, name: str, value: Any) -> None:
        if not (isinstance(value, str) and value == UNIFORM):
            super().check(name, value)

    def check_step(self, name: str, value: Any) -> None:
        if not (isinstance(value, str) and value == UNIFORM):
            super().check_step(name, value)

    def encode(self, value: Any) -> tuple[float, ...]:
        return (-1.0,) if isinstance(value, str) else super().encode(value)


@dataclass(frozen=True)
class Ema(Policy):
    """The slow weights follow the weights, which do not follow them."""

    name = "ema"
    # Its events are counted from where the average was made.
    numbers = (START,)

    @property
    def decay(self) -> str:
        return self.prefix + "decay"

    @property
    def every(self) -> str:
        return self.prefix + "every"

    @property
    def start(self) -> str:
        return self.prefix + "start"

    @property
    def warmup(self) -> str:
        return self.prefix + "warmup"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        decay = _Decay(f"a float in [0, 1] or {UNIFORM!r}", at_least=0.0, at_most=1.0, binds=True)
        every = Number("an int >= 1", at_least=1, whole=True, binds=True)
        start = Number("an int >= 0", at_least=0, whole=True, binds=True)
        return (
            Argument(self.decay, decay, ("decay",), name="decay"),
            Argument(self.every, every, ("every",), name="every"),
            Argument(self.start, start, ("start",), name="start"),
            Argument(self.warmup, Switch(), ("warmup",), name="warmup"),
        )

    def check(self, group: Mapping[str, Any], **names: str) -> None:
        if group[self.warmup] and isinstance(group[self.decay], str):
            warmup, decay = names.get("warmup", self.warmup), names.get("decay", self.decay)
            raise ValueError(f"{warmup} must be False with {decay}={UNIFORM!r}, which warms up by itself, got True")

    def begins(self, group: Mapping[str, Any]) -> int:
        return int(max(1, min(group[self.start], LARGEST_PERIOD)))

    def an_event(self, group: Mapping[str, Any]) -> int:
        return int(group[self.start] + group[self.every])


_INTERPOLATION = NumberOrTensor("a float in (0, 1]", at_least=ABOVE_ZERO, at_most=1.0, binds=True)


@dataclass(frozen=True)
class Averaging(Policy):
    """The weights lie between a sequence z, which the inner optimizer steps, and an average x of it."""

    slow = "z"
    # Kept where the inner step is not ours; else it follows from the weights and z.
    companion = "x"
    averages = True

    def has_companion(self, group: Mapping[str, Any], reads_gradient: bool) -> bool:
        return not reads_gradient

    def an_event(self, group: Mapping[str, Any]) -> int:
        return 1

    def check_dtype(self, name: str, dtype: torch.dtype, has_master: bool) -> None:
        if dtype in (torch.bfloat16, torch.float16) and not has_master:
            raise TypeError(
                f"{name} must have {self.master_weights}=True with {str(dtype).removeprefix('torch.')}, or be float32 "
                "or float64: the average follows from the weights, and 16 bits are too few for that"
            )


@dataclass(frozen=True)
class Gpa(Averaging):
    """The average moves a fixed share of the way."""

    name = "gpa"
    numbers = ("y_interp",)

    @property
    def arguments(self) -> tuple[Argument, ...]:
        eval_interp = NumberOrTensor("a float in [0, 1]", at_least=0.0, at_most=1.0, binds=True)
        return tuple(
            Argument(self.prefix + name, kind, (name,), name=name)
            for name, kind in (("train_interp", _INTERPOLATION), ("eval_interp", eval_interp))
        )


@dataclass(frozen=True)
class ScheduleFree(Averaging):
    """The average is the mean of all z, weighted by step and learning rate."""

    name = "schedule_free"
    numbers = ("y_interp", "weight_sum", "lr_max")
    reads_lr = True

    @property
    def arguments(self) -> tuple[Argument, ...]:
        power = Number("an int >= 0", at_least=0, whole=True, binds=True)
        return tuple(
            Argument(self.prefix + name, kind, (name,), name=name)
            for name, kind in (("interp", _INTERPOLATION), ("r", power), ("weight_lr_power", power))
        )


@dataclass(frozen=True)
class Alone(Policy):
    """No slow weights: the rule alone."""

    name = "alone"
    slow = ""

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return ()

    def an_event(self, group: Mapping[str, Any]) -> int:
        return 1
