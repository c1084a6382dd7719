"""A world: one backend's parameters and optimizer, with all that operations do to them kept comparable."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers import LOOKAHEAD_CLASSES, TORCH_CLASSES, UnfusedRMSprop, assert_unchanged, make_params, snapshot
from torch import Tensor

import lookahead_fused

ORACLE = "oracle"
BASES = {
    **{rule: TORCH_CLASSES[rule] for rule in ("adamw", "adam", "sgd")},
    "external": UnfusedRMSprop,
    "nadam": torch.optim.NAdam,
    "adagrad": torch.optim.Adagrad,
}
RULES = ("adamw", "adam", "sgd", *(f"wrapped-{base}" for base in BASES))
SETTINGS = ("k", "alpha", "pullback_momentum", "backend")


def base_of(rule: str) -> str:
    return rule.removeprefix("wrapped-")


def has_bits(rule: str) -> bool:
    """The oracle knows this rule's bits; another inner step is torch's own, and known to rounding."""
    return base_of(rule) in LOOKAHEAD_CLASSES


def spelled(rule: str, name: str) -> str:
    """A setting's name in the parameter groups."""
    return f"lookahead_{name}" if rule.startswith("wrapped-") and name in SETTINGS else name


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter group before it is one."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    hyper: dict[str, Any]
    seed: int

    def made(self, rule: str) -> dict[str, Any]:
        params = make_params(self.shapes, self.dtype, seed=self.seed)
        return {"params": params, **{spelled(rule, name): value for name, value in self.hyper.items()}}


@dataclasses.dataclass(frozen=True)
class Setup:
    rule: str
    groups: tuple[Group, ...]


class World:
    """One backend's parameters and optimizer.

    Every operation sees one world at a time and draws from a generator of its own seed, so that it does the same to
    each. What it may draw depends on shapes, dtypes, names and groups alone, which are the same everywhere.
    """

    def __init__(self, setup: Setup, backend: str) -> None:
        self.rule, self.backend = setup.rule, backend
        self.optimizer = self.fresh_optimizer([group.made(self.rule) for group in setup.groups])
        # What a user once saved.
        self.saved: Any = None
        # Memory that parameters and state no longer lie in, with what must stay there.
        self.left: list[tuple[Tensor, Tensor]] = []
        # Nobody looks at the state before and after this operation; to look is to ask the optimizer for it, which may
        # then look closer itself.
        self.is_quiet = False
        # What this operation saw inside the optimizer, to be compared as the weights are.
        self.seen: list[Any] = []

    @property
    def is_oracle(self) -> bool:
        return self.backend == ORACLE

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def fresh_optimizer(self, groups: list[dict[str, Any]]) -> Any:
        if self.is_oracle:
            from .follower import Follower

            return Follower(self.rule, groups)
        if self.rule.startswith("wrapped-"):
            return lookahead_fused.Lookahead(BASES[base_of(self.rule)](groups), backend=self.backend)
        return LOOKAHEAD_CLASSES[self.rule](groups, backend=self.backend)

    def setting(self, group: dict[str, Any], name: str) -> Any:
        return group.get(spelled(self.rule, name))

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """A parameter's state; asking creates none."""
        found: dict[str, Any] = self.optimizer.state.get(param, {})
        return found

    def pick(self, draw: random.Random) -> tuple[int, torch.nn.Parameter, dict[str, Any]]:
        """A parameter, its place in the list, and its group."""
        members = [(p, group) for group in self.optimizer.param_groups for p in group["params"]]
        index = draw.randrange(len(members))
        return index, *members[index]

    def pick_tensor(self, draw: random.Random) -> tuple[str, Tensor]:
        """A parameter, one of its state's tensors or its gradient, and how to call it."""
        index, p, _ = self.pick(draw)
        named: dict[str, Any] = {"": p, "'s gradient": p.grad}
        named.update((f"'s {name}", value) for name, value in sorted(self.state_of(p).items()))
        name = draw.choice([name for name, value in named.items() if isinstance(value, Tensor)])
        return f"parameter {index}{name}", named[name]

    @contextmanager
    def leaving(self, *tensors: Tensor) -> Iterator[None]:
        """Remembers the memory that tensors leave inside: nothing may be written there any more."""
        aliases = [tensor.detach() for tensor in tensors]
        yield
        for tensor, alias in zip(tensors, aliases, strict=True):
            if alias.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                self.left = [*self.left[-7:], (alias, alias.clone())]

    def tensors(self) -> list[Tensor]:
        """Every parameter and state tensor."""
        states = [v for p in self.params for v in self.state_of(p).values() if isinstance(v, Tensor)]
        return [*self.params, *states]

    @contextmanager
    def versions_tell(self, untouched: tuple[int, ...] = ()) -> Iterator[None]:
        """Whatever the optimizer writes to inside, it tells autograd of; `untouched` parameters it leaves alone."""
        if self.is_oracle or self.is_quiet:
            yield
            return
        watched = [(t, t._version, t.detach().clone()) for t in self.tensors()]
        quiet = [(index, self.params[index], self.params[index]._version) for index in untouched]
        yield
        for tensor, version, before in watched:
            if tensor._version == version:
                assert_unchanged(before, tensor.detach(), "written without a new version")
        for index, p, version in quiet:
            assert p._version == version, f"parameter {index} has no gradient and a new version"

    def refused(self, call: Callable[[], Any], *kinds: type[Exception]) -> None:
        """The optimizer refuses a call by one of these exceptions, and changes nothing."""
        if self.is_oracle:
            return
        before = self.everything()
        try:
            call()
        except kinds as error:
            self.seen.append(type(error).__name__)
        else:
            raise AssertionError(f"accepted, where {' or '.join(kind.__name__ for kind in kinds)} is due")
        self.same_as(before, "changed by a refused call")

    def same_as(self, before: dict[str, Any], where: str) -> None:
        assert_unchanged(before, self.everything(), where)

    def everything(self) -> dict[str, Any]:
        return {**snapshot(self.optimizer), "versions": [t._version for t in self.tensors()]}

    def comparable(self) -> dict[str, Any]:
        """All that must be the same in another world."""
        whole = snapshot(self.optimizer)
        del whole["members"]
        for group in whole["groups"]:
            group.pop(spelled(self.rule, "backend"), None)
        return {**whole, "seen": self.seen}
