"""`offload_slow`: slow weights in pinned host memory, which a GPU's kernels read and write where it lies.

Pinned memory has one address for the host and for every GPU, so that to a kernel it is a column like any other. torch
does not order the host after a kernel that writes there, as it does with a tensor on the device: `wait` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage

from ._captures import allowed_to_wait
from ._policies import Policy
from ._tensors import local_tensor
from ._torch import is_plain

_Class = TypeVar("_Class", bound=type[Any])

_DOCUMENTED = """offload_slow: Keep the slow weights of parameters on a GPU, and `outer_momentum_buffer` or `x` beside
            them, in pinned host memory. The kernels read and write it where it lies, at events alone: nothing is
            copied, no host waits, and a CUDA graph captures it (the reference backend copies). That takes one copy of
            the weights in the dtype of computation, or two, off the GPU, and puts what an event moves of them, 8 bytes
            of each, on its link to the host. GPA, Schedule-Free and `EMA(every=1)` have an event in every step. A step
            may still be writing when it returns: `torch.cuda.synchronize()` before the host looks into `state`;
            `state_dict()`, `slow_weights()`, copies and pickles wait by themselves. torch's allocator rounds each
            tensor up to a power of two of bytes, where it is not told otherwise. On a CPU this changes nothing, and
            other devices than CUDA's and ROCm's are refused. A checkpoint does not decide it, and loads either way."""


def documents_offload(cls: _Class) -> _Class:
    """The argument is the same in every class, and stated once."""
    cls.__doc__ = (cls.__doc__ or "").replace("{offload}", _DOCUMENTED)
    return cls


def hosted(policy: Policy, group: Mapping[str, Any], device: torch.device) -> tuple[str, ...]:
    """The state entries that lie on the host beside a parameter on a device, under a group's settings."""
    if not policy.offloads(group) or not is_apart(device):
        return ()
    return tuple(name for name in (policy.slow, policy.companion) if name)


def check_offload(policy: Policy, group: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raises ValueError where the device of a parameter is not known to reach pinned host memory by its address, and
    TypeError for one of a class that holds its memory elsewhere."""
    local = local_tensor(param)
    if not policy.offloads(group) or not is_apart(local.device):
        return
    if not reaches_host(local.device):
        raise ValueError(
            f"{policy.offload_slow} must be False for {name} on {local.device}, got True: only kernels of CUDA's "
            "and ROCm's devices read pinned host memory"
        )
    if not is_plain(local):
        raise TypeError(
            f"{policy.offload_slow} must be False for {name}, got a {type(local).__name__}: only its own "
            "class knows where its memory lies"
        )


def new_hosted(param: Tensor, dtype: torch.dtype, start: Tensor | None, told: tuple[str, str]) -> Tensor:
    """A tensor in a parameter's layout in pinned host memory: a copy of `start`, or zeros.

    Args:
        told: The name of the argument that asks for it, and of what is made.

    Raises:
        RuntimeError: The memory cannot be had.
    """
    argument, name = told
    with allowed_to_wait():
        try:
            made = pinned(param.shape, param.stride(), dtype)
        except (RuntimeError, MemoryError) as error:
            size = param.numel() * torch.empty(0, dtype=dtype, device="cpu").element_size()
            raise RuntimeError(
                f"{argument}=True: could not pin {size} bytes of host memory for {name}: {error}; free memory, or "
                f"leave slow weights on the device with {argument}=False"
            ) from error
        if start is None:
            return made.zero_()
        if start.device.type == "cpu":
            wait([param.device])
        # Not what it returns: of a parameter's class that may be one too, and here it is to be a tensor alone.
        made.copy_(start)
    return made


def may_be_given(tensor: Tensor) -> bool:
    """Whether a device may have the address of a tensor on the host; an empty one has none."""
    return tensor.device.type == "cpu" and (tensor.numel() == 0 or is_pinned(tensor))


def hold(tensor: Tensor) -> UntypedStorage | None:
    """The memory of a pinned tensor, to be held; None for one that no device may be given the address of."""
    return tensor.untyped_storage() if is_pinned(tensor) else None


def wait_for_hosted(policy: Policy, groups: Iterable[Mapping[str, Any]]) -> None:
    """Until no kernel writes slow weights on the host any more."""
    devices = {local_tensor(param).device for group in groups if policy.offloads(group) for param in group["params"]}
    with allowed_to_wait():
        wait(device for device in devices if is_apart(device) and reaches_host(device))


# ---- what is asked of torch; the tests have their own answers where there is no GPU


def is_apart(device: torch.device) -> bool:
    """Whether the host is elsewhere."""
    return device.type != "cpu"


def reaches_host(device: torch.device) -> bool:
    """AMD's ROCm is CUDA to torch."""
    return device.type == "cuda"


def pinned(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu", pin_memory=True)


def is_pinned(tensor: Tensor) -> bool:
    return tensor.is_pinned()


def wait(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)
