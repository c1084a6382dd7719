"""The base's own door to the state that a wrapper shares with it: loading and stepping by the base."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _checkpoint as checkpoint
from . import _masters as masters
from ._fused import Fused
from ._offload import wait_for_hosted
from ._policies import CACHED
from ._state_dtype import without_codes
from ._table import Table


class Wrapper(Protocol):
    """What of a wrapper is needed here."""

    base_optimizer: Optimizer
    _table: Table

    @property
    def _is_fused(self) -> bool: ...
    @property
    def _exact_names(self) -> tuple[str, ...] | None: ...
    def _loaded(self) -> None: ...
    def _restore_mode(self, train_params: list[tuple[Tensor, Tensor]]) -> None: ...
    def _refuse_inside_slow_weights(self, call: str, unless_evaluating: bool = False) -> None: ...


class BaseDoor:
    """Hooks on a wrapper's base, which make what comes by the base as right as what comes by the wrapper.

    `base.load_state_dict()` is as exact as the wrapper's. `base.step()` finds moments of 16-bit parameters in the dtype
    of their parameter, in which torch keeps them: its own kernels refuse the fp32 ones of a fused step.

    Args:
        wrapper: Whose base it is; not held.
    """

    def __init__(self, wrapper: Wrapper) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._loading: checkpoint.Loading | None = None
        self._held = False
        # How many hooks on a step of the base are this door's.
        self.step_hooks = 0
        base = wrapper.base_optimizer
        if not hasattr(base, "_optimizer_load_state_dict_pre_hooks"):
            return
        base.register_state_dict_pre_hook(self._before_save)
        base.register_state_dict_post_hook(self._after_save, prepend=True)
        base.register_load_state_dict_pre_hook(self._before_load)
        base.register_load_state_dict_post_hook(self._after_load, prepend=True)
        if wrapper._is_fused:
            base.register_step_pre_hook(self._before_step)
            self.step_hooks = 1

    def __enter__(self) -> None:
        """The wrapper itself comes by."""
        self._held = True

    def __exit__(self, *error: object) -> None:
        self._held = False

    def _before_save(self, base: Optimizer) -> None:
        wrapper = self._wrapper()
        if wrapper is not None:
            wait_for_hosted(wrapper._table.policy, base.param_groups)

    def _after_save(self, base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        wrapper = self._wrapper()
        if wrapper is None:
            return None
        return checkpoint.saved_without_codes(state_dict, base.param_groups, wrapper._table.rule)

    def _before_load(self, base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        wrapper = self._wrapper()
        if wrapper is None or self._held:
            return None
        wrapper._refuse_inside_slow_weights("load_state_dict()", unless_evaluating=True)
        self._loading = checkpoint.Loading(base, wrapper._table, wrapper._restore_mode, wrapper._exact_names)
        return self._loading.given(state_dict)

    def _after_load(self, base: Optimizer) -> None:
        wrapper, loading = self._wrapper(), self._loading
        if wrapper is None or loading is None or self._held:
            return
        self._loading = None
        loading.put_right()
        wrapper._loaded()

    @torch.no_grad()
    def _before_step(self, base: Optimizer, args: Any, kwargs: Any) -> None:
        """Gives the base's state the dtypes in which torch keeps it, where the base itself is about to step."""
        wrapper = self._wrapper()
        if wrapper is None or self._held:
            return
        for group in base.param_groups:
            for param in group["params"]:
                own = base.state.get(param, {})
                if param.grad is None or not isinstance(own, dict):
                    continue
                # The base steps the parameter: its master begins anew from that.
                for name in masters.NAMES:
                    own.pop(name, None)
                if isinstance(base, Fused):
                    continue
                # The copy of the first moment is the wrapper's.
                wide = without_codes(param, own, wrapper._table.rule, but=(CACHED,))
                for name in own.keys() - wide.keys():
                    del own[name]
                own.update(wide)
                for name, value in own.items():
                    if (
                        name in wrapper._table.policy.entries
                        or not isinstance(value, Tensor)
                        or not value.is_floating_point()
                    ):
                        continue
                    dtype = torch.float32 if name == "step" else param.dtype
                    if value.dtype != dtype:
                        own[name] = value.to(dtype)
