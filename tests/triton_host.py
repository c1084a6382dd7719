"""What the tests of the Triton backend on the host share; `triton_on_host` is the backend, the fixture `host` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_on_host
from helpers import BackendCase, make_grads, seeded, set_grad

needs_triton = pytest.mark.skipif(
    bool(triton_on_host.not_compiled()), reason=f"runs Triton: {triton_on_host.not_compiled()}"
)
needs_interpreter = pytest.mark.skipif(
    bool(triton_on_host.missing()), reason=f"interprets kernels: {triton_on_host.missing()}"
)
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


class Driver:
    """An NVIDIA driver without a device: kernels are compiled and looked up as for one, their launches are counted."""

    launches = 0

    class utils:
        load_binary = staticmethod(lambda *about: (1, 1, 32, 0, 1024))
        unload_module = staticmethod(lambda module: None)
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 20})

    class launcher_cls:
        def __init__(self, *about: Any) -> None:
            pass

        def __call__(self, *arguments: Any) -> None:
            Driver.launches += 1

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)
