"""The Triton backend: the step of `triton_kernels.py`, for GPUs that no compiled CUDA module serves.

Two launches a step for any number of tensors, and at most one copy to the device. Nothing is tuned at run time: a rule
and a pattern of dtypes is compiled once, in the first step that meets it, and kept by Triton on disk.

The table is the compiled CPU module's, which describes tensors of any device. Triton itself is imported when there is a
parameter for it, or when somebody asks which backends serve.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _build as build
from .._captures import allowed_to_wait
from .._norm import ClipOnDevice
from .._parts import CompiledPart, Part, Pass, Spec
from .._tensors import compute_dtype, count_device
from .gpu import LentUsedOn, PinnedUsedOn, UsedOn, moved_while_capturing, no_table_to_capture

NAME = "triton"
# CUDA is AMD's ROCm too. For the last two there are drivers outside of Triton's own releases.
DEVICES: tuple[str, ...] = ("cuda", "xpu", "npu", "mtia")

# The first that compiles the kernels, and the torch that brings it. What each since then makes of them,
# `test_triton_code.py` reads.
OLDEST, COMES_WITH = (3, 4), (2, 8)

# What captured graphs read, for as long as there is a parameter that they write.
_captured: Any = WeakIdKeyDictionary()


def native() -> ModuleType | None:
    """The compiled module that keeps this backend's tables, or None."""
    return build.module("_cpu")


def unavailable(device: torch.device | None = None) -> str:
    if native() is None:
        # Triton compiles with the system's C compiler as it runs, so who has none is not served without this either.
        return f"its table is kept by the compiled module _cpu: {build.reason('_cpu')}"
    types = DEVICES if device is None else (device.type,)
    present = next(filter(_is_visible, types), "")
    if not present:
        return f"no device of type {' or '.join(types)} is visible to this torch ({torch.__version__})"
    reason = _broken()
    if reason or (device is None and not _is_initialized(present)):
        # What remains only the device itself can tell, and no child that is forked after that can use it: it is asked
        # where there is a parameter on it.
        return reason
    return _not_driven(present) or _no_fp64(present)


def version() -> str:
    """Triton's version, or why there is none to tell."""
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:
        return _told(error)


def part(spec: Spec) -> Part:
    module = native()
    assert module is not None
    return CompiledPart(spec, module, Stepper)


