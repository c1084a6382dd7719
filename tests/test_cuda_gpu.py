"""The CUDA backend on a GPU, where there is one: what the stand-in on the host cannot show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BackendCase, make_grads, make_optimizer, make_params, same_tensor_bits, seeded, set_grad

import lookahead_fused

STATUS = lookahead_fused.backends()["cuda"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=f"backend cuda: {STATUS.reason}")
CUDA, CPU = BackendCase("cuda", "cuda", 0.0), BackendCase("cpu", "cpu", 0.0)
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 3},
    "adam": {"weight_decay": 0.1, "maximize": True, "pullback_momentum": "reset", "k": 3},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "k": 3},
}
SHAPES = [(5,), (300, 7), (1025,), (70_001,)]


def set_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    for p, g in zip(params, make_grads(params, generator=seeded(seed)), strict=True):
        set_grad(p, g)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_the_bits_of_the_cpu(rule: str, dtype: torch.dtype, master: bool, state_dtype: str) -> None:
    """Begun on the GPU, gone on with on the CPU and back: no step shows where it ran."""
    if state_dtype != "float32" and dtype == torch.float64:
        pytest.skip("fp64 parameters have their moments in fp64")
    settings = {"master_weights": master, "state_dtype": state_dtype}
    runs = []
    for case in (CUDA, CPU):
        params = make_params(SHAPES, dtype, device=case.device)
        optimizer = make_optimizer(rule, params, case, lr=0.1, **settings, **RULES[rule])
        for t in range(8):
            set_grads(params, t)
            optimizer.step()
        runs.append((params, optimizer))
    (ours, a), (theirs, b) = runs
    for p, q in zip(ours, theirs, strict=True):
        assert same_tensor_bits(p, q)
        for name, value in b.state[q].items():
            assert same_tensor_bits(a.state[p][name], value), name


@pytest.mark.parametrize("rule", RULES)
def test_twelve_replays_of_a_graph(rule: str) -> None:
    """Against eager steps; with eager steps on other gradients in between, and lr a tensor that changes."""
    runs = []
    for captured in (False, True):
        lr = torch.tensor(0.1, device="cuda")
        params = make_params(SHAPES, device="cuda")
        optimizer = make_optimizer(rule, params, CUDA, lr=lr, **RULES[rule])
        set_grads(params, 0)
        optimizer.step()
        static = make_grads(params, generator=seeded(1))
        for p, g in zip(params, static, strict=True):
            p.grad = g
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(12):
            for p, g, value in zip(params, static, make_grads(params, generator=seeded(10 + t)), strict=True):
                g.copy_(value)
                p.grad = g
            lr.fill_(0.1 / (t + 1))
            graph.replay() if captured else optimizer.step()
            if t % 5 == 4:
                set_grads(params, 100 + t)
                optimizer.step()
        runs.append(params)
        assert all(optimizer.state[p]["step"].item() == 15 for p in params)
    for p, q in zip(*runs, strict=True):
        assert same_tensor_bits(p, q)


def test_a_capture_without_warm_up_is_refused() -> None:
    params = make_params(SHAPES, device="cuda")
    optimizer = make_optimizer("adamw", params, CUDA)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state


def test_a_graph_outlives_its_optimizer() -> None:
    """What it reads is kept for it: memory allocated meanwhile is not written."""
    params = make_params(SHAPES, device="cuda")
    optimizer = make_optimizer("adamw", params, CUDA, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    del optimizer
    fillers = [torch.full((4096,), 7.0, device="cuda") for _ in range(200)]
    graph.replay()
    torch.cuda.synchronize()
    assert all((filler == 7.0).all() for filler in fillers)


def test_grad_scaler_with_infinities() -> None:
    model = torch.nn.Linear(64, 64).cuda()
    optimizer = make_optimizer("adamw", model.parameters(), CUDA, lr=0.1, k=2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for t, poison in enumerate((True, False, False, True, False)):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        loss = model(torch.randn(8, 64, device="cuda")).square().mean()
        scaler.scale(loss * float("inf") if poison else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) == poison, t
    assert optimizer.state[model.weight]["step"].item() == 3


def test_two_streams() -> None:
    """Steps on a stream of their own, ordered by events, are the steps of the default stream."""
    runs = []
    for streams in (1, 2):
        params = make_params(SHAPES, device="cuda")
        optimizer = make_optimizer("adamw", params, CUDA, lr=0.1, k=2)
        used = [torch.cuda.current_stream(), torch.cuda.Stream()][:streams]
        for t in range(10):
            stream = used[t % streams]
            stream.wait_stream(used[(t + 1) % streams])
            with torch.cuda.stream(stream):
                set_grads(params, t)
                optimizer.step()
        torch.cuda.synchronize()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert same_tensor_bits(p, q)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_other_than_the_current_one() -> None:
    params = [torch.nn.Parameter(torch.ones(1000, device=f"cuda:{i}")) for i in range(2)]
    optimizer = make_optimizer("adamw", params, CUDA, lr=0.1, k=2)
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert torch.cuda.current_device() == current
    assert same_tensor_bits(*params)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_stream_of_another_device() -> None:
    """One that is current on its own device is nothing to a parameter on the first."""
    p = torch.nn.Parameter(torch.ones(1000, device="cuda:0"))
    optimizer = make_optimizer("adamw", [p], CUDA, lr=0.1, k=2)
    with torch.cuda.stream(torch.cuda.Stream(device="cuda:1")):
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.cuda.synchronize(0)
    assert (p < 1).all()


def test_state_on_another_device_comes_back() -> None:
    """As a checkpoint leaves it that was loaded onto the CPU: no row mixes devices."""
    runs = []
    for moved in (False, True):
        params = make_params(SHAPES, device="cuda")
        optimizer = make_optimizer("adamw", params, CUDA, lr=0.1, k=2)
        for t in range(4):
            set_grads(params, t)
            optimizer.step()
            if moved:
                for own in optimizer.state.values():
                    own.update({name: value.cpu() for name, value in own.items()})
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert same_tensor_bits(p, q)


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
    reason="needs a GPU of 60 GB",
)
def test_more_than_2_to_the_31_elements() -> None:
    """The last elements of a tensor are updated as the first."""
    size = 2**31 + 1031
    p = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    optimizer = make_optimizer("adamw", [p], CUDA, lr=0.1, k=2)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p.detach() == p[0].detach()).all()
    assert p[0].item() < 1
