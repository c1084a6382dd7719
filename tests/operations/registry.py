"""The list of operations: what each is called, how often it is drawn, and where it has a meaning."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from .worlds import World, has_bits

# Does the operation to a world and tells what it did; "" where there was nothing to do.
Act = Callable[[World, random.Random], str]


@dataclasses.dataclass(frozen=True)
class Operation:
    act: Act
    weight: int
    # "computed" where numbers are made, "loaded" where torch casts the state of its own optimizers, else "".
    made: str
    # Only where the whole step is ours: torch's own inner steps take less, or fail half way.
    fused_only: bool


OPERATIONS: dict[str, Operation] = {}


def operation(weight: int, *, made: str = "", fused_only: bool = False) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        OPERATIONS[act.__name__] = Operation(act, weight, made, fused_only)
        return act

    return register


def operations_for(rule: str, without: tuple[str, ...] = ()) -> list[str]:
    return [name for name, op in OPERATIONS.items() if name not in without and (has_bits(rule) or not op.fused_only)]
