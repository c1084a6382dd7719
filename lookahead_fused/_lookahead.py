"""Lookahead(base_optimizer): Lookahead around any optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor
from torch.optim import Optimizer

from . import _policies as policies
from ._norm import GlobalNorm, documents_norm
from ._offload import documents_offload
from ._policies import StateDtype
from ._slow_weights import Interpolating
from ._state_dtype import documents_state_dtype
from ._table import Table
from ._torch import opaque_to_compile
from ._workers import Workers
from ._wrapper import FIRST_MOMENTS, Wrapper

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pullback = Literal["none", "pullback", "reset"]


@documents_norm
@documents_state_dtype
@documents_offload
class Lookahead(Wrapper, Interpolating):
    """Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1) around another optimizer.

    Over torch's Adam, AdamW, SGD, RAdam and RMSprop and over `Lion` a step is fused, on the base's own groups and
    state; its `step` is not called, its hooks are. Over any other optimizer a step is `base.step()` and then one fused
    sync.

    `param_groups`, `state` and `defaults` are the base's, so that it does not matter whether a scheduler, a hook or a
    checkpoint is attached to the base or to this, or when; its other public methods and attributes can be reached here
    too. Lookahead's settings are kept in the groups as `lookahead_k`, `lookahead_alpha`, `lookahead_pullback_momentum`,
    `lookahead_outer_momentum`, `lookahead_outer_nesterov`, `lookahead_master_weights`, `lookahead_state_dtype`,
    `lookahead_backend` and `lookahead_offload_slow`, and may be set there per group; its state beside the base's, as
    `slow_param`, for pullback `cached_momentum`, for outer momentum `outer_momentum_buffer`, for a master `master_low`
    or `master_param`, and over an optimizer that is not fused `lookahead_step`. The base may be stepped alone again at
    any time: it then finds its state in the dtypes that torch keeps it in.

    Args:
        base_optimizer: The optimizer that makes the inner steps.
        k: Inner steps from one sync to the next, an int >= 1.
        alpha: Step size of the slow weights, a float in [0, 1], with outer momentum in [0, 2]; or a tensor of one
            element that holds it, read where it lies in every step.
        pullback_momentum: What becomes of the first moment at a sync: "none" keeps it, "pullback" interpolates it like
            the weights, "reset" zeroes it.
        outer_momentum: Momentum mu of the slow weights, a float in [0, 1): at a sync s = phi - theta, b <- mu b + s,
            phi <- phi - alpha (s + mu b) (SNOO, arXiv 2510.15830; DiLoCo's outer step, arXiv 2311.08105). 0 keeps no
            buffer.
        outer_nesterov: False leaves Nesterov's form: phi <- phi - alpha b.
        master_weights: Keep fp32 masters of bf16 and fp16 parameters, in which the updates accumulate. Of a bf16 one
            the state has `master_low`, the 16 bits that the parameter lacks: it is the master rounded to the nearest,
            ties away from zero. Of an fp16 one it has the whole, `master_param`. Not around an optimizer
            whose step is its own.
        {state_dtype}
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.
        {offload}
        {norm}
        process_group: A torch.distributed group of workers that train apart and meet at the syncs (local SGD; SlowMo,
            arXiv 1910.00643; DiLoCo with outer momentum): the mean of theta over them takes theta's place before a
            sync, which sends 1/k of the bytes of data-parallel training. It is a mean of the weights as they are kept
            (the master where there is one), made in the compute dtype and rounded to theirs. All workers start from the
            same weights and step the same parameters, which are no DTensors; each has its own moments and `step`, in a
            checkpoint of its own. `found_inf`, where a scaler leaves it to the step, and what `skip_nonfinite` skips
            are agreed on; else each worker's scaler skips alone. A sync takes one more copy of the weights in the
            compute dtype, a step waits for the device to tell its count, and none can be captured in a CUDA graph. It
            is the whole optimizer's, not a group's, and neither a state dict nor a copy nor a pickle has it. A worker
            that does not come to a sync is an error of torch.distributed's, after which nothing has changed; where one
            is lost amid the mean, or with a closure over an optimizer that is not fused, the inner step stays, and
            `sync()` makes up for its sync.

    Raises:
        TypeError: `base_optimizer` is not a torch.optim.Optimizer, is a Lookahead already, or keeps its state elsewhere
            (ZeroRedundancyOptimizer, which is to be put around LookaheadAdamW and its kin).
        ValueError: A value is out of bounds, or the base is differentiable.
    """

    # The base keeps its own names in the groups, and RMSprop and ASGD have an alpha.
    policy = policies.Lookahead(prefix="lookahead_")

    def __init__(
        self,
        base_optimizer: Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
        *,
        outer_momentum: float = 0.0,
        outer_nesterov: bool = True,
        master_weights: bool = False,
        state_dtype: StateDtype = "float32",
        backend: str = "auto",
        offload_slow: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._workers = None if process_group is None else Workers(process_group)
        super().__init__(
            base_optimizer,
            GlobalNorm(max_grad_norm, skip_nonfinite),
            k=k,
            alpha=alpha,
            pullback_momentum=pullback_momentum,
            outer_momentum=outer_momentum,
            outer_nesterov=outer_nesterov,
            master_weights=master_weights,
            state_dtype=state_dtype,
            backend=backend,
            offload_slow=offload_slow,
        )

    @opaque_to_compile
    def sync(self) -> None:
        """Interpolates now: every parameter that had a step gets phi <- phi + alpha (theta - phi), theta <- phi.

        With a process group the mean over its workers takes theta's place first, and all of them must call this. Step
        counts stay, so the next sync of the rhythm comes when it would have come.

        Raises:
            RuntimeError: Inside `slow_weights()` or after `eval()`, or a named backend cannot serve.
            ValueError, TypeError: A setting or a state is not acceptable, or pullback_momentum names a moment that the
                base does not keep. Nothing has changed then.
        """
        self._complete_groups()
        if not self._is_fused and any(self.policy.slow in own and self._has_begun(own) for own in self._states()):
            self._find_first_moment()
        super().sync()

    def _find_first_moment(self, made: bool = False) -> None:
        """Which of the base's tensors is the first moment shows once it has made one.

        Args:
            made: The base has stepped, and has made all that it will keep.
        """
        pullback = self.policy.pullback_momentum
        mode = next((group[pullback] for group in self.param_groups if self.policy.acts_on_moment(group)), None)
        if mode is None:
            return
        ours = {*self.policy.entries, self._table.rule.step_name}
        # Where slow weights have begun beside nothing, the base has stepped and keeps nothing.
        states = [
            own for own in self._states() if own.keys() - ours or (self.policy.slow in own and self._has_begun(own))
        ]
        names = {name for own in states for name in FIRST_MOMENTS if isinstance(own.get(name), Tensor)}
        if not names:
            if not states and not made:
                return
            raise ValueError(
                f"{pullback} must be 'none' over {type(self.base_optimizer).__name__}, which keeps "
                f"no first moment under one of the names {', '.join(FIRST_MOMENTS)}, got {mode!r}"
            )
        name = next(name for name in FIRST_MOMENTS if name in names)
        if self._table.rule.moments != (name,):
            self._table = Table(self._external(name), self.policy, self._table.tuning)
