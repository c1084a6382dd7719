"""The Triton backend captured in a CUDA graph: what a replay reads, and how long it is kept."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton_on_host
from cuda_host import RULES
from helpers import make_grads, make_optimizer, make_params, same_tensor_bits, seeded
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton_host import HOST, Recorder, needs_interpreter, set_grads

from lookahead_fused import _captures


class Graph:
    """What a captured step leaves: the copy of what moves, and the launches."""

    def __init__(self, host: Any, optimizer: torch.optim.Optimizer) -> None:
        self.launches: list[Callable[[], None]] = []
        kernels = triton_on_host.kernels()
        stepper = optimizer._table.parts[0].stepper  # type: ignore[attr-defined]
        recorders = {name: Recorder(getattr(kernels, name), self.launches) for name in ("rows", "chunks")}
        stepper.kernels = types.SimpleNamespace(**{**vars(kernels), **recorders})
        norms = triton_on_host.norm_kernels()
        recorded = {name: Recorder(getattr(norms, name), self.launches) for name in ("squares", "clip")}
        made: list[Tensor] = []

        def empty_like(of: Tensor, **options: Any) -> Tensor:
            made.append(torch.zeros_like(of, **options))
            return made[-1]

        with (
            mock.patch.object(host, "norm_kernels", return_value=types.SimpleNamespace(**recorded)),
            mock.patch.object(host, "_is_capturing", return_value=True),
            mock.patch.object(host.torch, "empty_like", empty_like),
        ):
            optimizer.step()
        stepper.kernels = kernels
        self.source, self.moving = weakref.ref(stepper.source), made

    def replay(self) -> None:
        source = self.source()
        assert source is not None, "what a replay copies from is gone"
        for moving in self.moving:
            moving.copy_(source)
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
@pytest.mark.parametrize("rule", RULES)
def test_replays_read_a_weight_decay_that_is_a_tensor(host: Any, rule: str) -> None:
    """Also where there is none meanwhile."""
    runs = []
    for captured in (False, True):
        decay = torch.tensor(0.5)
        params = make_params([(5,), (300,)])
        optimizer = make_optimizer(rule, params, HOST, **{**RULES[rule], "weight_decay": decay})
        set_grads(params, 0)
        optimizer.step()
        graph = Graph(host, optimizer) if captured else None
        for value in (0.25, 0.0, 1.0):
            decay.fill_(value)
            optimizer.step() if graph is None else graph.replay()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert same_tensor_bits(p, q)


@needs_interpreter
def test_replays_take_the_norm(host: Any) -> None:
    """Each of the gradients as they are then; a replay may skip its step, and counts that."""
    runs = []
    for captured in (False, True):
        params = make_params([(5,), (5000,)])
        optimizer = make_optimizer("sgd", params, HOST, lr=0.1, k=2, max_grad_norm=0.5, skip_nonfinite=True)
        set_grads(params, 0)
        optimizer.step()
        graph = Graph(host, optimizer) if captured else None
        told = []
        for t in range(4):
            for p, value in zip(params, make_grads(params, generator=seeded(t), scale=10.0 ** (t - 2)), strict=True):
                p.grad.copy_(value)
            if t == 2:
                params[1].grad[4500] = torch.inf
            optimizer.step() if graph is None else graph.replay()
            told.append((optimizer.grad_norm.item(), optimizer.skipped_steps.item()))
        assert [skipped for _, skipped in told] == [0, 0, 1, 1]
        runs.append((told, params))
    (eager, params), (replayed, others) = runs
    assert eager == replayed
    for p, q in zip(params, others, strict=True):
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


DRIVER = """
static _Thread_local int mode;
int mode_of_this_thread() { return mode; }
int cuThreadExchangeStreamCaptureMode(int* exchanged) {
    int before = mode;
    mode = *exchanged;
    *exchanged = before;
    return 0;
}
"""


@pytest.fixture
def modes(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ctypes.CDLL]:
    """NVIDIA's driver, as far as it keeps which calls a thread may make while another one captures."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("builds a library in the driver's place, and no C compiler is on PATH")
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(library) if name == "libcuda.so.1" else name))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _captures._exchange_capture_mode.cache_clear()
    yield ctypes.CDLL("libcuda.so.1")
    _captures._exchange_capture_mode.cache_clear()


@needs_interpreter
def test_steps_beside_a_capture(host: Any, modes: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread captures another stream: what allocates memory, or waits for the device, has leave for it,
    and nothing else has. After a failure too, the thread is as it was."""
    asked: list[tuple[str, bool]] = []

    def ask(name: str) -> None:
        asked.append((name, modes.mode_of_this_thread() == 2))  # relaxed

    def pinned(like: Tensor) -> Tensor:
        ask("pin")
        if failing:
            raise RuntimeError("out of memory")
        return like.clone()

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is Tensor.copy_:
                ask("copy")
            return function(*args, **(kwargs or {}))

    class Kernel(Recorder):
        def warmup(self, *args: Any, **options: Any) -> None:
            ask("compile")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: ask("launch")

    kernels = types.SimpleNamespace(**{**vars(triton_on_host.kernels()), "rows": Kernel(None), "chunks": Kernel(None)})
    monkeypatch.setattr(host, "kernels", lambda: kernels)
    monkeypatch.setattr(host, "_pinned", pinned)
    (p,) = params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, 1)
    failing = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert modes.mode_of_this_thread() == 0
    failing = False
    asked.clear()
    with Copies():
        optimizer.step()
    compiled = [("compile", True)] * 2 + [("launch", True)] * 2
    table, moved = [("copy", True), ("pin", True)], [("pin", True), ("copy", False), ("copy", False)]
    assert asked == [*table, *moved, *compiled]
    asked.clear()
    p.grad = torch.ones_like(p)
    with Copies():
        optimizer.step()
    assert asked == [*moved, ("launch", False), ("launch", False)]
    assert modes.mode_of_this_thread() == 0


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
