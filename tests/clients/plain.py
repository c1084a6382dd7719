"""What the frameworks' runs are compared with: a model, batches, and torch's own loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lookahead_fused import LookaheadAdamW

SETTINGS = {"lr": 1e-2, "k": 2}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(x := torch.randn(8, 4), x.sum(1, keepdim=True)) for _ in range(count)]


def by_hand(count: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and the slow weights after so many steps without a framework."""
    model = make_model()
    optimizer = LookaheadAdamW(model.parameters(), **SETTINGS)
    for x, y in make_batches(count):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return weights(model), [optimizer.state[p]["slow_param"].clone() for p in model.parameters()]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_weights(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
