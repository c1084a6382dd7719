"""What `_torch.py` and `csrc/torch` take for granted of torch's insides still holds in this torch.

Where it does not, the package goes on more slowly or refuses; here it is told which assumption broke.
"""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import in_fork, needs_gloo
from torch import Tensor
from torch.autograd.graph import increment_version

from lookahead_fused import LookaheadAdamW, _torch
from lookahead_fused import _build as build

# csrc/torch/torch_shim.h: so many sizes, and strides, lie in an at::TensorImpl itself.
DIMENSIONS = 5
WORDS = 24


def implementation(tensor: Tensor) -> list[int]:
    """The words of the at::TensorImpl behind a tensor."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer(torch._C._tensor_impl_raw_handle(tensor), None)  # type: ignore[attr-defined]
    return list((ctypes.c_uint64 * WORDS).from_address(address))


def place_of(words: list[int], wanted: list[int]) -> int:
    """Where these words stand one after the other, once."""
    found = [i for i in range(len(words)) if words[i : i + len(wanted)] == wanted]
    assert len(found) == 1, f"{wanted} stand {len(found)} times in {words}"
    return found[0]


def test_what_describes_a_tensor_lies_where_it_is_compared() -> None:
    """Dimensions, sizes, strides, offset, number of elements, dtype and device, dispatch keys, one after the other."""
    plain, view = torch.zeros(97, 89), torch.zeros(98, 89)[1:]
    sizes = place_of(implementation(plain), [2, 97, 89]) + 1
    strides = sizes + DIMENSIONS
    offset, numel, kind, keys = (strides + DIMENSIONS + i for i in range(4))
    for tensor, begins in ((plain, 0), (view, 89)):
        words = implementation(tensor)
        assert words[strides : strides + 2] == [89, 1]
        assert words[offset] == begins
        assert words[numel] == 97 * 89
    words = implementation(plain)
    others = {
        "int": torch.zeros(97, 89, dtype=torch.int32),
        "meta": torch.zeros(97, 89, device="meta"),
        "negated": torch._neg_view(torch.zeros(97, 89)),
    }
    dtype, device = 0xFFFF, 0xFF0000
    changed = {name: implementation(other)[kind] ^ words[kind] for name, other in others.items()}
    assert changed["int"] & dtype
    assert not changed["int"] & device
    assert changed["meta"] & device
    assert not changed["meta"] & dtype
    assert not changed["negated"] & (dtype | device)
    assert implementation(others["int"])[keys] == words[keys]
    assert implementation(others["meta"])[keys] != words[keys]
    assert implementation(others["negated"])[keys] != words[keys]
    assert implementation(torch.nn.Parameter(torch.zeros(97, 89)))[keys] == words[keys]


@pytest.mark.skipif(build.module("_cpu") is None, reason=build.reason("_cpu"))
@pytest.mark.skipif(sys.platform != "linux", reason="torch's library is looked for by its name on Linux")
def test_tensors_are_described_by_the_c_abi() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LookaheadAdamW([param], backend="cpu")
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer._table.parts[0].table.way.name == "SHIM"


def test_an_alias_shares_the_version_and_none_of_the_memory() -> None:
    owner = torch.nn.Parameter(torch.ones(1000))
    found = _torch.version_counter(owner)
    assert found is not None
    before = owner._version
    increment_version(found[0])
    assert owner._version == before + 1
    assert all(alias.untyped_storage().nbytes() == 0 for alias in found)
    other = torch.nn.Parameter(torch.zeros(5))
    torch.utils.swap_tensors(owner, other)
    assert owner.numel() == 5


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_a_dtensor_has_its_shard_and_its_placement_in_slots() -> None:
    """csrc/torch/slot.h reads them there; elsewhere it asks by attribute, and Python every gradient."""
    from torch.distributed.tensor import DTensor

    for name in ("_local_tensor", "_spec"):
        assert isinstance(vars(DTensor)[name], types.MemberDescriptorType)
    assert DTensor.__getattribute__ is object.__getattribute__
    assert not hasattr(DTensor, "__getattr__")
    # Else every `.grad` would be a call in Python.
    assert DTensor.__torch_function__ is torch._C._disabled_torch_function_impl  # type: ignore[comparison-overlap]
    assert DTensor.grad is Tensor.grad


@needs_gloo
def test_an_alias_of_a_dtensor_is_plain_and_shares_its_version() -> None:
    found = in_fork(
        """
        import json
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        from torch.autograd.graph import increment_version
        from lookahead_fused import _torch

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        shard = distribute_tensor(torch.ones(1000), init_device_mesh("cpu", (1,)), [Shard(0)])
        found = _torch.version_counter(shard)
        before = shard._version
        increment_version(found[0])
        other = distribute_tensor(torch.ones(5), init_device_mesh("cpu", (1,)), [Shard(0)])
        torch.utils.swap_tensors(shard, other)
        sizes = [alias.untyped_storage().nbytes() for alias in found]
        print(json.dumps([[type(t).__name__ for t in found], other._version - before, sizes, shard.numel()]))
        """
    )
    assert found == [["Tensor", "Tensor"], 1, [0, 0], 5]


@needs_gloo
def test_a_dtensor_may_have_its_part_elsewhere(tmp_path: Path) -> None:
    """Beside a mesh of another device: `from_local` would bring it there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        owner = DTensor.from_local(torch.ones(4, 3, dtype=torch.bfloat16), mesh, [Shard(0)])
        for local in (torch.ones(4, 3), torch.ones(4, 3, device="meta")):
            # It leaves a part on the meta device alone, which stands in for one that it would move.
            moves = (
                {"side_effect": AssertionError("brought to the mesh")}
                if local.is_meta
                else {"wraps": DTensor.from_local}
            )
            with mock.patch.object(DTensor, "from_local", **moves):
                made: Any = _torch.dtensor_like(owner, local)
            assert isinstance(made, DTensor)
            assert made._local_tensor.device == made.device == local.device
            assert (made.shape, made.stride(), made.dtype) == (owner.shape, owner.stride(), torch.float32)
            assert (made.placements, made.device_mesh) == (owner.placements, mesh)
            assert not made.requires_grad
            assert made.detach().clone()._local_tensor.device == local.device
    finally:
        torch.distributed.destroy_process_group()


