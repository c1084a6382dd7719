"""The CUDA backend: `csrc/cuda` walks the table on an NVIDIA GPU, in two launches.

Nothing here touches CUDA before there is a parameter on a GPU, or somebody asks which backends serve.
"""

from __future__ import annotations

import functools
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _build as build
from .._norm import ClipOnDevice, address
from .._parts import CompiledPart, Part, Spec
from . import nvml
from .gpu import LentUsedOn, PinnedUsedOn, UsedOn, moved_while_capturing, no_table_to_capture

NAME = "cuda"
DEVICES: tuple[str, ...] = ("cuda",)

# What one block updates. At the end of a step the last blocks leave the memory idle: in chunks of 16,384 elements
# ResNet-50's 161 fp32 tensors are 1,667 blocks of up to 459 KB, 3.2 for each of the 528 places on an H100, and a last
# block that runs alone takes 20 us of 214. What smaller ones cost, a look into the table before the first load, hides
# behind the multiprocessor's other blocks. A model of that (blocks share the bandwidth, none gets more than its loads
# in flight allow) gives 4,096 elements against 16,384 for ResNet-50's list 0.7 to 2.5 % on an H100, 0.8 to 4 % on an
# H200, -3 to 8 % on a B200, by how unlike the blocks' speeds are, and for GPT-2's 0 to 2 %. 2,048 are no better.
CHUNK_ELEMENTS = 1 << 12


def native() -> ModuleType | None:
    """The compiled module that keeps this backend's tables, or None."""
    return build.module("_cuda")


