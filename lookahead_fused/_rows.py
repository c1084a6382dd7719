"""One parameter with its state, as a backend is handed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _codes as codes
from . import _masters as masters
from ._entries import Entries
from ._policies import CACHED, START, Policy
from ._rules import Rule
from ._state_dtype import kind_of, moment_dtype
from ._tensors import compute_dtype, copy_in_layout, extent, has_layout_of, is_dense, local_gradient, local_tensor
from ._torch import is_plain


@dataclass
class Row:
    """One parameter: dense tensors of one shape and stride order on one device.

    `param` is the owner's local part, or where that is not dense a copy. `made` are the entries that the owner's state
    lacks or has in another form, `dropped` those whose place others take: they are its state from `commit` on, and
    until then nothing has changed. `shown` is what the owner becomes before that, where its master has come whole.
    """

    owner: Tensor
    name: str
    group: Mapping[str, Any]
    param: Tensor
    gradient: Tensor | None
    step: Tensor
    # The policy's, by their state names.
    numbers: dict[str, Tensor]
    slow: Tensor | None
    companion: Tensor | None
    moments: dict[str, Tensor]
    cached_moment: Tensor | None
    # Where moments lie in codes, of each of these, by its name.
    scales: dict[str, Tensor]
    kinds: dict[str, codes.Kind]
    master: Tensor | None
    moments_loaded: bool
    # Names of entries that lie in pinned host memory, beside a parameter on another device.
    hosted: tuple[str, ...]
    made: dict[str, Any]
    moment_dtype: torch.dtype
    dropped: tuple[str, ...] = ()
    shown: Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.param.dtype)

    @property
    def has_narrow_moments(self) -> bool:
        return self.moment_dtype != self.compute_dtype

    @property
    def has_codes(self) -> bool:
        return self.moment_dtype == codes.DTYPE

    def wide(self, name: str, moment: Tensor) -> Tensor:
        """A moment as it is computed with: itself, where it is kept so."""
        if self.has_codes:
            moment = codes.decoded(moment, self.scales[name], self.kinds[name])
        return moment.to(self.compute_dtype)

    @property
    def stretch(self) -> tuple[int, int]:
        return stretch_of(self.owner)

    @property
    def is_copy(self) -> bool:
        return not is_dense(local_tensor(self.owner))

    @property
    def is_foreign(self) -> bool:
        """A tensor of a class around other tensors: torch's operators alone know what to do with it."""
        return not (is_plain(self.param) and (self.gradient is None or is_plain(self.gradient)))

    @property
    def is_uniform(self) -> bool:
        """Every tensor lies as the parameter does, and moments have their dtype: a table may take it."""
        return (
            not self.is_foreign
            and not self.owner.is_complex()
            and self.step.device == self.param.device
            and all(
                m.dtype == self.moment_dtype and is_plain(m) and has_layout_of(m, self.param)
                for m in self.moments.values()
            )
        )

    def commit(self, state: Any) -> None:
        if self.made:
            state[self.owner].update(self.made)
        for name in self.dropped:
            state[self.owner].pop(name, None)

    def copied(self, step: int) -> Row:
        """The same numbers in memory of their own, after so many steps."""
        names = ("param", "slow", "companion", "cached_moment", "master")
        tensors: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else t.clone() for name in names}
        moments = {name: moment.clone() for name, moment in self.moments.items()}
        scales = {name: scale.clone() for name, scale in self.scales.items()}
        count = torch.tensor(float(step), dtype=torch.float64, device=self.step.device)
        zeros = {name: torch.zeros_like(count) for name in self.numbers}
        return replace(self, **tensors, moments=moments, scales=scales, step=count, numbers=zeros)

    def show_master(self) -> None:
        """Rounds the owner as its master has it, whose low half says nothing beside a parameter rounded otherwise."""
        if self.shown is not None:
            local_tensor(self.owner).copy_(self.shown)

    def read_in(self) -> None:
        """Takes over what a row before it wrote into an owner that `param` is a copy of."""
        if self.is_copy:
            self.param.copy_(local_tensor(self.owner))

    def write_back(self) -> None:
        """Hands the update to an owner that `param` is a copy of."""
        if self.is_copy:
            local_tensor(self.owner).copy_(self.param)


