"""The Triton backend captured in a CUDA graph: what a replay reads, and how long it is kept."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton_on_host
from cuda_host import RULES
from helpers import make_grads, make_optimizer, make_params, same_tensor_bits, seeded
from torch import Tensor
from triton_host import HOST, Recorder, needs_interpreter, set_grads


class Graph:
    """What a captured step leaves: the copy of what moves, and the launches."""

    def __init__(self, host: Any, optimizer: torch.optim.Optimizer) -> None:
        self.launches: list[Callable[[], None]] = []
        kernels = triton_on_host.kernels()
        stepper = optimizer._table.parts[0].stepper  # type: ignore[attr-defined]
        recorders = {name: Recorder(getattr(kernels, name), self.launches) for name in ("rows", "chunks")}
        stepper.kernels = types.SimpleNamespace(**{**vars(kernels), **recorders})
        made: list[Tensor] = []

        def empty_like(of: Tensor, **options: Any) -> Tensor:
            made.append(torch.zeros_like(of, **options))
            return made[-1]

        with (
            mock.patch.object(host, "_is_capturing", return_value=True),
            mock.patch.object(host.torch, "empty_like", empty_like),
        ):
            optimizer.step()
        stepper.kernels = kernels
        self.source, (self.moving,) = weakref.ref(stepper.source), made

    def replay(self) -> None:
        source = self.source()
        assert source is not None, "what a replay copies from is gone"
        self.moving.copy_(source)
        for launch in self.launches:
            launch()


@needs_interpreter
@pytest.mark.parametrize("rule", RULES)
def test_replays_are_steps(host: Any, rule: str) -> None:
    """Eager steps on other gradients, with another lr, in between: a replay still has its own."""
    runs = []
    for captured in (False, True):
        lr = torch.tensor(0.1)
        params = make_params([(5,), (300,)])
        optimizer = make_optimizer(rule, params, HOST, **{**RULES[rule], "lr": lr})
        set_grads(params, 0)
        optimizer.step()
        static = make_grads(params, generator=seeded(1))
        for p, g in zip(params, static, strict=True):
            p.grad = g
        graph = Graph(host, optimizer) if captured else None
        for t in range(12):
            for p, g, value in zip(params, static, make_grads(params, generator=seeded(10 + t)), strict=True):
                g.copy_(value)
                p.grad = g
            lr.fill_(0.1 / (t + 1))
            optimizer.step() if graph is None else graph.replay()
            if t % 5 == 4:
                set_grads(params, 100 + t)
                optimizer.step()
        runs.append(params)
        assert all(optimizer.state[p]["step"].item() == 15 for p in params)
    for p, q in zip(*runs, strict=True):
        assert same_tensor_bits(p, q)


@needs_interpreter
def test_a_graph_outlives_its_optimizer(host: Any) -> None:
    """It keeps what it reads and writes for as long as its parameters are there, and no longer."""
    params = make_params([(64,), (3, 4)])
    optimizer = make_optimizer("adamw", params, HOST, lr=0.1, k=2)
    set_grads(params, 1)
    optimizer.step()
    graph = Graph(host, optimizer)
    state = [weakref.ref(value) for p in params for name, value in optimizer.state[p].items()]
    del optimizer
    gc.collect()
    assert all(reference() is not None for reference in state)
    before = [p.detach().clone() for p in params]
    graph.replay()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    graph.launches.clear()
    params.clear()
    gc.collect()
    assert graph.source() is None
    assert all(reference() is None for reference in state)


@needs_interpreter
def test_captures_pin_no_memory(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That may not be done while a stream is being captured: it was done before, and the same again needs no more."""
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, 1)
    optimizer.step()
    pinned = mock.Mock(side_effect=AssertionError("pinned memory in a capture"))
    with mock.patch.object(host, "_pinned", pinned):
        first, second = Graph(host, optimizer), Graph(host, optimizer)
    assert first.source() is second.source()
    optimizer.step()
    set_grads(params, 2)
    with mock.patch.object(host, "_pinned", pinned):
        third = Graph(host, optimizer)
    assert third.source() is not first.source()
    assert first.source() is not None


@needs_interpreter
@pytest.mark.parametrize("fails", ["table", "chunks"])
def test_a_capture_after_a_step_that_failed_is_refused(host: Any, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is state, and no table on the device yet, or no compiled kernel: neither can be made in a capture. What
    fails in compiling either kernel has counted no step."""
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, 1)
    failure = mock.MagicMock(side_effect=RuntimeError("out of memory"))
    failure.warmup.side_effect = failure.side_effect
    kernels = types.SimpleNamespace(**{**vars(triton_on_host.kernels()), "chunks": failure})
    with monkeypatch.context() as patch:
        patch.setattr(host, *(("_pinned", failure) if fails == "table" else ("kernels", lambda: kernels)))
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert optimizer.state[params[0]]["step"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(host, "_is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*; run a step before the capture"):
            optimizer.step()
    assert optimizer.state[params[0]]["step"] == 0
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    Graph(host, optimizer).replay()
    assert optimizer.state[params[0]]["step"] == 2
