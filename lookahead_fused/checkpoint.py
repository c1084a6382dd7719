"""Loading state dicts exactly: torch's own loading casts every state tensor to the parameter's dtype, and aliases."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .rules import Settings

# torch's switches, which here change nothing and which a torch class would read back as its own.
TORCH_SWITCHES = ("foreach", "fused", "capturable", "differentiable")


def load(
    optimizer: Optimizer,
    torch_load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    settings: Settings,
    exact_names: Container[str] | None = None,
) -> None:
    """Loads by torch's own loading, hooks included, and then puts right what it changes.

    Args:
        optimizer: Where the state goes.
        torch_load: `Optimizer.load_state_dict`, bound to it.
        state_dict: As `Optimizer.state_dict` returns it, this optimizer's or that of the torch class it stands for.
        settings: The names of Lookahead's entries in the groups. Those that the state dict lacks stay as they are,
            and so does the choice of a backend: it belongs to the machine, not to the run.
        exact_names: The state entries that keep the precision they were saved in. None: all of them. The others are
            another optimizer's, and become what its own loading makes of them.
    """
    before = [dict(group) for group in optimizer.param_groups]
    loaded: dict[str, Any] = {}

    def capture(_: Optimizer, given: dict[str, Any]) -> None:
        loaded.update(given)

    def put_right(_: Optimizer) -> None:
        for own, group, given in zip(before, optimizer.param_groups, loaded["param_groups"], strict=True):
            kept = [key for key in own if key not in given and key != "params"]
            for key in (*kept, settings.backend):
                if key in own:
                    group[key] = own[key]
            for key in TORCH_SWITCHES:
                if key not in own:
                    group.pop(key, None)
        _copy_exactly(optimizer, loaded, exact_names)

    # The last to see the state dict, after hooks that return another; and the first after the loading.
    before_load = optimizer.register_load_state_dict_pre_hook(capture)
    after_load = optimizer.register_load_state_dict_post_hook(put_right, prepend=True)
    try:
        torch_load(state_dict)
        if not loaded:
            # An optimizer that loads in its own way, and calls no hooks.
            capture(optimizer, state_dict)
            put_right(optimizer)
    finally:
        before_load.remove()
        after_load.remove()


def _copy_exactly(optimizer: Optimizer, loaded: dict[str, Any], exact_names: Container[str] | None) -> None:
    indices = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    params: Iterable[Tensor] = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(indices, params, strict=True):
        for name, value in loaded["state"].get(index, {}).items():
            own = optimizer.state[param]
            if isinstance(value, Tensor) and (exact_names is None or name in exact_names):
                own[name] = value.detach().to(param.device, copy=True)
            elif isinstance(value, Tensor) and own.get(name) is value:
                own[name] = value.detach().clone()
            elif isinstance(value, str):
                # torch's loading takes it for a sequence, and makes the repr of a generator of it.
                own[name] = value
