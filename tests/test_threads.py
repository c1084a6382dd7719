"""Other threads of a process: what they may do beside a step, and a step for which none can be had."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, UnfusedRMSprop, assert_unchanged, make_optimizer, make_params, set_grad, snapshot
from processes import needs_cpu_backend, needs_proc, python
from runs import advance, assert_same_run, gradients_of

from lookahead_fused import Lookahead, LookaheadAdamW

RULES = ["adamw", "wrapped-sgd", "external"]


def make(rule: str, params: list[torch.nn.Parameter], backend: BackendCase) -> Any:
    if rule == "external":
        return Lookahead(UnfusedRMSprop(params, lr=0.1), k=2, backend=backend.name)
    return make_optimizer(rule, params, backend, lr=0.1, k=2)


class Watched:
    """A lock that tells when a thread has to wait for it."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.reached = lock, threading.Event()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.reached.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.mark.parametrize("rule", RULES)
def test_slow_weights_wait_for_a_step(backend: BackendCase, rule: str) -> None:
    """An evaluation that begins on another thread within a step sees the slow weights after it, and the step is one of
    the fast weights."""
    params, twin_params = (make_params([(7,), (3, 5)], device=backend.device) for _ in range(2))
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(2))
    seen: list[torch.Tensor] = []
    entered, leave = threading.Event(), threading.Event()
    optimizer._lock = lock = Watched(optimizer._lock)

    def evaluate() -> None:
        with optimizer.slow_weights():
            seen.extend(p.detach().clone() for p in params)
            entered.set()
            lock.reached.set()
            leave.wait()

    thread = threading.Thread(target=evaluate, daemon=True)

    def closure() -> None:
        thread.start()
        # Whoever does not wait for the step is inside then.
        assert lock.reached.wait(60)
        for p, g in zip(params, gradients_of(2, params), strict=True):
            set_grad(p, g)

    optimizer.step(closure)
    assert entered.wait(60)
    for call in (optimizer.step, optimizer.sync):
        with pytest.raises(RuntimeError, match="slow_weights"):
            call()
    leave.set()
    thread.join()
    advance(twin, twin_params, [2])
    for p, s in zip(twin_params, seen, strict=True):
        assert torch.equal(s, twin.state[p]["slow_param"])
    assert_same_run(optimizer, twin)


def again_by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, again_by_pickle])
@pytest.mark.parametrize("rule", RULES)
def test_a_copy_has_a_lock_of_its_own(backend: BackendCase, rule: str, again: Callable) -> None:
    """It is not held up by the first one's, and the first one not by its."""
    params = make_params([(7,)], device=backend.device)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    other = again(optimizer)
    mine, others = snapshot(optimizer), snapshot(other)
    assert_unchanged([mine["params"], mine["state"]], [others["params"], others["state"]])

    def step(o: Any) -> None:
        ps = o.param_groups[0]["params"]
        thread = threading.Thread(target=advance, args=(o, ps, [3]), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "it waits for the other's lock"

    with optimizer._lock:
        step(other)
    with other._lock:
        step(optimizer)


@needs_cpu_backend
def test_no_other_thread_runs_while_a_step_writes() -> None:
    """Whoever waits for the interpreter may be about to share or free the memory that is written. So nobody ever finds
    the first number stepped and the last one not."""
    p = torch.nn.Parameter(torch.zeros(1 << 22))
    p.grad = torch.ones_like(p)
    optimizer = LookaheadAdamW([p], lr=1.0, weight_decay=0, k=100, backend="cpu")
    # Read in one call of C's, which keeps the lock.
    ends = p.detach().numpy()[:: p.numel() - 1]
    optimizer.step()
    torn, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            first, last = ends.tolist()
            if first != last:
                torn.append((first, last))

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=look)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(20):
            optimizer.step()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert not torn


@needs_cpu_backend
@needs_proc
def test_no_thread_can_be_had() -> None:
    """A step does without, to the same bits, and takes threads again as soon as there are."""
    script = """
    import json, os, resource
    import torch
    from lookahead_fused import LookaheadAdamW
    from lookahead_fused._parts import Tuning
    from lookahead_fused._table import Table

    def make():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(1 << 20))
        p.grad = torch.randn(1 << 20)
        optimizer = LookaheadAdamW([p], lr=0.1, k=2, backend="cpu")
        table = optimizer._table
        optimizer._table = Table(table.rule, table.policy, Tuning(own_threads=True))
        return p, optimizer

    def threads():
        return len(os.listdir("/proc/self/task"))

    torch.set_num_threads(1)
    (p, optimizer), (q, twin) = make(), make()
    for _ in range(6):
        twin.step()
    optimizer.step()
    torch.set_num_threads(4)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    found = [threads()]
    # No room for a stack.
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
    for _ in range(2):
        optimizer.step()
    found.append(threads())
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    for _ in range(3):
        optimizer.step()
    found.append(threads())
    print(json.dumps([found, torch.equal(p, q)]))
    """
    (before, without, after), same = python(script, OMP_NUM_THREADS="1")
    assert without == before
    assert after == before + 3
    assert same
