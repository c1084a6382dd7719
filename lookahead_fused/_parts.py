"""A part of an optimizer's parameters: those that one backend call takes together, on one device, in one pattern of
dtypes. It comes in two kinds behind the same calls.

A `CompiledPart` has a table of its rows in a compiled module, which looks in every step where each tensor is now, and
holds none of them in between but those in pinned host memory. A `PlainPart` makes its rows anew in every step, and
steps them by torch's operators.

The calls of a step, in their order:
    refresh(state, pass_) -> bool   reads what the pass needs; False: a row is not what it was made of
    sum_squares(order, sums)        what a norm of all gradients is made of, where one is asked for
    begin()                         what has to be done before anything is written
    run(...)                        the pass
    release()                       lets go of what was read
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _codes as codes
from . import _masters as masters
from ._checks import check_row, read_in_a_sync
from ._entries import moments_were_loaded
from ._hyperparameters import Argument, check_step
from ._norm import ClipOnDevice, Order, sum_of_squares
from ._offload import hold
from ._policies import CACHED, NUMBERS, Policy
from ._rows import Row, by_operators, make_row, stretch_of
from ._rules import Rule
from ._tensors import copy_in_layout, has_layout_of, has_memory, is_dense, is_on_mesh_of, local_gradient, local_tensor
from ._torch import is_plain, version_counter

State = MutableMapping[Tensor, Any]


# In which rows are shared out, where a backend has no size of its own.
CHUNK_ELEMENTS = 1 << 14


class Pass(Enum):
    """What is done to the rows; see `csrc/table/table.h`."""

    STEP = "STEP"
    SYNC = "SYNC"
    # A step whose events are left to a sync that comes after it.
    INNER = "INNER"


@dataclass(frozen=True)
class Tuning:
    """How compiled tables and walks work; no choice here changes a result.

    `chunk_elements` is the unit in which rows are shared out, None for the backend's own; `way` the fastest way in
    which a tensor may be described; `instruction_set` None for the best that the machine has; and with `own_threads`
    torch's threads are not called.
    """

    chunk_elements: int | None = None
    way: str = "SHIM"
    instruction_set: str | None = None
    own_threads: bool = False


@dataclass(frozen=True)
class Spec:
    """What the rows of a part have in common."""

    rule: Rule
    policy: Policy
    # Every entry of a group that a part depends on, the choice of a backend included.
    arguments: tuple[Argument, ...]
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    moment_dtype: torch.dtype
    # Of parameters whose moments came without a step count (torch's SGD saves none), by id, the count that they got.
    moments_loaded: dict[int, Tensor] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=Tuning)
    # Of which classes around other tensors, parameter's and gradient's, a step was tried.
    rehearsed: set[tuple[type, type]] = field(default_factory=set)


class Part(Protocol):
    spec: Spec

    @property
    def device(self) -> torch.device: ...
    @property
    def in_one_call(self) -> bool:
        """`run` writes in a single call of compiled code, which no signal cuts in two."""

    def add(self, row: Row, state: State) -> None: ...
    def refresh(self, state: State, pass_: Pass) -> bool: ...
    def sum_squares(self, order: Order, sums: Tensor) -> None: ...
    def make_clip(self, sums: Tensor, clip: ClipOnDevice) -> bool: ...
    def begin(self) -> None: ...
    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None) -> None: ...
    def release(self) -> None: ...


class Stepper(Protocol):
    """A backend's half of a compiled part: made for a table, and made anew when the table has grown."""

    # Whether `run` writes in a single call of compiled code.
    in_one_call: bool

    def sum_squares(self, part: CompiledPart, places: Tensor, sums: Tensor) -> None: ...
    def make_clip(self, part: CompiledPart, sums: Tensor, clip: ClipOnDevice) -> None: ...
    def run(
        self, part: CompiledPart, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None
    ) -> None: ...


