"""The CUDA kernels over moments in codes of 8 bits, on the host: the CPU's bits, and what they move.

A warp takes a block of 128 elements, by vectors where it is whole and all of its arrays are aligned, else element by
element.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cuda_host import HOST, RULES, set_grads
from helpers import (
    BackendCase,
    can_set_grad_dtype,
    make_grads,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    set_grad,
    tune,
)
from test_cuda_traffic import aligned, parameter_traffic, watch
from torch import Tensor, nn

import lookahead_fused
from bench import cuda_on_host
from lookahead_fused import EMA, GPA, Lookahead, ScheduleFree

pytestmark = pytest.mark.usefixtures("runtime")

CPU = BackendCase("cpu", "cpu", 0.0)
CODED: dict[str, Any] = {"state_dtype": "int8"}
BLOCK = 128
# With those of RULES an event in every third step, the first moment kept, interpolated and reset.
OTHERS: dict[str, dict[str, Any]] = {
    "rmsprop": {"lr": 0.1, "momentum": 0.9, "pullback_momentum": "pullback", "k": 3},
    "radam": {"lr": 0.1, "betas": (0.9, 0.8), "weight_decay": 0.1, "k": 3},
    "lion": {"lr": 0.1, "weight_decay": 0.1, "pullback_momentum": "reset", "k": 3},
}
BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.8, 0.9)),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.9),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.1, betas=(0.9, 0.8)),
    "lion": lambda params: lookahead_fused.Lion(params, lr=0.1, weight_decay=0.1),
}
POLICIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "pullback": lambda base, **settings: Lookahead(base, k=2, pullback_momentum="pullback", **settings),
    "reset": lambda base, **settings: Lookahead(
        base, k=2, pullback_momentum="reset", outer_momentum=0.5, outer_nesterov=False, **settings
    ),
    "ema": lambda base, **settings: EMA(base, decay=0.9, every=2, **settings),
    "gpa": lambda base, **settings: GPA(base, train_interp=0.6, eval_interp=0.8, **settings),
    "schedule-free": lambda base, **settings: ScheduleFree(base, interp=0.8, r=1, **settings),
}
dtypes = pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, True),
        (torch.float16, torch.float32, False),
    ],
)
# Of less than a block, of one with and without a tail, of some chunks and a tail, of none.
SHAPES: tuple[tuple[int, ...], ...] = ((5,), (300, 7), (), (128,), (129,), (0,), (4099,), (8192 + 127,))


def skip_unless_kept(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    if grad_dtype != dtype and not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient in another dtype than the parameter's")


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy that begins so many elements after an aligned address."""
    memory = aligned(torch.zeros(tensor.numel() + elements, dtype=tensor.dtype), 64)
    return memory[elements:].view(tensor.shape).copy_(tensor)


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """But for what is a number of the row's."""
    scalars = ("step", "average_start", "y_interp", "weight_sum", "lr_max")
    return {name: value for name, value in optimizer.state.get(p, {}).items() if name not in scalars}


def without_sign_of_nan(name: str, value: Tensor) -> Tensor:
    """Which sign a NaN has is the processor's choice, and nothing depends on it."""
    return (
        torch.where(value == 0xFF, 0x7F, value) if name in ("exp_avg", "momentum_buffer", "cached_momentum") else value
    )


def assert_same_run(
    make: Callable[[list[nn.Parameter], BackendCase], torch.optim.Optimizer],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    steps: int = 5,
    shift: int = 0,
    grads: Callable[[list[nn.Parameter], int], list[Tensor]] | None = None,
) -> None:
    """Every tensor's bits after every step, against the CPU backend's.

    Args:
        shift: So many elements after an aligned address every array begins, the codes too.
        grads: The gradients of a step.
    """
    runs = []
    for case in (HOST, CPU):
        params = make_params(shapes, dtype)
        if case == HOST and shift:
            for p in params:
                p.data = shifted(p.data, shift)
        runs.append((params, make(params, case)))
    for t in range(steps):
        for params, optimizer in runs:
            made = grads(params, t) if grads else make_grads(params, generator=seeded(t), dtype=grad_dtype)
            for p, g in zip(params, made, strict=True):
                set_grad(p, shifted(g, shift) if shift and optimizer is runs[0][1] else g)
            if shift and optimizer is runs[0][1] and t > 0:
                for value in (value for p in params for value in state_of(optimizer, p).values()):
                    value.data = shifted(value.data, shift)
            optimizer.step()
        (ours, a), (theirs, b) = runs
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert a.state[p].keys() == b.state[q].keys()
            for name, mine, its in (("param", p, q), *((n, a.state[p][n], b.state[q][n]) for n in b.state[q])):
                pair = without_sign_of_nan(name, mine), without_sign_of_nan(name, its)
                assert same_tensor_bits(*pair), f"{name} of parameter {i} after step {t + 1}"


