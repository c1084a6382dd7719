"""The CUDA kernels over narrow moments, on the host: what they move, and in which order they may run.

The bits of moments in codes are asked for in `test_cuda_codes.py`.
"""

from __future__ import annotations

import ctypes
import itertools
import math

import pytest
import torch
from cuda_host import HOST, NARROW, narrow_dtypes, set_grads, skip_unless_kept
from helpers import make_grads, make_optimizer, make_params, same_tensor_bits, seeded, set_grad, tune
from narrow import narrow_ones
from test_cuda_traffic import aligned, parameter_traffic, watch

from lookahead_fused._codes import BLOCK

pytestmark = pytest.mark.usefixtures("runtime")

AT_SYNC = ("slow_param", "cached_momentum", "cached_momentum_scale", "outer_momentum_buffer")
# Of each fp32 parameter of AdamW, in a step and in a sync.
BYTES = {"bfloat16": (20, 28), "int8": (16, 24)}


def state_of(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """But for what is a number of the row's."""
    return {name: value for name, value in optimizer.state.get(p, {}).items() if value.dim() > 0}


# A walk is the same for every rule.
@narrow_ones
@pytest.mark.parametrize(
    ("rule", "numel", "offset"),
    [*((rule, 4099, 0) for rule in NARROW), ("adam", 1, 0), ("adam", 255, 1), ("adam", 3 * 4096, 0)],
)
@narrow_dtypes
def test_each_array_is_read_and_written_once(
    runtime: ctypes.CDLL,
    narrow: str,
    rule: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    master: bool,
    numel: int,
    offset: int,
) -> None:
    """Scales are an eighth of a byte more, of two moments."""
    skip_unless_kept(dtype, grad_dtype)
    p = torch.nn.Parameter(torch.randn(numel + offset).to(dtype)[offset:])
    optimizer = make_optimizer(rule, [p], HOST, **NARROW[rule], state_dtype=narrow, master_weights=master)
    for t in range(1, 4):
        set_grads([p], seeded(t), grad_dtype)
        state = state_of(optimizer, p)
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
        assert traffic[:2] == [parameter_traffic(dtype, master), (1, 0)]
        for name, got in zip(state, traffic[2:], strict=True):
            assert got == ((1, 1) if name not in AT_SYNC or due else (0, 0)), name
        assert runtime.control_elsewhere() == 0
        if rule == "adamw" and dtype == torch.float32:
            total = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(traffic)))
            of_scales = 16 * math.ceil(numel / BLOCK) if narrow == "int8" else 0
            assert total == numel * BYTES[narrow][due] + of_scales


@narrow_ones
@narrow_dtypes
@pytest.mark.parametrize("rule", NARROW)
def test_a_warp_asks_for_whole_sectors(
    runtime: ctypes.CDLL, narrow: str, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool
) -> None:
    """But for scales, of which each is in a sector with those of the seven blocks beside it."""
    skip_unless_kept(dtype, grad_dtype)
    p = torch.nn.Parameter(aligned(torch.randn(2048 + 256).to(dtype), 64))
    optimizer = make_optimizer(rule, [p], HOST, **NARROW[rule], state_dtype=narrow, master_weights=master)
    for t in range(1, 4):
        for tensor in state_of(optimizer, p).values():
            tensor.data = aligned(tensor.data, 64)
        (gradient,) = make_grads([p], generator=seeded(t), dtype=grad_dtype)
        set_grad(p, aligned(gradient, 64))
        state = state_of(optimizer, p)
        arrays = [p, p.grad, *(value for name, value in state.items() if not name.endswith("_scale"))]
        scales = [value for name, value in state.items() if name.endswith("_scale")]
        runtime.control_reset()
        watch(runtime, *arrays, *scales)
        optimizer.step()
        if t == 1:
            continue
        moved = [runtime.control_read(i) + runtime.control_written(i) for i in range(len(arrays) + len(scales))]
        elements, of_scales = sum(moved[: len(arrays)]), sum(moved[len(arrays) :])
        assert elements > 0
        assert elements % 32 == 0
        assert runtime.control_elsewhere() == 0
        assert runtime.control_sectors() == elements // 32 + of_scales // 4


@narrow_ones
@pytest.mark.parametrize(("rule", "order"), list(zip(NARROW, itertools.cycle([1, 2, 3]), strict=False)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_blocks_and_threads_does_not_matter(
    runtime: ctypes.CDLL, narrow: str, rule: str, dtype: torch.dtype, order: int
) -> None:
    """Nor the size of chunks, of codes as long as they begin where blocks do: an element draws by its place in the
    row."""
    found = []
    for chunk_elements in (BLOCK, 3 * BLOCK, 4096) if narrow == "int8" else (64, 4096):
        params = make_params([(300,), (7, 9), (), (0,), (1025,)], dtype)
        optimizer = make_optimizer(rule, params, HOST, **NARROW[rule], state_dtype=narrow)
        tune(optimizer, chunk_elements=chunk_elements)
        for t in range(4):
            runtime.control_order(0 if chunk_elements == 4096 else order + 10 * t)
            set_grads(params, seeded(t))
            optimizer.step()
        found.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for others in found[1:]:
        assert all(same_tensor_bits(a, b) for a, b in zip(found[0], others, strict=True))
