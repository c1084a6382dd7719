"""In which dtype a rule's moments lie in memory, as a parameter group says. That of the arithmetic stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ._policies import DEFAULT_STATE_DTYPE, Policy
from ._rules import Rule
from ._tensors import compute_dtype

# Beside the default, in which moments are kept as they are computed.
_NARROW = {"bfloat16": torch.bfloat16}

_DOCUMENTED = """state_dtype: In which dtype the moments lie in memory, and pullback's copy of the first:
            "float32" (fp64 for fp64 parameters), or "bfloat16" for half of it. They are computed in fp32 and rounded up
            or down at random, so that their mean is the number: to the nearest, a second moment would not get smaller
            at beta2 = 0.999. What is drawn is a hash of `step` and the element's place: the same bits on every backend
            and in a resumed run. State that is loaded comes into this dtype in the next step, rounded to the nearest;
            the choice is not a checkpoint's. "bfloat16" is refused for fp64 parameters, around an optimizer whose step
            is its own, and with RMSprop's `centered`."""

_Class = TypeVar("_Class", bound=type[Any])


def documents_state_dtype(cls: _Class) -> _Class:
    """The argument is the same in every class, and stated once."""
    cls.__doc__ = (cls.__doc__ or "").replace("{state_dtype}", _DOCUMENTED)
    return cls


def moment_dtype(group: Mapping[str, Any], policy: Policy, param_dtype: torch.dtype) -> torch.dtype:
    """Of the moments of a parameter of a group, and of the first one's copy for pullback."""
    return _NARROW.get(group.get(policy.state_dtype, DEFAULT_STATE_DTYPE), compute_dtype(param_dtype))


def check_state_dtype(group: Mapping[str, Any], rule: Rule, policy: Policy, name: str = "") -> None:
    """Raises ValueError for narrow moments that an optimizer or a group's other settings do not go with.

    Args:
        group: A parameter group, or arguments of a constructor under the names that they have in groups.
        name: What its user calls the setting, where that is not its name in groups.
    """
    asked = group.get(policy.state_dtype, DEFAULT_STATE_DTYPE)
    if asked == DEFAULT_STATE_DTYPE:
        return
    told = f"{name or policy.state_dtype} must be {DEFAULT_STATE_DTYPE!r}"
    if not rule.reads_gradient:
        raise ValueError(f"{told} around an optimizer whose step is its own, got {asked!r}: the state is its own too")
    if rule.subtracts_moments_with and group.get(rule.subtracts_moments_with):
        raise ValueError(
            f"{told} with {rule.subtracts_moments_with}=True, got {asked!r}: one moment is taken off another there, "
            "and 8 bits are too few for that"
        )


def check_dtype_of(param: str, dtype: torch.dtype, group: Mapping[str, Any], policy: Policy) -> None:
    """Raises TypeError for a parameter, by its name in messages, whose moments are not to be narrow."""
    asked = group.get(policy.state_dtype, DEFAULT_STATE_DTYPE)
    if dtype == torch.float64 and asked != DEFAULT_STATE_DTYPE:
        raise TypeError(f"{param} must not be float64 with {policy.state_dtype}={asked!r}: its moments are float64")
