"""Memory moves behind the optimizer, by a tensor or storage that somebody got hold of long before: state, parameters,
gradients, learning rates. A step follows, and what was left behind is free, and nobody's to write.

All in processes of their own: what is written where memory was kills one, or destroys what is there now.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_optimizer, make_params, snapshot
from processes import in_fork, needs_cpu_backend, needs_fork, needs_proc
from runs import advance, gradients_of
from stand_ins import STAND_INS
from torch import Tensor

from lookahead_fused.backends import BACKENDS

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True, "pullback_momentum": "pullback"},
    "sgd": {"momentum": 0.9, "pullback_momentum": "reset"},
    "wrapped-adamw": {"weight_decay": 0.1},
    "wrapped-external": {"momentum": 0.9, "pullback_momentum": "pullback"},
}
IMPORTS = "import test_memory_moves as t\nfrom helpers import BackendCase\n"
GUARD = 85
OCCUPANTS: list[Tensor] = []


def share(tensor: Tensor) -> None:
    tensor.data.share_memory_()


def grow(tensor: Tensor) -> None:
    """By an alias: the tensor's own shape stays."""
    alias = tensor.detach()
    alias.resize_(alias.untyped_storage().nbytes() // alias.element_size() + 4096)


def free_and_restore(tensor: Tensor) -> None:
    """As an offloader does. Another tensor takes the place meanwhile, and keeps it."""
    storage = tensor.untyped_storage()
    size, content = storage.nbytes(), alias_of(storage).clone()
    storage.resize_(0)
    OCCUPANTS.append(torch.full((size,), GUARD, dtype=torch.uint8))
    storage.resize_(size)
    alias_of(storage).copy_(content)


def set_to_a_copy(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.set_(tensor.detach().clone())  # type: ignore[call-overload]


def replace_data(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def alias_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


Way = tuple[str, Callable[[Tensor], None]]
HANDLES: dict[str, Callable[[Tensor], Tensor]] = {"itself": lambda tensor: tensor, "detached": Tensor.detach}
WAYS: list[Way] = [(handle, move) for handle in HANDLES for move in (share, grow, free_and_restore)]
# Another storage is another tensor's: these move nothing but the tensor that they are called on.
WAYS += [("itself", move) for move in (set_to_a_copy, replace_data)]


def state_of(params: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]


WHAT: dict[str, Callable[..., list[Any]]] = {
    "state": state_of,
    "parameters": lambda params, optimizer: params,
    "gradients": lambda params, optimizer: [p.grad for p in params],
    "lr": lambda params, optimizer: [group["lr"] for group in optimizer.param_groups],
}


@needs_fork
def test_a_step_follows(backend: BackendCase) -> None:
    """Each kind of memory, moved in each way by each handle: the run in which nothing moves, to the bit."""
    assert in_fork(f"{IMPORTS}t.report(t.run, {backend!r})") == []


@needs_fork
def test_slow_weights_follow(backend: BackendCase) -> None:
    """What trades places in slow_weights() trades them back, wherever it lies by now."""
    assert in_fork(f"{IMPORTS}t.report(t.run_block, {backend!r})") == []


def report(run: Callable[..., Any], backend: BackendCase) -> None:
    """Prints the cases in which a run with moves is not the run without."""
    differing = []
    every = 7 if backend.name == "triton-host" else 1  # a step takes its interpreter a thousand times as long
    stand_in = {backend.name: STAND_INS[backend.name].backend()} if backend.name in STAND_INS else {}
    unmoved = functools.cache(lambda rule, what: run(backend, rule, what, None))
    with mock.patch.dict(BACKENDS, stand_in):
        for rule, what, way in list(itertools.product(RULES, WHAT, WAYS))[::every]:
            try:
                assert_unchanged(unmoved(rule, what), run(backend, rule, what, way))
                assert all(bool((occupant == GUARD).all()) for occupant in OCCUPANTS), "written where others are by now"
            except AssertionError as error:
                differing.append(f"{rule}, {what}, {way[0]}, {way[1].__name__}: {error}")
            OCCUPANTS.clear()
    print(json.dumps(differing))


def run(backend: BackendCase, rule: str, what: str, way: Way | None) -> Any:
    """Nothing of the optimizer is asked for between the first step, when the handles are taken, and the steps after a
    move: it could learn from that."""
    params, optimizer = begun(backend, rule, 1, torch.tensor(0.1, device=backend.device) if what == "lr" else 0.1)
    handles = [HANDLES[way[0]](tensor) for tensor in WHAT[what](params, optimizer)] if way else []
    for step in range(1, 8):
        for p, g in zip(params, gradients_of(step, params), strict=True):
            p.grad.copy_(g)
        if way and step in (1, 4):
            for held in handles:
                way[1](held)
        optimizer.step()
    return {**snapshot(optimizer), "members": None}


def run_block(backend: BackendCase, rule: str, what: str, way: Way | None) -> Any:
    params, optimizer = begun(backend, rule, 3, 0.1)
    handles = [HANDLES[way[0]](tensor) for tensor in WHAT[what](params, optimizer)] if way and what != "lr" else []
    with optimizer.slow_weights():
        for held in handles:
            way[1](held)
        inside = snapshot(optimizer)
    return [{**seen, "members": None} for seen in (inside, snapshot(optimizer))]


def begun(backend: BackendCase, rule: str, steps: int, lr: Any) -> tuple[list[Any], Any]:
    params = make_params([(33,), (4, 6)], device=backend.device)
    optimizer = make_optimizer(rule, params, backend, lr=lr, k=2, **RULES[rule])
    advance(optimizer, params, range(steps))
    return params, optimizer


# ------------------------------------------------------------------------------------------------------------
# pages

SCRIPT = """
import ctypes, gc, json, os
import torch
import torch.multiprocessing as mp
from lookahead_fused import Lookahead, LookaheadAdamW

M_MMAP_THRESHOLD = -3
# Allocations of this size are mapped one by one, and unmapped as soon as they are freed.
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)

class UnfusedRMSprop(torch.optim.RMSprop):
    pass

def make(backend, count):
    p = torch.nn.Parameter(torch.ones(count))
    return p, [
        LookaheadAdamW([p], lr=0.1, k=2, backend=backend),
        Lookahead(torch.optim.AdamW([p], lr=0.1), k=2, backend=backend),
        Lookahead(UnfusedRMSprop([p], lr=0.1), k=2, backend=backend),
    ]

def step(times=1):
    for _ in range(times):
        p.grad = torch.ones_like(p)
        optimizer.step()
    p.grad = None

def large():
    return {name: value for name, value in optimizer.state[p].items() if value.dim()}
"""


@needs_cpu_backend
@needs_fork
def test_memory_that_is_gone_is_not_touched() -> None:
    """The pages are not there any more: who still reads or writes them dies of it."""
    script = """
    def sent(own, held):
        queue = mp.get_context("fork").SimpleQueue()
        queue.put(held)

    def shared(own, held):
        held.share_memory_()

    def grown(own, held):
        held.resize_(2 * held.numel())

    def restored(own, held):
        content, storage = held.clone(), held.untyped_storage()
        storage.resize_(0)
        occupants.append(torch.zeros(p.numel() + 4096))  # so that it does not come back to where it was
        storage.resize_(4 * p.numel())
        held.copy_(content)

    def replaced(own, held):
        own.data = held.clone()

    occupants, stayed = [], []
    p, optimizers = make("cpu", 1 << 18)
    for optimizer in optimizers:
        for move in (grown, restored, replaced, shared, sent):
            p.data = torch.ones(1 << 18)
            optimizer.state.clear()
            step()
            held = {name: value.detach() for name, value in (*large().items(), ("param", p))}
            step(2)
            for name in list(held):
                own = p if name == "param" else optimizer.state[p][name]
                move(own, held[name])
                held[name] = own.detach()
            before = {name: value[0].item() for name, value in held.items()}
            del own
            step(3)
            stayed += [(move.__name__, name) for name, value in held.items() if value[0].item() == before[name]]
    assert all((occupant == 0).all() for occupant in occupants)
    print(json.dumps(stayed))
    """
    assert in_fork(script, SCRIPT) == []


@needs_cpu_backend
@needs_proc
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_what_is_moved_away_is_free(name: str) -> None:
    """Weights and state make room between training and generation: nothing of the optimizer holds where they were."""
    script = f"""
    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def data(own):
        own.data = torch.empty(0)

    def storage(own):
        own.untyped_storage().resize_(0)

    def set_(own):
        with torch.no_grad():
            own.set_(torch.empty(0))

    # So many that what torch 2.15 allocates in its first calls, a megabyte, is a small part.
    kept, COUNT = [], 1 << 21
    gc.freeze()  # the modules, which need not be looked through each time
    p, optimizers = make({name!r}, COUNT)
    for optimizer in optimizers:
        for way in (data, storage, set_, "other entries", "no state"):
            p.data = torch.ones(COUNT)
            optimizer.state.clear()
            step(2)
            before, tensors = resident(), 1 + len(large())
            if way == "other entries":
                optimizer.state[p].update({{name: torch.empty(0) for name in large()}})
            elif way == "no state":
                optimizer.state.clear()
            else:
                for own in large().values():
                    way(own)
                del own
            (data if isinstance(way, str) else way)(p)
            freed, needed = before - resident(), tensors * 4 * COUNT
            if freed < 0.9 * needed:
                kept.append([type(optimizer).__name__, str(way), freed, needed])
    print(json.dumps(kept))
    """
    assert in_fork(script, SCRIPT) == []