@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
@pytest.mark.parametrize("shift", [0, 1])
@dtypes
def test_the_bits_are_the_cpu_s(
    rule: str, shift: int, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool
) -> None:
    skip_unless_kept(dtype, grad_dtype)

    def make(params: list[nn.Parameter], case: BackendCase) -> torch.optim.Optimizer:
        return make_optimizer(rule, params, case, **(RULES | OTHERS)[rule], **CODED, master_weights=master)

    assert_same_run(make, dtype, grad_dtype, shift=shift)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_the_cpu_s_under_every_policy(base: str, policy: str, dtype: torch.dtype) -> None:
    def make(params: list[nn.Parameter], case: BackendCase) -> torch.optim.Optimizer:
        return POLICIES[policy](BASES[base](params), **CODED, master_weights=True, backend=case.name)

    assert_same_run(make, dtype, dtype, shift=int(policy in ("gpa", "reset")))


@pytest.mark.parametrize("pullback", ["none", "pullback", "reset"])
def test_a_sync_of_its_own_has_the_cpu_s_bits(pullback: str) -> None:
    runs = []
    for case in (HOST, CPU):
        params = make_params(SHAPES)
        optimizer: Any = make_optimizer("adamw", params, case, lr=0.1, k=4, pullback_momentum=pullback, **CODED)
        for t in range(3):
            set_grads(params, seeded(t))
            optimizer.step()
            optimizer.sync()
        runs.append([value for p in params for value in (p, *optimizer.state[p].values())])
    assert all(same_tensor_bits(a, b) for a, b in zip(*runs, strict=True))


EXTREMES = (0.0, -0.0, 1e-45, -1e-38, 1e-20, 3e-5, -0.1, 1e18, -3e19, 3.4e38, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("rule", ["adam", "sgd", "rmsprop", "lion"])
@pytest.mark.parametrize("largest", range(1, len(EXTREMES) + 1))
def test_whatever_a_block_holds(rule: str, largest: int) -> None:
    """Zeros, what is too small for a code, what is too large to be rounded up, what is not finite: in some lanes, in
    all of them, and in blocks beside those that are as usual."""

    def grads(params: list[nn.Parameter], t: int) -> list[Tensor]:
        chosen = torch.tensor(EXTREMES[:largest])
        generator = seeded(100 * largest + t)
        made = make_grads(params, generator=generator)
        for i, g in enumerate(made):
            taken = chosen[torch.randint(len(chosen), g.shape, generator=generator)]
            often = torch.rand(g.shape, generator=generator) < (0.02, 0.5, 1.0)[(i + t) % 3]
            g.copy_(torch.where(often, taken, g))
        return made

    def make(params: list[nn.Parameter], case: BackendCase) -> torch.optim.Optimizer:
        return make_optimizer(rule, params, case, **(RULES | OTHERS)[rule], **CODED)

    assert_same_run(make, torch.float32, torch.float32, shapes=((640,), (77,), (512,)), grads=grads, steps=4)


@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 4096 + 31])
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_is_written_beside_an_array(rule: str, numel: int, shift: int) -> None:
    """Nor read: NaNs stand there."""
    p = nn.Parameter(torch.zeros(0))
    optimizer = make_optimizer(rule, [p], HOST, **(RULES | OTHERS)[rule], **CODED)
    guarded: list[tuple[Tensor, Tensor]] = []

    def guard(tensor: Tensor) -> Tensor:
        fill: float = 0x5A if tensor.dtype == torch.uint8 else math.nan
        room = aligned(torch.full((tensor.numel() + 128,), fill, dtype=tensor.dtype), 64)
        inside = room[64 + shift :][: tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        guarded.append((room, inside))
        return inside

    p.data = guard(torch.randn(numel, generator=seeded(0)))
    for t in range(4):
        p.grad = guard(torch.randn(numel, generator=seeded(t)))
        for value in state_of(optimizer, p).values():
            value.data = guard(value.data)
        optimizer.step()
        for room, inside in guarded:
            beside = torch.cat([room[: 64 + shift], room[64 + shift + inside.numel() :]])
            assert (beside == 0x5A if room.dtype == torch.uint8 else beside.isnan()).all()
        assert p.isfinite().all()


@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
@pytest.mark.parametrize(("numel", "offset"), [(1, 0), (255, 1), (4099, 0), (3 * 4096, 0)])
@dtypes
def test_each_array_is_read_and_written_once(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool, numel: int, offset: int
) -> None:
    """16 bytes for each fp32 parameter of AdamW and an eighth of one more, 24 in a sync."""
    skip_unless_kept(dtype, grad_dtype)
    p = nn.Parameter(torch.randn(numel + offset).to(dtype)[offset:])
    optimizer = make_optimizer(rule, [p], HOST, **(RULES | OTHERS)[rule], **CODED, master_weights=master)
    at_sync = ("slow_param", "cached_momentum", "cached_momentum_scale", "outer_momentum_buffer")
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
            assert got == ((1, 1) if name not in at_sync or due else (0, 0)), name
        assert runtime.control_elsewhere() == 0
        if rule == "adamw" and dtype == torch.float32:
            total = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(traffic)))
            assert total == numel * (24 if due else 16) + 16 * math.ceil(numel / BLOCK)


