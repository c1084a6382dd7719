"""The mean over a process group's workers, which takes theta's place at a sync: local SGD, SlowMo, DiLoCo's outer step.

A step in which no parameter is due is the ordinary one, and nothing is sent. In any other the workers first agree on
what is due. Only then the inner step is made, without its events; the mean takes theta's place, and a sync follows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import _masters as masters
from ._hyperparameters import check_step
from ._interrupts import uninterrupted
from ._norm import Clip, GlobalNorm
from ._parts import State
from ._policies import Lookahead
from ._rows import parameter_name
from ._table import Groups, Member, Table, is_capturing
from ._tensors import compute_dtype, local_tensor
from ._torch import Gradless, is_dtensor, is_plain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ARGUMENT = "process_group"
# What one call of all_reduce is given at most: a backend may want as much memory again.
BUCKET_BYTES = 64 << 20


@dataclass
class Turn:
    """What this worker does in a step or sync that the workers have agreed on."""

    due: list[Member]
    mean: _Mean
    # Some worker's gradients overflowed, or their norm is not finite: nobody steps.
    skips: bool
    # What this worker's norm has come to, where one is asked for.
    clip: Clip | None = None


class Workers:
    """The workers of a process group, this one among them.

    Args:
        group: The `process_group` that an optimizer was given.

    Raises:
        TypeError: It is no process group, or none that this process is in.
    """

    def __init__(self, group: object) -> None:
        self.group = _checked(group)

    def check_parameters(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises TypeError for a DTensor."""
        for index, group in enumerate(groups):
            params = group["params"]
            for position, param in enumerate(params if isinstance(params, list | tuple) else ()):
                if isinstance(param, Tensor):
                    _refuse_dtensor(param, index, position)

    def step(
        self,
        table: Table,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: GlobalNorm | None,
        turn: Turn | None = None,
    ) -> None:
        """One step as `Table.step` makes it, with the mean over the workers where there is a sync.

        Args:
            turn: What `turn` has returned for this step, where it was asked before.

        Raises:
            RuntimeError: The workers do not sync the same parameters, or the step is captured in a CUDA graph. Nothing
                has changed then, nor where torch.distributed raises since a worker does not come. Where one is lost
                after all had come, the inner step is made, and `sync` makes the sync that it lacks.
        """
        with Gradless():
            turn = turn or self.turn(table, groups, state, grad_scale, found_inf, norm)
            if turn.skips:
                return
            if not turn.due:
                table.step(groups, state, grad_scale, norm=turn.clip)
                return
            with uninterrupted():
                table.step_without_events(groups, state, grad_scale, turn.clip)
                self._sync(turn, table, groups, state)

    def sync(self, table: Table, groups: Groups, state: State) -> None:
        """The event of every parameter that had a step, now, from the mean; raises as `step` does."""
        with Gradless():
            _refuse_capture(groups)
            self.check_parameters(groups)
            table.check_sync(groups, state)
            members = [(p, _own(state, p), name, group) for p, name, group in _members(groups) if _has_slow(state, p)]
            counts = _numbers([own.get(table.rule.step_name) for _, own, *_ in members])
            due = [(p, name, group) for (p, _, name, group), count in zip(members, counts, strict=True) if count > 0]
            turn = Turn(due, _Mean(due), skips=False)
            self._agree(turn, None, None, groups)
            with uninterrupted():
                self._sync(turn, table, groups, state)

    def turn(
        self,
        table: Table,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: GlobalNorm | None,
        clip: Clip | None = None,
    ) -> Turn:
        """Which parameters are due in the next step. Where there are any, or a step may be skipped, the workers agree.

        Args:
            norm: Takes the norm of this worker's gradients, or None.
            clip: What it has come to, where it was taken before.

        Raises:
            RuntimeError, ValueError, TypeError: What a step would raise, and what `step` raises of the workers.
        """
        _refuse_capture(groups)
        due = _due(table, groups, state)
        # What a step would refuse is found and room for the mean is made before another worker counts on this one.
        if due:
            table.check(groups, state)
        turn = Turn(due, _Mean(due), skips=False, clip=clip)
        if norm is not None and clip is None:
            turn.clip = table.measure(norm, groups, state, grad_scale, found_inf)
        skipping = norm if norm is not None and norm.skip_nonfinite else None
        if due or found_inf is not None or skipping is not None:
            self._agree(turn, found_inf, skipping, groups)
        return turn

    def _agree(self, turn: Turn, found_inf: Tensor | None, skipping: GlobalNorm | None, groups: Groups) -> None:
        """The workers tell each other whether they skip and what is due; they wait for each other here first."""
        overflow = found_inf is not None and found_inf.item() != 0
        not_finite = skipping is not None and not skipping.was_finite()
        numbers = (len(turn.due), turn.mean.elements, turn.mean.fingerprint)
        # The largest of a number and of its opposite tell whether all are the same.
        both = [number for n in numbers for number in (n, -n)]
        told = torch.tensor([int(overflow), int(not_finite), *both], dtype=torch.int64, device=_first_device(groups))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self.group)
        any_overflow, any_not_finite, *most = told.tolist()
        turn.skips = any_overflow != 0 or any_not_finite != 0
        if all(largest == -opposite for largest, opposite in zip(most[::2], most[1::2], strict=True)):
            if skipping is not None and any_not_finite and not not_finite:
                skipping.count_skip()
            return
        count, elements = ((-most[i + 1], most[i]) for i in (0, 2))
        raise RuntimeError(
            f"the workers of {ARGUMENT} must sync the same parameters in the same step, got {numbers[0]} of "
            f"{numbers[1]} elements on this worker, and on all of them from {count[0]} to {count[1]} of "
            f"{elements[0]} to {elements[1]} elements{'' if count[0] != count[1] else ', not the same ones'}"
        )

    def _sync(self, turn: Turn, table: Table, groups: Groups, state: State) -> None:
        """The mean in theta's place, and then the event."""
        thetas = [_theta(table, state, param, group) for param, _, group in turn.due]
        turn.mean.put(thetas, self.group)
        due = {id(param) for param, *_ in turn.due}
        with_slow = {id(param) for param, *_ in _members(groups) if _has_slow(state, param)}
        if due == with_slow:
            table.sync(groups, state)
        elif due:
            # A pass syncs every row of its table, and the phases of these differ: the due ones get one of their own.
            chosen = [{**group, "params": [p for p in group["params"] if id(p) in due]} for group in groups]
            Table(table.rule, table.policy, table.tuning).sync(chosen, state)


