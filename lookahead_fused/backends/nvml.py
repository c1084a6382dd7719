"""What NVIDIA's management library tells of a machine's GPUs.

It comes with the driver and does not initialise CUDA: a process may ask it, and its forked children still use a GPU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """All GPUs of a machine, also those that are hidden from this process.

    `cuda` is the version that the driver is made for, as 1000 * major + 10 * minor.
    """

    cuda: int
    cards: tuple[Card, ...]


def machine() -> Machine | None:
    """None where there is no such library, or where it does not answer."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() != 0:
            return None
        try:
            return _ask(library)
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError):  # no library; or an older one, without one of the functions
        return None


def _ask(library: ctypes.CDLL) -> Machine | None:
    cuda, count = ctypes.c_int(), ctypes.c_uint()
    if library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)) != 0:
        return None
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    cards = [_card(library, index) for index in range(count.value)]
    known = tuple(card for card in cards if card is not None)
    return Machine(cuda.value, known) if len(known) == len(cards) else None


def _card(library: ctypes.CDLL, index: int) -> Card | None:
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(96)
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    if library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    if library.nvmlDeviceGetName(device, name, ctypes.c_uint(len(name))) != 0:
        return None
    return Card(name.value.decode(errors="replace"), (major.value, minor.value))