def stretch_of(owner: Tensor) -> tuple[int, int]:
    """The memory in which a parameter lies; none of a class around other tensors, which may lie anywhere."""
    local = local_tensor(owner)
    return extent(local) if is_plain(local) else (0, 0)


def parameter_name(group: int, position: int) -> str:
    return f"parameter {position} of group {group}"


@contextmanager
def by_operators(name: str, *tensors: Tensor | None) -> Iterator[None]:
    """What torch's operators raise of a class around other tensors is told with the parameter's name and the class's.

    Raises:
        TypeError: The class does not serve one of them.
    """
    try:
        yield
    except Exception as error:
        foreign = next((tensor for tensor in tensors if tensor is not None and not is_plain(tensor)), None)
        if foreign is None:
            raise
        raise TypeError(
            f"{name} must be a Tensor that torch's operators can update, got a {type(foreign).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def make_row(
    owner: Tensor,
    name: str,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    rule: Rule,
    policy: Policy,
    moments_loaded: bool,
) -> Row:
    """A row over what the parameter's state has, and what it lacks, created: nothing of `state` is changed.

    Slow weights start where theta is now (phi_0 = theta_0). Where they start beside moments that were loaded, the
    moment's cached copy starts there too: the parameter is treated as just synced.
    """
    with by_operators(name, local_tensor(owner)):
        return _make_row(owner, name, group, state, rule, policy, moments_loaded)


def _make_row(
    owner: Tensor,
    name: str,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    rule: Rule,
    policy: Policy,
    moments_loaded: bool,
) -> Row:
    local = local_tensor(owner)
    param = local if is_dense(local) else copy_in_layout(local, local, local.dtype)
    dtype, of_moments = compute_dtype(param.dtype), moment_dtype(group, policy, param.dtype)
    own = Entries(owner, param, state, name, policy, group)

    step = own.counter(rule.step_name)
    moments = {}
    for moment, used in zip(rule.moments, rule.moments_in_use(group), strict=True):
        if used and rule.reads_gradient:
            moments[moment] = own.moment(moment, of_moments, kind_of(moment, rule))
        elif used and isinstance(state.get(moment), Tensor):
            moments[moment] = local_tensor(state[moment])
    master = None
    if rule.reads_gradient and group.get(policy.master_weights) and param.dtype != dtype:
        master = own.master()
    current = param
    if master is not None and policy.slow and state.get(policy.slow) is None:
        current = masters.read(param if own.shown is None else own.shown, master)
    slow = own.tensor(policy.slow, dtype, current) if policy.slow else None
    # What is left beside slow weights that start anew is as old as they were.
    restarts = rule.reads_gradient and state.get(policy.slow) is None
    number_of = {name: own.counter(name, step if name == START else None, restarts) for name in policy.numbers}
    companion = None
    if policy.has_companion(group, rule.reads_gradient):
        companion = own.tensor(policy.companion, dtype, current if policy.averages else None, restarts)
    cached_moment = None
    first = moments.get(rule.moments[0])
    if first is not None and policy.caches_moment(group):
        cached_moment = own.moment(CACHED, of_moments, codes.SIGNED, (rule.moments[0], first), restarts)
    gradient = owner.grad if rule.reads_gradient else None
    if gradient is not None:
        gradient = local_gradient(gradient, owner)
        if is_plain(gradient) and not (has_layout_of(gradient, param) and gradient.data_ptr()):
            gradient = copy_in_layout(gradient, param, gradient.dtype)
    return Row(
        owner,
        name,
        group,
        param,
        gradient,
        step,
        number_of,
        slow,
        companion,
        moments,
        cached_moment,
        own.scales,
        {name: kind_of(name, rule) for name in own.scales},
        master,
        moments_loaded,
        own.hosted,
        own.made,
        of_moments,
        own.dropped,
        own.shown,
    )