def test_an_inference_tensor_has_no_version() -> None:
    with torch.inference_mode():
        assert _torch.version_counter(torch.ones(1)) is None


def test_a_dispatch_mode_is_seen() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    assert not _torch.dispatch_mode_is_on()
    with TorchDispatchMode():
        assert _torch.dispatch_mode_is_on()
    assert not _torch.dispatch_mode_is_on()


def test_gradients_and_inference_are_off_inside_and_back_after() -> None:
    for outer in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with outer:
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            with _torch.Gradless():
                assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (False, False)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_a_class_with_operators_of_its_own_is_told_from_one_without() -> None:
    class Named(torch.Tensor):
        pass

    class Around(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    assert _torch.is_plain(torch.ones(1))
    assert _torch.is_plain(torch.nn.Parameter(torch.ones(1)))
    assert _torch.is_plain(torch.ones(1).as_subclass(Named))
    assert not _torch.is_plain(torch.ones(1).as_subclass(Around))


def test_a_profiler_is_seen() -> None:
    from torch._C._autograd import _profiler_enabled

    assert not _profiler_enabled()
    with torch.autograd.profiler.profile():
        assert _profiler_enabled()


def test_a_step_is_opaque_without_the_compiler() -> None:
    calls = []
    opaque = _torch.opaque_to_compile(lambda: calls.append(torch.compiler.is_compiling()))
    opaque()
    assert calls == [False]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_collective_that_is_under_way_can_be_waited_for() -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    assert callable(AsyncCollectiveTensor.wait)
    assert not _torch.is_plain(AsyncCollectiveTensor(torch.ones(3)))
    plain = torch.ones(3)
    assert _torch.waited_for(plain) is plain
