"""The CUDA backend: `csrc/cuda` walks the table on an NVIDIA GPU, in two launches.

Nothing here touches CUDA before there is a parameter on a GPU, or somebody asks which backends serve.
"""

from __future__ import annotations

import functools
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import build

if TYPE_CHECKING:
    from ..table import Part

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cuda",)


def native() -> ModuleType | None:
    """The compiled module that keeps this backend's tables, or None."""
    return build.module("_cuda")


def unavailable(device: torch.device | None = None) -> str:
    module = native()
    if module is None:
        return build.reason("_cuda")
    reason = _no_devices(module)
    if reason:
        return reason
    if device is not None:
        return _not_covered(module, _index(device)) or _refusal(module, _index(device))
    # Who only asks gets no context on every device: the driver itself is asked where there is a parameter.
    reasons = [_not_covered(module, index) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else "; ".join(reasons)


def step(part: Part, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Advances the part's parameters by one step, on the device's current stream, without waiting for it.

    Raises:
        RuntimeError: A CUDA call failed; the message names it, or the kernel and its launch configuration. Or the
            step is captured, and the one before it failed in making the table.
    """
    with _current(part.device):
        if part.stepper is None:
            if _is_capturing(part.device):
                raise RuntimeError(no_table_to_capture(part.device))
            part.stepper = Stepper(part)
        part.stepper.step(part, grad_scale, found_inf)


class Stepper:
    """A part's table on its device: the compiled stepper, and the memory it works in."""

    def __init__(self, part: Part) -> None:
        module = native()
        assert module is not None
        self.module = module
        stream = _stream(part.device)
        fixed_bytes, self.moving_bytes = module.Stepper.sizes(part.native)
        self.fixed = torch.empty(fixed_bytes, dtype=torch.uint8, device=part.device)
        self.moving = torch.empty(self.moving_bytes, dtype=torch.uint8, device=part.device)
        pinned = _pinned(module.ring * self.moving_bytes)
        self.native = module.Stepper(
            part.native,
            device=_index(part.device),
            fixed=self.fixed.data_ptr(),
            moving=self.moving.data_ptr(),
            pinned=pinned.data_ptr(),
            stream=stream,
            owners=(self.fixed, self.moving, pinned),
        )
        self.used_on = {stream}

    def step(self, part: Part, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        stream = _stream(part.device)
        if stream not in self.used_on:
            # Freed, the memory must not be given away while this stream still reads it. Told once, the allocator
            # remembers the stream as long as the memory is ours.
            _used_on_current_stream(self.fixed)
            _used_on_current_stream(self.moving)
            self.used_on.add(stream)
        arguments = (part.native, _address(grad_scale), _address(found_inf), stream)
        if not _is_capturing(part.device):
            self.native.step(*arguments)
            return
        # From the capture's own memory pool: it is the graph's, as any tensor that is made in a capture. The graph
        # copies from pinned memory in every replay and reads this table, so it keeps both.
        moving = torch.empty(self.moving_bytes, dtype=torch.uint8, device=part.device)
        pinned = self.module.allowed_to_wait(partial(_pinned, self.moving_bytes))
        owners = (part.native, self, pinned)
        self.native.capture(*arguments, moving=moving.data_ptr(), pinned=pinned.data_ptr(), owners=owners)


def no_table_to_capture(device: torch.device) -> str:
    return (
        "this step cannot be captured in a CUDA graph: the step before it failed, and its table is not on "
        f"{device}; run a step before the capture"
    )


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a build for some architectures ("8.0 9.0a 12.0+PTX") has code for a device of a compute capability."""
    for entry in architectures.split():
        number, _, ptx = entry.partition("+")
        major, minor = map(int, number.rstrip("af").split("."))
        if (major, minor) == capability:
            return True
        # Machine code serves later devices of its generation, PTX all later ones. What was made for the features of a
        # family ("10.0f") serves that generation in either form, and of one architecture ("9.0a") that one alone.
        further = not number.endswith("a") and (major == capability[0] or (ptx == "PTX" and not number.endswith("f")))
        if further and (major, minor) < capability:
            return True
    return False


@functools.cache
def _no_devices(module: ModuleType) -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    try:
        count = module.device_count()
    except RuntimeError as error:
        return str(error)
    return "" if count > 0 and torch.cuda.is_available() else "no CUDA device is visible"


@functools.cache
def _not_covered(module: ModuleType, index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if covers(module.architectures, capability):
        return ""
    number = ".".join(map(str, capability))
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {number}, and this build is for "
        f"{module.architectures}; rebuild it, in its source tree, with TORCH_CUDA_ARCH_LIST={number} pip install "
        "--force-reinstall --no-deps ."
    )


def _refusal(module: ModuleType, index: int) -> str:
    """Why the driver does not take the kernels, or ""; it has the last word on what it can run."""
    try:
        _load_kernels(module, index)
    except RuntimeError as error:
        return str(error)
    return ""


@functools.cache
def _load_kernels(module: ModuleType, index: int) -> None:
    # A failure is not cached: memory may have been short.
    module.load_kernels(index)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- what is asked of torch's CUDA; the tests' stand-in for the runtime has its own answers


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _is_capturing(device: torch.device) -> bool:
    return torch.cuda.is_current_stream_capturing()


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _used_on_current_stream(tensor: Tensor) -> None:
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
