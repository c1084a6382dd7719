"""Questions about a single tensor: may it take part, in which dtype is it computed, how does it lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import build

_PLAIN = (Tensor, torch.nn.Parameter)
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's moments and slow weights, and of the arithmetic: fp32, fp64 for fp64 parameters."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank; any other tensor itself."""
    # The first question is a tenth of the second, which a first step over many tensors feels.
    if type(tensor) in _PLAIN or not is_traceable_wrapper_subclass(tensor):
        return tensor
    local = getattr(tensor, "_local_tensor", None)
    if not isinstance(local, Tensor):
        raise TypeError(f"a parameter must be a plain Tensor or a DTensor, got {type(tensor).__name__}")
    return local


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
    return (
        tensor.layout == torch.strided
        and tensor.device == other.device
        and tensor.shape == other.shape
        and all(a == b for size, a, b in zip(tensor.shape, tensor.stride(), other.stride(), strict=True) if size > 1)
    )


def copy_in_layout(tensor: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in another tensor's device and dense layout, exact where the dtype allows."""
    return torch.empty_like(other, dtype=dtype, requires_grad=False).copy_(tensor)


def version_counter(owner: Tensor) -> tuple[Tensor, ...]:
    """A tensor that shares the owner's version counter, first, and whatever has to be kept beside it.

    torch keeps a tensor's Python object alive as long as C++ refers to it: handing over one that only Python refers to
    takes the interpreter's lock twice, and bumping its version 39 ns. The first of these is referred to by the second,
    a view of it, and takes 18. The owner itself is left out of that: torch.utils.swap_tensors wants it for itself.
    """
    if type(owner) not in _PLAIN:
        return (owner,)
    alias = owner.detach()
    return alias, alias.view_as(alias)


def new_state(param: Tensor, dtype: torch.dtype, start: Tensor | None) -> Tensor:
    """A tensor in a parameter's device and layout that lives as long as the optimizer: a copy of `start`, or zeros.

    On a CPU it lies in huge pages where the system has them. They must be asked for before the memory is written.
    """
    made = torch.empty_like(param, dtype=dtype, requires_grad=False)
    if made.device.type == "cpu" and made.nbytes >= _LARGE and type(made) is Tensor:
        native = build.module("_cpu")
        if native is not None:
            native.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made.zero_() if start is None else made.copy_(start)


# Two huge pages: whatever its address, a tensor of this size holds a whole one.
_LARGE = 4 << 20


def check_parameter(param: Tensor, name: str) -> None:
    """Raises TypeError or ValueError for a parameter that got a gradient and cannot be updated."""
    if param.is_complex():
        raise TypeError(
            f"{name} must be a real floating-point Tensor to be updated, got {param.dtype}; "
            "pass torch.view_as_real of it as the parameter"
        )
    if param.dtype not in PARAM_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {known} to be updated, got {param.dtype}")
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name} must not be expanded to be updated, got strides {param.stride()} for shape {tuple(param.shape)}: "
            "several of its elements refer to a single memory location"
        )


def check_gradient(gradient: Tensor, param: Tensor, name: str) -> None:
    """Raises TypeError or ValueError for a gradient that its parameter cannot be updated with."""
    if gradient.layout != torch.strided:
        raise TypeError(
            f"the gradient of {name} must be dense, got layout {gradient.layout}; use torch.optim.SparseAdam"
        )
    allowed = (param.dtype, torch.float32)
    if gradient.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(dtype) for dtype in allowed))
        raise TypeError(f"the gradient of {name} must be {names}, got {gradient.dtype}")
    if gradient.shape != param.shape or gradient.device != param.device:
        raise ValueError(
            f"the gradient of {name} must have the parameter's shape {tuple(param.shape)} and device {param.device}, "
            f"got {tuple(gradient.shape)} and {gradient.device}"
        )
