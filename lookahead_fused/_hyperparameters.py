"""Arguments that check, encode and name themselves.

A kind knows which values an argument may have; an `Argument` is an entry of a parameter group with its kind. Bounds
are for what a user passes, as in torch.optim: `check` asks them where an optimizer or a group is made. A scheduler may
leave lr = -1e-20 or momentum = 0 later, and the run goes on: `check_step`, asked when a value changes, refuses only
what cannot be computed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ._tensors import check_memory

BELOW_ONE, ABOVE_ZERO = math.nextafter(1.0, 0.0), math.nextafter(0.0, 1.0)
# The largest k that is told from a larger one: no count of updates in fp64 gets there.
LARGEST_PERIOD = 2**53


@dataclass(frozen=True)
class Kind:
    """Which values an argument may have, and how a compiled backend reads them.

    `expected` ends the sentence "lr must be ...". A compiled table reads `width` numbers. With `is_switch` another
    value needs another table; else a change within [low, high] is read without asking Python.
    """

    expected: str
    width: int = 1
    is_switch: bool = False
    low: float = -math.inf
    high: float = math.inf

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError for what a user must not pass."""
        self.check_step(name, value)

    def check_step(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError for what a step cannot compute with."""
        raise NotImplementedError

    def encode(self, value: Any) -> tuple[float, ...]:
        """The value as numbers; it has been checked."""
        raise NotImplementedError

    def wrong_type(self, name: str, value: Any) -> TypeError:
        return TypeError(f"{name} must be {self.expected}, got {value!r} of type {type(value).__name__}")

    def wrong_value(self, name: str, value: Any) -> ValueError:
        return ValueError(f"{name} must be {self.expected}, got {value!r}")


@dataclass(frozen=True)
class Number(Kind):
    """A real number. Bounds that `binds` are asked in every step too: beyond them there is nothing to compute."""

    at_least: float = -math.inf
    at_most: float = math.inf
    whole: bool = False
    binds: bool = False

    def __post_init__(self) -> None:
        if self.whole:
            # No plain float between these: Python is asked of every value.
            object.__setattr__(self, "low", math.inf)
            object.__setattr__(self, "high", -math.inf)
        elif self.binds:
            object.__setattr__(self, "low", self.at_least)
            object.__setattr__(self, "high", self.at_most)

    def check(self, name: str, value: Any) -> None:
        self._check_type(name, value)
        if not self.at_least <= value <= self.at_most:
            raise self.wrong_value(name, value)

    def check_step(self, name: str, value: Any) -> None:
        self._check_type(name, value)
        if self.binds and not self.at_least <= value <= self.at_most:
            raise self.wrong_value(name, value)

    def encode(self, value: Any) -> tuple[float, ...]:
        return (float(min(value, LARGEST_PERIOD)) if self.whole else float(value),)

    def _check_type(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be {self.expected}, got a Tensor; pass {name}.item()")
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.whole else numbers.Real):
            raise self.wrong_type(name, value)


@dataclass(frozen=True)
class NumberOrTensor(Number):
    """A real number, or a tensor of one element that holds one, read where it lies in every step."""

    def check(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            super().check(name, value)
            return
        self._check_tensor(name, value)
        # On a GPU, looking at the value here would wait for it.
        if value.device.type == "cpu" and not self.at_least <= float(value) <= self.at_most:
            raise self.wrong_value(name, value)

    def check_step(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            super().check_step(name, value)
        elif self.binds:
            self.check(name, value)
        else:
            self._check_tensor(name, value)

    def _check_tensor(self, name: str, value: torch.Tensor) -> None:
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be {self.expected}, got a Tensor of {value.dtype}")
        if value.numel() != 1:
            raise ValueError(f"{name} must be {self.expected}, got a Tensor of shape {tuple(value.shape)}")
        if value.is_meta:
            raise TypeError(f"{name} must be {self.expected}, got a Tensor on the meta device, which holds no value")
        check_memory(value, name)


@dataclass(frozen=True)
class Pair(Kind):
    """Two numbers of one kind, in any sequence."""

    each: Number = field(default_factory=lambda: Number("a float"))
    width: int = 2

    def check(self, name: str, value: Any) -> None:
        self.check_step(name, value)
        if not all(self.each.at_least <= item <= self.each.at_most for item in value):
            raise self.wrong_value(name, value)

    def check_step(self, name: str, value: Any) -> None:
        # A configuration's own sequence (OmegaConf's ListConfig) is none by its base class.
        is_sequence = isinstance(value, Sequence) or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))
        if isinstance(value, str | torch.Tensor | Mapping) or not is_sequence or len(value) != 2:
            raise self.wrong_type(name, value)
        for item in value:
            if isinstance(item, torch.Tensor):
                # Its powers are computed on the host, where the table is read.
                raise TypeError(f"{name} must be {self.expected}, got a Tensor; pass {name[:-1]}.item()")
            if isinstance(item, bool) or not isinstance(item, numbers.Real):
                raise self.wrong_type(name, item)

    def encode(self, value: Any) -> tuple[float, ...]:
        return tuple(float(item) for item in value)


@dataclass(frozen=True)
class Switch(Kind):
    """True or False; 0 and 1 pass for them."""

    expected: str = "True or False"
    is_switch: bool = True

    def check_step(self, name: str, value: Any) -> None:
        if not isinstance(value, numbers.Integral) or value not in (0, 1):
            raise self.wrong_type(name, value)

    def encode(self, value: Any) -> tuple[float, ...]:
        return (float(value),)


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names; a compiled backend reads which."""

    options: tuple[str, ...] = ()
    is_switch: bool = True

    def check_step(self, name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in self.options:
            raise self.wrong_value(name, value)

    def encode(self, value: Any) -> tuple[float, ...]:
        return (float(self.options.index(value)),)


def known(value: Any) -> float:
    """A setting as a number; NaN for a tensor on another device, whose value would have to be waited for."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return math.nan
    return float(value)


def one_of(*options: str) -> Choice:
    return Choice(f"one of {', '.join(map(repr, options))}", options=options)


@dataclass(frozen=True)
class Argument:
    """An entry of a parameter group.

    `key` is its name there, and `name` what its user calls it as an argument. `slots` are the names under which a
    compiled rule or policy reads its numbers, none where it is only watched. Where `presence` is True, becoming or
    ceasing to be zero changes which state exists. A group without the entry means `default`.
    """

    key: str
    kind: Kind
    slots: tuple[str, ...] = ()
    presence: bool = False
    default: Any = None
    name: str = ""

    def value(self, group: Mapping[str, Any]) -> Any:
        return group.get(self.key, self.default)

    def numbers(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        return self.kind.encode(self.value(group))


def check(arguments: Sequence[Argument], group: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for what a user must not pass in a parameter group."""
    for argument in arguments:
        argument.kind.check(argument.key, argument.value(group))


def check_step(arguments: Sequence[Argument], group: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for what a step cannot compute with."""
    for argument in arguments:
        argument.kind.check_step(argument.key, argument.value(group))


def check_passed(arguments: Sequence[Argument], passed: Mapping[str, Any]) -> None:
    """The same as `check` for arguments of a constructor, which speaks of them by the names that they have there."""
    for argument in arguments:
        if argument.key in passed:
            argument.kind.check(argument.name or argument.key, passed[argument.key])


def check_whole(names: Sequence[str], group: Mapping[str, Any], prefix: str, known: Mapping[str, Any]) -> None:
    """Raises ValueError for what is the whole optimizer's, in a parameter group.

    Args:
        names: Of the arguments.
        prefix: Of the policy's settings in the groups.
        known: The defaults of a base optimizer, which may have an entry of that name for itself.
    """
    for name in names:
        for key in (name, prefix + name):
            if key in group and key not in known:
                raise ValueError(
                    f"{key} must not stand in a parameter group, it is the whole optimizer's: pass it to the "
                    f"constructor, got {group[key]!r}"
                )
