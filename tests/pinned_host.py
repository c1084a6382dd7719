"""Pinned host memory where there is no GPU: what torch would answer, and which memory it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


class PinnedHost:
    """Stands in for torch's pinned memory and for the GPU beside it, whose memory is the host's here.

    Attributes:
        room: How many bytes more can be pinned.
        asked: How often somebody asked whether memory is pinned.
        waits: How often the host waited for the device.
    """

    def __init__(self) -> None:
        self.room = 1 << 30
        self.asked = self.waits = 0
        # Held: no other memory gets the address of one of these.
        self._pinned: dict[int, torch.UntypedStorage] = {}

    def pinned(self, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        if made.nbytes > self.room:
            raise RuntimeError("CUDA error: out of memory")
        self.room -= made.nbytes
        memory = made.untyped_storage()
        self._pinned[memory.data_ptr()] = memory
        return made

    def is_pinned(self, tensor: Tensor) -> bool:
        self.asked += 1
        return self.has(tensor)

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def wait(self, devices: Iterable[torch.device]) -> None:
        self.waits += len(list(devices))


@contextmanager
def pinned_host() -> Iterator[PinnedHost]:
    """As if a CPU's parameters were on a GPU. Not by monkeypatch, which tests undo in their middle."""
    host = PinnedHost()
    answers = {"is_apart": lambda device: True, "reaches_host": lambda device: True}
    answers |= {name: getattr(host, name) for name in ("pinned", "is_pinned", "wait")}
    with mock.patch.multiple("lookahead_fused._offload", **answers):
        yield host
