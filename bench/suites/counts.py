"""What can be counted instead of timed: launches, uploads, bytes, allocations, instructions. Less is better.

Launches, uploads and bytes are those of the CUDA backend, whose sources run on the host over a stand-in for the CUDA
runtime (cuda_on_host); its state and allocations are the CPU backend's. None of them depends on the machine.
Instructions do: see instructions.py.
"""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.optim import AdamW, NAdam

from bench import cuda_on_host
from lookahead_fused import (
    EMA,
    GPA,
    Lion,
    Lookahead,
    LookaheadAdamW,
    LookaheadLion,
    LookaheadRAdam,
    LookaheadRMSprop,
    ScheduleFree,
)
from lookahead_fused.backends import BACKENDS
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.measure import Unavailable
from lookahead_fused.bench.memory import allocated_bytes, state_bytes
from lookahead_fused.bench.opponents import Setting

# The rest of the family in fp32, each with its events in steps of even number: what a step moves, and what is kept.
FAMILY: dict[str, Callable[[list[torch.nn.Parameter], str], Any]] = {
    "outer momentum": lambda params, backend: Lookahead(AdamW(params), k=2, outer_momentum=0.5, backend=backend),
    "ema": lambda params, backend: EMA(AdamW(params), every=2, backend=backend),
    "gpa": lambda params, backend: GPA(AdamW(params), backend=backend),
    "schedule-free": lambda params, backend: ScheduleFree(AdamW(params), backend=backend),
    "gpa, base of its own": lambda params, backend: GPA(NAdam(params), backend=backend),
    "bf16 moments": lambda params, backend: LookaheadAdamW(params, k=2, state_dtype="bfloat16", backend=backend),
    "int8 moments": lambda params, backend: LookaheadAdamW(params, k=2, state_dtype="int8", backend=backend),
    "radam": lambda params, backend: LookaheadRAdam(params, k=2, backend=backend),
    "rmsprop": lambda params, backend: LookaheadRMSprop(params, k=2, backend=backend),
    "lion": lambda params, backend: LookaheadLion(params, k=2, backend=backend),
    "lion alone": lambda params, backend: Lion(params, backend=backend),
}
SETTINGS = [Setting(rule, dtype, k=2) for rule in ("adamw", "adam", "sgd") for dtype in opponents.DTYPE_TITLES]
# A few chunks and a tail, in two tensors.
COUNTED = parameters.Case("", ((150, 200), (4099,)))
LISTS = ("gpt2-small", "resnet50", "bert-large", "llama3-8b-512", "moe", "many-small")


@contextmanager
def stand_in() -> Iterator[ctypes.CDLL]:
    """The CUDA backend on the host, as a further backend.

    Raises:
        Unavailable: it cannot be built here.
    """
    reason = cuda_on_host.missing()
    if reason:
        raise Unavailable(f"the CUDA backend on the host: {reason}")
    library = cuda_on_host.control()
    library.control_reset()
    gc.collect()  # the events of optimizers that are gone
    with mock.patch.dict(BACKENDS, {cuda_on_host.NAME: cuda_on_host.backend()}):
        yield library
    library.control_reset()


def all_counts() -> dict[str, float]:
    """Every count that does not depend on the machine, by name.

    Raises:
        Unavailable: something they need is not here; the message says what.
    """
    return {**traffic_counts(), **launch_counts(), **memory_counts()}


def _make(setting: Setting, params: list[torch.nn.Parameter], layout: str = "one") -> Any:
    return opponents.make_ours(cuda_on_host.NAME, setting, parameters.groups(params, layout))


def traffic_counts() -> dict[str, float]:
    """Bytes a parameter of global memory that the kernels read and write, in a step and in one that syncs."""
    found: dict[str, float] = {}
    with stand_in() as library:
        for setting in SETTINGS:
            params = parameters.make(COUNTED, dtype=setting.param_dtype)
            found |= _traffic(library, f"{setting.rule}, {setting.dtype}", _make(setting, params), params)
        for name, make in FAMILY.items():
            params = parameters.make(COUNTED)
            found |= _traffic(library, name, make(params, cuda_on_host.NAME), params)
    return found