class CompiledPart:
    """Rows in a table of a compiled module.

    Args:
        spec: What the rows have in common.
        module: The compiled module that keeps the table.
        make_stepper: What walks over it.
        chunk_elements: The unit in which it shares out rows, if it is not told another.
    """

    def __init__(
        self,
        spec: Spec,
        module: ModuleType,
        make_stepper: Callable[[CompiledPart], Stepper],
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self.spec = spec
        self.module = module
        self._step_pass, self._sync_pass = (module.PASSES[pass_.value] for pass_ in (Pass.STEP, Pass.SYNC))
        self._entries = _entries(module, spec.rule, spec.policy, spec.param_dtype)
        self.table = module.Table(
            tensor_type=Tensor,
            fastest=getattr(module.Way, spec.tuning.way),
            rule=spec.rule.name,
            policy=spec.policy.name,
            param_dtype=_name(spec.param_dtype),
            grad_dtype=_name(spec.grad_dtype),
            state_dtype=_name(spec.moment_dtype),
            entries=self._entries,
            fields=_fields(module, spec.rule, spec.policy, spec.arguments),
            # Neither holds this part or its optimizer: their memory is free as soon as they are deleted, without
            # waiting for the garbage collector.
            conform=functools.partial(_conform, spec.grad_dtype),
            hold=hold,
            read_group=functools.partial(_read_group, spec.arguments, spec.policy),
            chunk_elements=chunk_elements if spec.tuning.chunk_elements is None else spec.tuning.chunk_elements,
        )
        self.pass_ = Pass.STEP
        self.stepper: Stepper | None = None
        # What took the norm of the step that comes next.
        self._measuring: Stepper | None = None
        self._make_stepper = make_stepper
        self._groups: dict[int, int] = {}
        # Of the rows the parameters, by id, and where these stand in the order of a norm.
        self._owners: list[int] = []
        self._places: tuple[Order, Tensor] | None = None
        # Parameters that are not dense, and what their rows have in their place: filled before a pass, and written
        # back after it. Where they lie tells whether they still share memory with no other row of this part.
        self._copies: list[tuple[Tensor, Tensor, tuple[int, int]]] = []

    def add(self, row: Row, state: State) -> None:
        if not self._groups:
            self.table.set_device(row.param)
        if id(row.group) not in self._groups:
            self._groups[id(row.group)] = self.table.add_group(row.group)
        copy = row.param if row.is_copy else None
        policy = self.spec.policy
        used = {self.spec.rule.step_name: row.step, policy.slow: row.slow, **dict.fromkeys(masters.NAMES, row.master)}
        used |= {CACHED: row.cached_moment, policy.companion: row.companion, **row.numbers, **row.moments}
        used |= {codes.scale_name(name): scale for name, scale in row.scales.items()}
        self.table.add_row(
            owner=row.owner,
            copy=copy,
            state=state,
            group=self._groups[id(row.group)],
            present=tuple(name is not None and used.get(name) is not None for name in self._entries),
            hosted=tuple(name in row.hosted for name in self._entries),
            moments_loaded=row.moments_loaded,
            acts_on_moment=self.spec.policy.acts_on_moment(row.group),
            version=version_counter(row.owner),
        )
        if copy is not None:
            self._copies.append((row.owner, copy, row.stretch))
        self._owners.append(id(row.owner))
        self._places = None
        self.stepper = self._measuring = None

    @property
    def device(self) -> torch.device:
        return self.spec.device

    @property
    def in_one_call(self) -> bool:
        return self.stepper is not None and self.stepper.in_one_call and not self._copies

    def refresh(self, state: State, pass_: Pass) -> bool:
        for owner, copy, stretch in self._copies:
            local = local_tensor(owner)
            same = (local.shape, local.dtype, local.device) == (copy.shape, copy.dtype, copy.device)
            if not same or is_dense(local) or stretch_of(owner) != stretch:
                return False
        self.pass_ = pass_
        return cast(
            bool,
            self.table.refresh(state, self._sync_pass if pass_ is Pass.SYNC else self._step_pass, pass_ is Pass.INNER),
        )

    def sum_squares(self, order: Order, sums: Tensor) -> None:
        if self._places is None or self._places[0] is not order:
            places = [order.place_of[owner] for owner in self._owners]
            self._places = order, torch.tensor(places, dtype=torch.int64, device=self.spec.device)
        stepper = self.stepper or self._measuring or self._make_stepper(self)
        stepper.sum_squares(self, self._places[1], sums)
        self._measuring = stepper

    def make_clip(self, sums: Tensor, clip: ClipOnDevice) -> bool:
        assert self._measuring is not None
        self._measuring.make_clip(self, sums, clip)
        return True

    def begin(self) -> None:
        # A backend writes through addresses, which autograd does not see.
        increment_version(self.table.updated())
        if self._copies:
            for owner, copy in self._active_copies():
                copy.copy_(local_tensor(owner))

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None = None) -> None:
        stepper, self._measuring = self.stepper or self._measuring or self._make_stepper(self), None
        stepper.run(self, grad_scale, found_inf, clip)
        # Not before: the first pass may fail in what it loads or compiles, and is made anew then.
        self.stepper = stepper
        if self._copies:
            for owner, copy in self._active_copies():
                local_tensor(owner).copy_(copy)

    def _active_copies(self) -> list[tuple[Tensor, Tensor]]:
        return [(o, copy) for o, copy, _ in self._copies if self.pass_ is Pass.SYNC or o.grad is not None]

    def release(self) -> None:
        self.table.release()

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the rows that take part in this pass write: the parameters, and the rest. A captured graph writes there
        in every replay, and has to keep it."""
        owners, state = self.table.tensors()
        return owners, [*state, *(copy for _, copy, _ in self._copies)]


class PlainPart:
    """Parameters whose rows are made anew in every step, and stepped by torch's operators one after the other.

    Args:
        spec: What the rows have in common.
        step: Steps one row, given what its gradient is divided and multiplied by and whether its event comes later.
        sync: Does a row's slow half alone, now.
    """

    in_one_call = False

    def __init__(
        self, spec: Spec, step: Callable[[Row, Spec, float, float, bool], None], sync: Callable[[Row, Spec], None]
    ) -> None:
        self.spec = spec
        self._step, self._sync = step, sync
        self._members: list[tuple[Tensor, str, Mapping[str, Any], list[Any], tuple[int, int]]] = []
        # The rows of a pass; and those that were just added for it, which are made already.
        self._rows: list[Row] = []
        self._added: dict[int, Row] = {}
        self._state: State = {}
        self._pass = Pass.STEP

    @property
    def device(self) -> torch.device:
        return self.spec.device

    def add(self, row: Row, state: State) -> None:
        self.rehearse(row)
        self._added[id(row.owner)] = row
        self._members.append((row.owner, row.name, row.group, self._switches(row.group), row.stretch))

    def refresh(self, state: State, pass_: Pass) -> bool:
        self._state, self._pass, self._rows = state, pass_, []
        spec = self.spec
        for owner, name, group, switches, stretch in self._members:
            check_step(spec.arguments, group)
            spec.policy.check(group)
            own = state.get(owner, {})
            if own.get(spec.policy.slow) is None if pass_ is Pass.SYNC else owner.grad is None:
                continue
            if self._switches(group) != switches or local_tensor(owner).device != spec.device:
                return False
            # Where the parameter itself is elsewhere, it may by now share memory with one of another part.
            if stretch_of(owner) != stretch:
                return False
            row = self._added.pop(id(owner), None)
            if row is None:
                read = read_in_a_sync(group, spec.rule, spec.policy) if pass_ is Pass.SYNC else None
                check_row(owner, name, group, own, spec.rule, spec.policy, read)
                loaded = moments_were_loaded(owner, own, spec.rule, spec.moments_loaded)
                row = make_row(owner, name, group, own, spec.rule, spec.policy, loaded)
                self.rehearse(row)
            self._rows.append(row)
        return True

    def rehearse(self, row: Row) -> None:
        """Steps and syncs a copy of a row of a class around other tensors, the first of its kind: a class that does not
        serve an operator is refused before anything changed."""
        kind = type(row.param), type(row.gradient)
        if not row.is_foreign or kind in self.spec.rehearsed:
            return
        steps = self.spec.policy.an_event(row.group)
        with by_operators(row.name, row.param, row.gradient):
            if row.gradient is not None or not self.spec.rule.reads_gradient:
                self._step(row.copied(steps - 1), self.spec, 1.0, 1.0, False)
            self._sync(row.copied(steps), self.spec)
        self.spec.rehearsed.add(kind)

    def _pass_over(self, row: Row, scale: float, clip: float) -> None:
        if self._pass is Pass.SYNC:
            self._sync(row, self.spec)
        else:
            self._step(row, self.spec, scale, clip, self._pass is Pass.INNER)

    def _switches(self, group: Mapping[str, Any]) -> list[Any]:
        """What another part may be due for, where it changes: the choice of a backend is one."""
        return [argument.value(group) for argument in self.spec.arguments if argument.kind.is_switch]

    def sum_squares(self, order: Order, sums: Tensor) -> None:
        rows = {id(row.owner): row for row in self._rows if row.gradient is not None}
        for owner, *_ in self._members:
            row, place = rows.get(id(owner)), order.place_of[id(owner)]
            if row is None or row.gradient is None:
                sums[place] = 0.0
                continue
            with by_operators(row.name, row.param, row.gradient):
                sums[place] = sum_of_squares(row.gradient, row.param)

    def make_clip(self, sums: Tensor, clip: ClipOnDevice) -> bool:
        return False

    def begin(self) -> None:
        """Operators bump versions themselves."""

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None = None) -> None:
        if found_inf is not None and found_inf.item() != 0:
            return
        scale = 1.0 if grad_scale is None else float(grad_scale)
        factor = 1.0 if clip is None else float(clip)
        for row in self._rows:
            with by_operators(row.name, row.param, row.gradient):
                row.show_master()
                row.read_in()
                self._pass_over(row, scale, factor)
                row.write_back()
            if row.moments_loaded:
                self.spec.moments_loaded[id(row.owner)] = row.step
            row.commit(self._state)

    def release(self) -> None:
        self._rows, self._added, self._state = [], {}, {}


def layers(extents: Iterable[tuple[int, int]]) -> list[int]:
    """For each stretch of memory how many have to be done before it: those before it in the list that it overlaps.

    Stretches of one layer share no byte, so that threads may work on all of them at once.
    """
    stretches = list(extents)
    found = [0] * len(stretches)
    cluster: list[int] = []
    reached = 0
    for i in sorted(range(len(stretches)), key=lambda i: stretches[i]):
        begin, end = stretches[i]
        if begin == end:
            continue
        if begin >= reached:
            _order(cluster, stretches, found)
            cluster = []
        cluster.append(i)
        reached = max(reached, end)
    _order(cluster, stretches, found)
    return found


def _order(cluster: list[int], stretches: list[tuple[int, int]], found: list[int]) -> None:
    if len(cluster) < 2:
        return
    for position, i in enumerate(sorted(cluster)):
        begin, end = stretches[i]
        before = [j for j in sorted(cluster)[:position] if stretches[j][0] < end and begin < stretches[j][1]]
        found[i] = max((found[j] + 1 for j in before), default=0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(64)
def _entries(module: ModuleType, rule: Rule, policy: Policy, param_dtype: torch.dtype) -> tuple[str | None, ...]:
    """For each column of a row the name of its entry in a parameter's state, in the compiled module's order.

    Raises:
        RuntimeError: The module was built from other sources: its rows are not laid out as this package takes them.
    """
    hypers, moments, *squares = module.rules()[rule.name]
    ours = tuple(slot for argument in rule.arguments for slot in argument.slots)
    columns = [name for name, *_ in module.columns()]
    # Of moments, and then of as many scales.
    places: list[str | None] = [*rule.moments, *[None] * (columns.count(None) // 2 - len(rule.moments))]
    names = iter([*places, *(None if name is None else codes.scale_name(name) for name in places)])
    # What a policy does not have has no name in its state.
    renamed: dict[str, str | None] = {name: name for name in (*policy.numbers, CACHED, codes.scale_name(CACHED))}
    renamed |= {"step": rule.step_name, "slow": policy.slow or None, "companion": policy.companion or None}
    renamed["master"] = masters.name_of(param_dtype)
    renamed = {**dict.fromkeys(("param", "grad", *NUMBERS)), **renamed}
    known = {name for name in columns if name is not None} == renamed.keys()
    differs = rule.reads_gradient and (
        set(hypers) != set(ours)
        or tuple(moments) != rule.moments
        or squares != [tuple(name in rule.squares for name in rule.moments)]
    )
    if not known or differs:
        raise RuntimeError(
            f"{module.__name__} was built from other sources than this package: its rule {rule.name!r} has "
            f"{hypers} and {moments}, and its rows {columns}; install lookahead_fused again"
        )
    return tuple(next(names) if name is None else renamed[name] for name in columns)


@functools.lru_cache(64)
def _fields(
    module: ModuleType, rule: Rule, policy: Policy, arguments: tuple[Argument, ...]
) -> tuple[tuple[str, int, int, int, float, float], ...]:
    """Each number of a group as the compiled table reads it: (key, item, slot, kind, low, high)."""
    # Apart: either may have an alpha.
    of_rule = {name: i for i, name in enumerate(module.rules()[rule.name][0])}
    of_policy = {name: module.POLICY_SLOT + i for i, name in enumerate(module.policies()[policy.name])}
    fields = []
    for argument in arguments:
        kind = argument.kind
        slots = of_rule if argument in rule.arguments else of_policy
        number = module.FIELD_KINDS["SWITCH" if kind.is_switch else "PRESENCE" if argument.presence else "NUMBER"]
        for item in range(kind.width):
            slot = slots[argument.slots[item]] if argument.slots else -1
            fields.append((argument.key, item if kind.width > 1 else -1, slot, number, kind.low, kind.high))
    return tuple(fields)


def _read_group(arguments: tuple[Argument, ...], policy: Policy, group: Mapping[str, Any]) -> tuple[float, ...]:
    check_step(arguments, group)
    policy.check(group)
    return tuple(number for argument in arguments for number in argument.numbers(group))


def _conform(grad_dtype: torch.dtype, owner: Tensor, copy: Tensor | None, gradient: Tensor) -> Tensor | None:
    """The gradient in its row's layout; None where the row must be made anew, which also finds what is wrong."""
    if not isinstance(gradient, Tensor) or not is_on_mesh_of(gradient, owner):
        return None
    gradient = local_gradient(gradient, owner)
    param = local_tensor(owner) if copy is None else copy
    if not is_plain(gradient) or gradient.layout != torch.strided or gradient.dtype != grad_dtype:
        return None
    if gradient.shape != param.shape or gradient.device != param.device or not has_memory(gradient):
        return None
    if has_layout_of(gradient, param) and gradient.data_ptr():
        return gradient
    return copy_in_layout(gradient, param, grad_dtype)
