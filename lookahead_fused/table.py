"""Parameters, gradients and state as a table that a backend advances by a step.

A `Row` is one parameter and what belongs to it, a `Part` the rows that one backend call takes together: one device,
one pattern of dtypes. `Table.advance` is a step. The parts are made anew when anything moved; when nothing did, a
compiled check says so, and only gradients and hyperparameters are read again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import rules
from .backends import check_name, choose
from .rows import Place, Row, check_state, describe_row, make_row, parameter_name
from .tensors import check_gradient, check_parameter, copy_in_layout, local_tensor

Groups = list[dict[str, Any]]
State = MutableMapping[Tensor, Any]

# Rows are cut into chunks of this many elements, the unit in which work is shared. A setting for tests.
chunk_elements = 1 << 14

# The fastest way to describe a tensor that a compiled table may take. A setting for tests, which try the slower ones.
fastest = "SHIM"


@dataclass
class Part:
    """Rows that one backend takes together, and what it has made of them."""

    backend: ModuleType
    rule: rules.Rule
    settings: rules.Settings
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    groups: Groups = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    # Once there is a compiled table, it and these stand for the rows, which are let go.
    places: list[Place] = field(default_factory=list)
    native: Any = None
    stepper: Any = None


class Table:
    """Keeps the parts of one optimizer current, and steps them.

    Args:
        rule: The inner optimizer's rule.
        settings: The names of Lookahead's own entries in the parameter groups.
    """

    def __init__(self, rule: rules.Rule, settings: rules.Settings) -> None:
        self.rule = rule
        self.settings = settings
        self.fields = rule.fields + settings.fields()
        self.state_names = (rule.step_name, *rule.moments, "slow_param", "slow_momentum", "master_param")
        self._parts: list[Part] = []
        self._watch: Any = None
        # Parameters that are not dense: the row's is a copy, filled before the step and written back after.
        self._copies: list[Place] = []
        # For parameters whose moments came from a checkpoint without a step count (torch's SGD saves none), by id, the
        # count that they then got: as long as it is theirs, the moments count from the first step on.
        self._moments_loaded: dict[int, Tensor] = {}

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError for a parameter group that holds a value out of bounds."""
        _check_group(self.fields, self.settings.backend, group)

    def invalidate(self) -> None:
        """Forgets all that was derived from state that has been replaced."""
        self._parts, self._watch, self._copies = [], None, []
        self._moments_loaded.clear()

    def is_current(self, groups: Groups, state: State, deep: bool = True) -> bool:
        """Since the last step no parameter was added or had its first gradient, and no state was replaced."""
        return self._watch is not None and self._watch.current(groups, state, deep)

    def state_is_private(self, state: State) -> bool:
        """Nobody outside holds a part of the state; see `advance`, deep."""
        return self._watch is not None and self._watch.state_is_private(state)

    def advance(
        self,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        deep: bool = True,
    ) -> None:
        """One step of every parameter that has a gradient.

        Args:
            groups: The optimizer's param_groups.
            state: The optimizer's state; what a parameter lacks there is created.
            grad_scale: What an AMP loss scaler multiplied the gradients by, a tensor of one element, or None.
            found_inf: A tensor of one element, or None; where it is not zero, nothing at all changes.
            deep: Look whether state tensors were replaced or moved. False is for a state that nobody could touch.

        Raises:
            ValueError, TypeError: a hyperparameter or gradient is not acceptable. Nothing has changed then.
            RuntimeError: a named backend cannot serve. Nothing has changed then.
        """
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
            return
        # What torch.no_grad does, without its price: with cold caches 5 us of a step.
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            current = self.is_current(groups, state, deep)
            if not (current and all(part.native.refresh(True, deep) for part in self._parts)):
                self._rebuild(groups, state)
            for copy in self._copies:
                copy.param.copy_(local_tensor(copy.owner))
            for part in self._parts:
                # A backend writes through addresses, which autograd does not see.
                if part.native is not None:
                    increment_version(part.native.updated(deep))
            for part in self._parts:
                part.backend.step(part, _on(grad_scale, part.device), _on(found_inf, part.device))
                for row in part.rows:
                    row.write_back()
            for copy in self._copies:
                local_tensor(copy.owner).copy_(copy.param)
        finally:
            for part in self._parts:
                if part.native is not None:
                    part.native.release()
                for row in part.rows:
                    row.gradient = None
            torch._C._set_grad_enabled(grad_enabled)

    def rows_with_slow_weights(self, groups: Groups, state: State) -> list[tuple[Row, dict[str, Any]]]:
        """A row for every parameter that has slow weights, with its group; to be written by `write_back`."""
        rows = []
        for index, group in enumerate(groups):
            for param in group["params"]:
                if "slow_param" in state.get(param, {}):
                    rows.append((make_row(param, group, index, state[param], self.rule, self.settings, False), group))
        return rows

    def _rebuild(self, groups: Groups, state: State) -> None:
        self._parts, self._watch, self._copies = [], None, []
        for group in groups:
            self.check_group(group)
        chosen: list[tuple[Tensor, dict[str, Any], int, ModuleType]] = []
        seen: set[Tensor] = set()
        dormant: list[Tensor] = []
        # Asked once for each parameter, and answered once for each group's backend and device.
        backend_for = functools.cache(choose)
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                if param in seen:
                    raise ValueError(f"{parameter_name(index, position)} must be there once, and is there before")
                seen.add(param)
                if param.grad is None:
                    dormant.append(param)
                    continue
                name = parameter_name(index, position)
                check_parameter(param, name)
                if self.rule.reads_gradient:
                    check_gradient(param.grad, param, name)
                check_state(param, state.get(param, {}), self.rule, name)
                backend = backend_for(group[self.settings.backend], local_tensor(param).device, self.settings.backend)
                chosen.append((param, group, index, backend))

        if any(_is_capturing(local_tensor(param).device) for param, *_ in chosen):
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph: state or tables would be made in it, and made anew in "
                "every replay; run a step with gradients for the same parameters before the capture"
            )
        # All is checked; from here on state changes.
        parts: dict[tuple[Any, ...], Part] = {}
        slots: dict[tuple[int, int], int] = {}
        for param, group, index, backend in chosen:
            own = state[param]
            loaded = self._moments_were_loaded(param, own)
            row = make_row(param, group, index, own, self.rule, self.settings, loaded)
            if loaded:
                self._moments_loaded[id(param)] = own[self.rule.step_name]
            if any(moment.dtype != row.compute_dtype for moment in row.moments.values()):
                # Another optimizer's own moments, in whatever dtype it keeps them.
                backend = choose("reference", row.param.device)
            part = self._part_for(parts, backend, row)
            if (id(part), index) not in slots:
                slots[id(part), index] = len(part.groups)
                part.groups.append(group)
            row.group = slots[id(part), index]
            part.rows.append(row)
        self._parts = list(parts.values())
        self._compile(groups, state, dormant)
        self._copies = [place for part in self._parts for place in part.places if place.is_copy]

    def _moments_were_loaded(self, param: Tensor, own: Mapping[str, Any]) -> bool:
        count = own.get(self.rule.step_name)
        if count is not None:
            return self._moments_loaded.get(id(param)) is count
        return any(own.get(name) is not None for name in self.rule.moments)

    def _part_for(self, parts: dict[tuple[Any, ...], Part], backend: ModuleType, row: Row) -> Part:
        grad = row.param.dtype
        if self.rule.reads_gradient:
            assert row.gradient is not None
            grad = row.gradient.dtype
        key = (backend.NAME, row.param.device, row.param.dtype, grad)
        if key not in parts:
            parts[key] = Part(backend, self.rule, self.settings, row.param.device, row.param.dtype, grad)
        return parts[key]

    def _compile(self, groups: Groups, state: State, dormant: list[Tensor]) -> None:
        """Lets the compiled modules take over; where one part has none, the next step is gathered like this one."""
        maker: ModuleType | None = None
        for part in self._parts:
            maker = part.backend.native()
            if maker is None:
                return
            part.places = [Place(row.owner, row.param, row.is_copy) for row in part.rows]
            part.native = maker.Table(
                tensor_type=Tensor,
                fastest=getattr(maker.Way, fastest),
                rule=self.rule.name,
                param_dtype=_name(part.param_dtype),
                grad_dtype=_name(part.grad_dtype),
                rows=[describe_row(row, self.rule) for row in part.rows],
                groups=part.groups,
                fields=tuple((f.key, f.item, f.slot, f.kind, f.low, f.high) for f in self.fields),
                # Neither holds the part or this table, which hold what is made here: the optimizer's memory is free as
                # soon as it is deleted, without waiting for the garbage collector.
                conform=functools.partial(_conform, part.places, part.grad_dtype),
                read_group=functools.partial(_read_group, self.fields, self.settings.backend),
                chunk_elements=chunk_elements,
            )
            part.rows = []
            if not part.native.refresh(True, True):
                raise RuntimeError("a table changed while it was made: is another thread changing the optimizer?")
        if maker is not None:
            self._watch = maker.Watch(Tensor, groups, state, self.state_names, dormant)


def _read_group(fields: tuple[rules.Field, ...], backend: str, group: Mapping[str, Any]) -> tuple[float | int, ...]:
    _check_group(fields, backend, group)
    return tuple(rules.as_number(f, f.value(group)) for f in fields)


def _check_group(fields: tuple[rules.Field, ...], backend: str, group: Mapping[str, Any]) -> None:
    rules.check_group(group, fields)
    check_name(group[backend], backend)


def _conform(places: list[Place], grad_dtype: torch.dtype, index: int, gradient: Tensor) -> Tensor | None:
    """The gradient in its row's layout; None where the row must be made anew, which also finds what is wrong."""
    place = places[index]
    owner, gradient = local_tensor(place.owner), local_tensor(gradient)
    moved = owner.shape != place.param.shape or not (place.is_copy or owner is place.param)
    if moved or gradient.layout != torch.strided or gradient.dtype != grad_dtype:
        return None
    if gradient.shape != owner.shape or gradient.device != owner.device:
        return None
    return copy_in_layout(gradient, place.param, grad_dtype)


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None else tensor.to(device, torch.float32)