class _Mean:
    """The means of some parameters over the workers, in one flat tensor for each device and dtype of computation.

    All of them are there before the first is written: a worker that is lost leaves no mixture of weights.
    """

    def __init__(self, members: list[Member]) -> None:
        tensors = [local_tensor(param) for param, *_ in members]
        kinds = [(local.device, compute_dtype(local.dtype)) for local in tensors]
        sizes = dict.fromkeys(kinds, 0)
        # Of each parameter where its share begins and ends.
        self._shares: list[tuple[tuple[torch.device, torch.dtype], int, int]] = []
        for local, kind in zip(tensors, kinds, strict=True):
            self._shares.append((kind, sizes[kind], sizes[kind] + local.numel()))
            sizes[kind] += local.numel()
        self._flat = {
            (device, dtype): torch.empty(size, dtype=dtype, device=device) for (device, dtype), size in sizes.items()
        }
        self.elements = sum(sizes.values())
        # Of what must be the same on all workers beside the number of elements. A device's own number need not be.
        order = {kind: (index, kind[0].type, str(kind[1])) for index, kind in enumerate(sizes)}
        told = [(name, order[kind], end) for (_, name, _), (kind, _, end) in zip(members, self._shares, strict=True)]
        self.fingerprint = zlib.crc32(repr(told).encode())

    def put(self, thetas: list[tuple[Tensor, Tensor | None]], group: ProcessGroup) -> None:
        """Replaces weights, in the order of the parameters, by their means over the workers.

        Args:
            thetas: Parameters, each with what is kept of its master, or None.
        """
        for (param, kept), (kind, begin, end) in zip(thetas, self._shares, strict=True):
            self._flat[kind][begin:end].view(param.shape).copy_(masters.read(param, kept))
        size = torch.distributed.get_world_size(group)
        for flat in self._flat.values():
            if flat.numel() > 0:
                at_once = BUCKET_BYTES // flat.element_size()
                for start in range(0, flat.numel(), at_once):
                    bucket = flat[start : start + at_once]
                    torch.distributed.all_reduce(bucket, torch.distributed.ReduceOp.SUM, group)
                flat.div_(size)
        for (param, kept), (kind, begin, end) in zip(thetas, self._shares, strict=True):
            masters.write(self._flat[kind][begin:end].view(param.shape), param, kept)


