"""One parameter with its state: what is created, what a checkpoint may have brought, what a backend is handed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _codes as codes
from . import _masters as masters
from ._offload import check_offload, hosted, may_be_given, new_hosted
from ._policies import CACHED, START, Policy
from ._rules import Rule
from ._state_dtype import check_moments_of, check_state_dtype, kind_of, moment_dtype
from ._tensors import (
    check_gradient,
    check_memory,
    check_parameter,
    compute_dtype,
    copy_in_layout,
    count_device,
    extent,
    has_layout_of,
    is_dense,
    is_laid_out_like,
    local_gradient,
    local_tensor,
    new_state,
)
from ._torch import dtensor_like, is_dtensor, is_plain


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
    own = _State(owner, param, state, name, policy, group)

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


def moments_were_loaded(param: Tensor, state: Mapping[str, Any], rule: Rule, loaded: Mapping[int, Tensor]) -> bool:
    """Whether a parameter's moments came without a step count, and count from the first step on."""
    count = state.get(rule.step_name)
    if count is not None:
        return loaded.get(id(param)) is count
    return any(state.get(name) is not None for name in rule.moments)


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


def read_in_a_sync(group: Any, rule: Rule, policy: Policy) -> Container[str]:
    """Which entries a sync has to do with, besides the slow weights and the count."""
    return {*policy.entries, *(rule.moments[:1] if policy.acts_on_moment(group) else ())}


def start_slow(
    owner: Tensor, moment: Tensor | None, policy: Policy, group: Mapping[str, Any], name: str, count: Any = None
) -> dict[str, Any]:
    """The state entries of slow weights that start now, beside a first moment that is not ours, or none yet; after so
    many updates."""
    local = local_tensor(owner)
    own = _State(
        owner, local if is_dense(local) else copy_in_layout(local, local, local.dtype), {}, name, policy, group
    )
    own.tensor(policy.slow, compute_dtype(local.dtype), local)
    if policy.has_companion(group, reads_gradient=False):
        own.tensor(policy.companion, compute_dtype(local.dtype), local if policy.averages else None)
    for number in policy.numbers:
        own.counter(number, count if number == START else None)
    return {**own.made, **(start_cached(owner, moment) if policy.caches_moment(group) else {})}


def average_of(param: Tensor, own: Mapping[str, Any], policy: Policy, has_master: bool) -> Tensor:
    """x beside a parameter that is y; it is kept where the inner step is not ours, and follows from y and z elsewhere.

    Its numbers are those that the next step would find: see `csrc/slow/averaging.h`.
    """
    kept = own.get(policy.companion)
    if isinstance(kept, Tensor):
        return kept
    local = local_tensor(param)
    # From the host, where it is offloaded.
    z = local_tensor(own[policy.slow]).to(local.device)
    y = masters.read(local, masters.kept(local, own) if has_master else None).to(z.dtype)
    place = own.get("y_interp")
    if place is None:
        return y.clone()
    place = torch.as_tensor(place, dtype=torch.float64, device=count_device(z.device))
    recovery = torch.where(place > 0, (1.0 - place) / torch.where(place > 0, place, 1.0), 0.0).to(z.dtype)
    return y + recovery.to(z.device) * (y - z)


def start_cached(owner: Tensor, moment: Tensor | None) -> dict[str, Any]:
    """The state entry of a first moment's copy that starts now; at zeros beside a moment that is still to be made."""
    local = local_tensor(owner)
    own = _State(owner, local if is_dense(local) else copy_in_layout(local, local, local.dtype), {})
    own.tensor(CACHED, compute_dtype(local.dtype), None if moment is None else local_tensor(moment))
    return own.made


