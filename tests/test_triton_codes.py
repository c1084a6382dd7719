"""Moments in codes of 8 bits in Triton's kernels, interpreted: the reference's bits, whatever a chunk is cut into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_grads, same_tensor_bits, seeded, set_grad, tune
from narrow import assert_same, of_class, run
from torch import Tensor
from triton_host import HOST, needs_interpreter

import lookahead_fused
from lookahead_fused import GPA
from lookahead_fused._parts import CHUNK_ELEMENTS

pytestmark = [needs_interpreter, pytest.mark.usefixtures("host")]

Make = Callable[[list[Any], str], torch.optim.Optimizer]


def gpa(params: list[Any], backend: str) -> torch.optim.Optimizer:
    base = torch.optim.AdamW(params, lr=0.05, amsgrad=True)
    return GPA(base, master_weights=True, state_dtype="int8", backend=backend)


def adam(params: list[Any], backend: str) -> torch.optim.Optimizer:
    make = of_class("adam", amsgrad=True, pullback_momentum="pullback", master_weights=True, k=2)
    return make(params, backend, "int8")


def stepped(
    make: Make, backend: str, numels: list[int], offset: int, dtype: torch.dtype, **tuning: Any
) -> tuple[Any, list[Any]]:
    params = []
    for i, numel in enumerate(numels):
        room = torch.zeros(numel + offset, dtype=dtype)
        room[offset:] = torch.randn(numel, generator=seeded(i))
        params.append(torch.nn.Parameter(room[offset:]))
    optimizer: Any = make(params, backend)
    if tuning:
        tune(optimizer, **tuning)
    for t in range(1, 5):
        run(optimizer, params, range(t, t + 1))
        if t == 3 and make is adam:
            # A pass of its own.
            optimizer.sync()
    return optimizer, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [adam, gpa])
@pytest.mark.parametrize("offset", [0, 1])
def test_tails_of_every_kind_are_the_reference_s(make: Make, offset: int, dtype: torch.dtype) -> None:
    """Less than a block, blocks and a rest, what a program takes at a time and a rest; with nothing aligned, too."""
    numels = [1, 3, 127, 128, 129, 255, 257, 511, 512, 513, 640, 1025, 1500]
    expected = stepped(make, "reference", numels, offset, dtype)
    assert_same(*stepped(make, HOST.name, numels, offset, dtype), *expected)


@pytest.mark.parametrize("make", [adam, gpa])
@pytest.mark.parametrize("chunk_elements", [128, 384, 2048])
def test_chunks_change_no_bit(make: Make, chunk_elements: int) -> None:
    numels = [33, 3000, CHUNK_ELEMENTS + 1]
    expected = stepped(make, "reference", numels, 0, torch.float32)
    assert_same(*stepped(make, HOST.name, numels, 0, torch.float32, chunk_elements=chunk_elements), *expected)


def numbers() -> Tensor:
    """Every bf16 number, and fp32 numbers above it: zeros, subnormal numbers, infinities and NaN among them. First like
    beside like, then each in any block."""
    lower = torch.tensor([0, 0x7FFF])
    bits = (torch.arange(1 << 16)[:, None] << 16 | lower).flatten()
    found = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
    return torch.cat([found, found[torch.randperm(len(found), generator=seeded(0))]])


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_every_number_is_encoded_and_decoded_as_by_the_reference(rule: str) -> None:
    """SGD's first buffer is the gradient. Of Adam without memory, the second moment is its square; and where gradients
    are zeros the step after that reads what the first wrote."""
    own: dict[str, Any] = {
        "sgd": {"momentum": 1.0, "k": 10},
        "adam": {"betas": (0.0, 0.0), "amsgrad": True, "pullback_momentum": "pullback", "k": 1},
    }[rule]
    found = []
    for backend in (HOST.name, "reference"):
        p = torch.nn.Parameter(torch.zeros_like(numbers()))
        optimizer = of_class(rule, lr=0.0, **own)([p], backend, "int8")
        for gradient in (numbers(), torch.zeros_like(p)):
            set_grad(p, gradient)
            optimizer.step()
            found.append({name: value.clone() for name, value in optimizer.state[p].items()})
    for ours, its in zip(found[:2], found[2:], strict=True):
        for name in ours:
            assert ours[name].dtype.is_floating_point or torch.equal(ours[name], its[name]), name
            assert not name.endswith("_scale") or same_tensor_bits(ours[name], its[name]), name
    codes = found[0]["momentum_buffer" if rule == "sgd" else "exp_avg_sq"]
    assert codes.unique().numel() == 256


def test_a_block_that_a_chunk_has_no_part_in_stays(host: Any) -> None:
    """A row whose gradient is missing, between two that are stepped."""
    params = [torch.nn.Parameter(torch.randn(n, generator=seeded(n))) for n in (300, 640, 129)]
    optimizer = lookahead_fused.LookaheadAdamW(params, state_dtype="int8", backend=HOST.name)
    run(optimizer, params, range(1, 3))
    before = {name: value.clone() for name, value in optimizer.state[params[1]].items()}
    for p, g in zip(params, make_grads(params, generator=seeded(3)), strict=True):
        set_grad(p, g)
    params[1].grad = None
    optimizer.step()
    assert all(same_tensor_bits(value, before[name]) for name, value in optimizer.state[params[1]].items())
