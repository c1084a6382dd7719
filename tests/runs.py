"""Runs that can be cut and resumed: the gradients of a step depend on its number alone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from helpers import BackendCase, assert_unchanged, make_grads, make_params, seeded, set_grad, snapshot
from torch import Tensor


def gradients_of(step: int, params: Sequence[Tensor]) -> list[Tensor]:
    return make_grads(params, generator=seeded(10_000 + step))


def advance(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    """Steps with the gradients of these numbers, as one uninterrupted run has them."""
    for step in steps:
        for p, g in zip(params, gradients_of(step, params), strict=True):
            set_grad(p, g)
        optimizer.step()


def copies(params: Iterable[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def through_a_file(value: Any) -> Any:
    """Saved and loaded again, as a process does that trusts no pickle."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_run(ours: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Parameters, gradients, state and settings are the same to the bit; the tensors are not."""
    a, b = snapshot(ours), snapshot(other)
    del a["members"], b["members"]
    assert_unchanged(a, b)
    # Both at once: of codes a state dict has numbers of its own, whose memory others may get after it.
    saved = ours.state_dict(), other.state_dict()
    first, second = ({t.data_ptr() for t in tensors_of(one) if t.numel()} for one in saved)
    assert first.isdisjoint(second)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]


def fresh(
    backend: BackendCase,
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[Sequence[int]] = ((7,), (3, 5), (), (0,)),
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    return make_params(shapes, dtype, seed=seed, device=backend.device)
