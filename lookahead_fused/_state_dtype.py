"""In which dtype a rule's moments lie in memory, as a parameter group says. That of the arithmetic stays."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _codes as codes
from ._policies import CACHED, DEFAULT_STATE_DTYPE, Policy
from ._rules import Rule
from ._tensors import compute_dtype, local_tensor
from ._torch import dtensor_like, is_dtensor, is_plain

# Beside the default, in which moments are kept as they are computed.
_NARROW = {"bfloat16": torch.bfloat16, "int8": codes.DTYPE}

_DOCUMENTED = """state_dtype: In which dtype the moments lie in memory, and pullback's copy of the first:
            "float32" (fp64 for fp64 parameters), "bfloat16" for half of it, or "int8" for a quarter: codes in uint8,
            each a floating-point number whose exponent counts from the largest in its block of 128, and the blocks'
            scales in fp32, as `exp_avg_scale` beside `exp_avg`. They are computed in fp32 and rounded up or down at
            random, so that their mean is the number: to the nearest, a second moment would not get smaller at
            beta2 = 0.999. What is drawn is a hash of `step` and the element's place: the same bits on every backend and
            in a resumed run. A state dict says in bf16 what codes stand for, exactly. State that is loaded comes into
            this dtype in the next step, rounded to the nearest; the choice is not a checkpoint's. "bfloat16" and "int8"
            are refused for fp64 parameters, around an optimizer whose step is its own, and with RMSprop's `centered`,
            "int8" for parameters of a class around other tensors too, DTensors excepted."""

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


def check_moments_of(param: Tensor, name: str, group: Mapping[str, Any], policy: Policy) -> None:
    """Raises TypeError for a parameter, by its name in messages, whose moments are not to be narrow."""
    asked = group.get(policy.state_dtype, DEFAULT_STATE_DTYPE)
    if param.dtype == torch.float64 and asked != DEFAULT_STATE_DTYPE:
        raise TypeError(f"{name} must not be float64 with {policy.state_dtype}={asked!r}: its moments are float64")
    if _NARROW.get(asked) == codes.DTYPE and not is_plain(local := local_tensor(param)):
        raise TypeError(
            f"{name} must be a Tensor with memory of its own with {policy.state_dtype}={asked!r}, got a "
            f"{type(local).__name__}: only its own class knows where its memory lies"
        )


def kind_of(moment: str, rule: Rule) -> codes.Kind:
    """How a moment of a rule, or the first one's copy, is kept in codes."""
    return codes.SQUARES if moment in rule.squares else codes.SIGNED


def without_codes(owner: Tensor, own: Mapping[str, Any], rule: Rule, but: Container[str] = ()) -> dict[str, Any]:
    """A parameter's state in which what lies in codes is in bf16, and there are no scales.

    Args:
        but: Entries that stay as they are.
    """
    made = dict(own)
    # What another optimizer calls so is its own.
    for moment in (*rule.moments, CACHED) if rule.reads_gradient else ():
        value, scale = own.get(moment), own.get(codes.scale_name(moment))
        if moment in but or not (isinstance(value, Tensor) and isinstance(scale, Tensor)):
            continue
        del made[codes.scale_name(moment)]
        if value.dtype == codes.DTYPE:
            wide = codes.decoded(local_tensor(value), scale, kind_of(moment, rule))
            made[moment] = dtensor_like(owner, wide) if is_dtensor(owner) else wide
    return made
