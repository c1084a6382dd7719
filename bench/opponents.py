"""The optimizers that are compared: ours, and the fastest that torch alone can do.

Every function takes ``params`` (tensors or parameter groups) and returns an object with ``step()``.
Hyperparameters are the same for all, and none of them is one that would let a side skip work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_fused import LookaheadAdamW, LookaheadSGD

K = 5
ALPHA = 0.5
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Steps(Protocol):
    """What a comparison needs of an optimizer."""

    def step(self) -> object: ...


class ForeachSync:
    """Lookahead as a careful user of torch writes it: a fused inner step, every k-th with a foreach sync.

    Two calls for all tensors, no Python loop over them, nothing allocated: what is left only fusing can save.

    Args:
        base: the inner optimizer; all its parameters are interpolated.
        k: steps between syncs.
        alpha: the share of the way that the slow weights go.
    """

    def __init__(self, base: Optimizer, k: int = K, alpha: float = ALPHA) -> None:
        self.base = base
        self.k = k
        self.alpha = alpha
        self.steps = 0
        # Detached views: in-place operations on them need no grad mode, which would cost this side time.
        self.fast: list[Tensor] = [p.detach() for group in base.param_groups for p in group["params"]]
        self.slow: list[Tensor] = [p.clone() for p in self.fast]

    def step(self) -> None:
        self.base.step()
        self.steps += 1
        if self.steps % self.k == 0:
            torch._foreach_lerp_(self.slow, self.fast, self.alpha)
            torch._foreach_copy_(self.fast, self.slow)


def ours_adamw(params: Params, k: int = K) -> LookaheadAdamW:
    # Named, not "auto": without the native module this raises and does not time something else.
    return LookaheadAdamW(params, **ADAMW, k=k, alpha=ALPHA, backend="cpu")


def ours_sgd(params: Params, k: int = K) -> LookaheadSGD:
    return LookaheadSGD(params, **SGD, k=k, alpha=ALPHA, backend="cpu")


def torch_adamw(params: Params) -> Optimizer:
    return torch.optim.AdamW(params, **ADAMW, fused=True)


def torch_adamw_sync(params: Params, k: int = K) -> ForeachSync:
    return ForeachSync(torch_adamw(params), k)


def torch_sgd_sync(params: Params, k: int = K) -> ForeachSync:
    return ForeachSync(torch.optim.SGD(params, **SGD, fused=True), k)
