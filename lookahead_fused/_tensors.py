"""Questions about a single tensor: may it take part, in which dtype is it computed, how does it lie in memory."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from . import _build as build
from ._torch import is_dtensor, is_plain, waited_for

_PLAIN = (Tensor, torch.nn.Parameter)
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's moments and slow weights, and of the arithmetic: fp32, fp64 for fp64 parameters."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def local_tensor(tensor: Tensor) -> Tensor:
    """What a step works on: of a DTensor the part on this rank, of a complex tensor its real and imaginary parts."""
    # The first question is a tenth of the second, which a first step over many tensors feels.
    if type(tensor) not in _PLAIN and not is_plain(tensor):
        tensor = waited_for(tensor)
        if is_dtensor(tensor):
            tensor = waited_for(cast(Any, tensor)._local_tensor)
    return torch.view_as_real(tensor) if tensor.dtype in _REAL else tensor


def local_gradient(gradient: Tensor, owner: Tensor) -> Tensor:
    """The gradient's part for this rank: brought to its parameter's placements, as torch's operators do."""
    gradient = waited_for(gradient)
    if is_dtensor(owner) and is_dtensor(gradient):
        parameter, placed = cast(Any, owner), cast(Any, gradient)
        if placed.placements != parameter.placements:
            gradient = placed.redistribute(parameter.device_mesh, parameter.placements)
    return local_tensor(gradient)


def is_on_mesh_of(gradient: Tensor, owner: Tensor) -> bool:
    """Both are DTensors of one mesh, or neither is one."""
    if is_dtensor(owner) and is_dtensor(gradient):
        return bool(cast(Any, gradient).device_mesh == cast(Any, owner).device_mesh)
    return is_dtensor(owner) == is_dtensor(gradient)


def _check_placement(gradient: Any, param: Any, name: str) -> None:
    if is_dtensor(param) != is_dtensor(gradient):
        kinds = {True: "a DTensor", False: "a plain Tensor"}
        raise TypeError(
            f"the gradient of {name} must be {kinds[is_dtensor(param)]} as the parameter is, which tells how it is "
            f"placed, got a {type(gradient).__name__}"
        )
    if not is_on_mesh_of(gradient, param):
        raise ValueError(
            f"the gradient of {name} must lie on the parameter's mesh {param.device_mesh}, got {gradient.device_mesh}"
        )


def _check_shard(gradient: Any, param: Any, name: str) -> None:
    """What lies on this rank of a gradient that is placed as its parameter is: a DTensor made by hand may tell
    otherwise, and a copy would spread too few numbers over all."""
    if not is_dtensor(param) or gradient.placements != param.placements:
        return
    lies, own = local_tensor(gradient), local_tensor(param)
    if (lies.shape, lies.dtype) != (own.shape, gradient.dtype):
        raise ValueError(
            f"the gradient of {name} must have the parameter's shape {tuple(own.shape)} on this rank, in "
            f"{gradient.dtype}, got {tuple(lies.shape)} in {lies.dtype}"
        )


def is_dense(tensor: Tensor) -> bool:
    """The elements fill a block of memory once each, in whatever order of dimensions, and stand there as they are."""
    if tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def has_layout_of(tensor: Tensor, other: Tensor) -> bool:
    """The same shape on the same device, and the same strides where there is more than one element along them."""
    return tensor.device == other.device and is_laid_out_like(tensor, other)


def is_laid_out_like(tensor: Tensor, other: Tensor) -> bool:
    """The same, wherever the two are."""
    return (
        tensor.layout == torch.strided
        and tensor.shape == other.shape
        and not tensor.is_neg()
        and all(a == b for size, a, b in zip(tensor.shape, tensor.stride(), other.stride(), strict=True) if size > 1)
    )


