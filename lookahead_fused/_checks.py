"""What is asked of a parameter and its state before a pass may advance it; nothing has changed while it is asked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from . import _codes as codes
from . import _masters as masters
from ._offload import check_offload
from ._policies import CACHED, Policy
from ._rules import Rule
from ._state_dtype import check_moments_of, check_state_dtype
from ._tensors import check_gradient, check_memory, check_parameter, local_tensor
from ._torch import is_plain


def check_row(
    owner: Tensor,
    name: str,
    group: Any,
    state: Mapping[str, Any],
    rule: Rule,
    policy: Policy,
    read: Container[str] | None = None,
) -> None:
    """Raises TypeError or ValueError for a parameter that a pass cannot advance; nothing has changed then."""
    check_parameter(owner, name, takes_complex=not rule.reads_gradient)
    policy.check_dtype(name, owner.dtype, bool(group.get(policy.master_weights)))
    check_state_dtype(group, rule, policy)
    check_moments_of(owner, name, group, policy)
    check_offload(policy, group, owner, name)
    check_state(owner, state, rule, policy, group, name, read)
    if rule.reads_gradient and owner.grad is not None:
        check_gradient(owner.grad, owner, name)


def check_state(
    param: Tensor,
    state: Mapping[str, Any],
    rule: Rule,
    policy: Policy,
    group: Any,
    name: str,
    read: Container[str] | None = None,
) -> None:
    """Raises TypeError or ValueError for state that was put there by hand and cannot be its parameter's.

    Of another optimizer's state, only a moment that the policy acts on is looked at.

    Args:
        read: The entries that are worked with besides the slow weights and the count, None for all: an offloader may
            have taken the memory of the others.
    """
    if read is None:
        check_whole(state, rule, name)
    looks = rule.reads_gradient or all(rule.moments_in_use(group))
    for key in (*(rule.moments if looks else ()), *policy.as_large):
        is_read = read is None or key in read or key == policy.slow
        is_coded = rule.reads_gradient and (key in rule.moments or key == CACHED)
        _check_entry(param, state, key, name, is_read, is_coded)
    for key in (rule.step_name, *policy.numbers):
        _check_count(state.get(key), key, name)


def check_whole(state: Mapping[str, Any], rule: Rule, name: str) -> None:
    """Raises ValueError for a state of which a part is missing, as of a checkpoint that was cut: it would begin anew
    beside the rest. What settings that were changed since bring along begins so."""
    there = [moment for moment in rule.moments if state.get(moment) is not None]
    count = state.get(rule.step_name)
    begun = count is not None and not (isinstance(count, int | float) and count == 0)
    lacks = [moment for moment in rule.always if moment not in there] if there or begun else []
    if there and rule.corrects_bias and count is None:
        lacks.append(rule.step_name)
    if lacks:
        raise ValueError(
            f"state {lacks[0]!r} of {name} must stand beside its {', '.join(map(repr, there or [rule.step_name]))}, "
            "got none: is the checkpoint whole?"
        )


def _check_entry(
    param: Tensor, state: Mapping[str, Any], key: str, name: str, is_read: bool, may_be_codes: bool
) -> None:
    value, shape = state.get(key), local_tensor(param).shape
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"state {key!r} of {name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"state {key!r} of {name} must be dense, got layout {value.layout}")
    if local_tensor(value).shape != shape:
        raise ValueError(
            f"state {key!r} of {name} must have the parameter's shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    if key == masters.LOW and value.dtype != torch.int16:
        raise TypeError(f"state {key!r} of {name} must be torch.int16, got {value.dtype}")
    is_coded = may_be_codes and value.dtype == codes.DTYPE
    real = value.is_floating_point() or value.is_complex() or key == masters.LOW or is_coded
    if value.device.type == "meta" or not real:
        raise TypeError(
            f"state {key!r} of {name} must be floating-point and hold numbers, got {value.dtype} on {value.device}"
        )
    if is_read:
        check_memory(local_tensor(value), f"state {key!r} of {name}")
    if is_coded:
        codes.check_codes(param, value, state, key, name)


def _check_count(count: Any, key: str, name: str) -> None:
    if count is None:
        return
    expected = f"state {key!r} of {name} must be one number >= 0"
    if isinstance(count, Tensor):
        check_memory(local_tensor(count), f"state {key!r} of {name}")
        if count.numel() != 1 or count.is_complex():
            raise ValueError(f"{expected}, got {count.dtype} of {tuple(count.shape)}")
        # On a GPU, looking at the value here would wait for it.
        if count.device.type != "cpu" or not is_plain(count):
            return
        count = count.item()
    if not isinstance(count, numbers.Real):
        raise TypeError(f"{expected}, got {count!r} of type {type(count).__name__}")
    if not 0 <= float(count) < math.inf:
        raise ValueError(f"{expected}, got {count!r}")


def read_in_a_sync(group: Any, rule: Rule, policy: Policy) -> Container[str]:
    """Which entries a sync has to do with, besides the slow weights and the count."""
    return {*policy.entries, *(rule.moments[:1] if policy.acts_on_moment(group) else ())}