def _checked(group: object) -> ProcessGroup:
    if not torch.distributed.is_available():
        raise TypeError(f"{ARGUMENT} must be None with a torch that has no torch.distributed, got {group!r}")
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"{ARGUMENT} must be a group that this process is in, got GroupMember.NON_GROUP_MEMBER")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"{ARGUMENT} must be a torch.distributed.ProcessGroup or None, got {group!r} of type {type(group).__name__}"
        )
    return group


def _members(groups: Groups) -> Iterator[Member]:
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            yield param, parameter_name(index, position), group


def _refuse_dtensor(param: Tensor, index: int, position: int) -> None:
    if not is_plain(param) and is_dtensor(param):
        raise TypeError(
            f"{ARGUMENT} must be None with DTensors, whose own mesh tells who shares them, and "
            f"{parameter_name(index, position)} is one: got a {type(param).__name__} with a process group"
        )


def _refuse_capture(groups: Groups) -> None:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    devices = {param.device for group in groups for param in group["params"]}
    if any(is_capturing(device) for device in devices):
        raise RuntimeError(
            f"a step or sync with a {ARGUMENT} cannot be captured in a CUDA graph: the host decides which parameters "
            "are due and waits for the other workers; capture the optimizer without one, or leave it out of the graph"
        )


def _due(table: Table, groups: Groups, state: State) -> list[Member]:
    """The parameters whose next update is one that a sync follows."""
    step_name, k = table.rule.step_name, cast(Any, table.policy).k
    places: list[tuple[int, int]] = []
    counts: list[Any] = []
    odd = False
    for index, group in enumerate(groups):
        if type(group[k]) is not int or group[k] < 1:
            check_step(table.arguments, group)
        for position, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            _refuse_dtensor(param, index, position)
            count = _own(state, param).get(step_name)
            odd |= count is not None and not (isinstance(count, Tensor) and count.dim() == 0)
            places.append((index, position))
            counts.append(count)
    if odd:
        # A checkpoint's count in another form, or none at all: the table tells.
        table.check(groups, state)
    numbers = _numbers(counts)
    periods = [int(group[k]) for group in groups]
    return [
        (groups[index]["params"][position], parameter_name(index, position), groups[index])
        for (index, position), count in zip(places, numbers, strict=True)
        if (int(count) + 1) % periods[index] == 0
    ]


def _numbers(counts: list[Any]) -> list[float]:
    """Counts of updates as numbers, 0 where there is none yet: one wait for each device, not for each count."""
    numbers = [0.0] * len(counts)
    by_device: dict[torch.device, list[int]] = {}
    for index, count in enumerate(counts):
        if isinstance(count, Tensor):
            if count.is_cpu:
                numbers[index] = count.item()
            else:
                by_device.setdefault(count.device, []).append(index)
        elif count is not None:
            numbers[index] = float(count)
    for indices in by_device.values():
        values = torch.stack([local_tensor(counts[index]).double().reshape(()) for index in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            numbers[index] = value
    return numbers


def _own(state: State, param: Tensor) -> Mapping[str, Any]:
    own = state.get(param)
    # The first question is a tenth of the second.
    return own if type(own) is dict or isinstance(own, Mapping) else {}


def _has_slow(state: State, param: Tensor) -> bool:
    return _own(state, param).get(Lookahead.slow) is not None


def _theta(table: Table, state: State, param: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Where the weights are kept: the parameter, and what is kept of its master."""
    local = local_tensor(param)
    if group.get(table.policy.master_weights) and local.dtype != compute_dtype(local.dtype):
        return local, masters.kept(local, _own(state, param))
    return local, None


def _first_device(groups: Groups) -> torch.device:
    """Of the first parameter: the same kind of device on all workers, and one that their backend serves."""
    return next((local_tensor(param).device for param, *_ in _members(groups)), torch.device("cpu"))
