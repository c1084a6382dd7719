"""What the tests of the Triton backend on the host share; `triton_on_host` is the backend, the fixture `host` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_on_host
from helpers import BackendCase, make_grads, seeded, set_grad

needs_triton = pytest.mark.skipif(bool(triton_on_host.missing()), reason=f"runs Triton: {triton_on_host.missing()}")
HOST = BackendCase(triton_on_host.NAME, "cpu", 0.0)


def set_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    for p, g in zip(params, make_grads(params, generator=seeded(seed)), strict=True):
        set_grad(p, g)


class Recorder:
    """In a kernel's place: counts its launches, and makes them or keeps them."""

    def __init__(self, kernel: Any, kept: list[Callable[[], None]] | None = None) -> None:
        self.kernel, self.kept, self.grids = kernel, kept, []  # type: ignore[var-annotated]

    def warmup(self, *args: Any, **options: Any) -> None:
        pass

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.grids.append(grid)
            if self.kept is not None:
                self.kept.append(lambda: self.kernel[grid](*args, **options))

        return launch
