"""Sequences of operations: drawn from one integer, run in a process of their own, shrunk where they fail.

A process of its own, because the wrong program that is looked for here writes to memory that is not its own: it may
die by a signal, and what it spoils must not reach the next sequence.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Sequence

import torch
from helpers import assert_unchanged

from . import moves, steps  # noqa: F401  they fill OPERATIONS
from .follower import assert_follows
from .registry import OPERATIONS, operations_for
from .steps import draw_group
from .worlds import ORACLE, RULES, Group, Setup, World, has_bits

# A sequence that takes longer hangs.
LONGEST = 600
# Seconds that a failing sequence is shrunk for.
SHRINKING = 60


@dataclasses.dataclass(frozen=True)
class Script:
    """A setup and what is done to it: names of operations, each with the seed that it draws from."""

    setup: Setup
    operations: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        groups = "".join(f"\n  group {i}: {g.shapes}, {g.dtype}, {g.hyper}" for i, g in enumerate(self.setup.groups))
        return f"{self.setup.rule}{groups}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a script: how far it came, what each operation told, and what failed, if anything did."""

    reached: int
    told: tuple[str, ...]
    failure: str

    def __str__(self) -> str:
        done = "\n".join(f"  {i}. {text}" for i, text in enumerate(self.told))
        return f"{done}\n{self.failure}"


def draw_script(seed: int, longest: int = 40, without: tuple[str, ...] = ()) -> Script:
    """The script of a seed; the rule goes round."""
    rule = RULES[seed % len(RULES)]
    draw = random.Random(seed)
    groups = tuple(draw_group(rule, draw) for _ in range(draw.randint(1, 3)))
    names = operations_for(rule, without)
    weights = [OPERATIONS[name].weight for name in names]
    count = draw.randint(longest // 4, longest)
    chosen = draw.choices(names, weights, k=count)
    return Script(Setup(rule, groups), tuple((name, draw.randrange(2**32)) for name in chosen))


@functools.cache
def warm_up() -> None:
    """What torch imports with the first optimizer takes a second, which no child has to spend again."""
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])


def run(script: Script, backends: Sequence[str]) -> Outcome:
    """Runs a script in a forked process."""
    warm_up()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever happens, this process must never return into the test runner that it is a copy of.
        try:
            os.close(reading)
            faulthandler.disable()
            signal.alarm(LONGEST)
            # GNU's OpenMP waits in a fork for the threads that other tests had it make in this process.
            torch.set_num_threads(1)
            with os.fdopen(writing, "w", buffering=1) as pipe:
                _run_here(script, backends, lambda kind, text: print(json.dumps([kind, text]), file=pipe))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [json.loads(line) for line in pipe]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    begun = [text for kind, text in lines if kind == "begin"]
    told = [text for kind, text in lines if kind == "told"]
    failure = next((text for kind, text in lines if kind == "failure"), "")
    if not failure and status:
        doing = next(text for kind, text in reversed(lines) if kind == "doing")
        failure = f"died of {signal.Signals(-status).name} in {doing}"
    if not failure and len(told) < len(script.operations):
        failure = "ended without a word"
    return Outcome(len(begun), tuple(told if len(told) == len(begun) else [*told, begun[-1]]), failure)


def _run_here(script: Script, backends: Sequence[str], tell) -> None:  # type: ignore[no-untyped-def]
    doing = "construction"
    torch.set_printoptions(threshold=8)
    try:
        worlds = [World(script.setup, backend) for backend in (ORACLE, *backends)]
        for index, (name, seed) in enumerate(script.operations):
            # Where the oracle knows the bits it need not be asked after each operation.
            is_quiet = has_bits(script.setup.rule) and seed % 2 == 0 and index + 1 < len(script.operations)
            tell("begin", name)
            for world in worlds:
                doing = f"{name} by {world.backend}"
                tell("doing", doing)
                world.is_quiet, world.seen = is_quiet, []
                text = OPERATIONS[name].act(world, random.Random(seed))
            tell("told", f"{name}: {text or 'nothing to do'}{', unseen' * is_quiet}")
            if is_quiet:
                continue
            doing = f"{name}, compared"
            compare(worlds, "" if has_bits(script.setup.rule) else OPERATIONS[name].made)
    except BaseException:
        tell("failure", f"in {doing}:\n{traceback.format_exc()}")


def compare(worlds: list[World], made: str) -> None:
    """All backends hold the same bits, the oracle agrees, and memory that was left is as it was left."""
    oracle, first, *others = worlds
    expected = first.comparable()
    for other in others:
        assert_unchanged(expected, other.comparable(), f"{other.backend} beside {first.backend}")
    for world in (first, *others):
        for tensor, before in world.left:
            assert_unchanged(before, tensor, f"{world.backend}: memory that was left")
    assert_follows(oracle, first, made)


def shrink(script: Script, backends: Sequence[str], outcome: Outcome) -> tuple[Script, Outcome]:
    """A shorter script that still fails: the failing prefix, and of it and of its parameters what it takes."""
    end = time.monotonic() + SHRINKING
    script = dataclasses.replace(script, operations=script.operations[: outcome.reached])
    shorter = True
    while shorter:
        shorter = False
        for candidate in candidates(script):
            if time.monotonic() > end:
                return script, outcome
            found = run(candidate, backends)
            if found.failure:
                kept = candidate.operations[: found.reached]
                script, outcome, shorter = dataclasses.replace(candidate, operations=kept), found, True
                break
    return script, outcome


def candidates(script: Script) -> list[Script]:
    """The script without a stretch of operations, the longest first, without a group, or without a parameter."""
    made, count = [], len(script.operations)
    length = count // 2
    while length >= 1:
        for start in range(0, count, length):
            kept = script.operations[:start] + script.operations[start + length :]
            made.append(dataclasses.replace(script, operations=kept))
        length //= 2
    groups = script.setup.groups
    smaller: list[tuple[Group, ...]] = [groups[:i] + groups[i + 1 :] for i in range(len(groups)) if len(groups) > 1]
    for i, group in enumerate(groups):
        for j in range(len(group.shapes) if len(group.shapes) > 1 else 0):
            fewer = dataclasses.replace(group, shapes=group.shapes[:j] + group.shapes[j + 1 :])
            smaller.append((*groups[:i], fewer, *groups[i + 1 :]))
    return made + [dataclasses.replace(script, setup=Setup(script.setup.rule, found)) for found in smaller]
