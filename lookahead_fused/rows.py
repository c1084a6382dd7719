"""One parameter with its state: what is created, what a checkpoint may have brought, what a backend is handed."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rules import Rule, Settings
from .tensors import (
    compute_dtype,
    copy_in_layout,
    has_layout_of,
    is_dense,
    local_tensor,
    new_state,
    version_counter,
)


@dataclass
class Row:
    """One parameter: dense tensors of one shape and stride order on one device.

    `param` is the owner itself (its local part, for a DTensor), or where that is not dense a copy; `group` is the
    index of its parameter group among those of its part.
    """

    owner: Tensor
    param: Tensor
    gradient: Tensor | None
    group: int
    step: Tensor
    slow: Tensor
    moments: dict[str, Tensor]
    slow_moment: Tensor | None
    master: Tensor | None
    moments_loaded: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.param.dtype)

    @property
    def is_copy(self) -> bool:
        return not is_dense(local_tensor(self.owner))

    def write_back(self) -> None:
        """Hands the update to an owner that `param` is a copy of."""
        if self.is_copy:
            local_tensor(self.owner).copy_(self.param)


class Place(NamedTuple):
    """What is left of a row once a compiled table has it: no reference to its state."""

    owner: Tensor
    param: Tensor
    is_copy: bool


def parameter_name(group: int, position: int) -> str:
    return f"parameter {position} of group {group}"


def make_row(
    owner: Tensor,
    group: MutableMapping[str, Any],
    index: int,
    state: MutableMapping[str, Any],
    rule: Rule,
    settings: Settings,
    moments_loaded: bool,
) -> Row:
    """Creates what the parameter's state lacks, and brings what it has into the parameter's layout.

    Slow weights start where theta is now (phi_0 = theta_0). Where they start beside moments that were loaded, the
    moment's cached copy starts there too: the parameter is treated as just synced.
    """
    local = local_tensor(owner)
    param = local if is_dense(local) else copy_in_layout(local, local, local.dtype)
    dtype = compute_dtype(param.dtype)
    own = _State(owner, param, state)

    step = own.counter(rule.step_name)
    in_use = rule.moments_in_use(group)
    moments = {}
    for name, used in zip(rule.moments, in_use, strict=True):
        if used and rule.reads_gradient:
            moments[name] = own.tensor(name, dtype, None)
        elif used and isinstance(state.get(name), Tensor):
            moments[name] = local_tensor(state[name])
    master = None
    if group.get(settings.master_weights) and param.dtype != dtype:
        master = own.tensor("master_param", dtype, param)
    slow = own.tensor("slow_param", dtype, param if master is None else master)
    slow_moment = None
    if group[settings.pullback_momentum] == "pullback" and moments:
        slow_moment = own.tensor("slow_momentum", dtype, next(iter(moments.values())))
    gradient = owner.grad
    if gradient is not None and rule.reads_gradient:
        gradient = local_tensor(gradient)
        if not has_layout_of(gradient, param):
            gradient = copy_in_layout(gradient, param, gradient.dtype)
    return Row(owner, param, gradient, index, step, slow, moments, slow_moment, master, moments_loaded)


def check_state(param: Tensor, state: Mapping[str, Any], rule: Rule, name: str) -> None:
    """Raises TypeError or ValueError for state that was put there by hand and cannot be its parameter's."""
    shape = local_tensor(param).shape
    for key in (*rule.moments, "slow_param", "slow_momentum", "master_param"):
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"state {key!r} of {name} must be a Tensor, got {type(value).__name__}")
        if local_tensor(value).shape != shape:
            raise ValueError(
                f"state {key!r} of {name} must have the parameter's shape {tuple(shape)}, got {tuple(value.shape)}"
            )
        if value.device.type == "meta" or not value.is_floating_point():
            raise TypeError(
                f"state {key!r} of {name} must be floating-point and hold numbers, got {value.dtype} on {value.device}"
            )


def start_slow(owner: Tensor, moment: Tensor | None, pullback: bool) -> dict[str, Any]:
    """The state entries of slow weights that start now, beside a first moment that is not ours, or none yet."""
    local = local_tensor(owner)
    entries: dict[str, Any] = {}
    own = _State(owner, local if is_dense(local) else copy_in_layout(local, local, local.dtype), entries)
    own.tensor("slow_param", compute_dtype(local.dtype), local)
    if pullback:
        own.tensor("slow_momentum", compute_dtype(local.dtype), None if moment is None else local_tensor(moment))
    return entries


def describe_row(row: Row, rule: Rule) -> tuple[Any, ...]:
    """The row as the compiled table takes it; the order of the columns is `csrc/table/table.h`'s."""
    moments = [row.moments.get(name) for name in rule.moments]
    moments += [None] * (3 - len(moments))
    columns = (row.param, None, row.master, row.slow, row.step, row.slow_moment, *moments)
    goes_through_python = row.is_copy or row.param is not row.owner
    return (row.owner, goes_through_python, row.group, row.moments_loaded, columns, version_counter(row.owner))


class _State:
    """The entries of one parameter's state, created or brought into form as they are asked for."""

    def __init__(self, owner: Tensor, param: Tensor, entries: MutableMapping[str, Any]) -> None:
        self.owner = owner
        self.param = param
        self.entries = entries

    def counter(self, name: str) -> Tensor:
        """The number of applied updates: 0-dim, fp64, beside the parameter, whatever a checkpoint made of it."""
        value = self.entries.get(name)
        if value is None:
            value = torch.zeros((), dtype=torch.float64, device=self.param.device)
        elif not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64, device=self.param.device)
        elif value.dtype != torch.float64 or value.device != self.param.device or value.dim() != 0:
            value = value.detach().to(self.param.device, torch.float64, copy=True).reshape(())
        self.entries[name] = value
        return local_tensor(value)

    def tensor(self, name: str, dtype: torch.dtype, start: Tensor | None) -> Tensor:
        """A tensor in the parameter's layout; where there is none yet it starts as a copy of `start`, or as zeros."""
        value = self.entries.get(name)
        if value is None:
            local = new_state(self.param, dtype, start)
            self.entries[name] = self._like_owner(local)
            return local
        local = local_tensor(value)
        if local.dtype != dtype or not has_layout_of(local, self.param):
            local = new_state(self.param, dtype, local)
            self.entries[name] = self._like_owner(local)
        return local

    def _like_owner(self, local: Tensor) -> Tensor:
        """A shard of a DTensor's state is a DTensor too, so that checkpoints know how to reassemble it."""
        if local_tensor(self.owner) is self.owner:
            return local
        from torch.distributed.tensor import DTensor

        assert isinstance(self.owner, DTensor)
        return DTensor.from_local(
            local,
            self.owner.device_mesh,
            self.owner.placements,
            run_check=False,
            shape=self.owner.shape,
            stride=self.owner.stride(),
        )
