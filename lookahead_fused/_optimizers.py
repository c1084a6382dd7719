"""The public optimizers: torch.optim's, and Lion, with Lookahead fused into the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import _rules as rules
from ._fused import Betas, Fused, FusedLookahead, Pullback, documented
from ._norm import GlobalNorm, documents_norm
from ._policies import Alone, Lookahead, StateDtype
from ._state_dtype import documents_state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@documented
class LookaheadAdam(FusedLookahead):
    """Adam (Kingma and Ba 2015, algorithm 1) with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: Decay rates of the two moments, a pair of floats in [0, 1).
        eps: Added to the denominator, a float >= 0.
        weight_decay: L2 penalty, a float >= 0 or a tensor of one element.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018, algorithm 2).
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Decay as AdamW does."""

    rule = rules.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "k": k,
            "alpha": alpha,
            "pullback_momentum": pullback_momentum,
            "outer_momentum": outer_momentum,
            "outer_nesterov": outer_nesterov,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "backend": backend,
            "offload_slow": offload_slow,
        }
        norm = GlobalNorm(max_grad_norm, skip_nonfinite)
        super().__init__(params, defaults, norm, differentiable, fused, process_group)


@documented
class LookaheadAdamW(LookaheadAdam):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: Decay rates of the two moments, a pair of floats in [0, 1).
        eps: Added to the denominator, a float >= 0.
        weight_decay: Decoupled weight decay, a float >= 0 or a tensor of one element.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018, algorithm 2).
        maximize: Ascend instead of descend."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            k=k,
            alpha=alpha,
            pullback_momentum=pullback_momentum,
            outer_momentum=outer_momentum,
            outer_nesterov=outer_nesterov,
            master_weights=master_weights,
            state_dtype=state_dtype,
            backend=backend,
            offload_slow=offload_slow,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            process_group=process_group,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # As torch's AdamW does: a checkpoint of Adam does not turn this class into Adam.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


@documented
class LookaheadSGD(FusedLookahead):
    """SGD, as torch.optim.SGD defines it, with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        momentum: Decay rate of the momentum buffer, a float >= 0; with 0 there is no buffer.
        dampening: How much of a gradient is kept out of the buffer, a float.
        weight_decay: L2 penalty, a float >= 0 or a tensor of one element.
        nesterov: Nesterov's form; needs momentum and no dampening.
        maximize: Ascend instead of descend."""

    rule = rules.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "k": k,
            "alpha": alpha,
            "pullback_momentum": pullback_momentum,
            "outer_momentum": outer_momentum,
            "outer_nesterov": outer_nesterov,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "backend": backend,
            "offload_slow": offload_slow,
        }
        norm = GlobalNorm(max_grad_norm, skip_nonfinite)
        super().__init__(params, defaults, norm, differentiable, fused, process_group)


@documented
class LookaheadRMSprop(FusedLookahead):
    """RMSprop, as torch.optim.RMSprop defines it, with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        alpha: Decay rate of the squared gradients' average, a float >= 0.
        eps: Added to the denominator, a float >= 0.
        weight_decay: L2 penalty, a float >= 0 or a tensor of one element.
        momentum: Decay rate of the momentum buffer, a float >= 0; with 0 there is no buffer, and pullback_momentum must
            be "none".
        centered: Take the gradients' average off before the root: divide by their standard deviation.
        maximize: Ascend instead of descend."""

    rule = rules.RMSPROP
    policy = Lookahead(alpha_name="lookahead_alpha")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        k: int = 5,
        lookahead_alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
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
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
            "k": k,
            "lookahead_alpha": lookahead_alpha,
            "pullback_momentum": pullback_momentum,
            "outer_momentum": outer_momentum,
            "outer_nesterov": outer_nesterov,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "backend": backend,
            "offload_slow": offload_slow,
        }
        norm = GlobalNorm(max_grad_norm, skip_nonfinite)
        super().__init__(params, defaults, norm, differentiable, fused, process_group)


@documented
class LookaheadRAdam(FusedLookahead):
    """RAdam (Liu et al. 2020, algorithm 2), as torch.optim.RAdam defines it, with Lookahead (Zhang, Lucas, Hinton, Ba
    2019, algorithm 1): the pair that is called Ranger.

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: Decay rates of the two moments, a pair of floats in [0, 1).
        eps: Added to the denominator, a float >= 0.
        weight_decay: L2 penalty, a float >= 0 or a tensor of one element.
        decoupled_weight_decay: Decay as AdamW does.
        maximize: Ascend instead of descend."""

    rule = rules.RADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "k": k,
            "alpha": alpha,
            "pullback_momentum": pullback_momentum,
            "outer_momentum": outer_momentum,
            "outer_nesterov": outer_nesterov,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "backend": backend,
            "offload_slow": offload_slow,
        }
        norm = GlobalNorm(max_grad_norm, skip_nonfinite)
        super().__init__(params, defaults, norm, differentiable, fused, process_group)


@documented
class LookaheadLion(FusedLookahead):
    """Lion (Chen et al. 2023, algorithm 2) with Lookahead (Zhang, Lucas, Hinton, Ba 2019, algorithm 1).

    Its state is `exp_avg`. A NaN in a gradient makes NaN of its weight, as in the paper's code.

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: How much of the momentum goes into an update, and its decay rate: a pair of floats in [0, 1).
        weight_decay: Decoupled weight decay, a float >= 0 or a tensor of one element.
        maximize: Ascend instead of descend."""

    rule = rules.LION

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: Pullback = "none",
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "k": k,
            "alpha": alpha,
            "pullback_momentum": pullback_momentum,
            "outer_momentum": outer_momentum,
            "outer_nesterov": outer_nesterov,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "backend": backend,
            "offload_slow": offload_slow,
        }
        norm = GlobalNorm(max_grad_norm, skip_nonfinite)
        super().__init__(params, defaults, norm, differentiable, fused, process_group)


@documents_norm
@documents_state_dtype
class Lion(Fused):
    """Lion (Chen et al. 2023, algorithm 2), which torch has not: c = beta1 m + (1 - beta1) g, theta <- theta -
    lr (sign(c) + weight_decay theta), m <- beta2 m + (1 - beta2) g.

    Its state is `exp_avg`, in the dtype that `state_dtype` says, `step` in fp64, and for `master_weights`
    `master_low` in int16 or `master_param`. The wrappers fuse their steps with it. A NaN in a gradient
    makes NaN of its weight, as in the paper's code.

    Args:
        params: Tensors, named tensors or parameter groups, as in torch.optim.
        lr: Learning rate, a float >= 0 or a tensor of one element.
        betas: How much of the momentum goes into an update, and its decay rate: a pair of floats in [0, 1).
        weight_decay: Decoupled weight decay, a float >= 0 or a tensor of one element.
        maximize: Ascend instead of descend.
        foreach, capturable: Accepted and without effect: every number that may differ between two replays of a captured
            graph lives on the device.
        fused: False has a GradScaler unscale the gradients before the step, so that they can be clipped in between.
            Else the step unscales them itself. Either way it is fused.
        differentiable: Must be False.
        master_weights: Keep fp32 masters of bf16 and fp16 parameters, in which the updates accumulate. Of a bf16 one
            the state has `master_low`, the 16 bits that the parameter lacks: it is the master rounded to the nearest,
            ties away from zero. Of an fp16 one it has the whole, `master_param`.
        {state_dtype}
        backend: "auto", or a name from `lookahead_fused.backends()`, which then serves or raises.
        {norm}

    Raises:
        ValueError: A value is out of bounds, or `differentiable` is True.
        TypeError: A value is of a wrong type.

    Example:
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> optimizer.step()
    """

    rule = rules.LION
    policy = Alone()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
        state_dtype: StateDtype = "float32",
        backend: str = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
            "backend": backend,
        }
        norm = GlobalNorm(max_grad_norm, skip_nonfinite)
        super().__init__(params, defaults, norm, differentiable, fused)