def unavailable(device: torch.device | None = None) -> str:
    module = native()
    if module is None:
        return build.reason("_cuda")
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if device is None and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # A query must not initialise CUDA either: no child that is forked after that can use it.
        machine = nvml.machine()
        answer = None if machine is None else _by_nvml(module, machine)
        if answer is not None:
            return answer
    reason = _no_devices(module)
    if reason:
        return reason
    if device is not None:
        return _not_covered(module, _index(device)) or _refusal(module, _index(device))
    # A query must not create a context on every device: the driver itself is asked where there is a parameter.
    reasons = [_not_covered(module, index) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else "; ".join(reasons)


def part(spec: Spec) -> Part:
    module = native()
    assert module is not None
    return CompiledPart(spec, module, Stepper, CHUNK_ELEMENTS)


class Stepper:
    """A part's table on its device: the compiled stepper, and the memory it works in.

    Raises:
        RuntimeError: A CUDA call failed; the message names it, or the kernel and its launch configuration. Or the
            pass is captured, and there is no table on the device yet.
    """

    in_one_call = True

    def __init__(self, part: CompiledPart) -> None:
        self.module, self.device = part.module, part.spec.device
        with _current(self.device):
            if _is_capturing(self.device):
                raise RuntimeError(no_table_to_capture(self.device))
            stream = _stream(self.device)
            fixed_bytes, self.moving_bytes = self.module.Stepper.sizes(part.table)
            self.fixed = torch.empty(fixed_bytes, dtype=torch.uint8, device=self.device)
            self.moving = torch.empty(self.moving_bytes, dtype=torch.uint8, device=self.device)
            # To pin memory needs leave while another thread captures a graph.
            pinned = self.module.allowed_to_wait(partial(_pinned, self.module.ring * self.moving_bytes))
            self.native = self.module.Stepper(
                part.table,
                device=_index(self.device),
                fixed=self.fixed.data_ptr(),
                moving=self.moving.data_ptr(),
                pinned=pinned.data_ptr(),
                stream=stream,
                owners=(self.fixed, self.moving, pinned),
            )
        self.moves = part.table.moves
        self.used_on, self.pinned_used_on = UsedOn(stream), PinnedUsedOn()
        # Made where a norm is asked for.
        self.norm: Tensor | None = None
        self.sums_used_on, self.clip_used_on = LentUsedOn(), LentUsedOn()

    def sum_squares(self, part: CompiledPart, places: Tensor, sums: Tensor) -> None:
        """The sum of the squares of each row's gradient, to its parameter's place in `sums`, without waiting for it."""
        with _current(self.device):
            stream = self._used_on_stream()
            capturing = _is_capturing(self.device)
            if self.norm is None:
                if capturing:
                    raise RuntimeError(no_table_to_capture(self.device))
                memory = torch.empty(part.table.norm_plan().bytes, dtype=torch.uint8, device=self.device)
                self.native.make_norm(part.table, _index(self.device), memory.data_ptr(), memory, stream)
                self.norm = memory
                self.norm_used_on = UsedOn(stream)
            self.norm_used_on.add(stream, (self.norm,), _used_on_current_stream)
            self.sums_used_on.add(stream, (places, sums), _used_on_current_stream)
            arguments = (part.table, places.data_ptr(), sums.data_ptr(), stream)
            if not capturing:
                self.native.sum_squares(*arguments)
                return
            moving, moving_stream = self._moving_apart()
            owners = (part.table, self, moving, places, sums)
            self.native.capture_squares(
                *arguments, moving=moving.data_ptr(), moving_stream=moving_stream, owners=owners
            )

    def make_clip(self, part: CompiledPart, sums: Tensor, clip: ClipOnDevice) -> None:
        """What all sums come to, in one launch."""
        with _current(self.device):
            stream = _stream(self.device)
            self.clip_used_on.add(stream, clip.own, _used_on_current_stream)
            if _is_capturing(self.device):
                self.module.retain_for_graph(stream, (sums, clip.own))
            self.module.make_clip(sums.data_ptr(), sums.numel(), *clip.addresses(), _index(self.device), stream)

    def run(self, part: CompiledPart, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None) -> None:
        """One pass over the part's table, on the device's current stream, without waiting for it."""
        with _current(self.device):
            stream = self._used_on_stream()
            capturing = _is_capturing(self.device)
            if part.table.moves != self.moves:
                if capturing:
                    raise RuntimeError(moved_while_capturing(self.device))
                self.native.update_fixed(part.table, stream)
                self.moves = part.table.moves
            arguments = (part.table, address(grad_scale), address(found_inf), address(clip), stream)
            if not capturing:
                self.pinned_used_on.add(stream, self.device, part.table)
                self.native.step(*arguments)
                return
            # What moves as it is now, in memory of the graph's own. Every replay reads that and this table, and writes
            # these tensors, so the graph keeps all.
            moving, moving_stream = self._moving_apart()
            owners = (part.table, self, moving, part.tensors())
            self.native.capture(*arguments, moving=moving.data_ptr(), moving_stream=moving_stream, owners=owners)

    def _used_on_stream(self) -> int:
        """The current stream, which the allocator knows from now on to use this memory."""
        stream = _stream(self.device)
        self.used_on.add(stream, (self.fixed, self.moving), _used_on_current_stream)
        return stream

    def _moving_apart(self) -> tuple[Tensor, int]:
        apart: tuple[Tensor, int] = self.module.allowed_to_wait(partial(_memory_apart, self.device, self.moving_bytes))
        return apart


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


def _by_nvml(module: ModuleType, machine: nvml.Machine) -> str | None:
    """Why no GPU of a machine is served, or ""; None where CUDA alone can tell."""
    # By NVML too; and the variable that hides GPUs is read.
    if not machine.cards or torch.cuda.device_count() == 0:
        return _NONE_VISIBLE
    # Drivers serve what was built for an older CUDA, and for a later one of the same number before the point.
    if machine.cuda // 1000 < module.runtime_version // 1000:
        ours = _version(module.runtime_version)
        return f"the driver is made for CUDA {_version(machine.cuda)}, and this build for {ours}"
    # Which of them are visible, and in which order, is CUDA's to say: it is not asked where that makes no difference.
    reasons = [_card_not_covered(module, card.name, card.capability) for card in machine.cards]
    return None if any(reasons) and "" in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


_NONE_VISIBLE = "no CUDA device is visible"


@functools.cache
def _no_devices(module: ModuleType) -> str:
    try:
        count = module.device_count()
    except RuntimeError as error:
        return str(error)
    return "" if count > 0 and torch.cuda.is_available() else _NONE_VISIBLE


@functools.cache
def _not_covered(module: ModuleType, index: int) -> str:
    return _card_not_covered(module, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def _card_not_covered(module: ModuleType, name: str, capability: tuple[int, int]) -> str:
    if covers(module.architectures, capability):
        return ""
    number = ".".join(map(str, capability))
    return (
        f"{name} has compute capability {number}, and this build is for "
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
    # A failure is not cached: memory may have been short. By torch's guard: the runtime's cudaSetDevice would put the
    # current device back by making a context on it, which costs memory where this process has no use for that device.
    with _current(torch.device("cuda", index)):
        module.load_kernels(index)


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
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _memory_apart(device: torch.device, size: int) -> tuple[Tensor, int]:
    """Memory that is no captured graph's, and the stream it was made on: what is allocated on one that is captured
    comes from the graph's pool."""
    # Torch hands out 32 streams in turn, and graphs are captured on them.
    for _ in range(64):
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            if not _is_capturing(device):
                return torch.empty(size, dtype=torch.uint8, device=device), _stream(device)
    raise RuntimeError(f"this step cannot be captured in a CUDA graph: all of torch's streams on {device} are captured")


def _used_on_current_stream(tensor: Tensor) -> None:
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
