"""The CUDA kernels over moments in codes of 8 bits, on the host: the CPU's bits. What they move is counted in
`test_cuda_narrow_moments.py`.

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
from cuda_host import HOST, NARROW, narrow_dtypes, set_grads, skip_unless_kept
from helpers import BackendCase, make_grads, make_optimizer, make_params, same_tensor_bits, seeded, set_grad
from test_cuda_traffic import aligned, watch
from torch import Tensor, nn

import lookahead_fused
from bench import cuda_on_host
from lookahead_fused import EMA, GPA, Lookahead, ScheduleFree

pytestmark = pytest.mark.usefixtures("runtime")

CPU = BackendCase("cpu", "cpu", 0.0)
CODED: dict[str, Any] = {"state_dtype": "int8"}
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
# Of less than a block, of some with and without a tail, of a chunk and more than a block, of none.
SHAPES: tuple[tuple[int, ...], ...] = ((5,), (60, 7), (), (128,), (129,), (0,), (4096 + 131,))


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy that begins so many elements after an aligned address."""
    memory = aligned(torch.zeros(tensor.numel() + elements, dtype=tensor.dtype), 64)
    return memory[elements:].view(tensor.shape).copy_(tensor)


def arrays_of(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    """Of its state, all but what is a number of the row's."""
    scalars = ("step", "average_start", "y_interp", "weight_sum", "lr_max")
    return [value for name, value in optimizer.state.get(p, {}).items() if name not in scalars]


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
                for value in (value for p in params for value in arrays_of(optimizer, p)):
                    value.data = shifted(value.data, shift)
            optimizer.step()
        (ours, a), (theirs, b) = runs
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert a.state[p].keys() == b.state[q].keys()
            for name, mine, its in (("param", p, q), *((n, a.state[p][n], b.state[q][n]) for n in b.state[q])):
                pair = without_sign_of_nan(name, mine), without_sign_of_nan(name, its)
                assert same_tensor_bits(*pair), f"{name} of parameter {i} after step {t + 1}"


@pytest.mark.parametrize("rule", NARROW)
@pytest.mark.parametrize("shift", [0, 1])
@narrow_dtypes
def test_the_bits_are_the_cpu_s(
    rule: str, shift: int, dtype: torch.dtype, grad_dtype: torch.dtype, master: bool
) -> None:
    skip_unless_kept(dtype, grad_dtype)

    def make(params: list[nn.Parameter], case: BackendCase) -> torch.optim.Optimizer:
        return make_optimizer(rule, params, case, **NARROW[rule], **CODED, master_weights=master)

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
        return make_optimizer(rule, params, case, **NARROW[rule], **CODED)

    assert_same_run(make, torch.float32, torch.float32, shapes=((640,), (77,), (512,)), grads=grads, steps=4)


@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
@pytest.mark.parametrize("numel", [1, 127, 128, 129, 4096 + 31])
@pytest.mark.parametrize("shift", [0, 1])
def test_nothing_is_written_beside_an_array(rule: str, numel: int, shift: int) -> None:
    """Nor read: NaNs stand there."""
    p = nn.Parameter(torch.zeros(0))
    optimizer = make_optimizer(rule, [p], HOST, **NARROW[rule], **CODED)
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
        for value in arrays_of(optimizer, p):
            value.data = guard(value.data)
        optimizer.step()
        for room, inside in guarded:
            beside = torch.cat([room[: 64 + shift], room[64 + shift + inside.numel() :]])
            assert (beside == 0x5A if room.dtype == torch.uint8 else beside.isnan()).all()
        assert p.isfinite().all()


def test_bytes_of_adamw(runtime: ctypes.CDLL) -> None:
    p = nn.Parameter(torch.randn(1 << 14))
    optimizer = make_optimizer("adamw", [p], HOST, **NARROW["adamw"], **CODED)
    for t in range(2):
        set_grads([p], seeded(t))
        arrays = [p, p.grad, *arrays_of(optimizer, p)]
        runtime.control_reset()
        watch(runtime, *arrays)
        optimizer.step()
    moved = sum(runtime.control_read(i) + runtime.control_written(i) for i in range(len(arrays)))
    assert moved / p.numel() == 16.125


def test_two_launches_a_step(runtime: ctypes.CDLL) -> None:
    params = make_params([(300,), (4096 * 3,)])
    optimizer = make_optimizer("adamw", params, HOST, **NARROW["adamw"], **CODED)
    for t in range(3):
        set_grads(params, seeded(t))
        runtime.control_reset()
        optimizer.step()
    assert cuda_on_host.calls().count("cudaLaunchKernelEx") == 2