class Stepper:
    """A part's table on its device, and the room for its rows' coefficients.

    Raises:
        RuntimeError: The pass is captured, and there is no table on the device yet.
    """

    in_one_call = False

    def __init__(self, part: CompiledPart) -> None:
        self.device, table, spec = part.spec.device, part.table, part.spec
        with _current(self.device):
            if _is_capturing(self.device):
                raise RuntimeError(no_table_to_capture(self.device))
            self.kernels = kernels()
            self.used_on, self.pinned_used_on = UsedOn(_stream(self.device)), PinnedUsedOn()
            self.packed = table.packed()
            self.fixed = torch.empty(self.packed.fixed, dtype=torch.uint8, device=self.device)
            self._send_fixed(part)
            # What moves: as this pass has it, as the device has it, and there.
            self.staged, self.uploaded = _host_bytes(self.packed.moving), _host_bytes(self.packed.moving)
            self.moving = torch.zeros(self.packed.moving, dtype=torch.uint8, device=self.device)
            # For a first captured step: memory cannot be pinned on a stream that is being captured.
            self.source: Tensor | None = None
            self.spare: Tensor | None = _pinned_with_leave(self.staged)
            # In place of what a step is not given.
            self.no_scale = torch.ones((), dtype=torch.float32, device=self.device)
            self.no_clip = torch.ones((), dtype=torch.float64, device=self.device)
            self.no_inf = torch.zeros((), dtype=torch.float32, device=self.device)
            self.no_count = torch.zeros((), dtype=torch.int64, device=self.device)
            self.rules = {name: self.kernels.RULES[name] for name in (spec.rule.name, "external")}
            self.policy = self.kernels.POLICIES[spec.policy.name]
            self.row_count, self.chunk_count = table.row_count, table.chunk_count
            numbers = max(rule.coefficients.value for rule in self.rules.values())
            numbers += self.kernels.SLOW_COEFFICIENTS.value + self.kernels.KEY.value
            self.steps = torch.empty(
                self.row_count * numbers, dtype=compute_dtype(spec.param_dtype), device=self.device
            )
            self.warps = self.kernels.THREADS // _warp_size()
        self.compiled: set[Pass] = set()
        # Made where a norm is asked for.
        self.norm: Norm | None = None
        self.sums_used_on, self.clip_used_on = LentUsedOn(), LentUsedOn()

    def sum_squares(self, part: CompiledPart, places: Tensor, sums: Tensor) -> None:
        """The sum of the squares of each row's gradient, to its parameter's place in `sums`, without waiting for it."""
        with _current(self.device):
            capturing, moving = _is_capturing(self.device), self._moving(part)
            self.sums_used_on.add(_stream(self.device), (places, sums), _used_on_current_stream)
            if self.norm is None:
                if capturing:
                    raise RuntimeError(no_table_to_capture(self.device))
                self.norm = Norm(part, self.device)
            if capturing:
                _keep_with(part, self.norm.memory, places, sums)
            self.norm.sum_squares(moving, self.packed.gradients, places, sums)

    def make_clip(self, part: CompiledPart, sums: Tensor, clip: ClipOnDevice) -> None:
        """What all sums come to, in one launch."""
        scale = self.no_scale if clip.grad_scale is None else clip.grad_scale
        found_inf = self.no_inf if clip.found_inf is None else clip.found_inf
        # In place of what is not asked for, something that is not written.
        skip = self.no_inf if clip.skip is None else clip.skip
        skipped = self.no_count if clip.skipped is None else clip.skipped
        with _current(self.device):
            self.clip_used_on.add(_stream(self.device), clip.own, _used_on_current_stream)
            if _is_capturing(self.device):
                _keep_with(part, sums, *clip.own)
            arguments = (sums, sums.numel(), scale, found_inf, clip.clip, skip, skipped, int(clip.skip is not None))
            _launched(norm_kernels().clip, 1, arguments, warps=1)

    def run(self, part: CompiledPart, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None) -> None:
        """One pass over the part's table, on the device's current stream, without waiting for it."""
        with _current(self.device):
            moving = self._moving(part)
            if not _is_capturing(self.device):
                self.pinned_used_on.add(_stream(self.device), self.device, part.table)
            self._launch(part, moving, grad_scale, found_inf, clip)

    def _moving(self, part: CompiledPart) -> Tensor:
        """What moves as it is now, on the device; a graph that is being captured gets it for itself."""
        memory = (self.fixed, self.moving, self.steps, self.no_scale, self.no_clip, self.no_inf, self.no_count)
        self.used_on.add(_stream(self.device), memory, _used_on_current_stream)
        capturing = _is_capturing(self.device)
        if part.table.moves != self.moves:
            if capturing:
                raise RuntimeError(moved_while_capturing(self.device))
            self._send_fixed(part)
        part.table.pack_moving(self.staged.data_ptr())
        return self._capture(part) if capturing else self._upload()

    def _launch(
        self,
        part: CompiledPart,
        moving: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> None:
        spec = part.spec
        rule = self.rules["external" if part.pass_ is Pass.SYNC else spec.rule.name]
        grad_dtype = spec.param_dtype if rule is self.rules["external"] else spec.grad_dtype
        dtypes = tuple(self.kernels.DTYPES[dtype] for dtype in (spec.param_dtype, grad_dtype, spec.moment_dtype))
        scale = self.no_scale if grad_scale is None else grad_scale
        factor = self.no_clip if clip is None else clip
        skip = self.no_inf if found_inf is None else found_inf
        row_programs = -(-self.row_count // self.kernels.ROWS.value)
        sizes = self.row_count, self.packed.gradients
        # As triton_prologue.rows takes it.
        pass_ = {Pass.STEP: 0, Pass.SYNC: 1, Pass.INNER: 2}[part.pass_]
        rows = (self.fixed, moving, self.steps, scale, factor, skip, *sizes, pass_, rule, self.policy)
        places = self.packed.chunks, self.packed.gradients
        chunks = (self.fixed, moving, self.steps, skip, *places, rule, self.policy.averages)
        launches = (
            (self.kernels.rows, row_programs, rows, 1),
            (self.kernels.chunks, self.chunk_count, (*chunks, *dtypes), self.warps),
        )
        # Machine code is loaded as it is first launched, which allocates memory.
        new = part.pass_ not in self.compiled
        with allowed_to_wait() if new else nullcontext():
            if new:
                # Both before either is launched: a pass that fails in compiling one must not count.
                for kernel, programs, arguments, warps in launches:
                    if programs:
                        kernel.warmup(*arguments, grid=(programs,), num_warps=warps, enable_fp_fusion=False)
                self.compiled.add(part.pass_)
            for kernel, programs, arguments, warps in launches:
                if programs:
                    kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)

    def _send_fixed(self, part: CompiledPart) -> None:
        staged = _host_bytes(self.packed.fixed)
        part.table.pack_fixed(staged.data_ptr())
        with allowed_to_wait():  # for the copy, out of memory that is not pinned
            self.fixed.copy_(staged)
        self.moves = part.table.moves

    def _upload(self) -> Tensor:
        if self.spare is None:
            self.spare = _pinned_with_leave(self.staged)
        if not torch.equal(self.staged, self.uploaded):
            # A copy of its own, which torch does not give away before the device has read it: the host may run ahead
            # by any number of steps.
            self.moving.copy_(_pinned_with_leave(self.staged), non_blocking=True)
            self.uploaded.copy_(self.staged)
        return self.moving

    def _capture(self, part: CompiledPart) -> Tensor:
        """A replay must find what moves as it is now, whatever steps are made meanwhile, and all that the table names.

        What is made here on the device is from the graph's own memory, and every replay fills it from `source`.
        """
        if self.source is None or not torch.equal(self.source, self.staged):
            if self.spare is None:
                self.source = _pinned_with_leave(self.staged)
            else:
                self.source, self.spare = self.spare.copy_(self.staged), None
        moving = torch.empty_like(self.moving)
        moving.copy_(self.source, non_blocking=True)
        _, tensors = part.tensors()
        _keep_with(part, self, self.source, tensors)
        return moving


def _keep_with(part: CompiledPart, *kept: Any) -> None:
    """For a graph, as long as the part's first parameter is there: not the parameters, which would keep each other."""
    owners, _ = part.tensors()
    _captured.setdefault(owners[0], []).append(kept)


class Norm:
    """What a norm of a part's gradients works in, on its device."""

    def __init__(self, part: CompiledPart, device: torch.device) -> None:
        plan = part.table.norm_plan()
        staged = _host_bytes(plan.bytes)
        plan.pack(staged.data_ptr())
        with allowed_to_wait():
            self.memory = staged.to(device)
        self.device = device
        self.count, self.places = plan.count, (plan.first_block, plan.done, plan.partial)
        self.dtype = kernels().DTYPES[part.spec.grad_dtype]
        self.used_on = UsedOn(_stream(device))

    def sum_squares(self, moving: Tensor, gradients_at: int, places: Tensor, sums: Tensor) -> None:
        self.used_on.add(_stream(self.device), (self.memory,), _used_on_current_stream)
        arguments = (self.memory, moving, gradients_at, *self.places, places, sums, self.dtype)
        if self.count:
            # Two elements for each thread.
            _launched(norm_kernels().squares, self.count, arguments, warps=max(1, 32 // _warp_size()))


def _launched(kernel: Any, programs: int, arguments: tuple[Any, ...], warps: int) -> None:
    # Machine code is loaded as it is first launched, which allocates memory.
    with allowed_to_wait():
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)


def _pinned_with_leave(like: Tensor) -> Tensor:
    # Torch asks for none where another thread captures: neither to allocate nor to see what it may use again.
    with allowed_to_wait():
        return _pinned(like)


def _host_bytes(size: int) -> Tensor:
    # On the host, whatever the default device is.
    return torch.zeros(size, dtype=torch.uint8, device="cpu")


@functools.cache
def kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


@functools.cache
def norm_kernels() -> ModuleType:
    from . import triton_norm

    return triton_norm


@functools.cache
def _broken() -> str:
    """Why Triton serves no device. Whatever goes wrong in it is told and not raised: other backends may serve."""
    try:
        importlib.import_module("triton")
        if reason := too_old(version()):
            return reason
        kernels()
    except Exception as error:
        return _told(error)
    return ""


@functools.cache
def _not_driven(device_type: str) -> str:
    """Why Triton does not serve on devices of a type, as its driver says, which initializes them."""
    try:
        from triton.runtime import driver

        served = driver.active.get_active_torch_device().type
    except Exception as error:
        return _told(error)
    return "" if served == device_type else f"triton {version()} drives devices of type {served}, not {device_type}"


def _no_fp64(device_type: str) -> str:
    if count_device(torch.device(device_type)).type != "cpu":
        return ""
    return f"its kernels count updates in fp64, and devices of type {device_type} have no fp64"


def too_old(version: str) -> str:
    """Why a release of Triton does not serve, or ""."""
    if tuple(int(number) for number in version.split(".")[:2]) >= OLDEST:
        return ""
    oldest, torch_ = (".".join(map(str, numbers)) for numbers in (OLDEST, COMES_WITH))
    return (
        f"triton {version} does not compile the kernels: "
        f"install torch {torch_} or newer, which brings triton {oldest} or newer"
    )


def _told(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "triton is not installed"
    return f"triton does not work here: {type(error).__name__}: {error}"


# ---- what is asked of torch's devices and of Triton's driver; the tests have their own answers where there are none


def _is_visible(device_type: str) -> bool:
    """By the module of the type, which counts without initializing: for NVIDIA's devices by NVML, if it is there.
    `torch.accelerator` initializes CUDA to answer, and torch 2.6 even to tell which accelerator it is built for."""
    module = getattr(torch, device_type, None)
    return module is not None and module.device_count() > 0


def _is_initialized(device_type: str) -> bool:
    return bool(torch.get_device_module(device_type).is_initialized())


def _current(device: torch.device) -> Any:
    return torch.get_device_module(device.type).device(device)


def _stream(device: torch.device) -> Any:
    return torch.get_device_module(device.type).current_stream(device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(like: Tensor) -> Tensor:
    return like.pin_memory()


def _used_on_current_stream(tensor: Tensor) -> None:
    tensor.record_stream(_stream(tensor.device))


def _warp_size() -> int:
    from triton.runtime import driver

    return int(driver.active.get_current_target().warp_size)
