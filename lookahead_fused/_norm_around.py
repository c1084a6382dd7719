"""The global norm around an optimizer whose step is its own: it reads gradients that are clipped copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _rules as rules
from ._norm import Clip, GlobalNorm
from ._policies import Alone
from ._table import Table
from ._torch import is_plain

# Of a rule that keeps nothing but a count. No step of it is ever made.
_SETTINGS = {
    "lr": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "master_weights": False,
}


class NormAround:
    """Takes the norm of the gradients of another optimizer's groups, by the backends that would step them."""

    def __init__(self) -> None:
        self._table = Table(rules.SGD, Alone())
        self._groups: list[dict[str, Any]] = []
        self._state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)

    def measure(
        self,
        norm: GlobalNorm,
        groups: Sequence[dict[str, Any]],
        backend: str,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Clip:
        """What the norm comes to.

        Args:
            groups: The optimizer's.
            backend: The name under which a group tells its backend.

        Raises:
            TypeError, ValueError: A gradient is sparse, complex or not floating-point, or does not fit its parameter.
            RuntimeError: A named backend cannot serve.
        """
        if [id(group["params"]) for group in groups] != [id(own["params"]) for own in self._groups]:
            self._groups = [{**_SETTINGS, "params": group["params"]} for group in groups]
            self._state.clear()
            self._table.invalidate()
        for own, group in zip(self._groups, groups, strict=True):
            own["backend"] = group[backend]
        return self._table.measure(norm, self._groups, self._state, grad_scale, found_inf)


@contextmanager
def clipped(groups: Sequence[dict[str, Any]], clip: Clip) -> Iterator[None]:
    """Has the parameters' gradients be clipped copies, for the length of a block."""
    kept = [(param, param.grad) for group in groups for param in group["params"] if param.grad is not None]
    # All copies are there before the first is seen.
    copies = [_times(gradient, clip.coefficient) for _, gradient in kept]
    try:
        for (param, _), copy in zip(kept, copies, strict=True):
            param.grad = copy
        yield
    finally:
        for param, gradient in kept:
            param.grad = gradient


def _times(gradient: Tensor, coefficient: Tensor) -> Tensor:
    with torch.no_grad():
        # Tensors around others take a number: not all of them can be multiplied by a tensor that is not.
        return gradient * (coefficient.to(gradient.device) if is_plain(gradient) else float(coefficient))
