"""Working with the slow weights: evaluate or save on them, and interpolate outside the rhythm of k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .backends import reference
from .step_hooks import with_hooks
from .table import Table
from .tensors import local_tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque_to_compile(function: _Function) -> _Function:
    """A graph break in torch.compile: a step hands addresses to compiled code, and there is nothing to trace.

    torch's own optimizers use this decorator. The public torch.compiler.disable imports the compiler at once, which
    takes seconds.
    """
    return cast(_Function, torch._disable_dynamo(function))  # type: ignore[attr-defined]


class SlowWeights(Optimizer):
    """The part of the public face that all Lookahead optimizers share."""

    _table: Table
    # How many slow_weights() blocks are open, and in the outermost what to undo at its end.
    _depth: int = 0
    _fast: list[tuple[Tensor, Tensor, bool]]
    _saving: RemovableHandle

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Puts the slow weights into the parameters for the length of a ``with`` block.

        Parameters keep their addresses. Where parameter and slow weights have one dtype the two trade places, and no
        memory is used beyond one tensor's; elsewhere the fast weights are set aside. Parameters that had no step yet
        have no slow weights, and stay as they are. Blocks may be nested; an exception restores the fast weights too.
        `state_dict()` inside gives the slow weights as slow weights.

        Raises:
            RuntimeError: from `step()`, `sync()` and `load_state_dict()` inside the block.
        """
        self._depth += 1
        try:
            if self._depth == 1:
                self._fast = []
                # The first to see a state dict, before hooks that copy its tensors, and whoever asks for it.
                self._saving = self._state_keeper.register_state_dict_post_hook(self._on_slow_weights, prepend=True)
                self._swap_in()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._saving.remove()
                self._swap_out()

    @torch.no_grad()
    def sync(self) -> None:
        """Interpolates now: every parameter that had a step gets phi <- phi + alpha (theta - phi), theta <- phi.

        Step counts stay, so the next sync of the rhythm comes when it would have come.

        Raises:
            RuntimeError: inside `slow_weights()`.
        """
        self._refuse_inside_slow_weights("sync()")
        settings = self._table.settings
        for row, group in self._table.rows_with_slow_weights(self.param_groups, self.state):
            reference.sync(row, group[settings.alpha], group[settings.pullback_momentum])
            row.write_back()

    def _patch_step_function(self) -> None:
        # torch's constructor calls this for every optimizer; in a class whose step is marked it wraps nothing.
        cls = type(self)
        if not getattr(cls.step, "hooked", False):
            cls.step = with_hooks(cls.step)  # type: ignore[method-assign]
            cls.step.hooked = True  # type: ignore[attr-defined]
        super()._patch_step_function()

    @property
    def _state_keeper(self) -> Optimizer:
        """The optimizer whose state dict holds the slow weights."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_inside_slow_weights("copying or pickling")
        state: dict[str, Any] = super().__getstate__()
        return state

    def _on_slow_weights(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Inside `slow_weights()` a parameter may hold phi and `slow_param` theta: what is saved is phi."""
        traded = {id(slow): param for param, slow, swapped in self._fast if swapped}
        state = {
            index: {name: _as_saved(value, traded) for name, value in entries.items()}
            for index, entries in state_dict["state"].items()
            if isinstance(entries, dict)
        }
        return {**state_dict, "state": {**state_dict["state"], **state}}

    def _refuse_inside_slow_weights(self, call: str) -> None:
        if self._depth > 0:
            raise RuntimeError(
                f"{call} inside slow_weights(): leave the block first, the parameters hold the slow weights"
            )

    @torch.no_grad()
    def _swap_in(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                slow = self.state[param].get("slow_param") if param in self.state else None
                if slow is None:
                    continue
                theta, phi = local_tensor(param), local_tensor(slow)
                if theta.dtype == phi.dtype:
                    _trade(theta, phi)
                    self._fast.append((param, slow, True))
                else:
                    self._fast.append((param, theta.clone(), False))
                    theta.copy_(phi)

    @torch.no_grad()
    def _swap_out(self) -> None:
        while self._fast:
            param, fast, swapped = self._fast.pop()
            if swapped:
                _trade(local_tensor(param), local_tensor(fast))
            else:
                local_tensor(param).copy_(fast)


def _trade(a: Tensor, b: Tensor) -> None:
    held = a.clone()
    a.copy_(b)
    b.copy_(held)


def _as_saved(value: Any, traded: dict[int, Tensor]) -> Any:
    return traded[id(value)].detach().clone() if id(value) in traded else value
