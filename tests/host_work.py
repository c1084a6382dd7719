"""The host's work for a step: Python's is counted, and C++'s timed beside something else of the same moment.

A time alone fails on a busy machine, and a ratio of two times now and then. What must never be, work of Python's for
each tensor, is therefore counted; a time has to show no more than that the tensors are read in the quick way, and gets
as many chances as it takes a busy machine to have a quiet moment.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch

# Of so many tensors, what describes them does not fit a core's caches, and memory is what is measured.
MANY = 1000
ROUNDS, STEPS = 20, 60
# In addresses asked for by Python: a tensor's part of a step is 2.3 to 2.8 of them on a quiet machine and was seen at
# 4.8 on a busy one; read through PyTorch's table of functions for DLPack it is 15, through Python's attributes 300.
FOR_EACH = 6.0


class Stepped(NamedTuple):
    """An optimizer's step, and what comes before it: gradients that move, a stand-in that is set back."""

    params: Sequence[torch.Tensor]
    step: Callable[[], object]
    before: Callable[[], object] = lambda: None


class HostWork(NamedTuple):
    """Bytecodes that Python ran in a step of two tensors and of `MANY`; of the whole step of one, and of a tensor among
    many, the time in addresses."""

    bytecodes: tuple[int, int]
    fixed: float
    each: float

    def __str__(self) -> str:
        return f"{self.bytecodes} bytecodes, fixed {self.fixed:.0f} and for each tensor {self.each:.2f} addresses"


def assert_host_work(begin: Callable[[int], Stepped], most_fixed: float) -> HostWork:
    """Python runs the same for any number of tensors, and the times come within their bounds in one of `ROUNDS` tries.

    Args:
        begin: makes a step of so many tensors.
        most_fixed: the bound of the whole step of one, in addresses.
    """
    one, many = begin(1), begin(MANY)
    # Triton specializes kernels for the number 1, which some of its releases take other ways for.
    counted = bytecodes(begin(2)), bytecodes(many)
    fixed = each = float("inf")
    for _ in range(ROUNDS):
        (alone, *_), (_, address, beside) = _times(one), _times(many)
        fixed, each = min(fixed, alone / address), min(each, beside)
        if fixed < most_fixed and each < FOR_EACH:
            break
    found = HostWork(counted, fixed, each)
    assert counted[0] == counted[1], found
    assert fixed < most_fixed, found
    assert each < FOR_EACH, found
    return found


def bytecodes(stepped: Stepped) -> int:
    """How many instructions Python's interpreter runs in a step, tables built and kernels loaded."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    for _ in range(3):
        stepped.before()
        stepped.step()
    before = sys.gettrace()
    # Python 3.12 tells of a function's opcodes from the second time on that it traces it.
    for _ in range(2):
        count = 0
        stepped.before()
        sys.settrace(trace)
        try:
            stepped.step()
        finally:
            sys.settrace(before)
    return count


def _times(stepped: Stepped) -> tuple[float, float, float]:
    """Of some steps: the shortest, an address's shortest, and how many addresses' time a tensor of a step takes."""
    taken, asked = [], []
    for _ in range(STEPS):
        stepped.before()
        start = time.perf_counter()
        stepped.step()
        taken.append(time.perf_counter() - start)
        asked.append(_seconds_to_ask_for_addresses(stepped.params))
    # Of neighbours in time: a machine's clock changes from one moment to the next.
    beside = statistics.median(t / a for t, a in zip(taken, asked, strict=True))
    return min(taken), min(asked) / len(stepped.params), beside


def _seconds_to_ask_for_addresses(params: Sequence[torch.Tensor]) -> float:
    """The time that Python takes to ask for each gradient's address: a measure of the machine as it is now."""
    start = time.perf_counter()
    for p in params:
        p.grad.data_ptr()  # type: ignore[union-attr]
    return time.perf_counter() - start
