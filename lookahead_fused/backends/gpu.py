"""What the CUDA and the Triton backend share: two launches over a table that was sent to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage


class UsedOn:
    """The streams that use some memory, so that the allocator learns of each once.

    Freed, the memory must not be given away while another stream than the one it was made on still reads it. Told once,
    the allocator remembers the stream as long as the memory is ours.

    Args:
        stream: The stream that the memory was made on.
    """

    def __init__(self, stream: Any) -> None:
        self._streams = {stream}

    def add(self, stream: Any, memory: Iterable[Tensor], tell: Callable[[Tensor], None]) -> None:
        """Has the allocator told of a stream that is new."""
        if stream not in self._streams:
            for tensor in memory:
                tell(tensor)
            self._streams.add(stream)


class LentUsedOn:
    """The same of tensors that a step is given, in most steps the same ones; all are new where the first of them is."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def add(self, stream: Any, tensors: tuple[Tensor, ...], tell: Callable[[Tensor], None]) -> None:
        """As `UsedOn` does; what is new was made on this stream."""
        if tensors[0] is not self._first:
            self._first, self._used_on = tensors[0], UsedOn(stream)
        self._used_on.add(stream, tensors, tell)


class PinnedUsedOn:
    """The same of a table's pinned host memory, of which torch's allocator has one lesson less to learn: it gives freed
    memory away at once unless it knows of a stream that may still use it."""

    def __init__(self) -> None:
        self._moves, self._streams = -1, set[Any]()

    def add(self, stream: Any, device: torch.device, table: Any) -> None:
        """Has the allocator told of a stream or of memory that is new."""
        if table.moves != self._moves:
            self._moves, self._streams = table.moves, set()
        if stream not in self._streams:
            for memory in table.pinned():
                tell_pinned(memory, device)
            self._streams.add(stream)


def tell_pinned(memory: UntypedStorage, device: torch.device) -> None:
    """Pinned memory has no `record_stream`; a copy that does not wait records its stream, for as long as the memory is
    not freed."""
    first = torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory)[:1]
    torch.empty(1, dtype=torch.uint8, device=device).copy_(first, non_blocking=True)


def no_table_to_capture(device: torch.device) -> str:
    return (
        "this step cannot be captured in a CUDA graph: the step before it failed, and its table is not on "
        f"{device}; run a step before the capture"
    )


def moved_while_capturing(device: torch.device) -> str:
    return (
        f"this step cannot be captured in a CUDA graph: state on {device} lies elsewhere than in the step before it, "
        "and its table would be sent anew in every replay; run a step before the capture"
    )
