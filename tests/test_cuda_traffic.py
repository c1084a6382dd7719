"""The memory traffic of the CUDA kernels, counted on the host: each array once, and in whole sectors."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_host import FURTHER, HOST, RULES, set_grads
from helpers import Lockstep, can_set_grad_dtype, make_grads, make_optimizer, seeded, set_grad, tune

from lookahead_fused.backends.cuda import CHUNK_ELEMENTS

pytestmark = pytest.mark.usefixtures("runtime")

dtypes = pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master"),
    [
        (torch.float32, torch.float32, False),
        (torch.float64, torch.float64, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float16, False),
        (torch.float16, torch.float32, True),
    ],
)


def parameter_traffic(dtype: torch.dtype, master: bool) -> tuple[int, int]:
    """How often the parameter is read and written: one in fp16 that has a master, which is whole, is not read."""
    return (0 if master and dtype == torch.float16 else 1), 1


def watch(library: ctypes.CDLL, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        library.control_watch(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(size))


@pytest.mark.parametrize(
    ("rule", "numel", "offset"),
    [
        *itertools.product(RULES, (1, 255, 4099), (0, 1)),
        *itertools.product(RULES, (17_000,), (0,)),
        *itertools.product(FURTHER, (4099,), (1,)),
    ],
)
@dtypes
def test_each_array_is_read_and_written_once(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool, numel: int, offset: int
) -> None:
    """28 bytes for each fp32 parameter of AdamW, 36 in a sync; phi and what hangs on it in a sync alone."""
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")
    p = torch.nn.Parameter(torch.randn(numel + offset).to(dtype)[offset:])
    hyper = (RULES | FURTHER)[rule]
    optimizer = make_optimizer(rule, [p], HOST, **hyper, **({"master_weights": True} if master else {}))
    for t in range(1, 4):
        set_grads([p], seeded(t), grad_dtype)
        state = optimizer.state.get(p, {})
        runtime.control_reset()
        at_sync = [name for name in ("slow_param", "cached_momentum", "outer_momentum_buffer") if name in state]
        once = [name for name in state if name not in (*at_sync, "step")]
        watch(runtime, p, p.grad, *(state[name] for name in (*once, *at_sync)))
        optimizer.step()
        if t == 1:
            continue
        traffic = [
            (runtime.control_read(i) / x.nbytes, runtime.control_written(i) / x.nbytes)
            for i, x in enumerate([p, p.grad, *(state[name] for name in (*once, *at_sync))])
        ]
        due = t % 3 == 0
        assert traffic[0] == parameter_traffic(dtype, master)
        assert traffic[1] == (1, 0)
        for name, got in zip((*once, *at_sync), traffic[2:], strict=True):
            assert got == ((1, 1) if name in once or due else (0, 0)), name
        assert runtime.control_elsewhere() == 0
        if rule == "adamw" and dtype == torch.float32:
            total = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(traffic)))
            assert total == numel * (36 if due else 28)


@pytest.mark.parametrize("numel", [1, 4096, 17_000])
@dtypes
def test_a_norm_reads_the_gradient_once_more(
    runtime: ctypes.CDLL, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool, numel: int
) -> None:
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")
    p = torch.nn.Parameter(torch.randn(numel).to(dtype))
    hyper = {"master_weights": True} if master else {}
    optimizer = make_optimizer("adamw", [p], HOST, lr=0.1, k=5, max_grad_norm=1.0, **hyper)
    for t in range(2):
        set_grads([p], seeded(t), grad_dtype)
        runtime.control_reset()
        watch(runtime, p, p.grad)
        optimizer.step()
    assert runtime.control_read(1) == 2 * p.grad.nbytes
    assert runtime.control_written(1) == 0
    assert runtime.control_read(0) == parameter_traffic(dtype, master)[0] * p.nbytes


@pytest.mark.parametrize("rule", [*RULES, *FURTHER])
@pytest.mark.parametrize("master", [False, True])
def test_a_sync_leaves_alone_what_it_does_not_change(runtime: ctypes.CDLL, rule: str, master: bool) -> None:
    """16 bytes for each fp32 parameter: of moments, it moves the first one where the policy acts on it."""
    p = torch.nn.Parameter(torch.randn(4099).to(torch.bfloat16 if master else torch.float32))
    hyper = (RULES | FURTHER)[rule]
    optimizer = make_optimizer(rule, [p], HOST, **hyper, **({"master_weights": True} if master else {}))
    set_grads([p], seeded(1))
    first = "momentum_buffer" if rule in ("sgd", "rmsprop") else "exp_avg"
    acted_on = (first,) if "pullback_momentum" in hyper else ()
    moved = ("slow_param", "master_low", "cached_momentum", "outer_momentum_buffer", *acted_on)
    optimizer.step()
    for call in (optimizer.sync, optimizer.sync, optimizer.step, optimizer.sync):
        state = {name: value for name, value in optimizer.state[p].items() if value.dim() > 0}
        runtime.control_reset()
        watch(runtime, p, p.grad, *state.values())
        call()
        if call == optimizer.step:
            continue
        traffic = [
            (runtime.control_read(i) / x.nbytes, runtime.control_written(i) / x.nbytes)
            for i, x in enumerate([p, p.grad, *state.values()])
        ]
        assert traffic[:2] == [(1, 1), (0, 0)]
        assert dict(zip(state, traffic[2:], strict=True)) == {n: (1, 1) if n in moved else (0, 0) for n in state}
        assert runtime.control_elsewhere() == 0


@dtypes
@pytest.mark.parametrize("rule", RULES)
def test_a_warp_asks_for_whole_sectors(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool
) -> None:
    """Memory moves in sectors of 32 bytes: no access of a warp takes a part of one and comes back for the rest."""
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")
    p = torch.nn.Parameter(aligned(torch.randn(3 * 2048 + 256).to(dtype), 64))
    optimizer = make_optimizer(rule, [p], HOST, **RULES[rule], **({"master_weights": True} if master else {}))
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


def aligned(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    """A copy that starts at a multiple of so many bytes, as all of a GPU's allocations do."""
    size = tensor.element_size()
    room = torch.empty(tensor.numel() + alignment // size, dtype=tensor.dtype)
    copy = room[-room.data_ptr() % alignment // size :][: tensor.numel()]
    return copy.copy_(tensor)


def test_the_table_is_a_small_part_of_the_traffic() -> None:
    """What a block reads of the table, against the chunk it updates, which is the smallest for AdamW in bf16 with its
    moments in codes."""
    row, chunk, step = 160, 16, 192
    assert (row + chunk + step) / (10 * CHUNK_ELEMENTS) < 0.01


@pytest.mark.parametrize(("tuned", "blocks"), [({}, 4), ({"chunk_elements": 1000}, 13)])
def test_what_a_block_updates(runtime: ctypes.CDLL, tuned: dict[str, int], blocks: int) -> None:
    """4096 elements, or as many as it is told."""
    p = torch.nn.Parameter(torch.randn(3 * 4096 + 1))
    optimizer = make_optimizer("adamw", [p], HOST)
    tune(optimizer, **tuned)
    set_grads([p], seeded(1))
    optimizer.step()
    (part,) = optimizer._table.parts
    assert part.table.chunk_count == blocks


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_order_of_blocks_and_threads_does_not_matter(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, order: int
) -> None:
    pair = Lockstep(HOST, rule, ([(300,), (7, 9), (), (0,), (1025,)], {}), dtype=dtype, **RULES[rule])
    tune(pair.optimizer, chunk_elements=64)
    for t in range(4):
        runtime.control_order(order + 10 * t)
        pair.step()
