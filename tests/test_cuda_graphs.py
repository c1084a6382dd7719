"""Steps of the CUDA backend in captured graphs, on the host."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from cuda_host import HOST, RULES, set_grads
from helpers import make_grads, make_optimizer, make_params, seeded

from bench import cuda_on_host
from bench.cuda_on_host import Torch, calls

pytestmark = pytest.mark.usefixtures("runtime")


class Capture:
    """A stream that is captured, and the graph that comes of it."""

    def __init__(self, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runtime = runtime
        self.stream = runtime.control_make_stream(0)
        self.graph = None
        table: Any = sys.modules["lookahead_fused._table"]
        monkeypatch.setattr(table, "is_capturing", Torch.is_capturing)

    def __enter__(self) -> Capture:
        Torch.stream = self.stream
        self.runtime.control_begin_capture(ctypes.c_void_p(self.stream))
        return self

    def __exit__(self, *exception: object) -> None:
        self.graph = self.runtime.control_end_capture(ctypes.c_void_p(self.stream))
        Torch.stream = 0

    def replay(self) -> None:
        assert self.runtime.control_replay(ctypes.c_void_p(self.graph)) == 0

    def nodes(self) -> int:
        return int(self.runtime.control_nodes(ctypes.c_void_p(self.graph)))

    def destroy(self) -> None:
        self.runtime.control_destroy_graph(ctypes.c_void_p(self.graph))


@pytest.mark.parametrize("rule", RULES)
def test_twelve_replays_are_twelve_steps(runtime: ctypes.CDLL, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps on other gradients, with another lr, in between: a replay still has its own."""
    lr = torch.tensor(0.1)
    results = []
    for captured in (False, True):
        lr.fill_(0.1)
        params = make_params([(5,), (300,)])
        optimizer = make_optimizer(rule, params, HOST, **{**RULES[rule], "lr": lr})
        set_grads(params, seeded(0))
        optimizer.step()
        static = make_grads(params, generator=seeded(1))
        capture = Capture(runtime, monkeypatch)

        def step(static: list = static, params: list = params, optimizer: Any = optimizer) -> None:
            for p, g in zip(params, static, strict=True):
                p.grad = g
            optimizer.step()

        if captured:
            with capture:
                step()
            monkeypatch.undo()
        for t in range(12):
            for g, value in zip(static, make_grads(params, generator=seeded(10 + t)), strict=True):
                g.copy_(value)
            lr.fill_(0.1 / (t + 1))
            capture.replay() if captured else step()
            if t % 5 == 4:
                set_grads(params, seeded(100 + t))
                optimizer.step()
        results.append([p.detach().clone() for p in params])
        assert all(optimizer.state[p]["step"] == 15 for p in params)
        if captured:
            live = runtime.control_live()
            capture.destroy()
            assert runtime.control_live() == live - 1
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_a_sync_between_two_replays(runtime: ctypes.CDLL, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another pass over the table that the graph reads, and leaves all there that a step needs."""
    results = []
    for captured in (False, True):
        params = make_params([(5,), (300,)])
        optimizer = make_optimizer(rule, params, HOST, **RULES[rule])
        set_grads(params, seeded(0))
        optimizer.step()
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for _ in range(4):
            capture.replay() if captured else optimizer.step()
            optimizer.sync()
        results.append([p.detach().clone() for p in params])
        results[-1] += [value for own in optimizer.state.values() for value in own.values()]
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


def test_replays_take_the_norm(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the gradients as they are then; a replay may skip its step, and counts that. Four nodes, no copy."""
    results = []
    for captured in (False, True):
        params = make_params([(5,), (9000,)])
        optimizer = make_optimizer("adamw", params, HOST, lr=0.1, k=2, max_grad_norm=0.5, skip_nonfinite=True)
        set_grads(params, seeded(0))
        optimizer.step()
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
            assert capture.nodes() == 4
        told = []
        for t in range(6):
            for p, value in zip(params, make_grads(params, generator=seeded(t), scale=10.0 ** (t - 3)), strict=True):
                p.grad.copy_(value)
            if t == 4:
                params[1].grad[8000] = math.inf
            capture.replay() if captured else optimizer.step()
            told.append((optimizer.grad_norm.item(), optimizer.skipped_steps.item()))
        assert [skipped for _, skipped in told] == [0, 0, 0, 0, 1, 1]
        results.append((told, [p.detach().clone() for p in params]))
    (eager, params), (replayed, others) = results
    assert eager == replayed
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_graph_keeps_what_a_norm_writes(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm, the coefficient and the counts of an optimizer that is gone."""
    params = make_params([(64,)])
    optimizer = make_optimizer("adamw", params, HOST, lr=0.1, max_grad_norm=0.5, skip_nonfinite=True)
    set_grads(params, seeded(1))
    optimizer.step()
    own, sums = optimizer._norm, optimizer._table._order.sums(params[0].device)
    held = [weakref.ref(tensor) for tensor in (own._clip, own._skip, own._skipped, sums)]
    del own, sums
    capture = Capture(runtime, monkeypatch)
    with capture:
        optimizer.step()
    monkeypatch.undo()
    del optimizer
    gc.collect()
    assert all(reference() is not None for reference in held)
    before = params[0].detach().clone()
    capture.replay()
    assert not torch.equal(params[0], before)
    capture.destroy()
    assert not any(reference() is not None for reference in held)


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_a_graph_keeps_what_it_reads(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Replayed after the optimizer is gone, it writes where the tensors were, which nobody else got meanwhile. Wherever
    it is destroyed, all of it is free then, without a further step."""
    params = make_params([(64,)])
    optimizer = make_optimizer("adamw", params, HOST, lr=0.1)
    set_grads(params, seeded(1))
    optimizer.step()
    capture = Capture(runtime, monkeypatch)
    made: list[weakref.ref] = []
    apart = Torch.memory_apart

    def noted(*args: Any) -> Any:
        memory, stream = apart(*args)
        made.append(weakref.ref(memory))
        return memory, stream

    monkeypatch.setattr(cuda_on_host.backend(), "_memory_apart", noted)
    with capture:
        optimizer.step()
    monkeypatch.undo()
    gc.collect()
    live = runtime.control_live()
    (p,) = params
    del optimizer, params
    gc.collect()
    assert runtime.control_live() == live  # the table's events among it
    assert made[0]() is not None
    before = p.detach().clone()
    capture.replay()
    assert not torch.equal(p, before)
    if where == "main thread":
        capture.destroy()
    else:
        thread = threading.Thread(target=capture.destroy)
        thread.start()
        thread.join()
    assert runtime.control_live() < live
    assert made[0]() is None


def test_a_capture_without_warm_up_is_refused(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """State made in a capture would be made anew in each replay. Nothing has changed, and a step outside works."""
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, seeded(1))
    with Capture(runtime, monkeypatch), pytest.raises(RuntimeError, match="before the capture"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_a_first_step_beside_a_capture(runtime: ctypes.CDLL) -> None:
    """While another thread captures another stream, a table is made all the same: calls that may wait ask for leave."""
    stream = runtime.control_make_stream(0)
    runtime.control_begin_capture(ctypes.c_void_p(stream))
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    for t in range(6):
        set_grads(params, seeded(t))
        optimizer.step()
    runtime.control_destroy_graph(ctypes.c_void_p(runtime.control_end_capture(ctypes.c_void_p(stream))))
    runtime.control_destroy_stream(ctypes.c_void_p(stream))
    assert optimizer.state[params[0]]["step"] == 6


def test_a_capture_after_a_step_that_failed_is_refused(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is state, and no table on the device yet: made in the capture, it would be read after it is gone."""
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, seeded(1))
    runtime.control_fail_at(ctypes.c_int64(2))  # after the leave to pin memory
    with pytest.raises(RuntimeError, match="cudaGetDevice failed: out of memory"):
        optimizer.step()
    runtime.control_reset()
    capture = Capture(runtime, monkeypatch)
    with capture, pytest.raises(RuntimeError, match="run a step before the capture"):
        optimizer.step()
    assert "cudaMemcpyAsync" not in calls()
    capture.destroy()
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_a_captured_step_makes_two_nodes(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels: what they read of the table is copied once, which has come to its end before the first replay."""
    params = make_params([(5,)] * 1000)
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, seeded(1))
    optimizer.step()
    runtime.control_reset()
    runtime.control_late(True)
    capture = Capture(runtime, monkeypatch)
    with capture:
        optimizer.step()
    made = Counter(calls())
    assert (made["cudaLaunchKernelEx"], capture.nodes()) == (2, 2)
    assert made["cudaMemcpyAsync"] == 1
    read = [p.grad for p in params]  # by the graph
    set_grads(params, seeded(2))
    optimizer.step()  # overwrites what eager steps read
    runtime.control_drain(None)
    runtime.control_reset()
    before = [p.detach().clone() for p in params]
    capture.replay()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert calls() == []
    capture.destroy()
    del read