def copy_in_layout(tensor: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another tensor's device and dense layout, exact where the dtype allows."""
    return torch.empty_like(other, dtype=dtype, requires_grad=False).copy_(tensor)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to the end of its last; none for an empty one, or on a device whose
    memory has no addresses."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0 or begin == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def new_state(param: Tensor, dtype: torch.dtype, start: Tensor | None) -> Tensor:
    """A tensor in a parameter's device and layout that lives as long as the optimizer: a copy of `start`, or zeros.

    On a CPU it lies in huge pages where the system has them. They must be asked for before the memory is written.
    """
    if not is_plain(param):
        # Of a class around another tensor, empty_like may be one too; zeros_like, which torch's optimizers call, is
        # the one whose result they can keep.
        made = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return made if start is None else made.copy_(start)
    made = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if made.device.type == "cpu" and made.nbytes >= _LARGE and type(made) is Tensor:
        native = build.module("_cpu")
        if native is not None:
            native.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made.zero_() if start is None else made.copy_(start)


# Two huge pages: whatever its address, a tensor of this size holds a whole one.
_LARGE = 4 << 20


def count_device(device: torch.device) -> torch.device:
    """Where a parameter's count of updates lies: beside it, or where that device has no fp64 on the CPU."""
    return device if _has_fp64(device.type) else torch.device("cpu")


@functools.cache
def _has_fp64(device_type: str) -> bool:
    if device_type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError):
        return False
    return True


def check_parameter(param: Tensor, name: str, takes_complex: bool = False) -> None:
    """Raises TypeError or ValueError for a parameter that got a gradient and cannot be updated."""
    if param.is_complex() and not takes_complex:
        raise TypeError(
            f"{name} must be a real floating-point Tensor to be updated, got {param.dtype}; "
            "pass torch.view_as_real of it as the parameter"
        )
    if _REAL.get(param.dtype, param.dtype) not in PARAM_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known} to be updated, got {param.dtype}")
    if param.numel() > 0 and any(
        stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} must not be expanded to be updated, got strides {param.stride()} for shape {tuple(param.shape)}: "
            "several of its elements refer to a single memory location"
        )
    check_memory(local_tensor(param), name)


def has_memory(local: Tensor) -> bool:
    """False for a tensor whose elements are nowhere: its storage was freed, or resized to less.

    A gradient of zeros that torch has not made yet has no memory either, and is one all the same.
    """
    if local.numel() == 0 or not is_plain(local) or local.layout != torch.strided or local._is_zerotensor():
        return True
    # What a device of another kind answers (Apple's, or one made in Python) need be no address.
    if local.device.type not in ("cpu", "cuda", "xpu"):
        return True
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    needed = (local.storage_offset() + last + 1) * local.element_size()
    storage = local.untyped_storage()
    return storage.data_ptr() != 0 and storage.nbytes() >= needed


def check_memory(local: Tensor, name: str) -> None:
    """Raises ValueError for a tensor whose elements are nowhere."""
    if not has_memory(local):
        raise ValueError(
            f"{name} must have its memory, got a storage of {local.untyped_storage().nbytes()} bytes for "
            f"{tuple(local.shape)} of {local.dtype}: was it freed or moved away?"
        )


def check_gradient(gradient: Tensor, param: Tensor, name: str) -> None:
    """Raises TypeError or ValueError for a gradient that its parameter cannot be updated with."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"the gradient of {name} must be dense, got layout {gradient.layout}; use torch.optim.SparseAdam"
        )
    _check_placement(gradient, param, name)
    allowed = (param.dtype, torch.float32)
    if gradient.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(dtype) for dtype in allowed))
        raise TypeError(f"the gradient of {name} must be {names}, got {gradient.dtype}")
    if gradient.shape != param.shape or gradient.device != param.device:
        raise ValueError(
            f"the gradient of {name} must have the parameter's shape {tuple(param.shape)} and device {param.device}, "
            f"got {tuple(gradient.shape)} and {gradient.device}"
        )
    _check_shard(gradient, param, name)
    check_memory(local_tensor(gradient), f"the gradient of {name}")
