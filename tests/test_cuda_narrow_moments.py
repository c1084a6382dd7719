"""The CUDA kernels over moments in bf16, on the host: what they move, and in which order they may run."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cuda_host import HOST, RULES, set_grads
from helpers import (
    can_set_grad_dtype,
    make_grads,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    set_grad,
    tune,
)
from test_cuda_traffic import aligned, watch

pytestmark = pytest.mark.usefixtures("runtime")

NARROW: dict[str, Any] = {"state_dtype": "bfloat16"}
OTHERS: dict[str, dict[str, Any]] = {
    "rmsprop": {"lr": 0.1, "momentum": 0.9, "pullback_momentum": "pullback", "k": 3},
    "radam": {"lr": 0.1, "betas": (0.9, 0.8), "k": 3},
    "lion": {"lr": 0.1, "pullback_momentum": "reset", "k": 3},
}
AT_SYNC = ("slow_param", "cached_momentum", "outer_momentum_buffer")
dtypes = pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, True),
        (torch.float16, torch.float32, False),
    ],
)


@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
@pytest.mark.parametrize(("numel", "offset"), [(1, 0), (255, 1), (4099, 0)])
@dtypes
def test_each_array_is_read_and_written_once(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool, numel: int, offset: int
) -> None:
    """20 bytes for each fp32 parameter of AdamW, 28 in a sync."""
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")
    p = torch.nn.Parameter(torch.randn(numel + offset).to(dtype)[offset:])
    optimizer = make_optimizer(rule, [p], HOST, **(RULES | OTHERS)[rule], **NARROW, master_weights=master)
    for t in range(1, 4):
        set_grads([p], seeded(t), grad_dtype)
        state = {name: x for name, x in optimizer.state.get(p, {}).items() if name != "step"}
        runtime.control_reset()
        watch(runtime, p, p.grad, *state.values())
        optimizer.step()
        if t == 1:
            continue
        traffic = [
            (runtime.control_read(i) / x.nbytes, runtime.control_written(i) / x.nbytes)
            for i, x in enumerate([p, p.grad, *state.values()])
        ]
        due = t % 3 == 0
        reads_param = "master_param" not in state
        assert traffic[:2] == [(1, 1) if reads_param else (0, 1), (1, 0)]
        for name, got in zip(state, traffic[2:], strict=True):
            assert got == ((1, 1) if name not in AT_SYNC or due else (0, 0)), name
        assert runtime.control_elsewhere() == 0
        if rule == "adamw" and dtype == torch.float32:
            total = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(traffic)))
            assert total == numel * (28 if due else 20)


@dtypes
@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
def test_a_warp_asks_for_whole_sectors(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool
) -> None:
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")
    p = torch.nn.Parameter(aligned(torch.randn(3 * 2048 + 256).to(dtype), 64))
    optimizer = make_optimizer(rule, [p], HOST, **(RULES | OTHERS)[rule], **NARROW, master_weights=master)
    for t in range(1, 7):
        for tensor in (x for x in optimizer.state.get(p, {}).values() if x.dim() > 0):
            tensor.data = aligned(tensor.data, 64)
        (gradient,) = make_grads([p], generator=seeded(t), dtype=grad_dtype)
        set_grad(p, aligned(gradient, 64))
        runtime.control_reset()
        arrays = [p, p.grad, *(x for x in optimizer.state.get(p, {}).values() if x.dim() > 0)]
        watch(runtime, *arrays)
        optimizer.step()
        moved = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(arrays)))
        if t > 1:
            assert moved > 0
            assert runtime.control_elsewhere() == 0
            assert runtime.control_sectors() * 32 == moved


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_blocks_and_threads_does_not_matter(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, order: int
) -> None:
    """Nor the size of chunks: an element draws by its place in the row."""
    found = []
    for chunk_elements in (64, 4096):
        params = make_params([(300,), (7, 9), (), (0,), (1025,)], dtype)
        optimizer = make_optimizer(rule, params, HOST, **(RULES | OTHERS)[rule], **NARROW)
        tune(optimizer, chunk_elements=chunk_elements)
        for t in range(4):
            runtime.control_order(0 if chunk_elements == 4096 else order + 10 * t)
            set_grads(params, seeded(t))
            optimizer.step()
        found.append([value for p in params for value in (p, *optimizer.state[p].values())])
    assert all(same_tensor_bits(a, b) for a, b in zip(*found, strict=True))
