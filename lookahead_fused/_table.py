"""All parameters of one optimizer as parts, kept current from step to step, and the passes over them.

A row is made where a parameter gets its first gradient, and stays: one without a gradient takes no part in a step, and
nothing is made anew for it. All parts are made anew where something is not what they were made of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _build as build
from ._checks import check_row, check_state, read_in_a_sync
from ._entries import average_of, moments_were_loaded
from ._hyperparameters import check, check_step
from ._interrupts import uninterrupted
from ._norm import Clip, Norm, Order
from ._parts import Part, Pass, PlainPart, Spec, State, Tuning, layers
from ._policies import Policy
from ._rows import Row, make_row, parameter_name
from ._rules import Rule
from ._state_dtype import check_moments_of, check_state_dtype
from ._tensors import check_memory, local_tensor
from ._torch import Gradless, dispatch_mode_is_on, is_plain
from .backends import backend_argument, choose

Groups = list[dict[str, Any]]
Member = tuple[Tensor, str, dict[str, Any]]


class Table:
    """Keeps the parts of one optimizer current, and runs passes over them.

    Args:
        rule: The inner optimizer's rule.
        policy: What becomes of the slow weights.
        tuning: How compiled tables and walks work.
    """

    def __init__(self, rule: Rule, policy: Policy, tuning: Tuning | None = None) -> None:
        self.rule = rule
        self.policy = policy
        self.tuning = tuning or Tuning()
        general = [policy.master_argument(), policy.state_argument(), backend_argument(policy.backend)]
        if policy.slow:
            general.append(policy.offload_argument())
        self.arguments = (*rule.arguments, *policy.arguments, *general)
        self._parts: dict[tuple[Any, ...], Part] = {}
        self._watch: Any = None
        # Of all parameters, as long as the watch says that they are the same.
        self._order: Order | None = None
        # The parameters that have a row, by id, with the memory that the row writes.
        self._rows: dict[int, tuple[int, int]] = {}
        # There are parameters with slow weights and without a row: they had no gradient since the rows were made.
        self._asleep = False
        # For parameters whose moments came from a checkpoint without a step count (torch's SGD saves none), by id, the
        # count that they then got: as long as it is theirs, the moments count from the first step on.
        self._moments_loaded: dict[int, Tensor] = {}
        self._rehearsed: set[tuple[type, type]] = set()

    @property
    def parts(self) -> list[Part]:
        """In the order in which they are stepped."""
        return list(self._parts.values())

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError or TypeError for what a user must not pass in a parameter group."""
        check(self.arguments, group)
        self.rule.check(group)
        self.policy.check(group)
        self.check_master(group, self.policy.master_weights)
        check_state_dtype(group, self.rule, self.policy)
        for param in group.get("params", ()):
            if isinstance(param, Tensor):
                self.policy.check_dtype("a parameter", param.dtype, bool(group.get(self.policy.master_weights)))
                check_moments_of(param, "a parameter", group, self.policy)
        needs = self.rule.first_moment_needs
        if needs and self.policy.acts_on_moment(group) and not self.rule.moments_in_use(group)[0]:
            raise self.policy.no_first_moment(group, f"{needs}={group[needs]!r}")

    def check_master(self, group: Mapping[str, Any], name: str) -> None:
        """Raises ValueError for a master that nothing would step; `name` is what its user calls the setting."""
        if group.get(self.policy.master_weights) and not self.rule.reads_gradient:
            raise ValueError(
                f"{name} must be False around an optimizer whose step is its own, got True: it would step the "
                "parameters, and not their master"
            )

    def invalidate(self) -> None:
        """Forgets all that was derived from state that has been replaced."""
        self._forget_rows()
        self._moments_loaded.clear()

    def step(
        self,
        groups: Groups,
        state: State,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        norm: Norm | None = None,
    ) -> None:
        """One step of every parameter that has a gradient.

        Args:
            groups: The optimizer's param_groups.
            state: The optimizer's state; what a parameter lacks there is created.
            grad_scale: What an AMP loss scaler multiplied the gradients by, a tensor of one element, or None.
            found_inf: A tensor of one element, or None; where it is not zero, nothing at all changes.
            norm: Takes the norm of all gradients and clips them by it, or has taken it; or None.

        Raises:
            ValueError, TypeError: A hyperparameter, gradient or state is not acceptable. Nothing has changed then.
            RuntimeError: A named backend cannot serve. Nothing has changed then.
        """
        if norm is None and found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
            return
        self._run((Pass.STEP,), groups, state, grad_scale, found_inf, norm)

    def step_without_events(
        self, groups: Groups, state: State, grad_scale: Tensor | None = None, norm: Norm | None = None
    ) -> None:
        """A step whose events are left to a `sync` after it."""
        self._run((Pass.INNER,), groups, state, grad_scale, None, norm)

    def measure(
        self, norm: Norm, groups: Groups, state: State, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Clip:
        """What `norm` comes to in the next step, before it is made; raises as `step` does."""
        with Gradless():
            parts = self._current(groups, state, Pass.STEP)
            try:
                return norm.measure(parts, self._order_of(groups), grad_scale, found_inf)
            finally:
                for part in parts:
                    part.release()

    def sync(self, groups: Groups, state: State) -> None:
        """The policy's event, now, for every parameter that had a step; raises as `step` does."""
        self._run((Pass.SYNC,), groups, state, None, None)

    def check(self, groups: Groups, state: State, gradients_come: bool = False) -> None:
        """Raises what a step would raise before it changes anything.

        Args:
            gradients_come: A closure is still to be evaluated: any parameter that requires one may get a gradient.
        """
        for group in groups:
            check_step(self.arguments, group)
            self.policy.check(group)
        for member in _members(groups):
            if member[0].grad is not None or (gradients_come and member[0].requires_grad):
                self._check_member(member, state)
                self._rehearse(member, state)

    def check_sync(self, groups: Groups, state: State) -> None:
        """Raises what a sync would raise before it changes anything."""
        for group in groups:
            check_step(self.arguments, group)
            self.policy.check(group)
        key = self.policy.backend
        for param, name, group in _members(groups):
            if _takes_part(param, state, self.policy, Pass.SYNC):
                read = read_in_a_sync(group, self.rule, self.policy)
                check_row(param, name, group, state[param], self.rule, self.policy, read)
                choose(group[key], local_tensor(param).device, key)

    def slow_weights(self, groups: Groups, state: State) -> list[tuple[Tensor, Tensor]]:
        """Each parameter that has slow weights, with them; raises for any that are not its own."""
        found = []
        for param, name, group in _members(groups):
            own = state.get(param)
            if not isinstance(own, Mapping) or own.get(self.policy.slow) is None:
                continue
            check_memory(local_tensor(param), name)
            check_state(param, own, self.rule, self.policy, group, name, read=())
            found.append(
                (param, self._slow_of(param, own, group), own.get(self.rule.step_name), self.policy.begins(group))
            )
        begun = _have_reached([count for _, _, count, _ in found], [begins for *_, begins in found])
        return [(param, slow) for (param, slow, _, _), has in zip(found, begun, strict=True) if has]

    def slow_weights_beside(
        self, groups: Groups, state: State, train_params: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameters whose training weights lie elsewhere: each with its slow weights and with these."""
        group_of = {id(param): group for param, _, group in _members(groups)}
        return [
            (param, self._slow_of(train, state[param], group_of[id(param)]), train) for param, train in train_params
        ]

    def _slow_of(self, theta: Tensor, own: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
        slow: Tensor = own[self.policy.slow]
        if not self.policy.averages:
            return slow
        return average_of(theta, own, self.policy, bool(group.get(self.policy.master_weights)))

    def _run(
        self,
        passes: tuple[Pass, ...],
        groups: Groups,
        state: State,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: Norm | None = None,
    ) -> None:
        with Gradless():
            for pass_ in passes:
                parts = self._current(groups, state, pass_)
                try:
                    clip = None
                    if norm is not None:
                        measured = norm.measure(parts, self._order_of(groups), grad_scale, found_inf)
                        clip, found_inf = measured.coefficient, measured.found_inf
                    if len(parts) == 1 and parts[0].in_one_call:
                        _run_part(parts[0], grad_scale, found_inf, clip)
                    else:
                        with uninterrupted():
                            for part in parts:
                                _run_part(part, grad_scale, found_inf, clip)
                finally:
                    for part in parts:
                        part.release()

    def _current(self, groups: Groups, state: State, pass_: Pass) -> list[Part]:
        """The parts, refreshed for a pass; made anew where they are out of date."""
        if dispatch_mode_is_on():
            parts = self._made(groups, state, pass_, operators=True)
            for part in parts.values():
                part.refresh(state, pass_)
            return list(parts.values())
        watch = self._watch
        if watch is not None:
            seen = watch.look(groups)
            if seen != watch.STALE and self._refreshed(state, pass_):
                if not self._asleep if pass_ is Pass.SYNC else seen == watch.CURRENT:
                    return self.parts
                self._release()
                if self._grow(groups, state, pass_) and self._refreshed(state, pass_):
                    return self.parts
            self._release()
        self._forget_rows()
        self._parts = self._made(groups, state, pass_)
        self._watch = self._new_watch(groups, state)
        if not self._refreshed(state, pass_):
            self._release()
            raise RuntimeError("a table changed while it was made: is another thread changing the optimizer?")
        return self.parts

    def _order_of(self, groups: Groups) -> Order:
        if self._order is not None and not dispatch_mode_is_on():
            return self._order
        order = Order([param for param, *_ in _members(groups)])
        # Under a mode nothing is kept: what is made there may be the mode's own kind of tensor.
        if not dispatch_mode_is_on():
            self._order = order
        return order

    def _refreshed(self, state: State, pass_: Pass) -> bool:
        try:
            for part in self._parts.values():
                if not part.refresh(state, pass_):
                    return False
        except BaseException:
            self._release()
            raise
        return True

    def _release(self) -> None:
        for part in self._parts.values():
            part.release()

    def _forget_rows(self) -> None:
        self._parts, self._watch, self._rows, self._asleep = {}, None, {}, False
        self._order = None

    def _grow(self, groups: Groups, state: State, pass_: Pass) -> bool:
        """Adds rows for parameters that have none yet. False: they share memory with rows that there are."""
        before = len(self._rows)
        try:
            grown = self._made(groups, state, pass_, onto=self._parts)
        except BaseException:
            # Some parts have taken rows by now that are not told of.
            self._forget_rows()
            raise
        if any(layers(self._rows.values())[before:]):
            return False
        self._parts = grown
        self._order = None
        self._watch = self._new_watch(groups, state)
        return True

    def _made(
        self,
        groups: Groups,
        state: State,
        pass_: Pass,
        onto: dict[tuple[Any, ...], Part] | None = None,
        operators: bool = False,
    ) -> dict[tuple[Any, ...], Part]:
        """Parts with a row for each parameter that takes part in a pass and has none yet."""
        known: Mapping[int, Any] = {} if operators else self._rows
        members = [
            m for m in _members(groups) if id(m[0]) not in known and _takes_part(m[0], state, self.policy, pass_)
        ]
        for group in groups:
            check_step(self.arguments, group)
            self.policy.check(group)
        backend_for = functools.cache(choose)
        chosen = [self._check_member(member, state, backend_for) for member in members]
        if any(is_capturing(local_tensor(param).device) for param, *_ in members):
            raise RuntimeError(
                "this step cannot be captured in a CUDA graph: state or tables would be made in it, and made anew in "
                "every replay; run a step with gradients for the same parameters before the capture"
            )
        # Of tensors around others, and where a mode wants to see all that happens, operators know what to do.
        plain = choose("reference", torch.device("cpu"))
        rows = [self._row(member, state) for member in members]
        stretches = [row.stretch for row in rows]
        parts = {} if onto is None else onto
        spread = layers(stretches)
        made = []
        for row, backend, layer in zip(rows, chosen, spread, strict=True):
            compiled = row.is_uniform and not operators and isinstance(state, dict) and _is_watchable(groups)
            part = self._part_for(parts, backend if compiled else plain, row, layer)
            made.append((row, part))
            if operators or isinstance(part, PlainPart):
                part.add(row, state)
        if operators:
            return _in_order(parts)
        # All is checked, and all memory is there; from here on state changes.
        with uninterrupted():
            for row, part in made:
                if row.moments_loaded:
                    self._moments_loaded[id(row.owner)] = row.step
                if not isinstance(part, PlainPart):
                    row.show_master()
                    row.commit(state)
                    part.add(row, state)
        self._rows.update((id(row.owner), stretch) for row, stretch in zip(rows, stretches, strict=True))
        return _in_order(parts)

    def _check_member(self, member: Member, state: State, backend_for: Any = choose) -> ModuleType:
        """The backend of a parameter; raises where it cannot be stepped."""
        param, name, group = member
        if dispatch_mode_is_on() and is_plain(local_tensor(param)):
            # Not left to the operators: some read a tensor with memory, and write to none.
            made = torch.empty(0, device="cpu")
            if not is_plain(made):
                raise TypeError(
                    f"{name} must be stepped outside of a mode that makes a {type(made).__name__} beside parameters "
                    "with memory"
                )
        check_row(param, name, group, state.get(param, {}), self.rule, self.policy)
        self.check_master(group, self.policy.master_weights)
        key = self.policy.backend
        found: ModuleType = backend_for(group[key], local_tensor(param).device, key)
        return found

    def _rehearse(self, member: Member, state: State) -> None:
        """Raises TypeError for a parameter of a class whose operators will not do, where that was not tried yet."""
        local = local_tensor(member[0])
        if not is_plain(local) and (type(local), type(None)) not in self._rehearsed:
            row = self._row(member, state)
            self._part_for({}, choose("reference", torch.device("cpu")), row, 0).add(row, state)

    def _row(self, member: Member, state: State) -> Row:
        param, name, group = member
        own = state.get(param, {})
        loaded = moments_were_loaded(param, own, self.rule, self._moments_loaded)
        return make_row(param, name, group, own, self.rule, self.policy, loaded)

    def _part_for(self, parts: dict[tuple[Any, ...], Part], backend: ModuleType, row: Row, layer: int) -> Part:
        # A row that has slow weights and no gradient yet takes part in syncs.
        grad = row.param.dtype if row.gradient is None else row.gradient.dtype
        pattern = row.param.device, row.param.dtype, grad, row.moment_dtype
        key = (layer, backend.NAME, *pattern)
        if key not in parts:
            shared = self._moments_loaded, self.tuning, self._rehearsed
            spec = Spec(self.rule, self.policy, self.arguments, *pattern, *shared)
            parts[key] = backend.part(spec)
        return parts[key]

    def _new_watch(self, groups: Groups, state: State) -> Any:
        """What tells cheaply that the parts are current; None where only making them anew does."""
        module = build.module("_cpu") or build.module("_cuda")
        if module is None or not _is_watchable(groups) or not isinstance(state, dict):
            return None
        dormant = [param for param, *_ in _members(groups) if id(param) not in self._rows]
        self._asleep = any(_takes_part(param, state, self.policy, Pass.SYNC) for param in dormant)
        return module.Watch(Tensor, groups, dormant)


def _in_order(parts: dict[tuple[Any, ...], Part]) -> dict[tuple[Any, ...], Part]:
    """Of rows that share memory, the one that stands first among the parameters is stepped first, as in torch."""
    return dict(sorted(parts.items(), key=lambda item: item[0][0]))


def _run_part(part: Part, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None) -> None:
    part.begin()
    if grad_scale is None and found_inf is None and clip is None:
        part.run(None, None, None)
        return
    device = part.spec.device
    part.run(_on(grad_scale, device), _on(found_inf, device), None if clip is None else clip.to(device))


def _members(groups: Groups) -> Iterator[Member]:
    """Each parameter, with the name that messages give it, and its group.

    Raises:
        ValueError: A parameter is there twice.
    """
    seen: set[int] = set()
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            name = parameter_name(index, position)
            if id(param) in seen:
                raise ValueError(f"{name} must be there once, and is there before")
            seen.add(id(param))
            yield param, name, group


def _takes_part(param: Tensor, state: State, policy: Policy, pass_: Pass) -> bool:
    """Nothing of a parameter without a gradient changes in a step, nor of one without slow weights in a sync."""
    if pass_ is not Pass.SYNC:
        return param.grad is not None
    own = state.get(param)
    return isinstance(own, Mapping) and own.get(policy.slow) is not None


def _is_watchable(groups: Groups) -> bool:
    return type(groups) is list and all(
        isinstance(group, dict) and isinstance(group["params"], list | tuple) for group in groups
    )


def _have_reached(counts: list[Any], least: list[int]) -> list[bool]:
    """Which counts of updates are as large as they must be; None, a count that is not there, is."""
    reached = [isinstance(count, Tensor) or count is None or count >= n for count, n in zip(counts, least, strict=True)]
    # One wait for each device, not for each count.
    by_device: dict[torch.device, list[int]] = {}
    for index, count in enumerate(counts):
        if isinstance(count, Tensor):
            by_device.setdefault(count.device, []).append(index)
    for indices in by_device.values():
        values = torch.stack([local_tensor(counts[index]).reshape(()) for index in indices]).tolist()
        for index, value in zip(indices, values, strict=True):
            reached[index] = value >= least[index]
    return reached


def is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None else tensor.to(device, torch.float32)
