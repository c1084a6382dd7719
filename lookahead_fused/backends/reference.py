"""The reference backend: plain PyTorch on any device, the algorithm as it is written down.

It is what the other backends are tested against, and what runs where none of them can. Each operation is one torch
operation, in the order in which `csrc/rules` states it, so that on a CPU the results are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..rows import Row
    from ..table import Part

NAME = "reference"
DEVICES = None


def native() -> ModuleType | None:
    return None


def unavailable(device: torch.device | None = None) -> str:
    return ""


def step(part: Part, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Advances the part's parameters by one step, one parameter after the other.

    The step counter and the sync decision are read by the host, so that this backend alone cannot be captured in a
    CUDA graph.
    """
    if part.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'reference' cannot be captured in a CUDA graph: it reads the step counter on the host; "
            "lookahead_fused.backends() tells which backends serve here"
        )
    if found_inf is not None and found_inf.item() != 0:
        return
    scale = 1.0 if grad_scale is None else float(grad_scale)
    for row in part.rows:
        if row.gradient is not None:
            _step_row(row, part, scale)


def _step_row(row: Row, part: Part, grad_scale: float) -> None:
    group, settings = part.groups[row.group], part.settings
    hyper = {f.slot: f.value(group) for f in part.rule.fields}
    first = not row.moments_loaded and row.step.item() == 0
    row.step.add_(1)
    steps = int(row.step.item())

    p = row.param if row.master is None else row.master
    p = p.to(row.compute_dtype, copy=True)
    moments = dict(row.moments)
    if part.rule.reads_gradient:
        assert row.gradient is not None
        if steps == 1:
            row.slow.copy_(p)
        g = row.gradient.to(row.compute_dtype)
        p = RULES[part.rule.name](hyper, steps, first, grad_scale, p, g, moments)
    if steps % group[settings.k] == 0:
        p = _sync(row, group[settings.alpha], group[settings.pullback_momentum], p, moments)
    _write(row, p, moments)


def sync(row: Row, alpha: float, pullback_momentum: str) -> None:
    """Interpolates one parameter now: phi <- phi + alpha (theta - phi), theta <- phi."""
    moments = dict(row.moments)
    p = row.param if row.master is None else row.master
    p = _sync(row, alpha, pullback_momentum, p.to(row.compute_dtype), moments)
    _write(row, p, moments)


def _sync(row: Row, alpha: float, pullback_momentum: str, p: Tensor, moments: dict[str, Tensor]) -> Tensor:
    row.slow.copy_(_lerp(row.slow, p, alpha))
    first = next(iter(moments), None)
    if first is not None and pullback_momentum == "pullback":
        assert row.slow_moment is not None
        dtype = row.compute_dtype
        moments[first] = _lerp(row.slow_moment.to(dtype), moments[first].to(dtype), alpha)
        row.slow_moment.copy_(moments[first])
    if first is not None and pullback_momentum == "reset":
        moments[first] = torch.zeros_like(moments[first])
    return row.slow


def _write(row: Row, p: Tensor, moments: Mapping[str, Tensor]) -> None:
    if row.master is not None:
        row.master.copy_(p)
    row.param.copy_(p)
    for name, moment in moments.items():
        row.moments[name].copy_(moment)


def _lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a + weight * (b - a), exactly a at weight 0 and exactly b at weight 1; see `csrc/rules/numeric.h`."""
    return a + (b - a) * weight if weight < 0.5 else b + (b - a) * -(1.0 - weight)


def _square_root(x: Tensor) -> Tensor:
    """Rounded correctly, as IEEE-754 and every other backend have it.

    torch's CPU kernel is MKL's, and one ulp off for one fp32 number in five. fp64 has digits to spare for an fp32
    root; an fp64 root is left to libm, number by number.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    values: list[float] = x.flatten().tolist()
    roots = [math.sqrt(value) if value >= 0 else math.nan for value in values]
    return torch.tensor(roots, dtype=x.dtype).view(x.shape)


def _power(beta: float, n: int) -> float:
    """beta ** n by squaring, multiplications alone; see `csrc/rules/numeric.h`."""
    result = 1.0
    while n > 0:
        if n & 1:
            result = result * beta
        beta = beta * beta
        n >>= 1
    return result


def _gradient_factor(hyper: Mapping[str, Any], grad_scale: float) -> float:
    return -(1.0 / grad_scale) if hyper["maximize"] else 1.0 / grad_scale


def _adam(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    grad_scale: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019), AMSGrad (Reddi et al. 2018)."""
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    lr, weight_decay = float(hyper["lr"]), hyper["weight_decay"]
    g = g * _gradient_factor(hyper, grad_scale)
    if weight_decay != 0 and hyper["decoupled_weight_decay"]:
        p = p * (1.0 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + p * weight_decay
    m = _lerp(moments["exp_avg"], g, 1.0 - beta1)
    v = moments["exp_avg_sq"] * beta2 + (g * g) * (1.0 - beta2)
    moments["exp_avg"], moments["exp_avg_sq"] = m, v
    if hyper["amsgrad"]:
        v = moments["max_exp_avg_sq"] = torch.maximum(v, moments["max_exp_avg_sq"])
    step_size = lr / (1.0 - _power(beta1, steps))
    inverse_sqrt_correction2 = 1.0 / math.sqrt(1.0 - _power(beta2, steps))
    denominator = _square_root(v) * inverse_sqrt_correction2 + float(hyper["eps"])
    return p - (m * step_size) / denominator


def _sgd(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    grad_scale: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """SGD with momentum, dampening and Nesterov's form, as torch.optim.SGD defines them."""
    lr, momentum = float(hyper["lr"]), hyper["momentum"]
    g = g * _gradient_factor(hyper, grad_scale)
    if hyper["weight_decay"] != 0:
        g = g + p * hyper["weight_decay"]
    if momentum != 0:
        buffer = g if first else moments["momentum_buffer"] * momentum + g * (1.0 - hyper["dampening"])
        moments["momentum_buffer"] = buffer
        g = g + buffer * momentum if hyper["nesterov"] else buffer
    return p - g * lr


RULES = {"adam": _adam, "sgd": _sgd}
