"""What this package knows of torch's insides, each with what it is for; `tests/test_torch_insides.py` fails where torch
changes under one of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Step = Callable[..., Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque_to_compile(function: _Function) -> _Function:
    """A graph break in torch.compile: a step hands addresses to compiled code, and there is nothing to trace.

    torch's own optimizers use this decorator. The public torch.compiler.disable imports the compiler at once, which
    takes seconds.
    """
    return cast(_Function, torch._disable_dynamo(function))  # type: ignore[attr-defined]


# ---- hooks. torch enters a profiler range around every step of an optimizer, whether or not a profiler runs. That is 7
# of the 12 microseconds that a step of one tensor takes (a Xeon with AMX, torch 2.13).


def with_hooks(step: Step) -> Step:
    """A class's step, with what torch would put around it; opaque as a whole, or hooks would be graph breaks of their
    own."""

    @opaque_to_compile
    @functools.wraps(step)
    def stepped(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return call_with_hooks(step, optimizer, *args, **kwargs)

    return stepped


def call_with_hooks(step: Step, optimizer: Optimizer, *args: Any, own_hooks: int = 0, **kwargs: Any) -> Any:
    """One step of an optimizer: its hooks and the global ones are called, and a profiler sees it under its name.

    Args:
        own_hooks: How many of the optimizer's hooks before a step are this package's, and have nothing to do here.
    """
    if _is_watched(optimizer, own_hooks):
        step = Optimizer.profile_hook_step(step)
    return step(optimizer, *args, **kwargs)


def _is_watched(optimizer: Optimizer, own_hooks: int) -> bool:
    return bool(
        len(optimizer._optimizer_step_pre_hooks) > own_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or _profiler_enabled()
    )


# ---- modes


class Gradless:
    """What torch.no_grad does, without its price: with cold caches 5 us of a step that takes 12.

    It leaves an inference mode too: state that is made in a step outlives it.
    """

    def __enter__(self) -> None:
        self.inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        if self.inference is not None:
            self.inference.__enter__()
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: Any) -> None:
        torch._C._set_grad_enabled(self.before)
        if self.inference is not None:
            self.inference.__exit__(*error)


def dispatch_mode_is_on() -> bool:
    """Somebody wants to see every operator (FakeTensorMode, allow_mutation_on_saved_tensors, FlopCounterMode): a step
    through addresses would pass by unseen."""
    return torch._C._len_torch_dispatch_stack() > 0


# ---- tensors around tensors


def is_plain(tensor: Tensor) -> bool:
    """A tensor with memory of its own: its class leaves torch's operators as they are."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def waited_for(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that a functional collective still works on, what it is when that is done."""
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(tensor, collectives.AsyncCollectiveTensor):
        return cast(Tensor, tensor.wait())
    return tensor


def is_dtensor(tensor: Tensor) -> bool:
    # Asked so that torch.distributed is not imported where nobody uses it.
    return isinstance(getattr(tensor, "_local_tensor", None), Tensor)


def shard(dtensor: Tensor) -> tuple[Any, ...]:
    """Which part of what a DTensor holds: its placements, how many ranks its mesh has and where this one is among them
    (or the one where it was pickled), and the shape of the whole."""
    placed = cast(Any, dtensor)
    mesh = placed.device_mesh
    return tuple(placed.placements), tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), tuple(placed.shape)


def dtensor_like(owner: Tensor, local: Tensor) -> Tensor:
    """A DTensor placed as another one is, around a local part of its own.

    `DTensor.from_local` brings it to the device of the mesh. Slow weights that are offloaded stay on the host: theirs
    is made as FSDP2 makes those of parameters that it offloads.
    """
    from torch.distributed.tensor import DTensor

    placed = cast(Any, owner)
    if local.device.type == placed.device_mesh.device_type:
        return DTensor.from_local(
            local, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
        )
    meta = placed._spec.tensor_meta
    spec = type(placed._spec)(placed.device_mesh, placed.placements, tensor_meta=meta._replace(dtype=local.dtype))
    return cast(Tensor, cast(Any, DTensor)(local, spec, requires_grad=False))


def version_counter(owner: Tensor) -> tuple[Tensor, ...] | None:
    """A tensor without memory that shares the owner's version counter, first, and what has to be kept beside it.

    torch keeps a tensor's Python object alive as long as C++ refers to it: handing over one that only Python refers to
    takes the interpreter's lock twice, and bumping the owner's own version 90 us for 1000 parameters of 170 that a step
    takes. The first of these is referred to by the second, a view of it, and takes 23. It holds none of the owner's
    memory, which stays its user's to free, and not the owner, which torch.utils.swap_tensors wants for itself.

    Of a DTensor this is a plain tensor: what its class has to say of `detach` is left out.

    None: an inference tensor, which has no version.
    """
    if owner.is_inference():
        return None
    with torch._C._DisableTorchDispatch():
        alias = owner.detach()
    alias.data = torch.empty(0, dtype=alias.dtype, device=alias.device)
    return alias, alias.view_as(alias)


# ---- scalers


def is_fsdp1(param: Tensor) -> bool:
    """A parameter of torch's first FSDP, flat or a view of a flat one: its ShardedGradScaler tells an overflow to the
    other ranks only where it unscales itself."""
    return type(param).__name__ == "FlatParameter" or getattr(param, "_fsdp_flattened", False)


def keeps_its_state_elsewhere(optimizer: Optimizer) -> bool:
    """ZeroRedundancyOptimizer, known by name: torch.distributed.optim is not imported for it."""
    return any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)