def test_bytes_of_adamw(runtime: ctypes.CDLL) -> None:
    p = nn.Parameter(torch.randn(1 << 14))
    optimizer = make_optimizer("adamw", [p], HOST, **RULES["adamw"], **CODED)
    for t in range(2):
        set_grads([p], seeded(t))
        arrays = [p, p.grad, *state_of(optimizer, p).values()]
        runtime.control_reset()
        watch(runtime, *arrays)
        optimizer.step()
    moved = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(arrays)))
    assert moved / p.numel() == 16.125


@dtypes
@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
def test_a_warp_asks_for_whole_sectors(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool
) -> None:
    """But for scales, of which each is in a sector with those of the seven blocks beside it."""
    skip_unless_kept(dtype, grad_dtype)
    numel = 3 * 2048 + 256
    p = nn.Parameter(aligned(torch.randn(numel).to(dtype), 64))
    optimizer = make_optimizer(rule, [p], HOST, **(RULES | OTHERS)[rule], **CODED, master_weights=master)
    for t in range(1, 7):
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
        assert runtime.control_elsewhere() == 0
        assert runtime.control_sectors() == elements // 32 + of_scales // 4


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_blocks_and_threads_does_not_matter(
    runtime: ctypes.CDLL, rule: str, dtype: torch.dtype, order: int
) -> None:
    """Nor the size of chunks, as long as they begin where blocks do."""
    found = []
    for chunk_elements in (BLOCK, 3 * BLOCK, 4096):
        params = make_params([(300,), (7, 9), (), (0,), (1025,)], dtype)
        optimizer = make_optimizer(rule, params, HOST, **(RULES | OTHERS)[rule], **CODED)
        tune(optimizer, chunk_elements=chunk_elements)
        for t in range(4):
            runtime.control_order(0 if chunk_elements == 4096 else order + 10 * t)
            set_grads(params, seeded(t))
            optimizer.step()
        found.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for others in found[1:]:
        assert all(same_tensor_bits(a, b) for a, b in zip(found[0], others, strict=True))


def test_two_launches_a_step(runtime: ctypes.CDLL) -> None:
    params = make_params([(300,), (4096 * 3,)])
    optimizer = make_optimizer("adamw", params, HOST, **RULES["adamw"], **CODED)
    for t in range(3):
        set_grads(params, seeded(t))
        runtime.control_reset()
        optimizer.step()
    assert cuda_on_host.calls().count("cudaLaunchKernelEx") == 2
