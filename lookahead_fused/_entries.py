"""The entries of one parameter's state: created, or brought into form whatever a checkpoint made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _codes as codes
from . import _masters as masters
from ._offload import hosted, may_be_given, new_hosted
from ._policies import CACHED, START, Policy
from ._rules import Rule
from ._tensors import (
    check_memory,
    compute_dtype,
    copy_in_layout,
    count_device,
    has_layout_of,
    is_dense,
    is_laid_out_like,
    local_tensor,
    new_state,
)
from ._torch import dtensor_like, is_dtensor, is_plain


class Entries:
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


def start_slow(
    owner: Tensor, moment: Tensor | None, policy: Policy, group: Mapping[str, Any], name: str, count: Any = None
) -> dict[str, Any]:
    """The state entries of slow weights that start now, beside a first moment that is not ours, or none yet; after so
    many updates."""
    local = local_tensor(owner)
    own = Entries(
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
    own = Entries(owner, local if is_dense(local) else copy_in_layout(local, local, local.dtype), {})
    own.tensor(CACHED, compute_dtype(local.dtype), None if moment is None else local_tensor(moment))
    return own.made


def moments_were_loaded(param: Tensor, state: Mapping[str, Any], rule: Rule, loaded: Mapping[int, Tensor]) -> bool:
    """Whether a parameter's moments came without a step count, and count from the first step on."""
    count = state.get(rule.step_name)
    if count is not None:
        return loaded.get(id(param)) is count
    return any(state.get(name) is not None for name in rule.moments)
