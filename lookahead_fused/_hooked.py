"""What every optimizer here is to torch: its hooks, its lock, what a gradient scaler asks of it, and one step."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._hyperparameters import check_whole
from ._norm import MAX_NORM, SKIP, Clip, GlobalNorm
from ._offload import wait_for_hosted
from ._policies import Policy
from ._table import Table
from ._tensors import local_tensor
from ._torch import is_fsdp1, with_hooks
from ._workers import Turn


class Hooked(Optimizer):
    """An optimizer whose step is a table's."""

    policy: Policy
    _table: Table
    _norm: GlobalNorm

    def _patch_step_function(self) -> None:
        # torch's constructor calls this for every optimizer, and so does unpickling; in a class whose step is marked it
        # wraps nothing.
        cls = type(self)
        if not getattr(cls.step, "hooked", False):
            cls.step = with_hooks(cls.step)  # type: ignore[method-assign]
            cls.step.hooked = True  # type: ignore[attr-defined]
        super()._patch_step_function()
        # Guards a whole step: another thread may evaluate on the slow weights meanwhile.
        self._lock = threading.RLock()

    def _check_group(self, group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        """Raises for what must not stand in a parameter group, besides the values of its settings.

        Args:
            known: The defaults of a base optimizer, which may have an entry of that name for itself.
        """
        check_whole((MAX_NORM, SKIP), group, self.policy.prefix, known)

    def _turn(self, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Clip | None) -> Turn | None:
        """What other workers have to agree on before a step. `clip`: what the norm has come to, where it was taken."""
        return None

    def _advance(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        norm: GlobalNorm | None,
        turn: Turn | None = None,
    ) -> None:
        """The table's step. `turn`: as `_turn` returned it for this step, where it was asked before."""
        self._table.step(self.param_groups, self.state, grad_scale, found_inf, norm)

    @property
    def _asked_norm(self) -> GlobalNorm | None:
        return self._norm if self._norm.is_asked else None

    @property
    def grad_norm(self) -> Tensor:
        """The norm of all gradients, unscaled and not yet clipped, that the last step found, without waiting for it.

        A 0-dim fp64 tensor of its own on the first parameter's device; NaN before the first step, and without
        `max_grad_norm` and `skip_nonfinite`.
        """
        return self._norm.last(self._first_device)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps `skip_nonfinite` has skipped in this process, without waiting for it; in no checkpoint.

        A 0-dim int64 tensor of its own on the first parameter's device.
        """
        return self._norm.skipped(self._first_device)

    @property
    def _first_device(self) -> torch.device:
        params = (param for group in self.param_groups for param in group["params"])
        first = next(params, None)
        return torch.device("cpu") if first is None else local_tensor(first).device

    def _may_unscale(self, fused: bool | None) -> bool:
        """Whether a gradient scaler may leave unscaling to the step: not where its user said fused=False, as of torch's
        own classes, and not where only the scaler tells the other ranks of an overflow."""
        if fused is False:
            return False
        return not any(is_fsdp1(param) for group in self.param_groups for param in group["params"])

    def _wait_for_hosted(self) -> None:
        """Before the host reads slow weights that a kernel may still be writing."""
        wait_for_hosted(self.policy, self.param_groups)

    def _refuse_inside_slow_weights(self, call: str, unless_evaluating: bool = False) -> None:
        """Raises for a call that must not come while the parameters hold the slow weights."""

    def _restore_mode(self, train_params: list[tuple[Tensor, Tensor]]) -> None:
        """A checkpoint was loaded, maybe of an optimizer that evaluated."""
