"""What a thread may do while another one captures a CUDA graph."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allowed_to_wait() -> Iterator[None]:
    """While any thread captures a graph, calls that might wait are forbidden to all threads that do not ask for this:
    they would fail, and the capture with them."""
    exchange = _exchange_capture_mode()
    mode = ctypes.c_int(_RELAXED)
    exchanged = exchange is not None and exchange(ctypes.byref(mode)) == 0
    try:
        yield
    finally:
        if exchange is not None and exchanged:
            exchange(ctypes.byref(mode))


_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _exchange_capture_mode() -> Callable[..., int] | None:
    """The function of NVIDIA's driver that gives this thread another capture mode; None where it drives no device. No
    torch has it in Python: `capture_error_mode` of torch.cuda.graph is for the thread that captures."""
    if torch.version.cuda is None:
        return None
    try:
        function: Callable[..., int] = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return function
