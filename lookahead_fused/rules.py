"""What the optimizers know of each rule: its hyperparameters, their bounds, and its state.

The mathematics stands in `csrc/rules` and, a second time and in its plainest form, in `backends/reference.py`. Here is
what both are told: which entries of a parameter group a rule reads and what is allowed there, and which state tensors
it keeps. Every hyperparameter is validated by this table, at construction and whenever it changes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

PULLBACK_MODES = ("none", "pullback", "reset")
_PULLBACK_EXPECTED = f"one of {', '.join(map(repr, PULLBACK_MODES))}"
BELOW_ONE = math.nextafter(1.0, 0.0)
LARGEST_K = 2**63 - 1


@dataclass(frozen=True)
class Field:
    """One value of a parameter group.

    `kind` is what a change of the value means: a "number" is read anew, for a "presence" becoming or ceasing to be
    zero changes which state exists, a "switch" asks for another table. `slot` is the rule's name for the value where
    a compiled backend reads it, empty where it only has to be watched.
    """

    key: str
    slot: str
    kind: str
    low: float = 0.0
    high: float = math.inf
    item: int = -1
    expected: str = ""
    default: Any = None

    def value(self, group: Mapping[str, Any]) -> Any:
        value = group.get(self.key, self.default)
        return value if self.item < 0 else value[self.item]


@dataclass(frozen=True)
class Rule:
    """One inner optimizer: the name under which every backend has its rule, its fields and its state names.

    The first of `moments` is the one that pullback and reset act on.
    """

    name: str
    fields: tuple[Field, ...]
    moments: tuple[str, ...]
    moments_in_use: Callable[[Mapping[str, Any]], tuple[bool, ...]]
    step_name: str = "step"
    reads_gradient: bool = True


def _number(key: str, *, low: float = 0.0, high: float = math.inf, kind: str = "number", expected: str = "") -> Field:
    return Field(key, key, kind, low, high, expected=expected)


def _switch(key: str, default: bool = False) -> Field:
    return Field(key, key, "switch", default=default, expected="True or False")


_LR = _number("lr", expected="a float >= 0 or a tensor of one element")
_WEIGHT_DECAY = _number("weight_decay", expected="a float >= 0")
_BETAS_EXPECTED = "a pair of floats in [0, 1)"

ADAM = Rule(
    name="adam",
    fields=(
        _LR,
        Field("betas", "beta1", "number", 0.0, BELOW_ONE, 0, _BETAS_EXPECTED),
        Field("betas", "beta2", "number", 0.0, BELOW_ONE, 1, _BETAS_EXPECTED),
        _number("eps", expected="a float >= 0"),
        _WEIGHT_DECAY,
        _switch("decoupled_weight_decay"),
        _switch("amsgrad"),
        _switch("maximize"),
    ),
    moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    moments_in_use=lambda group: (True, True, bool(group["amsgrad"])),
)

SGD = Rule(
    name="sgd",
    fields=(
        _LR,
        _number("momentum", kind="presence", expected="a float >= 0"),
        _number("dampening", low=-math.inf, expected="a float"),
        _WEIGHT_DECAY,
        _switch("nesterov"),
        _switch("maximize"),
    ),
    moments=("momentum_buffer",),
    moments_in_use=lambda group: (group["momentum"] != 0,),
)


# torch's AdamW had no such entry in its groups at first: there it is what the class says.
ADAMW = replace(
    ADAM,
    fields=tuple(replace(f, default=True) if f.key == "decoupled_weight_decay" else f for f in ADAM.fields),
)


def sync_only(settings: Settings, moment: str) -> Rule:
    """The rule of an inner optimizer that is not ours: its step is done, the interpolation is left.

    `moment` is the state name of the first moment that pullback and reset act on; it is looked at in no other mode.
    """
    mode = settings.pullback_momentum
    return Rule(
        name="sync",
        fields=(Field(mode, "tracks_moment", "switch", expected=_PULLBACK_EXPECTED),),
        moments=(moment,),
        moments_in_use=lambda group: (group[mode] != "none",),
        step_name=settings.prefix + "step",
        reads_gradient=False,
    )


@dataclass(frozen=True)
class Settings:
    """The names of Lookahead's own entries in a parameter group.

    A wrapper keeps them under a prefix, since the groups are its base optimizer's, which may have an `alpha` of its
    own.
    """

    prefix: str = ""

    @property
    def k(self) -> str:
        return self.prefix + "k"

    @property
    def alpha(self) -> str:
        return self.prefix + "alpha"

    @property
    def pullback_momentum(self) -> str:
        return self.prefix + "pullback_momentum"

    @property
    def master_weights(self) -> str:
        return self.prefix + "master_weights"

    @property
    def backend(self) -> str:
        return self.prefix + "backend"

    def fields(self) -> tuple[Field, ...]:
        return (
            Field(self.k, "k", "number", 1, LARGEST_K, expected=f"an int from 1 to {LARGEST_K}"),
            Field(self.alpha, "alpha", "number", 0.0, 1.0, expected="a float in [0, 1]"),
            Field(self.pullback_momentum, "pullback", "switch", expected=_PULLBACK_EXPECTED),
            Field(self.master_weights, "", "switch", default=False, expected="True or False"),
            Field(self.backend, "", "switch", expected="'auto' or a backend's name"),
        )


def check_group(group: Mapping[str, Any], fields: tuple[Field, ...]) -> None:
    """Raises ValueError or TypeError, naming the argument, what was expected and what came."""
    for field in fields:
        if field.key == "betas":
            _check_betas(group["betas"])
        value = field.value(group)
        if field.kind == "switch":
            _check_switch(field, value)
        elif isinstance(value, torch.Tensor):
            _check_tensor(field, value)
        elif isinstance(value, bool) or not isinstance(value, numbers.Integral if field.slot == "k" else numbers.Real):
            raise TypeError(f"{field.key} must be {field.expected}, got {_shown(value)}")
        elif not field.low <= float(value) <= field.high:
            raise ValueError(f"{field.key} must be {field.expected}, got {value!r}")
    has_nesterov = any(field.key == "nesterov" for field in fields)
    if has_nesterov and group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov=True must come with momentum > 0 and dampening = 0, "
            f"got momentum={group['momentum']!r} and dampening={group['dampening']!r}"
        )


def as_number(field: Field, value: Any) -> float | int:
    """A validated value as a compiled backend reads it."""
    if field.slot == "k":
        return int(value)
    if field.slot == "pullback":
        return PULLBACK_MODES.index(value)
    if field.slot == "tracks_moment":
        return float(value != "none")
    return 0.0 if isinstance(value, str) else float(value)


def _check_betas(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be {_BETAS_EXPECTED}, got {_shown(betas)}")
    for beta in betas:
        # A beta enters powers that are computed on the host where the table is read.
        if isinstance(beta, torch.Tensor):
            raise TypeError(f"betas must be {_BETAS_EXPECTED}, got a Tensor; pass beta.item()")


def _check_tensor(field: Field, value: torch.Tensor) -> None:
    if field.slot != "lr":
        raise TypeError(f"{field.key} must be {field.expected}, got a Tensor; only lr may be one")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"lr must be {field.expected}, got a Tensor of {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"lr must be {field.expected}, got a Tensor of shape {tuple(value.shape)}")
    # The value itself is read where the tensor lies, in the step: on a GPU, looking at it here would wait for it.
    if value.device.type == "cpu" and not float(value) >= 0:
        raise ValueError(f"lr must be {field.expected}, got {value!r}")


def _check_switch(field: Field, value: Any) -> None:
    if field.expected == _PULLBACK_EXPECTED:
        if value not in PULLBACK_MODES:
            raise ValueError(f"{field.key} must be {field.expected}, got {value!r}")
        return
    is_truth_value = isinstance(value, numbers.Integral) and value in (0, 1)
    if field.expected.startswith("True") and not is_truth_value:
        raise TypeError(f"{field.key} must be {field.expected}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"
