"""The CUDA backend's launches and uploads on the host: how many, how late they may be, and what a failing call does."""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
from collections import Counter

import pytest
import torch
from cuda_host import HOST, set_grads
from helpers import (
    assert_unchanged,
    make_grads,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    snapshot,
)
from host_work import Stepped, assert_host_work

from bench import cuda_on_host
from bench.cuda_on_host import Torch, calls

pytestmark = pytest.mark.usefixtures("runtime")


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
        runtime.control_idle(True)  # what the kernels do is not asked here
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


def test_a_norm_is_two_launches_more(runtime: ctypes.CDLL) -> None:
    """And one copy more at most, of gradients that moved."""
    params = make_params([(3,)] * 148)
    groups = [{"params": params[:70], "lr": 0.1}, {"params": params[70:]}]
    optimizer = make_optimizer("adamw", groups, HOST, max_grad_norm=1.0, skip_nonfinite=True)
    set_grads(params, seeded(1))
    optimizer.step()
    for moved in (False, True):
        if moved:
            set_grads(params, seeded(2))
        runtime.control_reset()
        runtime.control_idle(True)  # what the kernels do is not asked here
        optimizer.step()
        made = Counter(calls())
        assert made["cudaLaunchKernelEx"] == 4
        assert made["cudaMemcpyAsync"] == (1 if moved else 0)


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


def test_a_query_makes_a_context_on_its_device_alone(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the device that was current before, where this process may have nothing to do."""
    backend = cuda_on_host.backend()
    monkeypatch.setattr(backend, "_current", Torch.current)
    backend._load_kernels.cache_clear()
    assert backend._refusal(cuda_on_host.load(), 1) == ""
    assert "cudaFuncGetAttributes" in calls()
    assert runtime.control_contexts() == 1 << 1


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True])
def test_host_work_of_a_step(runtime: ctypes.CDLL, moved: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """All of `optimizer.step()` but the kernels, also where gradients move: Python does the same for any number of
    tensors, and C++ reads them in the quick way.

    `pytest -n 0 -k host_work tests/test_cuda_launches.py` prints the figures.
    """

    def begin(count: int) -> Stepped:
        params = make_params([(3,)] * count)
        optimizer = make_optimizer("adamw", params, HOST)
        sets = [make_grads(params, generator=seeded(t)) for t in range(2)]
        turns = itertools.cycle(sets if moved else sets[:1])

        def before() -> None:
            for p, g in zip(params, next(turns), strict=True):
                p.grad = g
            runtime.control_reset()
            runtime.control_idle(True)

        return Stepped(params, optimizer.step, before)

    found = assert_host_work(begin, most_fixed=200)
    assert calls().count("cudaMemcpyAsync") == moved
    with capsys.disabled():
        print(f"\ngradients {'move' if moved else 'stay'}: {found}")


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

    gc.collect()
    # Of other tests' optimizers: they go when the garbage collector or a later step comes by.
    others = runtime.control_live()
    params, optimizer = prepare()
    if when == "moved":
        wait_for_ring(optimizer, params)
    runtime.control_reset()
    optimizer.step()
    names = calls()
    assert "cudaLaunchKernelEx" in names
    assert runtime.control_live() > 0
    del params, optimizer
    gc.collect()
    assert runtime.control_live() <= others
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
                assert re.search("kernels of (adam|external) of float32", message)
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
        assert runtime.control_live() <= others, name


@pytest.mark.parametrize("moved", [False, True])
def test_a_stream_of_another_device_is_refused(
    runtime: ctypes.CDLL, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the runtime, before anything changed; the message names the call. The next step is a step."""
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST, lr=0.1, k=2)
    set_grads(params, seeded(1))
    optimizer.step()
    if moved:
        set_grads(params, seeded(2))
    stream = runtime.control_make_stream(1)
    before = snapshot(optimizer)
    with Torch.on(stream):
        message = error_of(optimizer)
    assert "invalid resource handle" in message
    assert ("cudaMemcpyAsync" if moved else "launch of the row kernel of adam of float32 in 1 blocks") in message
    assert_unchanged(before, snapshot(optimizer))
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2
    runtime.control_destroy_stream(ctypes.c_void_p(stream))


def test_the_allocator_is_told_of_each_stream_once(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's memory was allocated on one stream; another that reads it must be done before it is given away."""
    told: list[int] = []
    monkeypatch.setattr(cuda_on_host.backend(), "_used_on_current_stream", lambda tensor: told.append(Torch.stream))
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    streams = [runtime.control_make_stream(0) for _ in range(2)]
    for stream in (0, streams[0], 0, streams[1], streams[0], streams[0]):
        with Torch.on(stream):
            set_grads(params, seeded(1))
            optimizer.step()
    assert told == [streams[0]] * 2 + [streams[1]] * 2  # both of its arrays
    del optimizer
    gc.collect()
    for stream in streams:
        runtime.control_destroy_stream(ctypes.c_void_p(stream))


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


def test_rows_that_lie_elsewhere_are_sent_again(runtime: ctypes.CDLL) -> None:
    """A stepper that was made for one table steps another of the same sizes, once it has sent that one's rows."""
    ours, theirs, other = ([(5,), (300,)], 3), ([(5,), (300,)], 3), ([(5,)], 4)
    optimizers = []
    for shapes, seed in (ours, theirs, other):
        optimizers.append(make_optimizer("adamw", make_params(shapes, seed=seed), HOST, lr=0.1, k=2))
        set_grads(optimizers[-1].param_groups[0]["params"], seeded(1))
        optimizers[-1].step()
    (stepper, table), (_, moved), (_, another) = (
        (part.stepper, part.table) for optimizer in optimizers for part in optimizer._table.parts
    )
    before = [snapshot(optimizer) for optimizer in optimizers]
    optimizers[0].step()  # what the second is to be like
    for native, optimizer in zip((table, moved, another), optimizers, strict=True):
        assert native.refresh(optimizer.state, cuda_on_host.load().PASSES["STEP"])
    stepper.native.update_fixed(moved, 0)
    stepper.native.step(moved, 0, 0, 0, 0)
    for a, b in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers[:2]), strict=True):
        assert same_tensor_bits(a, b)
        for name, value in optimizers[0].state[a].items():
            assert same_tensor_bits(value, optimizers[1].state[b][name]), name
    with pytest.raises(RuntimeError, match="another table than it was made for"):
        stepper.native.update_fixed(another, 0)
    stream = runtime.control_make_stream(0)
    runtime.control_begin_capture(ctypes.c_void_p(stream))
    with pytest.raises(RuntimeError, match="while their stream is being captured"):
        stepper.native.update_fixed(table, stream)
    runtime.control_destroy_graph(ctypes.c_void_p(runtime.control_end_capture(ctypes.c_void_p(stream))))
    runtime.control_destroy_stream(ctypes.c_void_p(stream))
    assert_unchanged(before[2], snapshot(optimizers[2]))
    for native in (table, moved, another):
        native.release()