class _State:
    """The entries of one parameter's state, created or brought into form as they are asked for, in `made`."""

    def __init__(
        self,
        owner: Tensor,
        param: Tensor,
        entries: Mapping[str, Any],
        owner_name: str = "",
        policy: Policy | None = None,
        group: Mapping[str, Any] | None = None,
    ) -> None:
        self.owner = owner
        self.param = param
        self.entries = entries
        self.owner_name = owner_name
        self.policy = policy
        self.hosted = () if policy is None or group is None else hosted(policy, group, param.device)
        self.made: dict[str, Any] = {}
        self.scales: dict[str, Tensor] = {}
        self.dropped: tuple[str, ...] = ()
        self.shown: Tensor | None = None

    def counter(self, name: str, start: Any = None, restarts: bool = False) -> Tensor:
        """A number of applied updates, whatever a checkpoint made of it; where there is none yet that of `start`, or
        0."""
        value = self.entries.get(name)
        is_new = value is None or restarts
        device = count_device(self.param.device)
        kept = value if isinstance(value, Tensor) and not is_new else None
        if kept is not None and (kept.dtype, kept.dim(), kept.device) == (torch.float64, 0, device):
            return local_tensor(kept)
        if is_new:
            value = start
        count = torch.tensor(0.0, dtype=torch.float64, device=device)
        if isinstance(value, Tensor):
            count.copy_(local_tensor(value).detach().reshape(()))
        elif value is not None:
            count.fill_(float(value))
        self._keep(name, count)
        return count

    def tensor(self, name: str, dtype: torch.dtype, start: Tensor | None, restarts: bool = False) -> Tensor:
        """A tensor in the parameter's layout; where there is none yet it starts as a copy of `start`, or as zeros."""
        value = self.entries.get(name)
        if value is None or restarts:
            return self._make(name, dtype, start)
        local = local_tensor(value)
        if name in self.hosted:
            fits = is_laid_out_like(local, self.param) and may_be_given(local)
        else:
            fits = has_layout_of(local, self.param)
        if local.dtype != dtype or not fits:
            check_memory(local, f"state {name!r}")
            return self._make(name, dtype, local)
        return local

    def moment(
        self,
        name: str,
        dtype: torch.dtype,
        kind: codes.Kind,
        start: tuple[str, Tensor] | None = None,
        restarts: bool = False,
    ) -> Tensor:
        """A moment in its dtype, whatever a checkpoint made of it; where there is none yet it starts as a copy of
        another one of this row, by its name, or as zeros. What is in codes has its scale in `scales`."""
        if dtype == codes.DTYPE:
            return self._coded(name, kind, start, restarts)
        value, scale = self.entries.get(name), self.entries.get(codes.scale_name(name))
        if scale is not None:
            self.dropped = (*self.dropped, codes.scale_name(name))
            if value is not None and not restarts and (local := local_tensor(value)).dtype == codes.DTYPE:
                check_memory(local, f"state {name!r}")
                return self._make(name, dtype, codes.decoded(local, scale, kind))
        return self.tensor(name, dtype, None if start is None else start[1], restarts)

    def _coded(self, name: str, kind: codes.Kind, start: tuple[str, Tensor] | None, restarts: bool) -> Tensor:
        value, of_scale = self.entries.get(name), codes.scale_name(name)
        made: Tensor | None
        if value is not None and not restarts:
            local = local_tensor(value)
            is_coded = local.dtype == codes.DTYPE
            if is_coded and has_layout_of(local, self.param):
                self.scales[name] = self.entries[of_scale]
                return local
            check_memory(local, f"state {name!r}")
            wide = codes.decoded(local, self.entries[of_scale], kind) if is_coded else local
            made, scale = codes.encoded(wide, self.param, kind)
        elif start is not None:
            made, scale = start[1], self.scales[start[0]].clone()
        else:
            made, scale = None, codes.new_scale(self.param)
        kept = self._make(name, codes.DTYPE, made)
        self.scales[name] = scale
        self._keep(of_scale, scale)
        return kept

    def master(self) -> Tensor:
        """What is kept of the master, which starts at the parameter; a whole one that a checkpoint has brought decides
        what a bf16 parameter is, to which side it was rounded there and here."""
        param, name = self.param, masters.name_for(self.param)
        others = (n for n in masters.NAMES if n != name and self.entries.get(n) is not None)
        self.dropped = (*self.dropped, *others)
        if name == masters.WHOLE:
            return self.tensor(name, torch.float32, param)
        whole = self.entries.get(masters.WHOLE)
        if whole is None:
            return self.tensor(name, torch.int16, None)
        check_memory(local_tensor(whole), f"state {masters.WHOLE!r}")
        self.shown, low = masters.halve(local_tensor(whole).to(param.device, torch.float32))
        return self._make(name, torch.int16, low)

    def _make(self, name: str, dtype: torch.dtype, start: Tensor | None) -> Tensor:
        if name in self.hosted:
            assert self.policy is not None
            told = self.policy.offload_slow, f"the {name!r} of {self.owner_name}"
            local = new_hosted(self.param, dtype, start, told)
        else:
            local = new_state(self.param, dtype, start)
        self._keep(name, torch.view_as_complex(local) if self.owner.is_complex() else self._like_owner(local))
        return local

    def _keep(self, name: str, value: Tensor) -> None:
        if is_plain(self.param) and not is_plain(local_tensor(value)):
            raise TypeError(
                f"state {name!r} must be a Tensor with memory, as its parameter is, got a {type(value).__name__} from "
                "a mode that is on: leave it for the first step"
            )
        self.made[name] = value

    def _like_owner(self, local: Tensor) -> Tensor:
        """A shard of a DTensor's state is a DTensor too, so that checkpoints know how to reassemble it."""
        if not is_dtensor(self.owner):
            return local
        return dtensor_like(self.owner, local)