def _traffic(library: ctypes.CDLL, name: str, optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, float]:
    found: dict[str, float] = {}
    optimizer.step()
    for due in (True, False):
        library.control_reset()
        arrays = [t for p in params for t in (p, p.grad, *optimizer.state[p].values()) if t.dim() > 0]
        for array in arrays:
            size = array.numel() * array.element_size()
            library.control_watch(ctypes.c_void_p(array.data_ptr()), ctypes.c_int64(size))
        optimizer.step()
        moved = sum(library.control_read(i) + library.control_written(i) for i in range(len(arrays)))
        found[f"bytes per parameter, {name}{', in a sync' if due else ''}"] = moved / COUNTED.elements
        found[f"accesses elsewhere, {name}"] = library.control_elsewhere()
    return found


def launch_counts() -> dict[str, float]:
    """Launches, uploads and waits of a step, where gradients stay and where they move."""
    found: dict[str, float] = {}
    with stand_in() as library:
        for name in LISTS:
            # Launches are counted, not run: tensors of one element do, as many as the list has.
            case = parameters.Case("", parameters.equal(parameters.CASES[name].tensors, 1))
            for layout in ("one", "each"):
                library.control_reset()
                library.control_idle(True)
                params = parameters.make(case)
                optimizer = _make(Setting(), params, layout)
                for _ in range(opponents.K):
                    optimizer.step()
                for how in ("gradients stay", "gradients move"):
                    if how == "gradients move":
                        parameters.renew_gradients(params)
                    library.control_reset()
                    library.control_idle(True)
                    optimizer.step()
                    made = Counter(cuda_on_host.calls())
                    where = f"{name}, {'one group' if layout == 'one' else 'a group per tensor'}, {how}"
                    found[f"launches, {where}"] = made["cudaLaunchKernelEx"]
                    found[f"uploads, {where}"] = made["cudaMemcpyAsync"]
                    found[f"runtime calls, {where}"] = sum(made.values())
        for name, make in FAMILY.items():
            params = parameters.make(parameters.Case("", parameters.equal(10, 1)))
            optimizer = make(params, cuda_on_host.NAME)
            for _ in range(2):
                optimizer.step()
            library.control_reset()
            library.control_idle(True)
            optimizer.step()
            found[f"launches, {name}"] = Counter(cuda_on_host.calls())["cudaLaunchKernelEx"]
    return found


def memory_counts() -> dict[str, float]:
    """State, and what torch allocates in whole periods of steps."""
    found: dict[str, float] = {}
    case = parameters.Case("", parameters.equal(4, 100_000))
    for setting in SETTINGS:
        params = parameters.make(case, dtype=setting.param_dtype)
        optimizer: Any = opponents.make_ours("cpu", replace(setting, device="cpu"), parameters.groups(params, "one"))
        for _ in range(2 * setting.k):
            optimizer.step()

        def period(optimizer: Any = optimizer, k: int = setting.k) -> None:
            for _ in range(k):
                optimizer.step()

        name = f"{setting.rule}, {setting.dtype}"
        # Without the step counters, 8 bytes a tensor.
        kept = state_bytes(optimizer, params) - 8 * case.tensors
        found[f"state bytes per parameter, {name}"] = kept / case.elements
        found[f"bytes allocated by torch in a period, {name}"] = allocated_bytes(period)
    for name, make in FAMILY.items():
        params = parameters.make(case)
        optimizer = make(params, "cpu")
        for _ in range(2):
            optimizer.step()
        numbers = sum(t.nbytes for p in params for t in optimizer.state[p].values() if t.dim() == 0)
        found[f"state bytes per parameter, {name}"] = (state_bytes(optimizer, params) - numbers) / case.elements
    return found
