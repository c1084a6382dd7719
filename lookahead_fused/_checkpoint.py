"""Loading state dicts exactly: torch's own loading casts every state tensor to the parameter's dtype, and aliases."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._policies import Policy
from ._tensors import count_device
from ._torch import is_dtensor, is_plain

# torch's switches, which here change nothing and which a torch class would read back as its own.
TORCH_SWITCHES = ("foreach", "fused", "capturable", "differentiable")


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
    policy: Policy,
    exact_names: Container[str] | None = None,
) -> Iterator[None]:
    """Puts right what torch's own loading, in the block, changes.

    Args:
        optimizer: Where the state goes.
        state_dict: What is loaded, this optimizer's or that of the torch class it stands for.
        policy: The names of Lookahead's entries in the groups. Those that the state dict lacks stay as they are, and so
            does the choice of a backend: it belongs to the machine, not to the run.
        exact_names: The state entries that keep the precision they were saved in. None: all of them. The others are
            another optimizer's, and become what its own loading makes of them.
    """
    loading = Loading(optimizer, policy, exact_names)
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

    def __init__(self, optimizer: Optimizer, policy: Policy, exact_names: Container[str] | None) -> None:
        self.optimizer, self.policy, self.exact_names = optimizer, policy, exact_names
        self.before = [dict(group) for group in optimizer.param_groups]
        self.loaded: dict[str, Any] = {}

    def given(self, state_dict: dict[str, Any]) -> None:
        self.loaded = dict(state_dict)

    def put_right(self) -> None:
        for own, group, given in zip(
            self.before, self.optimizer.param_groups, self.loaded["param_groups"], strict=True
        ):
            kept = [key for key in own if key not in given and key != "params"]
            for key in (*kept, self.policy.backend):
                if key in own:
                    group[key] = own[key]
            for key in TORCH_SWITCHES:
                if key not in own:
                    group.pop(key, None)
        # What is loaded while somebody evaluates outlives that.
        with torch.inference_mode(False), torch.no_grad():
            self._copy_exactly()

    def _copy_exactly(self) -> None:
        indices = chain.from_iterable(group["params"] for group in self.loaded["param_groups"])
        params: Iterable[Tensor] = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        for index, param in zip(indices, params, strict=True):
            for name, value in self.loaded["state"].get(index, {}).items():
                own = self.optimizer.state[param]
                if isinstance(value, Tensor) and (self.exact_names is None or name in self.exact_names):
                    # A count of updates is in fp64 on every device, also on one that has none.
                    device = count_device(param.device) if value.dtype == torch.float64 else param.device
                    own[name] = value.detach().to(device, copy=True)
                elif isinstance(value, Tensor) and own.get(name) is value:
                    # A class that another optimizer keeps its state in need not know how to copy itself.
                    if is_plain(value) or is_dtensor(value):
                        own[name] = value.detach().clone()
                elif isinstance(value, str):
                    # torch's loading takes it for a sequence, and makes the repr of a generator of it.
                    own[name] = value
