"""The CUDA backend's sources on the host: memory traffic, launches, uploads, failing calls, late copies, captures.

The backend-parametrised suite runs through the same stand-in for numbers; here is what only a runtime of our own can
tell.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_on_host
import pytest
import torch
from cuda_on_host import Torch, calls, control
from helpers import BackendCase, Lockstep, make_grads, make_optimizer, make_params, seeded, set_grad

from lookahead_fused.backends import BACKENDS

pytestmark = pytest.mark.skipif(bool(cuda_on_host.missing()), reason=f"builds the stand-in: {cuda_on_host.missing()}")
HOST = BackendCase(cuda_on_host.NAME, "cpu", 0.0)
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "k": 3},
    "adam": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 3},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "pullback_momentum": "reset", "k": 3},
}


@pytest.fixture(autouse=True)
def runtime() -> Iterator[ctypes.CDLL]:
    library = control()
    library.control_reset()
    gc.collect()  # optimizers of other tests, which have events of their own
    # Not by monkeypatch, which tests here undo in their middle.
    with mock.patch.dict(BACKENDS, {cuda_on_host.NAME: cuda_on_host.backend()}):
        yield library
    library.control_reset()


def set_grads(params: list[torch.nn.Parameter], generator: torch.Generator, dtype: torch.dtype | None = None) -> None:
    for p, g in zip(params, make_grads(params, generator=generator, dtype=dtype), strict=True):
        set_grad(p, g)


def watch(library: ctypes.CDLL, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        library.control_watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(size))


# ------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("numel", [1, 255, 4099, 40_000])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master"),
    [
        (torch.float32, torch.float32, False),
        (torch.float64, torch.float64, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float16, False),
        (torch.float16, torch.float16, True),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_each_array_is_read_and_written_once(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool, numel: int, offset: int
) -> None:
    """28 bytes for each fp32 parameter of AdamW, 36 in a sync; phi and what hangs on it in a sync alone."""
    p = torch.nn.Parameter(torch.randn(numel + offset).to(dtype)[offset:])
    optimizer = make_optimizer(rule, [p], HOST, **RULES[rule], **({"master_weights": True} if master else {}))
    for t in range(1, 7):
        set_grads([p], seeded(t), grad_dtype)
        state = optimizer.state.get(p, {})
        runtime.control_reset()
        once = [
            name
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "master_param")
            if name in state
        ]
        at_sync = [name for name in ("slow_param", "slow_momentum") if name in state]
        watch(runtime, p, p.grad, *(state[name] for name in (*once, *at_sync)))
        optimizer.step()
        if t == 1:
            continue
        traffic = [
            (runtime.control_read(i) / x.nbytes, runtime.control_written(i) / x.nbytes)
            for i, x in enumerate([p, p.grad, *(state[name] for name in (*once, *at_sync))])
        ]
        due = t % 3 == 0
        assert traffic[0] == ((0, 1) if master else (1, 1))
        assert traffic[1] == (1, 0)
        for name, got in zip((*once, *at_sync), traffic[2:], strict=True):
            assert got == ((1, 1) if name in once or due else (0, 0)), name
        assert runtime.control_elsewhere() == 0
        if rule == "adamw" and dtype == torch.float32:
            total = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(traffic)))
            assert total == numel * (36 if due else 28)


def test_the_table_is_a_small_part_of_the_traffic() -> None:
    """What a block reads of the table, against the chunk it updates."""
    from lookahead_fused import table

    row, chunk, step = 88, 16, 128
    assert (row + chunk + step) / (28 * table.chunk_elements) < 0.01


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_order_of_blocks_and_threads_does_not_matter(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["lookahead_fused.table"], "chunk_elements", 64)
    pair = Lockstep(HOST, rule, ([(300,), (7, 9), (), (0,), (1025,)], {}), dtype=dtype, **RULES[rule])
    for t in range(4):
        runtime.control_order(order + 10 * t)
        pair.step()


# ------------------------------------------------------------------------------------------------------------
# launches and uploads


@pytest.mark.parametrize("count", [1, 148, 1000, 20_000])
def test_launches_and_uploads_of_a_step(runtime: ctypes.CDLL, count: int) -> None:
    """Two launches for any number of tensors and groups; one copy where a gradient moved, none where none did."""
    params = make_params([(3,)] * count)
    groups = [{"params": params[: count // 2 + 1], "lr": 0.1}, {"params": params[count // 2 + 1 :]}]
    optimizer = make_optimizer("adamw", [g for g in groups if g["params"]], HOST)
    set_grads(params, seeded(1))
    optimizer.step()
    grads = [p.grad for p in params]
    for moved in (False, True, "lr", False):
        if moved is True:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
        if moved == "lr":
            optimizer.param_groups[0]["lr"] = 0.2
        runtime.control_reset()
        optimizer.step()
        made = Counter(calls())
        assert made["cudaLaunchKernelEx"] == 2
        assert made["cudaMemcpyAsync"] == (1 if moved else 0)
        assert made["cudaEventSynchronize"] <= 1
        assert set(made) <= {
            "cudaGetDevice",
            "cudaLaunchKernelEx",
            *(("cudaMemcpyAsync", "cudaEventRecord", "cudaEventSynchronize") if moved else ()),
            *(("cudaThreadExchangeStreamCaptureMode",) if moved else ()),
        }


def test_copies_that_are_late_read_what_they_were_given(runtime: ctypes.CDLL) -> None:
    """The device lags many steps behind while gradients move in each: no slot of the ring is written too early."""
    results = []
    for late in (False, True):
        params = make_params([(5,), (40,)])
        optimizer = make_optimizer("adamw", params, HOST, lr=0.1, k=2)
        set_grads(params, seeded(1))
        optimizer.step()
        runtime.control_late(late)
        alive = []
        for t in range(23):
            set_grads(params, seeded(t))
            alive += [p.grad for p in params]
            optimizer.param_groups[0]["lr"] = 0.01 * (t + 1)
            optimizer.step()
        runtime.control_late(False)
        assert runtime.control_drain(None) == 0
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_device_is_put_back(runtime: ctypes.CDLL) -> None:
    """Whatever device is current, the step runs on its own."""
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    for device in (0, 3):
        runtime.control_set_device(device)
        set_grads(params, seeded(1))
        optimizer.step()
        assert runtime.control_device() == device
        assert calls().count("cudaSetDevice") == (0 if device == 0 else 2)


@pytest.mark.slow
def test_host_work_of_the_launch_path(runtime: ctypes.CDLL) -> None:
    """At most 0.3 us a tensor and 20 us fixed, with kernels that do nothing; what Python asks of torch is not in it."""

    def seconds(count: int) -> float:
        params = make_params([(3,)] * count)
        optimizer = make_optimizer("adamw", params, HOST)
        set_grads(params, seeded(1))
        optimizer.step()
        (part,) = optimizer._table._parts
        assert part.native.refresh(True, False)
        best = 1.0
        for _ in range(50):
            start = time.perf_counter()
            part.backend.step(part, None, None)
            best = min(best, time.perf_counter() - start)
        part.native.release()
        return best

    runtime.control_idle(True)
    one, many = seconds(1), seconds(4000)
    print(f"fixed {one * 1e6:.1f} us, for each tensor {(many - one) / 3999 * 1e9:.0f} ns")
    assert one < 20e-6 * 3  # three times: this machine is shared
    assert (many - one) / 3999 < 0.3e-6


# ------------------------------------------------------------------------------------------------------------
# what goes wrong


def error_of(optimizer: torch.optim.Optimizer) -> str:
    """The message of a step that fails; the exception itself keeps the step's frames alive."""
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("when", ["first", "moved", "still"])
def test_any_call_may_fail(runtime: ctypes.CDLL, when: str) -> None:
    """The error names the call, nothing leaks, and the next step is a step."""

    def prepare() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        params = make_params([(5,), (4, 4)])
        optimizer = make_optimizer("adamw", params, HOST, lr=0.1, k=2)
        set_grads(params, seeded(1))
        if when != "first":
            optimizer.step()
        if when == "moved":
            set_grads(params, seeded(2))
        return params, optimizer

    def wait_for_ring(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
        # Once around, so that a slot is waited for.
        for t in range(4):
            set_grads(params, seeded(t))
            optimizer.step()
        set_grads(params, seeded(2))

    params, optimizer = prepare()
    if when == "moved":
        wait_for_ring(optimizer, params)
    runtime.control_reset()
    optimizer.step()
    names = calls()
    assert "cudaLaunchKernelEx" in names
    del params, optimizer
    gc.collect()
    assert runtime.control_live() == 0
    for index, name in enumerate(names):
        params, optimizer = prepare()
        if when == "moved":
            wait_for_ring(optimizer, params)
        runtime.control_reset()
        runtime.control_fail_at(ctypes.c_int64(index))
        if name == "cudaThreadExchangeStreamCaptureMode":
            optimizer.step()  # it is asked for leave to wait, and waits without
        else:
            message = error_of(optimizer)
            assert "out of memory (cudaErrorMemoryAllocation)" in message
            if name == "cudaLaunchKernelEx":
                assert "adam of float32" in message
                assert "blocks of" in message
            elif name == "cudaFuncGetAttributes":
                assert "adam of float32" in message
                assert "this build has" in message
            else:
                assert name in message
        runtime.control_reset()
        before = [p.detach().clone() for p in params]
        set_grads(params, seeded(9))
        optimizer.step()
        assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert all(torch.isfinite(p).all() for p in params)
        del params, optimizer
        gc.collect()
        assert runtime.control_live() == 0, name


def test_a_failed_upload_is_made_up_for(runtime: ctypes.CDLL) -> None:
    """The step after it has the same bits as if nothing had failed."""
    results = []
    for fail in (False, True):
        params = make_params([(5,)])
        optimizer = make_optimizer("adamw", params, HOST, lr=0.1)
        set_grads(params, seeded(1))
        optimizer.step()
        set_grads(params, seeded(2))
        if fail:
            runtime.control_reset()
            runtime.control_fail_at(ctypes.c_int64(1))
            with pytest.raises(RuntimeError, match=r"cudaMemcpyAsync of \d+ bytes \(gradients and groups\)"):
                optimizer.step()
            runtime.control_reset()
        optimizer.step()
        results.append(params[0].detach().clone())
    assert torch.equal(*results)


# ------------------------------------------------------------------------------------------------------------
# captured graphs


class Capture:
    """A stream that is captured, and the graph that comes of it."""

    def __init__(self, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library = library
        self.stream = library.control_make_stream()
        self.graph = None
        table: Any = sys.modules["lookahead_fused.table"]
        monkeypatch.setattr(table, "_is_capturing", Torch.is_capturing)

    def __enter__(self) -> Capture:
        Torch.stream = self.stream
        self.library.control_begin_capture(ctypes.c_void_p(self.stream))
        return self

    def __exit__(self, *exception: object) -> None:
        self.graph = self.library.control_end_capture(ctypes.c_void_p(self.stream))
        Torch.stream = 0

    def replay(self) -> None:
        assert self.library.control_replay(ctypes.c_void_p(self.graph)) == 0

    def destroy(self) -> None:
        self.library.control_destroy_graph(ctypes.c_void_p(self.graph))


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
        keep = []

        def step(static: list = static, params: list = params, optimizer: Any = optimizer, keep: list = keep) -> None:
            for p, g in zip(params, static, strict=True):
                p.grad = g
            keep.append(optimizer)
            optimizer.step()

        if captured:
            # What torch makes in a capture, the graph owns: here it only has to stay.
            monkeypatch.setattr(torch, "empty", keeping(torch.empty, keep))
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


def keeping(make: Any, keep: list) -> Any:
    def kept(*args: Any, **kwargs: Any) -> Any:
        keep.append(make(*args, **kwargs))
        return keep[-1]

    return kept


def test_a_graph_keeps_what_it_reads(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed after the optimizer is gone, it writes where the tensors were, which nobody else got meanwhile."""
    params = make_params([(64,)])
    optimizer = make_optimizer("adamw", params, HOST, lr=0.1)
    set_grads(params, seeded(1))
    optimizer.step()
    keep: list = []
    monkeypatch.setattr(torch, "empty", keeping(torch.empty, keep))
    capture = Capture(runtime, monkeypatch)
    with capture:
        optimizer.step()
    monkeypatch.undo()
    gc.collect()
    live = runtime.control_live()
    (p,) = params
    del optimizer, params
    gc.collect()
    assert runtime.control_live() == live  # the table's events among it
    before = p.detach().clone()
    capture.replay()
    assert not torch.equal(p, before)
    capture.destroy()
    other = make_params([(3,)])
    set_grads(other, seeded(1))
    make_optimizer("adamw", other, HOST).step()  # lets go of what destroyed graphs held
    gc.collect()
    assert runtime.control_live() < live


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


def test_a_captured_step_makes_three_nodes(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params([(5,)] * 1000)
    optimizer = make_optimizer("adamw", params, HOST)
    set_grads(params, seeded(1))
    optimizer.step()
    runtime.control_reset()
    keep: list = []
    monkeypatch.setattr(torch, "empty", keeping(torch.empty, keep))
    capture = Capture(runtime, monkeypatch)
    with capture:
        optimizer.step()
    made = Counter(calls())
    assert (made["cudaLaunchKernelEx"], made["cudaMemcpyAsync"]) == (2, 1)
    capture.destroy()


# ------------------------------------------------------------------------------------------------------------
# sanitizers


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizer")
def test_under_address_and_undefined_behaviour_sanitizers() -> None:
    """A part of the suite under an instrumented stand-in: no access outside of a tensor, none misaligned."""
    runtimes = [
        subprocess.run([*cuda_on_host.CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("the compiler has no sanitizer runtimes")
    module = cuda_on_host.build(*cuda_on_host.SANITIZE)
    env = {
        **os.environ,
        "LOOKAHEAD_FUSED_CUDA_HOST": str(module),
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    files = [str(Path(__file__).with_name(name)) for name in ("test_rules.py", "test_layout.py", "test_cuda_host.py")]
    selected = "cuda-host and (test_views or test_values) or each_array and 4099 or test_twelve or test_any_call"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected]
    done = subprocess.run([*command, *files], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout
