"""Loading state dicts exactly: torch's own loading casts every state tensor to the parameter's dtype, and aliases."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_whole
from ._offload import hosted, wait_for_hosted
from ._rules import Rule
from ._saved import check_range, dtype_in_memory, in_checkpoint
from ._table import Table
from ._tensors import count_device, local_tensor
from ._torch import is_dtensor, is_plain, shard

# torch's switches, which here change nothing and which a torch class would read back as its own.
TORCH_SWITCHES = ("foreach", "fused", "capturable", "differentiable")

# The training weights of a parameter that held its slow weights when its state was saved. They stand in state dicts
# alone, never in an optimizer's state.
TRAIN = "train_param"

Restore = Callable[[list[tuple[Tensor, Tensor]]], None]


def check_switches(group: Mapping[str, Any]) -> None:
    """Raises for one of torch's switches that asks for what is not to be had."""
    if group.get("differentiable"):
        raise ValueError("differentiable must be False, got True: a fused step cannot be differentiated through")
    fused = group.get("fused")
    if fused not in (None, True, False):
        raise TypeError(f"fused must be True, False or None, got {fused!r} of type {type(fused).__name__}")


@contextmanager
def exactly(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    table: Table,
    restore_mode: Restore,
    exact_names: Container[str] | None = None,
) -> Iterator[None]:
    """Puts right what torch's own loading, in the block, changes.

    Args:
        optimizer: Where the state goes.
        state_dict: What is loaded, this optimizer's or that of the torch class it stands for.
        table: Its policy has the names of entries in the groups. Those that the state dict lacks stay as they are, and
            so do the choices of a backend and of where slow weights lie, which belong to the machine, not to the run,
            and of the moments' dtype, which they are brought into.
        restore_mode: Is told of the parameters that come with training weights, and of these.
        exact_names: The state entries that keep the precision they were saved in. None: all of them. The others are
            another optimizer's, and become what its own loading makes of them.
    """
    loading = Loading(optimizer, table, restore_mode, exact_names)
    hooks = []
    if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        # The last to see the state dict, after hooks that return another; and the first after the loading.
        hooks = [
            optimizer.register_load_state_dict_pre_hook(lambda _, given: loading.given(given)),
            optimizer.register_load_state_dict_post_hook(lambda _: loading.put_right(), prepend=True),
        ]
    try:
        yield
        if not loading.loaded:
            # An optimizer that loads in its own way, and calls no hooks.
            loading.given(state_dict)
            loading.put_right()
    finally:
        for hook in hooks:
            hook.remove()


class Loading:
    """One loading of a state dict into an optimizer: how the groups were before, and what came."""

    def __init__(
        self, optimizer: Optimizer, table: Table, restore_mode: Restore, exact_names: Container[str] | None
    ) -> None:
        self.optimizer, self.exact_names = optimizer, exact_names
        self.rule, self.policy = table.rule, table.policy
        self.restore_mode = restore_mode
        self.before = [dict(group) for group in optimizer.param_groups]
        self.loaded: dict[str, Any] = {}
        # Of the parameters, by what the state dict calls them, the entries that lie on the host.
        self.hosted: dict[Any, tuple[str, ...]] = {}

    def given(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """What torch's own loading is to see in place of a state dict: it brings all of it to the parameters' devices,
        where slow weights that are offloaded may not have room. None: the same."""
        groups = self.optimizer.param_groups
        _check_form(state_dict)
        for index, param in given_by_index(state_dict, groups, strict=False):
            entries = state_dict["state"].get(index)
            if isinstance(entries, Mapping):
                check_whole(entries, self.rule, f"parameter {index!r}")
                _check_shards(entries, param, f"parameter {index!r}")
                check_range(entries, f"parameter {index!r}")
        _check_train_params(state_dict, groups, self.policy.slow)
        self.loaded = dict(state_dict)
        for given, group in zip(state_dict["param_groups"], groups, strict=False):
            for index, param in zip(given["params"], group["params"], strict=False):
                names = hosted(self.policy, group, local_tensor(param).device)
                if names:
                    self.hosted[index] = names
        if not self.hosted:
            return None
        # The state dict may be this optimizer's own.
        wait_for_hosted(self.policy, groups)
        state = {
            index: {name: v for name, v in entries.items() if name not in self.hosted[index]}
            if index in self.hosted and isinstance(entries, Mapping)
            else entries
            for index, entries in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def put_right(self) -> None:
        for own, group, given in zip(
            self.before, self.optimizer.param_groups, self.loaded["param_groups"], strict=True
        ):
            kept = [key for key in own if key not in given and key != "params"]
            chosen = self.policy.backend, self.policy.offload_slow, self.policy.state_dtype
            for key in (*kept, *chosen):
                if key in own:
                    group[key] = own[key]
            for key in TORCH_SWITCHES:
                if key not in own:
                    group.pop(key, None)
        # What is loaded while somebody evaluates outlives that.
        with torch.inference_mode(False), torch.no_grad():
            self.restore_mode(self._copy_exactly())

    def _copy_exactly(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that come with training weights, and these."""
        train_params = []
        for index, param in given_by_index(self.loaded, self.optimizer.param_groups):
            for name, value in self.loaded["state"].get(index, {}).items():
                own = self.optimizer.state[param]
                if name == TRAIN:
                    own.pop(name, None)
                    train_params.append((param, value.detach().to(param.device, copy=True)))
                elif isinstance(value, Tensor) and (self.exact_names is None or name in self.exact_names):
                    # A count of updates is in fp64 on every device, also on one that has none.
                    device = count_device(param.device) if value.dtype == torch.float64 else param.device
                    if name in self.hosted.get(index, ()):
                        # The next step pins it.
                        device = torch.device("cpu")
                    own[name] = value.detach().to(device, dtype_in_memory(name, value.dtype), copy=True)
                elif isinstance(value, Tensor) and own.get(name) is value:
                    # A class that another optimizer keeps its state in need not know how to copy itself.
                    if is_plain(value) or is_dtensor(value):
                        own[name] = value.detach().clone()
                elif isinstance(value, str):
                    # torch's loading takes it for a sequence, and makes the repr of a generator of it.
                    own[name] = value
        return train_params


def saved(state_dict: dict[str, Any], groups: list[dict[str, Any]], rule: Rule | None) -> dict[str, Any]:
    """A state dict as a checkpoint has it; what differs from what lies in memory is in `_saved.py`.

    Args:
        rule: None: of whose state nothing is known any more, and its moments stay as they are.
    """
    # What is saved while somebody evaluates outlives that.
    with torch.inference_mode(False), torch.no_grad():
        state = {
            index: in_checkpoint(param, entries, f"parameter {index!r}", rule)
            for index, param in given_by_index(state_dict, groups, strict=False)
            if isinstance(entries := state_dict["state"].get(index), dict)
        }
    return {**state_dict, "state": {**state_dict["state"], **state}}


def given_by_index(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], strict: bool = True
) -> list[tuple[Any, Tensor]]:
    """What a state dict calls each parameter, and the parameter: they stand in the same order."""
    indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    return list(zip(indices, params, strict=strict))


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no whole state dict of an optimizer."""
    for name, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(name), kind):
            raise ValueError(
                f"state_dict must have a {kind.__name__.lower()} of {name!r}, as an optimizer's state_dict() has, got "
                f"{type(state_dict.get(name)).__name__} among {sorted(map(str, state_dict))}"
            )
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(f"param_groups[{index}] of a state_dict must be a dict with 'params', got {group!r}")


def _check_shards(entries: Mapping[str, Any], param: Tensor, name: str) -> None:
    """Raises ValueError for shards of another rank or of another number of ranks, as files have them that each rank
    wrote for itself: they may have the right shape by chance."""
    if not is_dtensor(param):
        return
    for key, value in entries.items():
        if isinstance(value, Tensor) and is_dtensor(value) and shard(value) != shard(param):
            raise ValueError(
                f"state {key!r} of {name} must be placed as the parameter is, {_told(param)}, got {_told(value)}: "
                "torch.distributed.checkpoint loads what other ranks have saved"
            )


def _told(tensor: Tensor) -> str:
    placements, ranks, coordinate, shape = shard(tensor)
    return f"{placements} of {tuple(shape)} at {coordinate} of {ranks} ranks"


def _check_train_params(state_dict: Mapping[str, Any], groups: list[dict[str, Any]], slow: str) -> None:
    """Raises TypeError or ValueError for training weights that cannot be their parameter's."""
    state = state_dict["state"]
    if not any(isinstance(entries, Mapping) and TRAIN in entries for entries in state.values()):
        return
    # Where there are more of one than of the other, torch is about to raise.
    for index, param in given_by_index(state_dict, groups, strict=False):
        entries = state.get(index)
        if not isinstance(entries, Mapping) or TRAIN not in entries:
            continue
        train, shape = entries[TRAIN], tuple(local_tensor(param).shape)
        if not isinstance(train, Tensor):
            raise TypeError(f"state {TRAIN!r} of parameter {index!r} must be a Tensor, got {type(train).__name__}")
        if tuple(local_tensor(train).shape) != shape:
            raise ValueError(
                f"state {TRAIN!r} of parameter {index!r} must have the parameter's shape {shape}, got "
                f"{tuple(local_tensor(train).shape)}"
            )
        if not isinstance(entries.get(slow), Tensor):
            raise ValueError(
                f"state {TRAIN!r} of parameter {index!r} must stand beside slow weights, which are not there"
            )
